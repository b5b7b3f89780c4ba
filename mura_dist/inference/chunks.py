"""The chunks of a prediction: read ahead by worker processes, predicted in batches, each written when it is complete.

    FileList -> chunks of 256 files -> paths -> workers (reader.py) -> batches (B, 1, S, S) uint8 -> OnnxModel.stream
        -> OUT/overlays, with --overlays -> OUT/.parts/000000.json, one per chunk

A chunk is the unit of work and of resumption. If an I/O fault kept a file from being read, its result is 000000.faults.json. The
next start reads only such files of the chunk again. Each rank takes every n-th chunk. Rank 0 also predicts the chunks of ranks
whose heartbeat expired.
"""

import functools
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core.errors import RunError, StopRequestedError
from mura_dist.data.io_faults import IoFaults
from mura_dist.distributed import environment, heartbeat, worker_pool
from mura_dist.distributed.processes import num_processors
from mura_dist.distributed.worker_pool import PoolLimits, TaskFailed, WorkerPool
from mura_dist.inference import retries
from mura_dist.inference.engine import OUTPUTS
from mura_dist.inference.file_list import FileList, ListedFile
from mura_dist.inference.grouping import Grouping
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.output_folder import RETRY, OutputFolder, wait_for_ranks
from mura_dist.inference.overlays import Overlay, Overlays, overlay_counts
from mura_dist.inference.reader import RadiographReader, ReadResult, failure_result
from mura_dist.inference.tables import ChunkResult
from mura_dist.inference.throughput import Throughput

CHUNK = 256
_FILES_PER_WORKER = 64  # a process costs 0.22 s of CPU time to start, a radiograph of 0.2 megapixels 3.3 ms to read
_FILES_PER_TASK, _PIXELS_PER_TASK = 8, 1 << 20  # upper limits


@dataclass
class _Chunk:
    """The files of a chunk, and what is read and predicted so far.

    Attributes:
        number: Position of the chunk.
        files: Files to read. After an I/O fault, only those that could not be read.
        previous: Result of an earlier start that met I/O faults.
        reads: One result per file read.
        logits: Of the radiographs predicted so far.
        cells: Activation maps (h, w) float32, with --overlays.
    """

    number: int
    files: list[ListedFile]
    previous: ChunkResult | None = None
    reads: list[ReadResult] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    cells: list[np.ndarray] = field(default_factory=list)

    @property
    def is_predicted(self) -> bool:
        num_radiographs = sum(read.image is not None for read in self.reads)
        return len(self.reads) == len(self.files) and len(self.logits) == num_radiographs


