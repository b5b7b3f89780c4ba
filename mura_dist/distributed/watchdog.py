"""A limit on waits that cannot be interrupted: when one lasts too long, log a line and end the process.

A read from a failed disk blocks in the kernel, so the waiting thread receives no signal and raises nothing. Without the limit,
the other ranks would only report that this rank is lost.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

_POLL_S = 0.5


class Watchdog:
    """A thread that ends the process when a wait of another thread exceeds a limit.

    Args:
        limit_s: Longest wait in seconds.
        line: Text to print on stderr before the process exits with status 1.
    """

    def __init__(self, limit_s: float, line: str) -> None:
        self._limit_s, self._line = limit_s, line
        self._wait_start: float | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Apply the limit to the block."""
        self._wait_start = time.monotonic()
        try:
            yield
        finally:
            self._wait_start = None

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(_POLL_S, self._limit_s)):
            start = self._wait_start
            if start is not None and time.monotonic() - start > self._limit_s:
                print(self._line, file=sys.stderr, flush=True)  # noqa: T201
                os._exit(1)
