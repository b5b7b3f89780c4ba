"""Compute results ahead of their consumer, in order, with a bound on the results in memory.

prefetch_ordered: tasks of a thread pool        prefetch_in_thread: a generator, run by one thread
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def prefetch_ordered(tasks: Iterable[Future[T]], *, ahead: int) -> Iterator[T]:
    """Yield the results of `tasks` in order. Up to `ahead` tasks are taken, and hence submitted, early."""
    pending: deque[Future[T]] = deque()
    for task in tasks:
        pending.append(task)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prefetch_in_thread(source: Generator[T, None, None], *, ahead: int) -> Generator[T, None, None]:
    """Yield the items of `source`, which a thread runs up to `ahead` items early.

    An error of `source` is raised after the items before it. Closing this generator closes `source` in its thread after the
    current item, and waits for that.
    """
    results: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    slots, is_closing = threading.Semaphore(ahead), threading.Event()

    def run() -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(source):
                while slots.acquire() and not is_closing.is_set():
                    results.put((next(source),))
        except StopIteration:
            pass
        except BaseException as error:
            end = error
        results.put(end)

    thread = threading.Thread(target=run, daemon=True, name="load-background")
    thread.start()
    try:
        while isinstance(result := results.get(), tuple):
            yield result[0]
            slots.release()
        if result is not None:
            raise result
    finally:
        is_closing.set()
        slots.release()
        thread.join()
