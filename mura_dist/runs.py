"""A run is a folder with one writer.

    runs/NAME/recipe.toml        every setting as it runs           status.json     running, stopped, done, failed
              data.json          which shards it learns from        environment.json   versions and machine
              metrics.jsonl, tensorboard/, curves.png   journal.py  checkpoints/    checkpoint.py
              lock               host, process, heartbeat of the one writer

Opening decides: a new run, one to go on with, one that is finished, or another one (Refusal naming the key).
"""

import contextlib
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

from . import __version__, atomic, config
from .config import Settings
from .refusal import Refusal, Stopped
from .shards import Shards

HEARTBEAT_S = 10.0
STALE_S = 120.0  # a lock of another host whose heart has not beaten for so long is taken over
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
        for key, value in self.settings.model_dump().items():
            if key not in config.CHANGEABLE | {"shards", "run"} and before.get(key, value) != value:
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

    def describe(self, shards: Shards, **facts: Any) -> None:
        """Write what this run is, as it starts or goes on."""
        atomic.write_json(self.folder / "data.json", _data(shards))
        atomic.write_json(self.folder / "environment.json", {**environment(), **facts})
        atomic.write_text(self.folder / "recipe.toml", config.to_toml(self.settings))  # last: it makes the folder a run

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock; leave status.json saying how the block ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder / "lock"):
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
    begun = {"lock", "status.json", "data.json", "environment.json"}
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
def _lock(path: Path) -> Iterator[None]:
    """One writer: a file with host, process and heartbeat. A stale one is reported and taken."""
    owner = {"host": platform.node(), "process": os.getpid(), "started": time.time_ns()}
    while not _create(path, owner):
        _take_away(path, _judge(path))
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, ended), daemon=True, name="heartbeat")
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _owner(path) == owner:  # else somebody took it for stale, and it is theirs
            path.unlink(missing_ok=True)


def _create(path: Path, owner: dict[str, Any]) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(owner, file)
    except FileExistsError:
        return False
    return True


def _owner(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # gone, or its writer was killed between creating and writing it
        return {"host": "unknown", "process": 0}


def _judge(path: Path) -> int | None:
    """The inode of a stale lock, None where it is gone by now; Refusal where its owner lives."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    owner, age_s = _owner(path), time.time() - found.st_mtime
    here = owner["host"] == platform.node()
    gone = here and (owner["process"] == os.getpid() or not _is_alive(owner["process"]))
    if not gone and age_s < STALE_S:
        raise Refusal(
            f"run={path.parent} is being written by process {owner['process']} on {owner['host']} "
            f"(heartbeat {age_s:.0f} s ago); wait for it or stop it, or give run=NEW"
        )
    print(f"taking over a stale lock of process {owner['process']} on {owner['host']}", file=sys.stderr)  # noqa: T201
    return found.st_ino


def _take_away(path: Path, inode: int | None) -> None:
    """Remove the lock that was judged, and no other: two starts may have judged the same one."""
    aside = path.with_name(f".lock.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, aside)
        if aside.stat().st_ino != inode:
            os.replace(aside, path)
        aside.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix" or process <= 0:
        return process > 0  # where we cannot ask, the heartbeat must go stale first
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(path)
