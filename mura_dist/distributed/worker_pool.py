"""Tasks in worker processes with limits: a task that crashes, stalls or exhausts memory fails alone.

    tasks, in chunks -> worker processes, each with limits -> results in the order of the tasks, computed a few chunks ahead

A chunk goes to a worker as one message, and so do its results. Each worker counts its finished tasks in shared memory, so the
task at which it died is known. That task runs once more, alone, in a new process: a worker may be killed from outside (by an
operator, or by the kernel when memory is short). If it fails again, its result is `TaskFailed`. The time limit counts processor
time, so a busy machine gives the same results as an idle one. A wall-clock limit, ten times longer, ends tasks that wait forever.

With `chunk_bytes`, the buffers of results (PickleBuffer) stay in the shared memory and are not copied through a pipe.
"""

import contextlib
import multiprocessing
import os
import pickle
import selectors
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.heap import Arena
from multiprocessing.process import BaseProcess
from typing import Any

from mura_dist.core.errors import RunError
from mura_dist.distributed.processes import end_with_parent
from mura_dist.distributed.spawn import CONTEXT

Prepare = Callable[..., Callable[[Any], Any]]
"""Called once in each worker with the pool's arguments. Returns the function that does one task."""

_POLL_S = 0.5  # longest time between two checks of the limits
_AHEAD = 4  # chunks per worker to compute ahead of the consumer
_NUM_DONE, _START_S, _START_PROCESSOR_S = range(3)  # a worker's progress in the shared memory: three doubles
_PROGRESS_BYTES = 24

_Packed = tuple[bytes, list[tuple[int, int]]]
"""A pickled result, and (start, stop) in the shared memory of each of its buffers."""


@dataclass(frozen=True)
class PoolLimits:
    """Limits of one task.

    Attributes:
        processor_s: Processor time of its process, in seconds.
        wall_s: Wall-clock time in seconds.
        memory_bytes: Memory above that of an idle worker.
    """

    processor_s: float = 60.0
    wall_s: float = 600.0
    memory_bytes: int = 2 << 30


DEFAULT_LIMITS = PoolLimits()


@dataclass(frozen=True)
class TaskFailed:
    """Result of a task that ended its worker twice. `reason` is a predicate, such as "crashed"."""

    reason: str


@dataclass
class _Chunk:
    tasks: Sequence[Any]
    memory: tuple[int, int]  # (start, stop) in the shared memory for its buffers
    start: int  # of the part that holds no buffer yet
    results: list[Any] = field(default_factory=list)
    suspect: int | None = None  # number of a task that has ended a worker: it runs alone, once more

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.tasks)

    def next_tasks(self) -> Sequence[Any]:
        """Return the tasks of the next message: those before the suspect, then the suspect alone, then the others."""
        first = len(self.results)
        return self.tasks[first:] if self.suspect is None else self.tasks[first : max(self.suspect, first + 1)]

    def add(self, results: list[Any]) -> None:
        self.results += results
        if self.suspect is not None and len(self.results) > self.suspect:
            self.suspect = None


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    progress: "memoryview[float]"  # see _NUM_DONE
    ready: bool = False
    chunk: _Chunk | None = None


@contextlib.contextmanager
def start_pool(
    prepare: Prepare,
    arguments: tuple[Any, ...],
    *,
    workers: int,
    max_workers: int = 0,
    limits: PoolLimits = DEFAULT_LIMITS,
    chunk_bytes: int = 0,
) -> Iterator["WorkerPool"]:
    """Start worker processes, which exit with the block. Everything that is sent to them must pickle.

    Args:
        prepare: Called as `prepare(*arguments)` in each worker; returns the function that does one task.
        arguments: Arguments of `prepare`.
        workers: Number of processes.
        max_workers: Number of processes to which `WorkerPool.grow` may increase it.
        limits: Limits of each task.
        chunk_bytes: Bytes of shared memory for the buffers of a chunk's results. Buffers in it are valid until the consumer asks
            for the result after the chunk's last one. Buffers that do not fit are pickled.
    """
    supervisor = _Supervisor(prepare, arguments, workers, max(workers, max_workers), limits, chunk_bytes)
    supervisor.start()
    try:
        yield WorkerPool(supervisor)
    finally:
        supervisor.stop()


