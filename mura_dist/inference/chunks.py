"""The chunks of a prediction: read ahead by worker processes, predicted in batches, each written when it is complete.

    FileList -> chunks of 256 files -> paths -> reader_pool.py -> batches (B, 1, S, S) uint8 -> OnnxModel.stream
        -> OUT/overlays, with --overlays -> OUT/.parts/000000.json, one per chunk

A chunk is the unit of work and of resumption. If an I/O fault kept a file from being read, its result is 000000.faults.json. The
next start reads only such files of the chunk again. Each rank takes every n-th chunk. Rank 0 also predicts the chunks of ranks
whose heartbeat expired.
"""

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core.errors import RunError, StopRequestedError
from mura_dist.data.io_faults import IoFaults
from mura_dist.distributed import heartbeat
from mura_dist.inference import retries
from mura_dist.inference.engine import OUTPUTS
from mura_dist.inference.file_list import FileList, ListedFile
from mura_dist.inference.grouping import Grouping
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.output_folder import RETRY, OutputFolder, wait_for_ranks
from mura_dist.inference.overlays import Overlay, Overlays, overlay_counts
from mura_dist.inference.reader import ReadResult, failure_result
from mura_dist.inference.reader_pool import ReaderPool
from mura_dist.inference.tables import ChunkResult
from mura_dist.inference.throughput import Throughput

CHUNK = 256


@dataclass
class _Chunk:
    """The files of a chunk, and what is read and predicted so far.

    Attributes:
        number: Position of the chunk.
        files: Files to read. After an I/O fault, only those that could not be read.
        previous: Result of an earlier start that met I/O faults.
        reads: One result per file read. With --overlays they keep their images, which are views of their batches.
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
        return len(self.reads) == len(self.files) and len(self.logits) == sum(read.is_radiograph for read in self.reads)


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

    def run(self, readers: ReaderPool) -> None:
        """Predict until this rank's chunks are complete. Rank 0 returns when all chunks are complete.

        Args:
            readers: Processes that read the files.

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
        readers.prepare(min(len(own) * self.files.chunk_size, self.files.num_files))
        self._predict_all(readers, own)
        monitor = heartbeat.HeartbeatMonitor()
        while folder.rank == 0 and (missing := self._find_missing()):
            self.progress(self.num_done, self.files.num_files)
            abandoned = [number for number in missing if self._has_expired(monitor, number % folder.num_ranks)]
            if abandoned:
                self._predict_all(readers, abandoned[:1])
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

    def _predict_all(self, readers: ReaderPool, numbers: list[int]) -> None:
        """Predict chunks. Those with I/O faults in an earlier start are predicted last, one at a time."""
        retried = {number for number in numbers if self.folder.chunk_path(number, RETRY).is_file()}
        self._predict(readers, [number for number in numbers if number not in retried])
        for number in sorted(retried):
            self._predict(readers, [number], self.folder.load_retry(number))

    def _predict(self, readers: ReaderPool, numbers: list[int], previous: ChunkResult | None = None) -> None:
        """Predict chunks. Batches never cross chunks, so that every run predicts the same batches."""
        start, busy_s = time.perf_counter(), self.model.busy.seconds
        active: deque[_Chunk] = deque()
        reads = readers.results(
            [os.path.join(self.directory, file.path) for file in chunk.files if file.failure is None]
            for chunk in _iterate_chunks(self.files, numbers, previous)
        )
        batches = self._batches(reads, _iterate_chunks(self.files, numbers, previous), active)
        outputs = OUTPUTS if self.overlays is not None else OUTPUTS[:1]
        for logits, *maps in self.model.stream(batches, outputs):  # in the order of the batches
            chunk = next(chunk for chunk in active if not chunk.is_predicted)
            chunk.cells += [cells for batch_maps in maps for cells in batch_maps]
            chunk.logits += logits.tolist()
            self.throughput.num_radiographs += len(logits)
            self._write_predicted(active)
        self._write_predicted(active)
        self.throughput.num_processes = readers.pool.workers
        self.throughput.computing_s += self.model.busy.seconds - busy_s
        self.throughput.elapsed_s += time.perf_counter() - start
        if self.stop.is_set() and self._find_missing():
            raise StopRequestedError(
                f"stopped after {self.num_done:,} of {self.files.num_files:,} files. The same command resumes."
            )

    def _batches(
        self, reads: Iterator[ReadResult], chunks: Iterator[_Chunk], active: deque[_Chunk]
    ) -> Iterator[np.ndarray]:
        """Yield (B, 1, S, S) uint8, chunk after chunk, in the calling thread. A chunk is in `active` before its first batch."""
        batch_size = self.model.session_config.batch_size or 1
        for chunk in chunks:
            if self.stop.is_set():
                return
            shape = min(batch_size, len(chunk.files)), 1, self.model.size, self.model.size
            batch, num_images = np.empty(shape, np.uint8), 0
            active.append(chunk)
            self.num_done += len(chunk.previous[retries.FILES]) - len(chunk.files) if chunk.previous is not None else 0
            for file in chunk.files:
                read = failure_result(*file.failure) if file.failure is not None else self._check(next(reads))
                self.throughput.num_files += 1
                self.throughput.reading_s += read.seconds
                self.num_done += 1
                self.progress(self.num_done, self.files.num_files)
                if read.image is not None:
                    batch[num_images, 0] = read.image
                    read = read._replace(image=None if self.overlays is None else batch[num_images, 0])
                    num_images += 1
                chunk.reads.append(read)
                if num_images == len(batch):
                    yield batch
                    batch, num_images = np.empty(shape, np.uint8), 0
            if num_images:
                yield batch[:num_images]
            self._write_predicted(active)  # a chunk without radiographs has no batch
        assert next(reads, None) is None  # a WorkerPool has to be read to its end

    def _check(self, read: ReadResult) -> ReadResult:
        """Return a result. Raises RunError if the disk fails continuously."""
        self._faults.check(*read.failure)
        return read

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
            if not read.is_radiograph:
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
