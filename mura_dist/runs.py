"""A run is a folder with one writer.

    runs/NAME/recipe.toml        every setting as it runs           status.json     running, stopped, done, failed
              data.json          which shards it learns from        environment.json   versions and machine
              metrics.jsonl, tensorboard/, curves.png   journal.py  checkpoints/    checkpoint.py
              lock               host, process, heartbeat of the one writer; a second one waits for it, then is refused

Opening decides: a new run, one to go on with, one that is finished, or another one (Refusal naming the key).
"""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, atomic, config, workers
from .config import Settings
from .refusal import Refusal, Stopped
from .shards import Shards

HEARTBEAT_S = 10.0
STALE_S = 120.0  # a lock of another host whose heart has not beaten for so long is taken over
POLL_S = 0.5  # how often a start that waits looks at the lock
_PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "nvidia-dali-cuda130",
    "numpy",
    "onnxruntime-gpu",
    "opencv-python-headless",
)


@dataclass(frozen=True)
class Run:
    """A run's folder and the settings it runs with."""

    folder: Path
    settings: Settings

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """An existing run, to evaluate or export. Refusal where `folder` is none."""
        path = folder / "recipe.toml"
        if not path.is_file():
            raise Refusal(f"{folder} is not a run (no recipe.toml); give the folder that run= named")
        return cls(folder, config.load(path))

    def begun_with(self, key: str, otherwise: Any) -> Any:
        """A setting as the run's recipe has it; `otherwise` where it has not begun."""
        path = self.folder / "recipe.toml"
        return tomllib.loads(path.read_text(encoding="utf-8")).get(key, otherwise) if path.is_file() else otherwise

    def data(self) -> dict[str, Any]:
        """data.json's content: which shards the run learns from."""
        return json.loads((self.folder / "data.json").read_bytes())

    def status(self) -> dict[str, Any]:
        """status.json's content; empty where there is none yet."""
        try:
            return json.loads((self.folder / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}

    def write_status(self, state: str, **facts: Any) -> None:
        atomic.write_json(self.folder / "status.json", {"state": state, "time": time.strftime("%FT%T%z"), **facts})

    def check(self, shards: Shards) -> None:
        """Refusal where the folder holds another run: other shards, or a setting that may not change."""
        if not (self.folder / "recipe.toml").is_file():
            if self.folder.exists() and not _is_ours(self.folder):
                raise Refusal(f"run={self.folder} exists and is no run; give run=NEW")
            return
        before = tomllib.loads((self.folder / "recipe.toml").read_text(encoding="utf-8"))
        free = config.CHANGEABLE | {"shards", "run", "deepspeed"}  # others look at these
        free |= {"micro_batch"} if self.settings.micro_batch == config.AUTO else set()
        for key, value in self.settings.model_dump().items():
            if key not in free and before.get(key, value) != value:
                raise Refusal(
                    f"run={self.folder} was started with {key}={before[key]!r}, now it says {key}={value!r}; "
                    "set it back, or give run=NEW for another run"
                )
        data = self.data()
        for key, value in _data(shards).items():
            if data[key] != value:
                raise Refusal(
                    f"run={self.folder} learns from shards with {key}={data[key]}, {shards.folder} has {key}={value}; "
                    "give those shards, or run=NEW"
                )

    def check_deepspeed(self, theirs: dict[str, Any]) -> None:
        """Refusal where what a user's DeepSpeed file adds is not what it was."""
        path = self.folder / "deepspeed.json"
        before = json.loads(path.read_bytes()) if path.is_file() else {}
        if not (self.folder / "recipe.toml").is_file() or before == theirs:
            return
        key = next(key for key in sorted(before.keys() | theirs.keys()) if before.get(key) != theirs.get(key))
        raise Refusal(
            f"run={self.folder} was started with {key} = {json.dumps(before.get(key))} of a DeepSpeed file, deepspeed="
            f"{self.settings.deepspeed} says {json.dumps(theirs.get(key))}; set it back, or give run=NEW for another run"
        )

    def describe(self, shards: Shards, deepspeed: dict[str, Any], **facts: Any) -> None:
        """Write what this run is, as it starts or goes on; `deepspeed`: what a user's DeepSpeed file adds."""
        if deepspeed:
            atomic.write_json(self.folder / "deepspeed.json", deepspeed)
        atomic.write_json(self.folder / "data.json", _data(shards))
        atomic.write_json(self.folder / "environment.json", {**environment(), **facts})
        atomic.write_text(self.folder / "recipe.toml", config.to_toml(self.settings))  # last: it makes the folder a run

    def _make(self) -> None:
        """Refusal where there can be no such folder, or nothing can be written into it."""
        why = "read-only, or another user's"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if os.access(self.folder, os.W_OK | os.X_OK):
                return
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            why = error.strerror or str(error)
        raise Refusal(f"run={self.folder} cannot be written ({why}); make it so, or give run= on a disk that can be")

    @contextlib.contextmanager
    def writing(self, stop: threading.Event | None = None) -> Iterator[None]:
        """Hold the lock; leave status.json saying how the block ended.

        Where another writer lives, wait up to `wait_s` for it to end; then Refusal. `stop`, when set, ends the wait: Stopped.
        """
        self._make()
        with _lock(self.folder / "lock", self.settings.wait_s, stop or threading.Event()):
            try:
                yield
            except Refusal:  # nothing was done: what the folder says stays true
                raise
            except (Stopped, KeyboardInterrupt) as stopped:
                self.write_status("stopped", reason=str(stopped) or "interrupted; the same command goes on")
                raise
            except BaseException as error:
                with contextlib.suppress(OSError):  # the disk may be what failed
                    self.write_status("failed", reason=f"{type(error).__name__}: {error}")
                raise


def _is_ours(folder: Path) -> bool:
    """An empty folder, or a run killed before its recipe was written."""
    begun = {"lock", "status.json", "data.json", "environment.json", "deepspeed.json"}
    return folder.is_dir() and all(path.name in begun or path.name.startswith(".") for path in folder.iterdir())


def _data(shards: Shards) -> dict[str, Any]:
    index = shards.index
    return {
        "manifest_sha256": index["manifest"]["sha256"],
        "size": index["size"],
        "encoding": index["encoding"],
        "holds": index["holds"],
        "splits": {name: part["num_radiographs"] for name, part in index["splits"].items()},
        "study_types": sorted(shards.manifest.frame.loc[shards.rows("train"), "study_type"].unique().tolist()),
    }


def environment() -> dict[str, Any]:
    """Versions and machine, for a claim to be checked against."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "mura_dist": __version__,
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "num_processors": os.cpu_count(),
    }


@contextlib.contextmanager
def _lock(path: Path, wait_s: float, stop: threading.Event) -> Iterator[None]:
    """One writer: a file with host, process and heartbeat. A stale one is reported and taken, a living one waited for."""
    owner = {**_self(), "started": time.time_ns()}
    _take(path, owner, wait_s, stop)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, owner, ended), daemon=True, name="heartbeat")
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _owner(path) == owner:  # else somebody took it for stale, and it is theirs
            path.unlink(missing_ok=True)


def _self() -> dict[str, Any]:
    """This process among all: host and boot (hosts share names, after a boot numbers begin anew), process, when it was born."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": platform.node(),
        "boot": boot.read_text(encoding="ascii").strip() if boot.exists() else "",
        "process": os.getpid(),
        "numbers": os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else "",
        "born": workers.born(os.getpid()),
    }


