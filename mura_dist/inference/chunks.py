"""The chunks of a prediction: read ahead by guarded processes, predicted in batches, each written as a part when it is whole.

    Walk -> chunks of 256 files -> paths -> worker processes (reader.py) -> batches (B, 1, S, S) uint8 -> OnnxModel.stream
        -> OUT/overlays, where wanted -> OUT/.parts/000000.json, one a chunk

A chunk is the unit of work and of resumption. Where an I/O fault kept a file of it from being read, its part is
000000.faults.json; the next start reads these files again, and no others of that chunk. Each rank takes every n-th; the first
one makes itself what a rank that fell silent has left undone.
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
_FILES_PER_WORKER = 64  # a process costs 0.22 s of a processor before it reads, a radiograph of 0.2 megapixels 3.3 ms
_AT_ONCE, _AT_ONCE_BYTES = 8, 1 << 20  # files a worker takes at once, and their pixels at most


@dataclass
class _Chunk:
    """Files that were read, or are being read, and the logits of those radiographs that are predicted already.

    before: the part of an earlier start, where only the files are here that an I/O fault kept it from reading.
    """

    number: int
    files: list[ListedFile]
    before: ChunkResult | None = None
    readings: list[ReadResult] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    cells: list[np.ndarray] = field(default_factory=list)  # (h, w) float32, where overlays are wanted

    @property
    def predicted(self) -> bool:
        radiographs = sum(reading.image is not None for reading in self.readings)
        return len(self.readings) == len(self.files) and len(self.logits) == radiographs


@dataclass
class ChunkPredictor:
    """Makes the parts of this rank's chunks; on the first one also those of ranks that fell silent.

    grouping: how files become studies; progress: hears of files done and of all files; throughput: of what this command made.
    """

    model: OnnxModel
    directory: Path
    grouping: Grouping
    files: FileList
    folder: OutputFolder
    overlays: Overlays | None
    stop: threading.Event
    progress: Callable[[int, int], None]
    done: int = 0
    throughput: Throughput = field(default_factory=Throughput)

    def __post_init__(self) -> None:
        self._faults = IoFaults(self.directory)

    def run(self, workers: int | None, limits: PoolLimits) -> None:
        """Return when every chunk has its part; on ranks but the first, when those of its own have. Raises StopRequestedError.

        workers: processes that read, None: by files and processors; limits: what reading one file may take.
        """
        if self.overlays is not None:
            self.overlays.begin()
        folder = self.folder
        missing = self._missing()
        self.progress(self.done, self.files.num_files)
        mine = [number for number in missing if number % folder.num_ranks == folder.rank]
        if not missing or (folder.rank and not mine):
            return
        num_workers = self.throughput.num_processes = self._num_workers(len(mine), workers)
        with worker_pool.start_pool(RadiographReader, (self.model.size,), workers=num_workers, limits=limits) as pool:
            self._make(pool, mine)
            monitor = heartbeat.HeartbeatMonitor()
            while folder.rank == 0 and (missing := self._missing()):
                self.progress(self.done, self.files.num_files)
                silent = [number for number in missing if self._is_silent(monitor, number % folder.num_ranks)]
                if silent:
                    self._make(pool, silent[:1])
                else:
                    wait_for_ranks(self.stop)

    def _is_silent(self, monitor: heartbeat.HeartbeatMonitor, rank: int) -> bool:
        return (
            monitor.seconds_since_beat(heartbeat.heartbeat_path(self.folder.parts, rank))
            > heartbeat.HEARTBEAT_TIMEOUT_S
        )

    def _missing(self) -> list[int]:
        """List the chunks without a part, whoever is to make them; `done` is brought up to date."""
        missing, num_chunks, size = (
            self.folder.missing(self.files.num_chunks),
            self.files.num_chunks,
            self.files.chunk_size,
        )
        self.done = self.files.num_files - size * len(missing)
        if num_chunks - 1 in missing:
            self.done += size * num_chunks - self.files.num_files
        return missing

    def _num_workers(self, num_chunks: int, workers: int | None) -> int:
        """Reading is a twentieth of a CPU's work here; 16 keep a GPU fed. Each may hold one radiograph of full size."""
        num_files = min(num_chunks * self.files.chunk_size, self.files.num_files)
        if workers is not None:
            return max(1, min(workers, num_files))
        return max(1, min(16, num_processors() // environment.local_world_size(), num_files // _FILES_PER_WORKER))

    def _make(self, pool: WorkerPool, numbers: list[int]) -> None:
        """A part for each of these chunks; of those that an earlier start could not read whole, one at a time."""
        again = {number for number in numbers if self.folder.part(number, RETRY).is_file()}
        self._predict(pool, [number for number in numbers if number not in again])
        for number in sorted(again):
            self._predict(pool, [number], self.folder.retry(number))

    def _predict(self, pool: WorkerPool, numbers: list[int], before: ChunkResult | None = None) -> None:
        """The parts of `numbers`. Batches never cross chunks: what is predicted together is the same in every run."""
        started, busy_s = time.perf_counter(), self.model.busy.seconds
        begun: deque[_Chunk] = deque()
        chunks = functools.partial(_chunks, self.files, numbers, before)
        batches = self._batches(pool, chunks, begun)
        wanted = OUTPUTS if self.overlays is not None else OUTPUTS[:1]
        for logits, *cells in self.model.stream(
            batches, wanted
        ):  # aligned with the batches, however many are ahead of it
            chunk = next(chunk for chunk in begun if not chunk.predicted)
            chunk.cells += [each for part in cells for each in part]
            chunk.logits += logits.tolist()
            self.throughput.num_radiographs += len(logits)
            self._write(begun)
        self._write(begun)
        self.throughput.computing_s += self.model.busy.seconds - busy_s
        self.throughput.elapsed_s += time.perf_counter() - started
        if self.stop.is_set() and self._missing():
            raise StopRequestedError(
                f"stopped after {self.done:,} of {self.files.num_files:,} files; the same command goes on"
            )

    def _batches(
        self, pool: WorkerPool, chunks: Callable[[], Iterator[_Chunk]], begun: deque[_Chunk]
    ) -> Iterator[np.ndarray]:
        """(B, 1, S, S) uint8, chunk after chunk; each chunk is in `begun` before its first batch. To be drawn by this thread."""
        batch_size = self.model.session_config.batch_size or 1
        at_once = max(1, min(_AT_ONCE, _AT_ONCE_BYTES // self.model.size**2))
        ahead = max(2, -(-2 * batch_size // (at_once * pool.workers)))  # two batches at least
        readings = pool.results(_tasks(chunks(), self.directory, at_once), ahead=ahead)
        for chunk in chunks():
            if self.stop.is_set():
                return
            images: list[np.ndarray] = []
            begun.append(chunk)
            self.done += len(chunk.before[retries.FILES]) - len(chunk.files) if chunk.before is not None else 0
            for file in chunk.files:
                reading = failure_result(*file.failure) if file.failure is not None else self._reading(next(readings))
                chunk.readings.append(reading)
                self.throughput.num_files += 1
                self.throughput.reading_s += reading.seconds
                self.done += 1
                self.progress(self.done, self.files.num_files)
                if reading.image is not None:
                    images.append(reading.image)
                if len(images) == batch_size:
                    yield np.stack(images)[:, None]
                    images = []
            if images:
                yield np.stack(images)[:, None]
            self._write(begun)  # a chunk without a radiograph gets no logits
        assert next(readings, None) is None  # read to its end, as a WorkerPool wants it

    def _reading(self, result: ReadResult | TaskFailed) -> ReadResult:
        """Return what a worker has read, or why not. Raises RunError where the disk seems to be gone."""
        reading = (
            failure_result("unreadable", f"its decoder {result.reason}") if isinstance(result, TaskFailed) else result
        )
        self._faults.check(*reading.failure)
        return reading

    def _write(self, begun: deque[_Chunk]) -> None:
        """The parts of those chunks at the head that are predicted."""
        while begun and begun[0].predicted:
            chunk = begun.popleft()
            # Here a chunk's files, images, identities and logits are together: what else is made of them, is made here.
            self.folder.write_part(chunk.number, self._part(chunk))
            if self.folder.num_ranks > 1:  # what the others have done meanwhile
                self._missing()
                self.done += sum(len(chunk.readings) for chunk in begun)

    def _part(self, chunk: _Chunk) -> ChunkResult:
        rows: list[list[Any]] = []
        failures: list[tuple[str, str, str]] = []
        logits = iter(chunk.logits)
        for file, reading in zip(chunk.files, chunk.readings, strict=True):
            name = self.grouping.public_name(file.path)
            if reading.image is None:
                failures.append((name, *reading.failure))
                continue
            if not np.isfinite(logit := next(logits)):
                raise RunError(f"{name}: the model's logit is {logit}; it is broken, export it again or give another")
            rows.append([name, *self.grouping.study_and_type(file.path, reading.identity), logit, reading.gate])
        notes = Counter(note for reading in chunk.readings for note in reading.notes)
        drawn = self._draw(chunk, [row[0] for row in rows])
        part: ChunkResult = {"predictions": rows, "failures": failures, "overlays": drawn, "notes": notes}
        return retries.merge_retry(chunk.before, part, chunk.readings)

    def _draw(self, chunk: _Chunk, names: list[str]) -> dict[str, int]:
        """The chunk's overlays are on disk then; how many, and how many are withheld."""
        if self.overlays is None:
            return overlay_counts(0, 0)
        read = [(reading.image, reading.identity) for reading in chunk.readings if reading.image is not None]
        some = [
            Overlay(name, image, cells, logit)
            for name, (image, identity), cells, logit in zip(names, read, chunk.cells, chunk.logits, strict=True)
            if not self.overlays.withholds(identity)
        ]
        self.overlays.write_all(some)
        return overlay_counts(len(some), len(names) - len(some))


def _chunks(walk: FileList, numbers: list[int], before: ChunkResult | None) -> Iterator[_Chunk]:
    """These chunks, nothing read; `before`: see _Chunk."""
    for number, files in zip(numbers, walk.chunks(numbers), strict=True):
        yield _Chunk(number, files if before is None else retries.select_retries(before, files), before)


def _tasks(chunks: Iterable[_Chunk], directory: Path, at_once: int) -> Iterator[list[str]]:
    """The paths to be read, in order, `at_once` at most at a time."""
    for chunk in chunks:
        paths = [os.path.join(directory, file.path) for file in chunk.files if file.failure is None]
        yield from (paths[start : start + at_once] for start in range(0, len(paths), at_once))
