"""Work in processes under guard: a task that crashes, stalls or eats memory is one lost task, never the end of the work.

    tasks, in chunks -> worker processes, each under limits -> results in the order of the tasks, decoded ahead, never far ahead

A chunk goes to a worker as one message and comes back task by task, so that the one a worker died of is known. Such a task is
tried once more, alone, in a fresh process: whoever killed the first (an operator, the kernel short of memory) leaves no trace in
the results. A second time, the result is `Lost`. Time is the worker's processor time, so that a crowded machine judges as an idle
one does; a clock on the wall, ten times slower, ends those that wait for ever.
"""

import contextlib
import multiprocessing
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from mura_dist.core.errors import RunError
from mura_dist.distributed.processes import end_with_parent
from mura_dist.distributed.spawn import CONTEXT

Prepare = Callable[..., Callable[[Any], Any]]
"""Called once in each process with what `results` was given; what it returns does one task."""

_TICK_S = 0.5  # how often clocks are looked at, at least


@dataclass(frozen=True)
class Limits:
    """What one task may take. processor_s: of its process; wall_s: seconds at all; memory_bytes: above an idle worker's."""

    processor_s: float = 60.0
    wall_s: float = 600.0
    memory_bytes: int = 2 << 30


DEFAULT = Limits()


@dataclass(frozen=True)
class Lost:
    """A task that took its worker with it, twice. `why` goes on from "its decoder"."""

    why: str


@dataclass
class _Chunk:
    tasks: Sequence[Any]
    results: list[Any] = field(default_factory=list)
    suspect: bool = False  # the task at hand has ended a worker: it goes alone, once

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.tasks)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    chunk: _Chunk | None = None
    at_work_since: float = 0.0  # on the clock, of the task at hand
    spent_s: float = 0.0  # processor time of the process when that task began


@contextlib.contextmanager
def crew(prepare: Prepare, arguments: tuple[Any, ...], *, workers: int, limits: Limits = DEFAULT) -> Iterator["Crew"]:
    """Processes that get ready at once, to do what is asked of the Crew; they end with the block. Everything sent must pickle."""
    guard = _Guard(prepare, arguments, workers, limits)
    guard.start()
    try:
        yield Crew(guard, workers)
    finally:
        guard.stop()


@dataclass(frozen=True)
class Crew:
    _guard: "_Guard"
    workers: int

    def results(self, chunks: Iterable[Sequence[Any]], *, ahead: int = 4) -> Iterator[Any]:
        """For every task of every chunk, in order, what `prepare(*arguments)(task)` returned, or Lost.

        An exception a task raises is raised here. `ahead`: chunks a worker may be ahead of whoever reads. To be read to its
        end before the next is asked for.
        """
        self._guard.feed((chunk for chunk in chunks if chunk), ahead * self.workers)
        while (chunk := self._guard.next()) is not None:
            for result in chunk.results:
                if isinstance(result, BaseException):
                    raise result
                yield result


