"""A time limit for one batch: a model may come from anywhere, and a loop in its graph may be endless.

    watched(stop) -> the engine computes -> in time, or `stop` is called and the engine returns with an error: RunError
                                         -> the engine does not return even then: the process exits with the same line

Python cannot interrupt a runtime's own threads. Exiting is the last resort.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mura_dist.core.errors import RunError

LIMIT_S = 600.0  # of a batch: about 100 times what the slowest machine that we measured needs
GRACE_S = 10.0  # for an engine to return after `stop`
_POLL_S = 0.5


class BatchLimit:
    """A thread that watches the batches of an engine."""

    def __init__(self, limit_s: float, name: str) -> None:
        """Set the limit in seconds. `name` is the model's name in messages."""
        self.limit_s = limit_s
        self.message = (
            f"{name}: a batch took more than {limit_s:g} s. Give a smaller --batch-size or a longer --batch-limit, or export the "
            "model again."
        )
        self._active: dict[object, tuple[float, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watched(self, stop: Callable[[], None]) -> Iterator[None]:
        """Limit the time of the block, which computes one batch. Several threads may be in one at once.

        Args:
            stop: Makes the engine return. It is called in another thread.

        Raises:
            RunError: the block exceeded the limit, and the engine returned.
        """
        self._start()
        token, is_late = object(), threading.Event()

        def stop_late() -> None:
            is_late.set()
            stop()

        with self._lock:
            self._active[token] = time.monotonic(), stop_late
        try:
            yield
        except Exception as error:
            if is_late.is_set():
                raise RunError(self.message) from error
            raise
        finally:
            with self._lock:
                del self._active[token]
        if is_late.is_set():
            raise RunError(self.message)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="batch-limit")
                self._thread.start()

    def _watch(self) -> None:
        stopped: set[object] = set()
        while True:
            time.sleep(min(_POLL_S, self.limit_s))
            with self._lock:
                active = dict(self._active)
            stopped &= active.keys()
            for token, (start, stop) in active.items():
                late_s = time.monotonic() - start - self.limit_s
                if late_s > GRACE_S:
                    print(f"mura-dist: {self.message}", file=sys.stderr, flush=True)  # noqa: T201
                    os._exit(1)
                if late_s > 0 and token not in stopped:
                    stopped.add(token)
                    stop()
