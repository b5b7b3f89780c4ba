"""Worker processes that read files ahead of the model.

    lists of paths -> tasks of a few paths -> workers (reader.py) -> results, in order, with images in shared memory

The first process starts early, so that it imports its modules while the files are listed. Others start when the model waits for
results. A process costs 0.2 s of CPU time to start, and one alone reads several times as fast as two cores predict.
"""

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mura_dist.distributed import environment, worker_pool
from mura_dist.distributed.processes import num_processors
from mura_dist.distributed.worker_pool import PoolLimits, TaskFailed, WorkerPool
from mura_dist.inference.reader import RadiographReader, ReadResult, failure_result

_FILES_PER_WORKER = 64  # at least: a radiograph of 0.2 megapixels costs 3.3 ms to read
_PATIENCE_S = 0.02  # wait for a result after which another process starts
_FIRST_TASKS = 4  # tasks whose results the model always waits for
_FILES_PER_TASK, _PIXELS_PER_TASK = 8, 1 << 20  # upper limits


@dataclass
class ReaderPool:
    """Processes that read files; see start_readers.

    Attributes:
        pool: The processes.
        workers: Number of processes that the caller requested, or None.
        files_per_task: Number of paths that a process receives at once.
        num_ahead: Number of tasks to read ahead, of all processes together, at least.
        max_workers: Number of processes that may start while the model waits. Each may hold a radiograph of full size.
    """

    pool: WorkerPool
    workers: int | None
    files_per_task: int
    num_ahead: int
    max_workers: int = 1

    def prepare(self, num_files: int) -> None:
        """Start the requested processes. Without a request, let as many start as `num_files` files may need."""
        if self.workers is None:
            self.max_workers = min(_max_workers(), num_files // _FILES_PER_WORKER)
        else:
            self.pool.grow(min(self.workers, num_files))

    def results(self, path_lists: Iterable[Sequence[str]]) -> Iterator[ReadResult]:
        """Yield the result of each path. Its image is valid until the next result.

        Args:
            path_lists: Paths to read. A process receives paths of one list at a time.
        """
        tasks = (
            paths[start : start + self.files_per_task]
            for paths in path_lists
            for start in range(0, len(paths), self.files_per_task)
        )
        results = self.pool.results(tasks, ahead=2, min_ahead=self.num_ahead)
        for number in itertools.count():
            start = time.perf_counter()
            if (result := next(results, None)) is None:
                return
            is_late = number >= _FIRST_TASKS * self.files_per_task and time.perf_counter() - start > _PATIENCE_S
            if is_late and self.pool.workers < self.max_workers:
                self.pool.grow(self.pool.workers + 1)
            is_lost = isinstance(result, TaskFailed)
            yield failure_result("unreadable", f"its decoder {result.reason}") if is_lost else result


@contextlib.contextmanager
def start_readers(size: int, batch_size: int, workers: int | None, limits: PoolLimits) -> Iterator[ReaderPool]:
    """Start the first of the processes that read files. All exit with the block.

    Args:
        size: Side of an image in pixels.
        batch_size: Radiographs per batch. Two batches are read ahead.
        workers: Number of processes. None chooses by the numbers of files and processors: reading a file takes a twentieth of
            the CPU time of predicting it on the CPU, and 16 processes keep a GPU busy.
        limits: Limits of reading one file.
    """
    files_per_task = max(1, min(_FILES_PER_TASK, _PIXELS_PER_TASK // size**2))
    with worker_pool.start_pool(
        RadiographReader,
        (size,),
        workers=1,
        max_workers=workers or _max_workers(),
        limits=limits,
        chunk_bytes=files_per_task * size**2,
    ) as pool:
        yield ReaderPool(pool, workers, files_per_task, -(-2 * batch_size // files_per_task))


def _max_workers() -> int:
    return max(1, min(16, num_processors() // environment.local_world_size()))
