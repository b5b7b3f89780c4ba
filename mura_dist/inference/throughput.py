"""Find what limits a prediction: decoding the files or computing the logits. Wall-clock time alone, of one command on one rank.

BusyTime: seconds in which batches were computed       Reading.seconds: what a process spent on a file
    -> Throughput -> files and radiographs per second of each, how long each waited for the other, which one limits
"""

import threading
import time
from dataclasses import dataclass
from typing import Any


class BusyTime:
    """Seconds of wall-clock time in which at least one thread was inside the `with` block."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._num_inside, self._since, self._lock = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._since = time.perf_counter()
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self.seconds += time.perf_counter() - self._since


@dataclass
class Throughput:
    """Sums over a command. `reading_s` is of all processes together, the other seconds are wall-clock time."""

    num_processes: int = 1
    num_files: int = 0
    num_radiographs: int = 0
    reading_s: float = 0.0
    computing_s: float = 0.0
    elapsed_s: float = 0.0

    def summary(self) -> dict[str, Any] | None:
        """Return standard JSON values, or None where nothing was computed.

        Each rate is what one side would reach if it never waited; as measured here, beside the other on the same processors.
        The side that waited less is the limit. A file that crashed or stalled its process counts as no time.
        """
        decoding_s = self.reading_s / self.num_processes  # a process's, on average
        if not self.num_radiographs or not decoding_s or not self.computing_s:
            return None
        return {
            "limited_by": "decoding" if decoding_s > self.computing_s else "computing",
            "decoding": {
                "files_per_s": round(self.num_files / decoding_s, 3),
                "waiting_s": round(max(0.0, self.elapsed_s - decoding_s), 3),
                "num_processes": self.num_processes,
            },
            "computing": {
                "radiographs_per_s": round(self.num_radiographs / self.computing_s, 3),
                "waiting_s": round(max(0.0, self.elapsed_s - self.computing_s), 3),
            },
        }