@dataclass(frozen=True)
class WorkerPool:
    """Worker processes that do tasks; see start_pool."""

    _supervisor: "_Supervisor"

    @property
    def workers(self) -> int:
        """Number of processes."""
        return self._supervisor.num_workers

    def grow(self, workers: int) -> None:
        """Start processes until there are `workers`, at most `max_workers` of start_pool."""
        self._supervisor.grow(workers)

    def results(self, chunks: Iterable[Sequence[Any]], *, ahead: int = _AHEAD, min_ahead: int = 0) -> Iterator[Any]:
        """Yield the result of each task, or TaskFailed, in order. Exhaust the iterator before the next call.

        Args:
            chunks: Tasks; a chunk is sent to a worker at once.
            ahead: Number of chunks per worker to compute ahead of the consumer.
            min_ahead: Least number of chunks of all workers together to compute ahead.

        Raises:
            Exception: that of a task.
            RunError: workers cannot be started.
        """
        self._supervisor.feed((chunk for chunk in chunks if chunk), ahead, min_ahead)
        while (chunk := self._supervisor.next_chunk()) is not None:
            for result in chunk.results:
                if isinstance(result, BaseException):
                    raise result
                yield result
            self._supervisor.release(chunk)


class _Supervisor(threading.Thread):
    """Thread that sends chunks, receives results and enforces limits, so that workers never wait for the consumer."""

    def __init__(
        self,
        prepare: Prepare,
        arguments: tuple[Any, ...],
        num_workers: int,
        max_workers: int,
        limits: PoolLimits,
        chunk_bytes: int,
    ) -> None:
        super().__init__(daemon=True, name="supervisor")
        progress_bytes, num_chunks = _PROGRESS_BYTES * max_workers, _AHEAD * max_workers + 1  # one is being consumed
        starts = [progress_bytes + number * chunk_bytes for number in range(num_chunks if chunk_bytes else 0)]
        self.free_memory = [(start, start + chunk_bytes) for start in starts]
        self.arena = _create_arena(progress_bytes + num_chunks * chunk_bytes)
        self.prepare, self.limits, self.num_workers = (prepare, arguments), limits, num_workers
        self.max_workers = max_workers
        self.chunks: Iterator[Sequence[Any]] = iter(())
        self.exhausted, self.ahead, self.min_ahead = True, 0, 0
        self.changed = threading.Condition()
        self.pending: deque[_Chunk] = deque()  # sent, not yet consumed
        self.retries: deque[_Chunk] = deque()  # partly done, to be sent again
        self.workers: list[_Worker] = []
        self.error: BaseException | None = None
        self.poll_s = min(_POLL_S, limits.processor_s / 4, limits.wall_s / 4)
        self.stopping = False
        self.failed_starts = 0  # consecutive workers that exited before they were ready
        self.wakeup_receiver, self.wakeup = multiprocessing.Pipe(duplex=False)
        self.selector = selectors.DefaultSelector()  # one for all: `connection.wait` would create one per message
        self.selector.register(self.wakeup_receiver, selectors.EVENT_READ)

    # ---- called by the consumer

    def grow(self, num_workers: int) -> None:
        self.num_workers = min(self.max_workers, max(self.num_workers, num_workers))
        self._wake()

    def feed(self, chunks: Iterator[Sequence[Any]], ahead: int, min_ahead: int) -> None:
        with self.changed:
            assert self.exhausted, "one stream of tasks at a time"
            assert not self.pending
            self.chunks, self.ahead, self.min_ahead, self.exhausted = chunks, ahead, min_ahead, False
        self._wake()

    def next_chunk(self) -> _Chunk | None:
        """Return the next chunk with all its results, or None at the end."""
        with self.changed:
            while True:
                if self.error is not None:
                    raise self.error
                if self.pending and self.pending[0].done:
                    chunk = self.pending.popleft()
                    self._wake()
                    return chunk
                if self.exhausted and not self.pending:
                    return None
                self.changed.wait(1.0)  # with a limit, so that Ctrl-C works on every system

    def release(self, chunk: _Chunk) -> None:
        """Let another chunk use the memory of a consumed one."""
        if chunk.memory != _NO_MEMORY:
            self.free_memory.append(chunk.memory)

    def stop(self) -> None:
        self.stopping = True
        self._wake()
        self.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended
            self.wakeup.send_bytes(b"!")

    # ---- in the supervisor's thread

    def run(self) -> None:
        try:
            while not self.stopping:
                while len(self.workers) < self.num_workers:
                    self.workers.append(self._start_worker(len(self.workers)))
                self._send_chunks()
                self._receive()
                self._enforce_limits()
        except BaseException as error:
            with self.changed:
                self.error = error
                self.changed.notify_all()
        finally:
            for worker in self.workers:
                _kill(worker)
            self.selector.close()

    def _start_worker(self, number: int) -> _Worker:
        pipe, worker_pipe = CONTEXT.Pipe()
        arguments = (worker_pipe, self.arena, number, self.limits.memory_bytes, *self.prepare)
        process = CONTEXT.Process(target=_run_worker, args=arguments, daemon=True)
        process.start()
        worker_pipe.close()
        worker = _Worker(process, pipe, _progress(self.arena, number))
        self.selector.register(pipe, selectors.EVENT_READ, worker)
        return worker

    def _send_chunks(self) -> None:
        for worker in list(self.workers):
            if worker.ready and worker.chunk is None and (chunk := self._next_to_send()) is not None:
                worker.chunk = chunk
                worker.progress[_NUM_DONE], worker.progress[_START_S] = 0, time.monotonic()
                try:
                    worker.pipe.send((chunk.next_tasks(), chunk.start, chunk.memory[1]))
                except OSError:
                    self._replace(worker, "crashed")

    def _next_to_send(self) -> _Chunk | None:
        if self.retries:
            return self.retries.popleft()
        if self.exhausted or len(self.pending) >= max(self.ahead * self.num_workers, self.min_ahead):
            return None
        tasks = next(self.chunks, None)
        with self.changed:
            if tasks is None:
                self.exhausted = True
                self.changed.notify_all()
                return None
            memory = self.free_memory.pop() if self.free_memory else _NO_MEMORY
            chunk = _Chunk(tasks, memory, memory[0])
            self.pending.append(chunk)
            return chunk

    def _receive(self) -> None:
        """Receive what has arrived, or wait up to `poll_s` for it."""
        for key, _ in self.selector.select(self.poll_s):
            if key.data is None:
                self.wakeup_receiver.recv_bytes()
            else:
                self._receive_from(key.data)

    def _receive_from(self, worker: _Worker) -> None:
        try:
            results: list[_Packed] = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, "crashed")
            return
        if not worker.ready:
            worker.ready, self.failed_starts = True, 0
            return
        chunk, worker.chunk = worker.chunk, None
        assert chunk is not None
        memory = memoryview(self.arena.buffer)
        chunk.start = max([chunk.start, *(stop for _, extents in results for _, stop in extents)])
        self._add_results(
            chunk,
            [pickle.loads(data, buffers=[memory[slice(*extent)] for extent in extents]) for data, extents in results],
        )

    def _add_results(self, chunk: _Chunk, results: list[Any]) -> None:
        """Record results of a chunk. If tasks remain, they are sent next."""
        with self.changed:
            chunk.add(results)
            if chunk.done:
                self.changed.notify_all()
            else:
                self.retries.appendleft(chunk)

    def _enforce_limits(self) -> None:
        for worker in list(self.workers):
            if worker.chunk is None:
                continue
            wall_s = time.monotonic() - worker.progress[_START_S]
            if wall_s < min(self.limits.processor_s, self.limits.wall_s):
                continue
            total_s = _processor_seconds(worker.process.pid)
            processor_s = wall_s if total_s is None else total_s - worker.progress[_START_PROCESSOR_S]
            if processor_s >= self.limits.processor_s or wall_s >= self.limits.wall_s:
                self._replace(worker, f"did not finish within {self.limits.processor_s:g} s")

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Kill a worker and start another. The task that it was doing is retried, or fails."""
        self.selector.unregister(worker.pipe)
        _kill(worker)
        self.failed_starts += not worker.ready
        if self.failed_starts > self.num_workers + 2:
            raise RunError(
                f"worker processes exit before they are ready (exit status {worker.process.exitcode}), perhaps for lack of "
                "memory. Use fewer --workers."
            )
        number = self.workers.index(worker)
        num_done = int(worker.progress[_NUM_DONE])
        self.workers[number] = self._start_worker(number)
        chunk = worker.chunk
        if chunk is None:
            return
        first, num_sent = len(chunk.results), len(chunk.next_tasks())
        if chunk.suspect == first:
            self._add_results(chunk, [TaskFailed(reason)])
        else:
            chunk.suspect = first + min(num_done, num_sent - 1)
            self.retries.appendleft(chunk)


_NO_MEMORY = (0, 0)


def _create_arena(num_bytes: int) -> Arena:
    """Return memory that can be sent to a worker when it starts. On Linux it does not depend on the size of /dev/shm."""
    if not hasattr(os, "memfd_create"):
        return Arena(num_bytes)
    descriptor = os.memfd_create("mura-dist")
    os.ftruncate(descriptor, num_bytes)
    arena = Arena(num_bytes, descriptor)
    weakref.finalize(arena, os.close, descriptor)
    return arena


def _progress(arena: Arena, number: int) -> "memoryview[float]":
    start = _PROGRESS_BYTES * number
    return memoryview(arena.buffer)[start : start + _PROGRESS_BYTES].cast("d")


def _kill(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _processor_seconds(process: int | None) -> float | None:
    """Return the processor time of a process in seconds, or None where unknown: not Linux, or it has exited."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run_worker(
    pipe: Connection, arena: Arena, number: int, memory_bytes: int, prepare: Prepare, arguments: tuple[Any, ...]
) -> None:
    """Do tasks from `pipe` until it closes. The main function of a worker process."""
    end_with_parent()
    do = prepare(*arguments)
    memory, progress = memoryview(arena.buffer), _progress(arena, number)
    _limit_memory(memory_bytes)
    try:
        pipe.send([])
        while True:
            tasks, start, stop = pipe.recv()
            results: list[_Packed] = []
            for task in tasks:
                progress[_START_PROCESSOR_S], progress[_START_S] = time.process_time(), time.monotonic()
                try:
                    result = do(task)
                except Exception as error:
                    result = error
                results.append(_pack(result, memory[:stop], start))
                start = max([start, *(end for _, end in results[-1][1])])
                progress[_NUM_DONE] = len(results)
            pipe.send(results)
    except (EOFError, OSError):  # the supervisor has closed the pipe
        return


def _pack(result: Any, memory: memoryview, start: int) -> _Packed:
    """Pickle a result. Its buffers are copied into `memory` from `start` on, as far as they fit."""
    extents: list[tuple[int, int]] = []

    def is_pickled(buffer: pickle.PickleBuffer) -> bool:
        nonlocal start
        content = buffer.raw()
        stop = start + content.nbytes
        if stop > len(memory):
            return True
        memory[start:stop] = content
        extents.append((start, stop))
        start = stop
        return False

    return pickle.dumps(result, protocol=5, buffer_callback=is_pickled), extents


def _limit_memory(memory_bytes: int) -> None:
    """Allow this process `memory_bytes` more than it uses now. Beyond it Python raises MemoryError; a library may crash.

    Linux only: other systems have no such limit, or count something else.
    """
    try:
        import resource

        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            used_bytes = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    except (ImportError, OSError, StopIteration):
        return
    resource.setrlimit(resource.RLIMIT_DATA, (used_bytes + memory_bytes, resource.RLIM_INFINITY))
    # No core dumps: they would write a patient's pixels to the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