class _Guard(threading.Thread):
    """Hands out chunks, takes in results, watches the clocks; a thread, so that no worker waits while the caller writes."""

    def __init__(self, prepare: Prepare, arguments: tuple[Any, ...], workers: int, limits: Limits) -> None:
        super().__init__(daemon=True, name="guard")
        self.prepared, self.limits, self.count = (prepare, arguments), limits, workers
        self.coming: Iterator[Sequence[Any]] = iter(())
        self.exhausted, self.ahead = True, 0
        self.changed = threading.Condition()
        self.ordered: deque[_Chunk] = deque()  # handed out, not yet read
        self.again: deque[_Chunk] = deque()  # begun, to be gone on with
        self.staff: list[_Worker] = []
        self.failure: BaseException | None = None
        self.tick_s = min(_TICK_S, limits.processor_s / 4, limits.wall_s / 4)
        self.ending = False
        self.stillborn = 0  # workers in a row that ended before they began
        self.bell_in, self.bell = multiprocessing.Pipe(duplex=False)
        self.ears = selectors.DefaultSelector()  # kept: `connection.wait` would make one for each message
        self.ears.register(self.bell_in, selectors.EVENT_READ)

    # ---- for whoever reads the results

    def feed(self, chunks: Iterator[Sequence[Any]], ahead: int) -> None:
        with self.changed:
            assert self.exhausted, "one stream of tasks at a time"
            assert not self.ordered
            self.coming, self.ahead, self.exhausted = chunks, ahead, False
        self._ring()

    def next(self) -> _Chunk | None:
        """The next chunk, whole; None at the end."""
        with self.changed:
            while True:
                if self.failure is not None:
                    raise self.failure
                if self.ordered and self.ordered[0].done:
                    chunk = self.ordered.popleft()
                    self._ring()
                    return chunk
                if self.exhausted and not self.ordered:
                    return None
                self.changed.wait(1.0)  # with an end, so that Ctrl-C is heard on every system

    def stop(self) -> None:
        self.ending = True
        self._ring()
        self.join()

    def _ring(self) -> None:
        """Wake the guard."""
        with contextlib.suppress(OSError):  # it has ended
            self.bell.send_bytes(b"!")

    # ---- the guard's own thread

    def run(self) -> None:
        try:
            self.staff = [self._hire() for _ in range(self.count)]
            while not self.ending:
                self._hand_out()
                self._listen()
                self._watch_the_clocks()
        except BaseException as error:
            with self.changed:
                self.failure = error
                self.changed.notify_all()
        finally:
            for worker in self.staff:
                _end(worker)
            self.ears.close()

    def _hire(self) -> _Worker:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_work, args=(theirs, self.limits.memory_bytes, *self.prepared), daemon=True)
        process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.ears.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _hand_out(self) -> None:
        for worker in list(self.staff):
            if worker.ready and worker.chunk is None and (chunk := self._next_chunk()) is not None:
                worker.chunk = chunk
                worker.at_work_since = time.monotonic()
                left = chunk.tasks[len(chunk.results) :]
                try:
                    worker.pipe.send(left[:1] if chunk.suspect else left)
                except OSError:
                    self._replace(worker, "crashed")

    def _next_chunk(self) -> _Chunk | None:
        if self.again:
            return self.again.popleft()
        if self.exhausted or len(self.ordered) >= self.ahead:
            return None
        tasks = next(self.coming, None)
        with self.changed:
            if tasks is None:
                self.exhausted = True
                self.changed.notify_all()
                return None
            chunk = _Chunk(tasks)
            self.ordered.append(chunk)
            return chunk

    def _listen(self) -> None:
        """Take in what has come, waiting a little where nothing has."""
        for key, _ in self.ears.select(self.tick_s):
            if key.data is None:
                self.bell_in.recv_bytes()
            else:
                self._hear(key.data)

    def _hear(self, worker: _Worker) -> None:
        try:
            result, worker.spent_s = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, "crashed")
            return
        if not worker.ready:
            worker.ready, self.stillborn = True, 0
            return
        chunk = worker.chunk
        assert chunk is not None
        worker.at_work_since = time.monotonic()
        if chunk.suspect or len(chunk.results) + 1 == len(chunk.tasks):
            worker.chunk = None
        self._settle(chunk, result)

    def _settle(self, chunk: _Chunk, result: Any) -> None:
        """The task at hand has its result; what was sent alone goes on with the rest of its chunk."""
        alone, chunk.suspect = chunk.suspect, False
        with self.changed:
            chunk.results.append(result)
            if chunk.done:
                self.changed.notify_all()
            elif alone:
                self.again.appendleft(chunk)

    def _watch_the_clocks(self) -> None:
        for worker in list(self.staff):
            if worker.chunk is None:
                continue
            waited_s = time.monotonic() - worker.at_work_since
            if waited_s < min(self.limits.processor_s, self.limits.wall_s):
                continue
            spent_s = _processor_seconds(worker.process.pid)
            busy_s = waited_s if spent_s is None else spent_s - worker.spent_s
            if busy_s >= self.limits.processor_s or waited_s >= self.limits.wall_s:
                self._replace(worker, f"did not come to an end within {self.limits.processor_s:g} s")

    def _replace(self, worker: _Worker, why: str) -> None:
        """End a worker, hire another; what it had at hand is tried once more, or lost."""
        self.ears.unregister(worker.pipe)
        _end(worker)
        self.stillborn += not worker.ready
        if self.stillborn > self.count + 2:
            raise RunError(
                f"worker processes end before they begin (exit status {worker.process.exitcode}); is there enough memory? "
                "try again with fewer --workers"
            )
        self.staff[self.staff.index(worker)] = self._hire()
        chunk = worker.chunk
        if chunk is not None and chunk.suspect:
            self._settle(chunk, Lost(why))
        elif chunk is not None:
            chunk.suspect = True
            self.again.appendleft(chunk)


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _processor_seconds(process: int | None) -> float | None:
    """Of another process, as Linux tells it; None elsewhere, and where it has ended."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            words = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _work(pipe: Connection, memory_bytes: int, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    """A worker's whole life."""
    end_with_parent()
    do = prepare(*arguments)
    _limit_memory(memory_bytes)
    try:
        pipe.send((None, time.process_time()))
        while True:
            for task in pipe.recv():
                try:
                    result = do(task)
                except Exception as error:
                    result = error
                pipe.send((result, time.process_time()))
    except (EOFError, OSError):  # the guard has closed the pipe
        return


def _limit_memory(memory_bytes: int) -> None:
    """What a worker holds now, and so much more; beyond it Python raises MemoryError, a library fails or crashes.

    Linux only: elsewhere the limit does not exist or counts something else.
    """
    try:
        import resource

        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            held = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
    except (ImportError, OSError, StopIteration):
        return
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory_bytes, resource.RLIM_INFINITY))
    # A decoder's crash is no reason to leave a patient's pixels on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
