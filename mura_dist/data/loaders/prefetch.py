"""Work ahead of the one that consumes the results, in order, with a bound on what lies ready.

in_order: tasks of a pool's threads        in_background: an iterator, run by one thread of its own
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
    """Yield the results of `tasks` in their order; of those, up to `ahead` are taken (and so submitted) early."""
    pending: deque[Future[T]] = deque()
    for task in tasks:
        pending.append(task)
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prefetch_in_thread(source: Generator[T, None, None], *, ahead: int) -> Generator[T, None, None]:
    """Yield what `source` yields. A thread runs it, up to `ahead` items early; the caller's thread runs none of its code.

    An error of `source` is raised here, after the items before it. Closing this generator closes `source`, in its thread,
    when its current item is done, and waits for that.
    """
    results: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    room, is_closing = threading.Semaphore(ahead), threading.Event()

    def run() -> None:
        end: BaseException | None = None
        try:
            with contextlib.closing(source):
                while room.acquire() and not is_closing.is_set():
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
            room.release()
        if result is not None:
            raise result
    finally:
        is_closing.set()
        room.release()
        thread.join()
