"""One writer of a folder: a file with host, process and heartbeat. A stale one is reported and taken, a living one waited for.

A lock is stale where its process is known to have ended; on another host, or in another container, where its heart has not
beaten for STALE_S by the clock of the disk it lies on: two machines' clocks differ. A heart seen to beat is alive.
"""

import contextlib
import json
import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mura_dist.core import files
from mura_dist.core.errors import StopRequestedError, UserError
from mura_dist.distributed import processes

HEARTBEAT_S = 10.0
STALE_S = 120.0  # a lock of another host whose heart has not beaten for so long is taken over
DOUBT_S = STALE_S + HEARTBEAT_S  # so long a start waits at least where nobody here can tell whether the writer lives
POLL_S = 0.5  # how often a start that waits looks at the lock


@dataclass(frozen=True)
class Claim:
    """What a start wants to write alone. what, remedy: for its messages; wait_s: how long it waits for the former writer;
    doubt_s: how long at least where nobody here can tell whether that one still lives."""

    what: str
    remedy: str
    wait_s: float
    doubt_s: float = 0.0


@contextlib.contextmanager
def held(path: Path, claim: Claim, stop: threading.Event) -> Iterator[None]:
    """Hold the lock `path` while the block runs. Raises UserError where its writer lives on, StopRequestedError where `stop` is set before."""
    owner = {**_self(), "started": time.time_ns()}
    _take(path, owner, claim, stop)
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
        "born": processes.born(os.getpid()),
    }


def _take(path: Path, owner: dict[str, Any], claim: Claim, stop: threading.Event) -> None:
    """Make the lock ours."""
    begin, waiting, beats = time.monotonic(), False, set[float]()
    while (found := _try(path, owner)) is not None:
        writer, age_s, lives = found.owner, found.age_s, found.lives
        beats.add(found.beat)
        lives = lives or len(beats) > 1
        wait_s = claim.wait_s if lives else max(claim.wait_s, claim.doubt_s)
        left_s = begin + wait_s - time.monotonic()
        if left_s <= 0:
            raise UserError(
                f"{claim.what} is being written by process {writer['process']} on {writer['host']} "
                f"(heartbeat {age_s:.0f} s ago, waited {wait_s:.0f} s); wait for it or stop it, or {claim.remedy}"
            )
        if not waiting:
            _say(
                f"waiting up to {wait_s:.0f} s for process {writer['process']} on host {writer['host']}, "
                f"which writes {claim.what}"
            )
        waiting = True
        if stop.wait(min(POLL_S, left_s)):
            raise StopRequestedError(f"stopped while waiting for the writer of {claim.what}; the same command goes on")


@dataclass(frozen=True)
class _Found:
    """A lock that is not ours: who has it, when its heart last beat and how long ago, and whether it surely lives, or does as far
    as this machine can tell: its process number does."""

    owner: dict[str, Any]
    beat: float
    age_s: float
    lives: bool


def _try(path: Path, owner: dict[str, Any]) -> _Found | None:
    """None: the lock is ours."""
    files.make_folder(path.parent)  # the former writer may have finished, and tidied up
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
    try:
        with files.creating(path) as file:
            file.write(json.dumps(owner).encode())
    except FileExistsError:
        return _owner(path) == owner  # a network disk may have done it and say it again
    except OSError:  # a disk without links
        return _create_in_place(path, owner)
    return True


def _create_in_place(path: Path, owner: dict[str, Any]) -> bool:
    try:
        mode = files.mode_of(path)
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            json.dump(owner, file)
    except FileExistsError:
        return False
    return True


_NOBODY = {"host": "unknown", "process": 0}


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = files.parse_json(path.read_bytes())
        return owner if isinstance(owner.get("host"), str) and isinstance(owner.get("process"), int) else _NOBODY
    except (OSError, ValueError, AttributeError):  # gone, or its writer was killed between creating and writing it
        return _NOBODY


def _judge(path: Path) -> _Found | None:
    """The living owner's; None where there is no lock any more: a stale one is taken away."""
    try:
        owner, found = _owner(path), path.stat()
    except FileNotFoundError:
        return None
    age_s, lives = _now(path.parent) - found.st_mtime, _lives(owner)
    if lives or (lives is None and age_s < STALE_S):
        return _Found(owner, found.st_mtime, age_s, lives is True or not _is_foreign(owner))
    _say(f"taking over a stale lock of process {owner['process']} on {owner['host']}")
    _take_away(path, found.st_ino)
    return None


def _now(folder: Path) -> float:
    """The time by the clock that dates the folder's files: on a shared disk its server's."""
    try:
        with files.scratch(folder / "now") as probe:
            return probe.stat().st_mtime
    except OSError:
        return time.time()


def _lives(owner: dict[str, Any]) -> bool | None:
    """Whether the lock's owner lives; None where only its heartbeat can tell: on another host, or in another container, whose
    process numbers are not ours. Here it lives even if it has not beaten for long: stopped, or its machine was asleep."""
    if _is_foreign(owner):
        return None
    since = processes.born(owner["process"])
    if since is None or owner["process"] == os.getpid():
        return False
    if not since or "born" not in owner:
        return None
    return since == owner["born"]  # else its number is another process's by now


def _is_foreign(owner: dict[str, Any]) -> bool:
    """Whether its process numbers are not ours."""
    ours = _self()
    return any(owner.get(name, ours[name]) != ours[name] for name in ("host", "boot", "numbers"))


def _take_away(path: Path, inode: int) -> None:
    """Remove the lock that was judged, and no other: two starts may have judged the same one."""
    aside = path.with_name(f".lock.{secrets.token_hex(8)}")
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
