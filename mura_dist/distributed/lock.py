"""A lock that allows one writer of a folder: a file with host, process and heartbeat.

A start waits for a live holder, and reports and replaces a stale lock. A lock is stale if its process is known to have ended.
On another host or in another container that is unknown: there it is stale if its heartbeat is older than STALE_S, by the clock
of the disk that holds it (clocks of two machines differ). A holder whose heartbeat advances is alive.
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
STALE_S = 120.0  # age of the last heartbeat after which the lock of another host is taken over
UNVERIFIED_WAIT_S = STALE_S + HEARTBEAT_S  # shortest wait where this machine cannot tell whether the holder is alive
POLL_S = 0.5  # time between two looks at a lock that is held


@dataclass(frozen=True)
class LockOptions:
    """Messages and waiting times of a lock.

    Attributes:
        target: What is locked, for messages.
        remedy: What to do instead of waiting, for messages.
        wait_s: Seconds to wait for a live holder.
        unverified_wait_s: Least seconds to wait where this machine cannot tell whether the holder is alive.
    """

    target: str
    remedy: str
    wait_s: float
    unverified_wait_s: float = 0.0


@contextlib.contextmanager
def acquire(path: Path, options: LockOptions, stop: threading.Event) -> Iterator[None]:
    """Hold the lock `path` while the block runs.

    Raises:
        UserError: the holder stays alive beyond the waiting time.
        StopRequestedError: `stop` was set during the wait.
    """
    owner = {**_this_process(), "started": time.time_ns()}
    _wait_and_take(path, owner, options, stop)
    released = threading.Event()
    heartbeat = threading.Thread(target=_send_heartbeats, args=(path, owner, released), daemon=True, name="heartbeat")
    heartbeat.start()
    try:
        yield
    finally:
        released.set()
        heartbeat.join()
        if _read_owner(path) == owner:  # else another process took the lock as stale, and owns it now
            path.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    """Return what identifies this process: host, boot (hosts may share names), number, its namespace, start time."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": platform.node(),
        "boot": boot.read_text(encoding="ascii").strip() if boot.exists() else "",
        "process": os.getpid(),
        "numbers": os.readlink("/proc/self/ns/pid") if os.path.lexists("/proc/self/ns/pid") else "",
        "born": processes.process_start_time(os.getpid()),
    }


def _wait_and_take(path: Path, owner: dict[str, Any], options: LockOptions, stop: threading.Event) -> None:
    """Wait for the holder, then take the lock. Raises as `acquire`."""
    start, is_reported, beats = time.monotonic(), False, set[float]()
    while (holder := _try_take(path, owner)) is not None:
        beats.add(holder.beat)
        is_alive = holder.is_alive or len(beats) > 1
        wait_s = options.wait_s if is_alive else max(options.wait_s, options.unverified_wait_s)
        remaining_s = start + wait_s - time.monotonic()
        process = f"process {holder.owner['process']} on {holder.owner['host']}"
        if remaining_s <= 0:
            raise UserError(
                f"{options.target} is being written by {process} (heartbeat {holder.age_s:.0f} s ago, waited {wait_s:.0f} s). "
                f"Wait for it or stop it, or {options.remedy}."
            )
        if not is_reported:
            _log(f"waiting up to {wait_s:.0f} s for {process}, which writes {options.target}")
        is_reported = True
        if stop.wait(min(POLL_S, remaining_s)):
            raise StopRequestedError(
                f"stopped while waiting for the writer of {options.target}. The same command resumes."
            )


@dataclass(frozen=True)
class _Holder:
    """Another process that holds the lock.

    Attributes:
        owner: The lock's content.
        beat: Modification time of the lock.
        age_s: Seconds since then.
        is_alive: Whether this machine can tell that the process exists.
    """

    owner: dict[str, Any]
    beat: float
    age_s: float
    is_alive: bool


def _try_take(path: Path, owner: dict[str, Any]) -> _Holder | None:
    """Take the lock and return None, or return its holder."""
    files.make_folder(path.parent)  # the previous writer may have finished and removed it
    with _machine_lock(path.parent):
        while not _create(path, owner):
            if (holder := _live_holder(path)) is not None:
                return holder
    return None


@contextlib.contextmanager
def _machine_lock(folder: Path) -> Iterator[None]:
    """Allow one process of this machine at a time, so that two starts do not both replace the same stale lock."""
    if os.name != "posix":  # Windows cannot open folders; there `_remove` compares the inode, as between machines
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


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def _create(path: Path, owner: dict[str, Any]) -> bool:
    """Create the lock with its content, and return whether this process holds it."""
    try:
        with files.creating(path) as file:
            file.write(json.dumps(owner).encode())
    except FileExistsError:
        return _read_owner(path) == owner  # a network disk may have created it and still report this
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


_UNKNOWN_OWNER = {"host": "unknown", "process": 0}


def _read_owner(path: Path) -> dict[str, Any]:
    try:
        owner = files.parse_json(path.read_bytes())
        is_valid = isinstance(owner.get("host"), str) and isinstance(owner.get("process"), int)
        return owner if is_valid else _UNKNOWN_OWNER
    except (OSError, ValueError, AttributeError):  # removed, or its writer was killed before it wrote the content
        return _UNKNOWN_OWNER


def _live_holder(path: Path) -> _Holder | None:
    """Return the holder if it is alive; else remove the lock and return None."""
    try:
        owner, status = _read_owner(path), path.stat()
    except FileNotFoundError:
        return None
    age_s, is_alive = _disk_time(path.parent) - status.st_mtime, _is_alive(owner)
    if is_alive or (is_alive is None and age_s < STALE_S):
        return _Holder(owner, status.st_mtime, age_s, is_alive is True or not _is_foreign(owner))
    _log(f"taking over a stale lock of process {owner['process']} on {owner['host']}")
    _remove(path, status.st_ino)
    return None


def _disk_time(folder: Path) -> float:
    """Return the time by the clock that dates the files of `folder`: on a shared disk the server's."""
    try:
        with files.scratch(folder / "now") as probe:
            return probe.stat().st_mtime
    except OSError:
        return time.time()


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Return whether the owner exists, or None where only its heartbeat can tell: on another host or in another container.

    A process of this machine may be alive without a heartbeat: stopped, or after the machine was suspended.
    """
    if _is_foreign(owner):
        return None
    start_time = processes.process_start_time(owner["process"])
    if start_time is None or owner["process"] == os.getpid():
        return False
    if not start_time or "born" not in owner:
        return None
    return start_time == owner["born"]  # else another process has its number now


def _is_foreign(owner: dict[str, Any]) -> bool:
    """Return whether the owner's process number belongs to another host or another container."""
    own = _this_process()
    return any(owner.get(name, own[name]) != own[name] for name in ("host", "boot", "numbers"))


def _remove(path: Path, inode: int) -> None:
    """Remove the lock if it is still the file `inode`: another start may have replaced it."""
    renamed = path.with_name(f".lock.{secrets.token_hex(8)}")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, renamed)
        if renamed.stat().st_ino != inode:
            os.replace(renamed, path)
        renamed.unlink(missing_ok=True)


def _send_heartbeats(path: Path, owner: dict[str, Any], released: threading.Event) -> None:
    """Touch the lock until `released`. End the process if another one took the lock: there must not be two writers."""
    while not released.wait(HEARTBEAT_S):
        holder = _read_owner(path)
        if holder != owner and holder["host"] != _UNKNOWN_OWNER["host"]:
            _log(f"process {holder['process']} on {holder['host']} has taken over {path.parent}. This process exits.")
            os._exit(1)
        with contextlib.suppress(OSError):
            os.utime(path)
