"""prefetch.py: order, bound, errors and end of what works ahead of its consumer."""

import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mura_dist.data.loaders.prefetch import prefetch_in_thread, prefetch_ordered


def test_tasks_come_in_order_and_no_more_are_submitted_than_may_lie_ready() -> None:
    submitted: list[int] = []
    with ThreadPoolExecutor(3) as pool:

        def tasks():
            for number in range(10):
                submitted.append(number)
                yield pool.submit(pow, number, 2)

        results = prefetch_ordered(tasks(), ahead=4)
        assert next(results) == 0
        assert submitted == [0, 1, 2, 3, 4]
        assert list(results) == [number**2 for number in range(1, 10)]


class Source:
    """Counts, in which thread, up to where; fails at `fails_at`; knows when it was closed, and where."""

    def __init__(self, fails_at: int = 99) -> None:
        self.fails_at, self.threads, self.count = fails_at, set[int](), 0
        self.closed_in: int | None = None
        self.reached = threading.Semaphore(0)

    def items(self) -> Generator[int, None, None]:
        try:
            for number in range(7):
                self.threads.add(threading.get_ident())
                if number == self.fails_at:
                    raise ConnectionError("the disk is gone")
                self.count = number + 1
                self.reached.release()
                yield number
        finally:
            self.closed_in = threading.get_ident()


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "load-background"]


def test_a_background_source_runs_in_its_own_thread_no_further_ahead_than_the_bound() -> None:
    source = Source()
    stream = prefetch_in_thread(source.items(), ahead=2)
    assert next(stream) == 0
    for _ in range(2):
        assert source.reached.acquire(timeout=10)
    assert not source.reached.acquire(timeout=0.2), "a third is not begun before the first is done with"
    assert list(stream) == [1, 2, 3, 4, 5, 6]
    assert threading.get_ident() not in source.threads
    assert source.closed_in in source.threads
    assert background_threads() == []


def test_an_error_of_a_background_source_is_raised_after_the_items_before_it() -> None:
    source, items = Source(fails_at=3), []
    with pytest.raises(ConnectionError, match="the disk is gone"):  # noqa: PT012
        for item in prefetch_in_thread(source.items(), ahead=2):
            items.append(item)  # noqa: PERF402
    assert items == [0, 1, 2]
    assert background_threads() == []


def test_leaving_early_closes_the_source_in_its_thread_and_ends_it() -> None:
    source = Source()
    stream = prefetch_in_thread(source.items(), ahead=2)
    next(stream)
    stream.close()
    assert source.count < 7
    assert source.closed_in in source.threads
    assert source.closed_in != threading.get_ident()
    assert background_threads() == []
