"""The bottleneck of a prediction: decoding files or computing logits. Wall-clock times of one command on one rank.

BusyTime: seconds in which batches were computed       ReadResult.seconds: time of a process for a file
    -> Throughput -> files and radiographs per second, waiting time of each side, the limiting side
"""

import threading
import time
from dataclasses import dataclass
from typing import Any


class BusyTime:
    """Wall-clock time in which at least one thread was inside the `with` block.

    Attributes:
        seconds: The sum so far.
    """

    def __init__(self) -> None:
        """Start at 0 seconds."""
        self.seconds = 0.0
        self._num_inside, self._start, self._lock = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if not self._num_inside:
                self._start = time.perf_counter()
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if not self._num_inside:
                self.seconds += time.perf_counter() - self._start


@dataclass
class Throughput:
    """Sums over one command. `reading_s` adds up all processes, the other times are wall-clock times."""

    num_processes: int = 1
    num_files: int = 0
    num_radiographs: int = 0
    reading_s: float = 0.0
    computing_s: float = 0.0
    elapsed_s: float = 0.0

    def summary(self) -> dict[str, Any] | None:
        """Return the throughput as JSON values, or None if nothing was computed.

        A rate is what one side would reach without waiting, with the other side on the same processors. The side that waited
        less is the limit. A file that crashed or stalled its process counts as no time.
        """
        decoding_s = self.reading_s / self.num_processes  # average of a process
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
