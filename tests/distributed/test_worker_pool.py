"""Test that the worker pool returns results in order, also when tasks crash, hang or use too much memory."""

import itertools
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mura_dist.core.errors import RunError
from mura_dist.distributed.worker_pool import PoolLimits, TaskFailed, start_pool

QUICK = PoolLimits(processor_s=1.0, wall_s=3.0, memory_bytes=200 << 20)


def worker(notes: Path) -> Callable[[Any], Any]:
    """Return a function that runs a task (kind, number) and notes its process id in a file."""

    def do(task: tuple[str, int]) -> Any:
        kind, number = task
        with open(notes / f"{kind}-{number}", "a") as file:
            file.write(f"{os.getpid()}\n")
        if kind == "crash":
            os.abort()
        elif kind == "once" and len((notes / f"{kind}-{number}").read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "spin":
            while True:
                pass
        elif kind == "wait":
            time.sleep(1000)
        elif kind == "eat":
            try:
                return len(bytearray(400 << 20))
            except MemoryError:
                return "no memory"
        elif kind == "raise":
            raise ValueError(f"task {number}")
        return number

    return do


def work(
    notes: Path, tasks: list[tuple[str, int]], *, workers: int, chunk: int = 3, limits: PoolLimits = QUICK
) -> list[Any]:
    chunks = (tasks[start : start + chunk] for start in range(0, len(tasks), chunk))
    with start_pool(worker, (notes,), workers=workers, limits=limits) as pool:
        return list(pool.results(chunks))


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("num_tasks", [0, 1, 40])
def test_results_are_in_task_order(tmp_path: Path, workers: int, num_tasks: int) -> None:
    assert work(tmp_path, [("do", n) for n in range(num_tasks)], workers=workers) == list(range(num_tasks))
    assert all(len(path.read_text().split()) == 1 for path in tmp_path.iterdir()), "each task once"


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_only_tasks_that_kill_their_worker_fail(tmp_path: Path, workers: int) -> None:
    kinds = {2: "crash", 7: "spin", 8: "crash", 12: "eat", 15: "once"}
    tasks = [(kinds.get(n, "do"), n) for n in range(20)]
    results = work(tmp_path, tasks, workers=workers)
    assert results[2] == results[8] == TaskFailed("crashed")
    assert results[7] == TaskFailed("did not finish within 1 s")
    assert results[12] == "no memory"
    assert results[15] == 15, "a killed task is retried"
    assert [results[n] for n in range(20) if n not in (2, 7, 8, 12)] == [n for n in range(20) if n not in (2, 7, 8, 12)]
    assert len((tmp_path / "crash-2").read_text().split()) == 2, "tried twice, in two processes"
    assert len(set((tmp_path / "crash-2").read_text().split())) == 2


def test_hanging_task_fails_after_its_wall_time_limit(tmp_path: Path) -> None:
    results = work(tmp_path, [("do", 0), ("wait", 1), ("do", 2)], workers=1, limits=PoolLimits(0.5, 1.0, 200 << 20))
    assert results == [0, TaskFailed("did not finish within 0.5 s"), 2]


def test_exception_of_a_task_is_raised_in_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 4"):
        work(tmp_path, [("raise" if n == 4 else "do", n) for n in range(9)], workers=2)


def exiting_worker(notes: Path) -> Callable[[Any], Any]:
    os._exit(7)


def test_worker_that_exits_at_start_raises_run_error(tmp_path: Path) -> None:
    with (
        start_pool(exiting_worker, (tmp_path,), workers=2, limits=QUICK) as pool,
        pytest.raises(RunError, match=r"exit before they are ready \(exit status 7\)"),
    ):
        list(pool.results([[1]]))


def test_workers_prefetch_few_chunks_and_exit_with_the_block(tmp_path: Path) -> None:
    task_numbers = itertools.count()
    chunks = ([("do", next(task_numbers))] for _ in range(1000))
    with start_pool(worker, (tmp_path,), workers=2, limits=QUICK) as pool:
        stream = pool.results(chunks, ahead=4)
        assert next(stream) == 0
        time.sleep(0.5)
        assert next(task_numbers) <= 12, "few tasks ahead"
    pids = {int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()}
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not [thread for thread in threading.enumerate() if thread.name == "supervisor"]


def buffer_worker(notes: Path) -> Callable[[Any], Any]:
    """Return a function that gives a task's number, and that number plus one bytes. It aborts at 5."""

    def do(number: int) -> Any:
        if number == 5:
            os.abort()
        return number, pickle.PickleBuffer(bytes([number]) * (number + 1))

    return do


@pytest.mark.parametrize("chunk_bytes", [0, 30, 2000])
def test_buffers_arrive_by_shared_memory_or_where_they_do_not_fit_by_pipe(tmp_path: Path, chunk_bytes: int) -> None:
    """Chunk 0 to 7 has a task that crashes, so its buffers come from three processes. The memory of chunks is reused."""
    chunks = [range(start, start + 8) for start in range(0, 160, 8)]
    kinds = set()
    with start_pool(buffer_worker, (tmp_path,), workers=2, limits=QUICK, chunk_bytes=chunk_bytes) as pool:
        for number, result in zip(range(160), pool.results(chunks), strict=True):
            if number == 5:
                assert result == TaskFailed("crashed")
                continue
            assert (result[0], bytes(result[1])) == (number, bytes([number]) * (number + 1))
            kinds.add(type(result[1]))
    assert (memoryview in kinds) == (chunk_bytes > 0)
    assert (bytes in kinds) == (chunk_bytes < 2000)


def test_pool_is_reused_for_several_runs(tmp_path: Path) -> None:
    with start_pool(worker, (tmp_path,), workers=2, limits=QUICK) as pool:
        time.sleep(0.3)  # ready, and idle
        for start in (0, 100, 200):
            tasks = [[("do", start + n)] for n in range(20)]
            assert list(pool.results(tasks)) == list(range(start, start + 20))
        assert list(pool.results([])) == []
        assert list(pool.results([[], [("do", 7)], []])) == [7]
    pids = {pid for path in tmp_path.iterdir() for pid in path.read_text().split()}
    assert len(pids) <= 2, "the same processes"
