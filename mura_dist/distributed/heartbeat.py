"""Ranks that share a folder and talk through it alone: who leads, who lives, what is whose.

    the first rank   holds `lock`, says what is to be done, makes its share, then what ranks that fell silent left undone
    another rank     touches `rank-N` while it lives, waits for the first one's word, makes its share

A heart is listened to by our own clock: it beats if the file's time has changed since we looked. Two machines' clocks differ.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mura_dist.distributed import lock
from mura_dist.distributed.lock import Claim

BEAT_S = 5.0
SILENCE_S = 60.0  # a rank whose heart has not beaten for so long makes nothing any more


def heart(folder: Path, rank: int) -> Path:
    """The file that is touched while `rank` lives."""
    return folder / (f"rank-{rank}" if rank else "lock")


@contextlib.contextmanager
def taking_part(folder: Path, rank: int, claim: Claim, stop: threading.Event) -> Iterator[None]:
    """Live in `folder` while the block runs, the first rank as its only writer: see lock.held.

    What had to be made for it, and holds nothing in the end, is taken away again: a refused start leaves no trace.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock.held(heart(folder, rank), claim, stop) if rank == 0 else _beating(heart(folder, rank)):
            yield
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # not empty, or another rank was faster
                each.rmdir()


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    path.touch()
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, ended), daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with contextlib.suppress(OSError):  # the first rank has ended and cleaned up
            os.utime(path)


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