def _take(path: Path, owner: dict[str, Any], wait_s: float, stop: threading.Event) -> None:
    """Make the lock ours. Raises Refusal where its writer still lives after `wait_s`, Stopped where `stop` is set before."""
    end, waiting = time.monotonic() + wait_s, False
    while (found := _try(path, owner)) is not None:
        (writer, age_s), left_s = found, end - time.monotonic()
        if left_s <= 0:
            raise Refusal(
                f"run={path.parent} is being written by process {writer['process']} on {writer['host']} "
                f"(heartbeat {age_s:.0f} s ago, waited {wait_s:.0f} s); wait for it or stop it, or give run=NEW"
            )
        if not waiting:
            _say(
                f"waiting up to {wait_s:.0f} s for process {writer['process']} on host {writer['host']}, "
                f"which writes run={path.parent}"
            )
        waiting = True
        if stop.wait(min(POLL_S, left_s)):
            raise Stopped(f"stopped while waiting for the writer of run={path.parent}; the same command goes on")


def _try(path: Path, owner: dict[str, Any]) -> tuple[dict[str, Any], float] | None:
    """None: the lock is ours. Else who has it, and seconds since its last heartbeat."""
    with _alone(path.parent):
        while not _create(path, owner):
            if (found := _judge(path)) is not None:
                return found
    return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine at a time: of two that find the same lock stale, the second is not to take the first one's."""
    if os.name != "posix":  # cannot open folders; there `_take_away` knows the lock by its inode, as between machines
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):  # a disk without flock
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Whether the lock is ours now. It appears with its content: a kill in between leaves no lock that nobody owns."""
    aside = path.with_name(f".lock.{owner['host']}.{owner['process']}")
    aside.write_text(json.dumps(owner), encoding="utf-8")
    try:
        os.link(aside, path)
    except FileExistsError:
        return _owner(path) == owner  # a network disk may have done it and say it again
    except OSError:  # a disk without links
        return _create_in_place(path, owner)
    finally:
        aside.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, owner: dict[str, Any]) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(owner, file)
    except FileExistsError:
        return False
    return True


_NOBODY = {"host": "unknown", "process": 0}


def _owner(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # gone, or its writer was killed between creating and writing it
        return _NOBODY


def _judge(path: Path) -> tuple[dict[str, Any], float] | None:
    """(the living owner, seconds since its last heartbeat); None where there is no lock any more: a stale one is taken away."""
    try:
        owner, found = _owner(path), path.stat()
    except FileNotFoundError:
        return None
    age_s, lives = time.time() - found.st_mtime, _lives(owner)
    if lives or (lives is None and age_s < STALE_S):
        return owner, age_s
    _say(f"taking over a stale lock of process {owner['process']} on {owner['host']}")
    _take_away(path, found.st_ino)
    return None


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the lock's owner lives; None where only its heartbeat can tell: on another host, or in another container, whose
    process numbers are not ours. Here it lives even if it has not beaten for long: stopped, or its machine was asleep."""
    ours = _self()
    if any(owner.get(name, ours[name]) != ours[name] for name in ("host", "boot", "numbers")):
        return None
    since = workers.born(owner["process"])
    if since is None or owner["process"] == ours["process"]:
        return False
    if not since or "born" not in owner:
        return None
    return since == owner["born"]  # else its number is another process's by now


def _take_away(path: Path, inode: int) -> None:
    """Remove the lock that was judged, and no other: two starts may have judged the same one."""
    aside = path.with_name(f".lock.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
        if aside.stat().st_ino != inode:
            os.replace(aside, path)
        aside.unlink(missing_ok=True)


def _beat(path: Path, owner: dict[str, Any], ended: threading.Event) -> None:
    """A writer that finds the lock another's, who took it for dead, ends at once: there are to be no two."""
    while not ended.wait(HEARTBEAT_S):
        now = _owner(path)
        if now != owner and now["host"] != _NOBODY["host"]:
            _say(f"process {now['process']} on {now['host']} has taken over {path.parent}; this one ends")
            os._exit(1)
        with contextlib.suppress(OSError):
            os.utime(path)
