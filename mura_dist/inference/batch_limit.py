"""A time limit for one batch: a model may come from anywhere, and a loop in it may have no end.

    watched(stop) -> the engine computes -> in time, or `stop` is called: the engine returns with an error, which becomes RunError
                                         -> it does not return even then: the process ends, with the same line

A runtime's own threads cannot be interrupted from Python: without the last resort a process could not be left.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mura_dist.core.errors import RunError

LIMIT_S = 600.0  # of a batch: some 100 times what the slowest machine we know takes
GRACE_S = 10.0  # what an engine gets to return after it was stopped
_LOOK_S = 0.5


class BatchLimit:
    """Watches the batches under way of an engine, from a thread of its own. `name` is what messages call the model."""

    def __init__(self, limit_s: float, name: str) -> None:
        self.limit_s = limit_s
        self.line = (
            f"{name}: a batch took more than {limit_s:g} s; give a smaller --batch-size or a longer --batch-limit, or export the "
            "model again"
        )
        self._under_way: dict[object, tuple[float, Callable[[], None]]] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watched(self, stop: Callable[[], None]) -> Iterator[None]:
        """For the block that computes one batch; several threads may be in one at once.

        Raises:
            RunError: where it took longer than the limit, and `stop` made the engine return.
        """
        self._start()
        token, late = object(), threading.Event()

        def stop_late() -> None:
            late.set()
            stop()

        with self._lock:
            self._under_way[token] = time.monotonic(), stop_late
        try:
            yield
        except Exception as error:
            if late.is_set():
                raise RunError(self.line) from error
            raise
        finally:
            with self._lock:
                del self._under_way[token]
        if late.is_set():
            raise RunError(self.line)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="batch-limit")
                self._thread.start()

    def _watch(self) -> None:
        stopped: set[object] = set()
        while True:
            time.sleep(min(_LOOK_S, self.limit_s))
            with self._lock:
                under_way = dict(self._under_way)
            stopped &= under_way.keys()
            for token, (since, stop) in under_way.items():
                late_s = time.monotonic() - since - self.limit_s
                if late_s > GRACE_S:
                    print(f"mura-dist: {self.line}", file=sys.stderr, flush=True)  # noqa: T201
                    os._exit(1)
                if late_s > 0 and token not in stopped:
                    stopped.add(token)
                    stop()