@dataclass
class ChunkPredictor:
    """Predicts the chunks of this rank. Rank 0 also predicts those of ranks whose heartbeat expired.

    Attributes:
        model: Model to predict with.
        directory: Folder that the paths of `files` are relative to.
        grouping: Rules by which files become studies.
        files: Files to predict.
        folder: Output folder.
        overlays: Writer of overlays, or None.
        stop: Set when the process was asked to stop.
        progress: Called with the numbers of finished files and of all files.
        num_done: Number of finished files.
        throughput: Measurements of this process.
    """

    model: OnnxModel
    directory: Path
    grouping: Grouping
    files: FileList
    folder: OutputFolder
    overlays: Overlays | None
    stop: threading.Event
    progress: Callable[[int, int], None]
    num_done: int = 0
    throughput: Throughput = field(default_factory=Throughput)

    def __post_init__(self) -> None:
        self._faults = IoFaults(self.directory)

    def run(self, workers: int | None, limits: PoolLimits) -> None:
        """Predict until this rank's chunks are complete. Rank 0 returns when all chunks are complete.

        Args:
            workers: Number of reading processes. None chooses by the numbers of files and processors.
            limits: Limits of reading one file.

        Raises:
            StopRequestedError: `stop` was set.
            RunError: a logit is not finite, a batch failed, or the disk fails continuously.
        """
        if self.overlays is not None:
            self.overlays.begin()
        folder = self.folder
        missing = self._find_missing()
        self.progress(self.num_done, self.files.num_files)
        own = [number for number in missing if number % folder.num_ranks == folder.rank]
        if not missing or (folder.rank and not own):
            return
        num_workers = self.throughput.num_processes = self._choose_num_workers(len(own), workers)
        with worker_pool.start_pool(RadiographReader, (self.model.size,), workers=num_workers, limits=limits) as pool:
            self._predict_all(pool, own)
            monitor = heartbeat.HeartbeatMonitor()
            while folder.rank == 0 and (missing := self._find_missing()):
                self.progress(self.num_done, self.files.num_files)
                abandoned = [number for number in missing if self._has_expired(monitor, number % folder.num_ranks)]
                if abandoned:
                    self._predict_all(pool, abandoned[:1])
                else:
                    wait_for_ranks(self.stop)

    def _has_expired(self, monitor: heartbeat.HeartbeatMonitor, rank: int) -> bool:
        path = heartbeat.heartbeat_path(self.folder.parts, rank)
        return monitor.seconds_since_beat(path) > heartbeat.HEARTBEAT_TIMEOUT_S

    def _find_missing(self) -> list[int]:
        """Return the chunks of all ranks that have no result, and update `num_done`."""
        num_chunks, chunk_size = self.files.num_chunks, self.files.chunk_size
        missing = self.folder.missing_chunks(num_chunks)
        self.num_done = self.files.num_files - chunk_size * len(missing)
        if num_chunks - 1 in missing:
            self.num_done += chunk_size * num_chunks - self.files.num_files
        return missing

    def _choose_num_workers(self, num_chunks: int, workers: int | None) -> int:
        """Return the number of reading processes, each of which may hold a radiograph of full size.

        Reading needs a twentieth of the CPU time of predicting on the CPU. 16 processes keep a GPU busy.
        """
        num_files = min(num_chunks * self.files.chunk_size, self.files.num_files)
        if workers is not None:
            return max(1, min(workers, num_files))
        return max(1, min(16, num_processors() // environment.local_world_size(), num_files // _FILES_PER_WORKER))

    def _predict_all(self, pool: WorkerPool, numbers: list[int]) -> None:
        """Predict chunks. Those with I/O faults in an earlier start are predicted last, one at a time."""
        retried = {number for number in numbers if self.folder.chunk_path(number, RETRY).is_file()}
        self._predict(pool, [number for number in numbers if number not in retried])
        for number in sorted(retried):
            self._predict(pool, [number], self.folder.load_retry(number))

    def _predict(self, pool: WorkerPool, numbers: list[int], previous: ChunkResult | None = None) -> None:
        """Predict chunks. Batches never cross chunks, so that every run predicts the same batches."""
        start, busy_s = time.perf_counter(), self.model.busy.seconds
        active: deque[_Chunk] = deque()
        chunks = functools.partial(_iterate_chunks, self.files, numbers, previous)
        batches = self._batches(pool, chunks, active)
        outputs = OUTPUTS if self.overlays is not None else OUTPUTS[:1]
        for logits, *maps in self.model.stream(batches, outputs):  # in the order of the batches
            chunk = next(chunk for chunk in active if not chunk.is_predicted)
            chunk.cells += [cells for batch_maps in maps for cells in batch_maps]
            chunk.logits += logits.tolist()
            self.throughput.num_radiographs += len(logits)
            self._write_predicted(active)
        self._write_predicted(active)
        self.throughput.computing_s += self.model.busy.seconds - busy_s
        self.throughput.elapsed_s += time.perf_counter() - start
        if self.stop.is_set() and self._find_missing():
            raise StopRequestedError(
                f"stopped after {self.num_done:,} of {self.files.num_files:,} files. The same command resumes."
            )

    def _batches(
        self, pool: WorkerPool, chunks: Callable[[], Iterator[_Chunk]], active: deque[_Chunk]
    ) -> Iterator[np.ndarray]:
        """Yield (B, 1, S, S) uint8, chunk after chunk, in the calling thread. A chunk is in `active` before its first batch."""
        batch_size = self.model.session_config.batch_size or 1
        files_per_task = max(1, min(_FILES_PER_TASK, _PIXELS_PER_TASK // self.model.size**2))
        num_ahead = max(2, -(-2 * batch_size // (files_per_task * pool.workers)))  # at least two batches
        reads = pool.results(_tasks(chunks(), self.directory, files_per_task), ahead=num_ahead)
        for chunk in chunks():
            if self.stop.is_set():
                return
            images: list[np.ndarray] = []
            active.append(chunk)
            self.num_done += len(chunk.previous[retries.FILES]) - len(chunk.files) if chunk.previous is not None else 0
            for file in chunk.files:
                read = failure_result(*file.failure) if file.failure is not None else self._check(next(reads))
                chunk.reads.append(read)
                self.throughput.num_files += 1
                self.throughput.reading_s += read.seconds
                self.num_done += 1
                self.progress(self.num_done, self.files.num_files)
                if read.image is not None:
                    images.append(read.image)
                if len(images) == batch_size:
                    yield np.stack(images)[:, None]
                    images = []
            if images:
                yield np.stack(images)[:, None]
            self._write_predicted(active)  # a chunk without radiographs has no batch
        assert next(reads, None) is None  # a WorkerPool has to be read to its end

    def _check(self, result: ReadResult | TaskFailed) -> ReadResult:
        """Return a worker's result. A failed task is an unreadable file. Raises RunError if the disk fails continuously."""
        if isinstance(result, TaskFailed):
            result = failure_result("unreadable", f"its decoder {result.reason}")
        self._faults.check(*result.failure)
        return result

    def _write_predicted(self, active: deque[_Chunk]) -> None:
        """Write the chunks at the head of `active` that are predicted."""
        while active and active[0].is_predicted:
            chunk = active.popleft()
            self.folder.write_chunk(chunk.number, self._build_result(chunk))
            if self.folder.num_ranks > 1:  # update num_done by the chunks of the other ranks
                self._find_missing()
                self.num_done += sum(len(chunk.reads) for chunk in active)

    def _build_result(self, chunk: _Chunk) -> ChunkResult:
        rows: list[list[Any]] = []
        failures: list[tuple[str, str, str]] = []
        logits = iter(chunk.logits)
        for file, read in zip(chunk.files, chunk.reads, strict=True):
            name = self.grouping.public_name(file.path)
            if read.image is None:
                failures.append((name, *read.failure))
                continue
            if not np.isfinite(logit := next(logits)):
                raise RunError(f"{name}: the model's logit is {logit}. Export the model again, or give another model.")
            rows.append([name, *self.grouping.study_and_type(file.path, read.identity), logit, read.gate])
        notes = Counter(note for read in chunk.reads for note in read.notes)
        counts = self._write_overlays(chunk, [row[0] for row in rows])
        result: ChunkResult = {"predictions": rows, "failures": failures, "overlays": counts, "notes": notes}
        return retries.merge_retry(chunk.previous, result, chunk.reads)

    def _write_overlays(self, chunk: _Chunk, names: list[str]) -> dict[str, int]:
        """Write the chunk's overlays. Return the numbers of those written and withheld."""
        if self.overlays is None:
            return overlay_counts(0, 0)
        radiographs = [(read.image, read.identity) for read in chunk.reads if read.image is not None]
        overlays = [
            Overlay(name, image, cells, logit)
            for name, (image, identity), cells, logit in zip(names, radiographs, chunk.cells, chunk.logits, strict=True)
            if not self.overlays.withholds(identity)
        ]
        self.overlays.write_all(overlays)
        return overlay_counts(len(overlays), len(names) - len(overlays))


def _iterate_chunks(files: FileList, numbers: list[int], previous: ChunkResult | None) -> Iterator[_Chunk]:
    for number, chunk_files in zip(numbers, files.chunks(numbers), strict=True):
        selected = chunk_files if previous is None else retries.select_retries(previous, chunk_files)
        yield _Chunk(number, selected, previous)


def _tasks(chunks: Iterable[_Chunk], directory: Path, files_per_task: int) -> Iterator[list[str]]:
    """Yield the paths to read, in order, in lists of at most `files_per_task`."""
    for chunk in chunks:
        paths = [os.path.join(directory, file.path) for file in chunk.files if file.failure is None]
        yield from (paths[start : start + files_per_task] for start in range(0, len(paths), files_per_task))
