"""Ranks that share a folder and talk through it alone: who leads, who lives, what is whose.

    the first rank   holds `lock`, says what is to be done, makes its share, then what ranks that fell silent left undone
    another rank     holds `rank-N`, waits for the first one's word, makes its share

Both are locks (lock.py), so that one process has one share. A start waits a while for the former holder: ranks whose launcher was
killed notice that, and leave in good order.

A heart is listened to by our own clock: it beats if the file's time has changed since we looked. Two machines' clocks differ.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mura_dist.core import files
from mura_dist.distributed import lock, processes
from mura_dist.distributed.lock import Claim

WAIT_S = processes.ORDERLY_S + 5.0  # how long a start waits for the former holder of its share
SILENCE_S = 60.0  # a rank whose heart has not beaten for so long makes nothing any more


def heart(folder: Path, rank: int) -> Path:
    """Return the lock of `rank`, which is touched while it lives."""
    return folder / (f"rank-{rank}" if rank else "lock")


@contextlib.contextmanager
def taking_part(folder: Path, rank: int, claim: Claim, stop: threading.Event) -> Iterator[None]:
    """Live in `folder` while the block runs, as the only process of this rank: see lock.held.

    What had to be made for it, and holds nothing in the end, is taken away again: a refused start leaves no trace.
    """
    made = [folder, *(each for each in folder.parents if not each.exists())]
    files.make_folder(folder)
    try:
        with lock.held(heart(folder, rank), claim, stop):
            yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty, or another rank was faster
                each.rmdir()


def tidy(folder: Path) -> None:
    """Delete what `folder` holds but the first rank's lock, which it still has, and that of a start that waits for it."""
    for path in folder.iterdir():
        if path != heart(folder, 0) and not path.name.startswith(f".{heart(folder, 0).name}"):
            with contextlib.suppress(OSError):
                path.unlink()


class Ears:
    """Listens to hearts."""

    def __init__(self) -> None:
        self._heard: dict[Path, tuple[int, float]] = {}

    def silent_s(self, path: Path) -> float:
        """Seconds since this heart was first listened to, or last heard to beat."""
        try:
            beat = path.stat().st_mtime_ns
        except OSError:
            beat = 0
        known = self._heard.get(path)
        if known is None or (beat and known[0] != beat):
            self._heard[path] = known = beat, time.monotonic()
        return time.monotonic() - known[1]
