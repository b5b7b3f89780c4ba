"""Coordination of ranks that share only a folder: one process per rank, and which ranks are alive.

    rank 0       holds `lock`, publishes the plan, does its share, then the shares of ranks whose heartbeat expired
    other ranks  hold `rank-N`, wait for the plan, do their share

These files are locks (lock.py), so a share has one process. A start waits for the previous holder of its share: ranks whose
launcher was killed need a while to notice and to exit.

A heartbeat is a change of the file's modification time, timed by the observer's clock. Clocks of two machines differ.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mura_dist.core import files
from mura_dist.distributed import lock, processes
from mura_dist.distributed.lock import LockOptions

LOCK_WAIT_S = processes.GRACE_S + 5.0  # how long a start waits for the previous holder of its share
HEARTBEAT_TIMEOUT_S = 60.0  # a rank without a heartbeat for this long counts as dead


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Return the lock of `rank`, which it touches while it runs."""
    return folder / (f"rank-{rank}" if rank else "lock")


@contextlib.contextmanager
def join_folder(folder: Path, rank: int, options: LockOptions, stop: threading.Event) -> Iterator[None]:
    """Hold the lock of `rank` in `folder` while the block runs, see lock.acquire.

    Folders that this call creates and that are empty at its end are removed: a refused start leaves no trace.
    """
    created = [folder, *(parent for parent in folder.parents if not parent.exists())]
    files.make_folder(folder)
    try:
        with lock.acquire(heartbeat_path(folder, rank), options, stop):
            yield
    finally:
        for path in created:
            with contextlib.suppress(OSError):  # not empty, or removed by another rank
                path.rmdir()


def clear_folder(folder: Path) -> None:
    """Delete all files in `folder` except the lock of rank 0 and the files of a start that waits for it."""
    lock_path = heartbeat_path(folder, 0)
    for path in folder.iterdir():
        if path != lock_path and not path.name.startswith(f".{lock_path.name}"):
            with contextlib.suppress(OSError):
                path.unlink()


class HeartbeatMonitor:
    """Time since the last heartbeat of each file, by this process's clock."""

    def __init__(self) -> None:
        self._last_beats: dict[Path, tuple[int, float]] = {}  # modification time, when it was first observed

    def seconds_since_beat(self, path: Path) -> float:
        """Return the seconds since the last observed heartbeat of `path`, or since the first call for it."""
        try:
            beat = path.stat().st_mtime_ns
        except OSError:
            beat = 0
        last = self._last_beats.get(path)
        if last is None or (beat and last[0] != beat):
            self._last_beats[path] = last = beat, time.monotonic()
        return time.monotonic() - last[1]
