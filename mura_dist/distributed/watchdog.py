"""A wait that lasts too long ends the process, with a line that says for what.

A read from a disk that is gone cannot be interrupted: whoever waits for it hears no signal and raises nothing. The other ranks
would only say that this one is lost.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

_LOOK_S = 0.5


class Overdue:
    """Watches the waits of one thread, from another."""

    def __init__(self, limit_s: float, line: str) -> None:
        self._limit_s, self._line = limit_s, line
        self._since: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="overdue").start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def close(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(_LOOK_S, self._limit_s)):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s:
                print(self._line, file=sys.stderr, flush=True)  # noqa: T201
                os._exit(1)
