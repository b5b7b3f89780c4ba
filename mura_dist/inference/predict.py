"""A directory of radiographs -> predictions.csv, studies.csv, failures.csv. No torch from here on.

    walk.find -> chunks of 256 files -> read ahead by guarded processes (reader.py) -> batches -> Model.stream
        -> OUT/overlays, where wanted -> OUT/.parts/000000.json, one a chunk -> KEYTABLE, where wanted -> tables.py
        -> predict.json (last: it says "done")

Every file ends in exactly one of predictions and failures, also one that crashes, stalls or bloats its decoder: that is why
processes read, not threads, which are a little faster (2 cores, 512-px PNG to 320: 690 against 841 radiographs/s). A chunk is the
unit of work and of resumption: killed anywhere, the same command makes the missing ones, and the same bytes. No list is as
long as the directory: what is, lies on disk. `OUT/.parts/plan.json` says what the run is; another model, other options or
other files in the same OUT are refused, and so is a second start while the first one lives.

Several ranks (torchrun's or Slurm's) share the work: each takes every n-th chunk; the first one writes the plan and the tables,
and makes itself what a rank that fell silent has left undone. Nobody talks to anybody but through OUT/.parts.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import PIL

from mura_dist import __version__
from mura_dist.core import files as atomic
from mura_dist.core.errors import Failure, OwnRefusal, Refusal, Stopped
from mura_dist.data import gate, mura
from mura_dist.distributed import environment, heartbeat, lock, worker_pool
from mura_dist.distributed.lock import Claim
from mura_dist.distributed.processes import processors
from mura_dist.distributed.worker_pool import Crew, Limits, Lost
from mura_dist.inference import autotune as tuning
from mura_dist.inference import file_list, pseudonyms, study_types, tables
from mura_dist.inference import studies as grouping
from mura_dist.inference.file_list import File, Walk
from mura_dist.inference.onnx_model import OUTPUTS, PROVIDERS, Model, Tuning, flowing, version
from mura_dist.inference.overlays import FOLDER, Overlay, Overlays, counted, counts, warning
from mura_dist.inference.pseudonyms import Names
from mura_dist.inference.reader import Reader, Reading, failed
from mura_dist.inference.studies import Grouping
from mura_dist.inference.tables import Part, Tally
from mura_dist.metrics.operating_points import BANDS
from mura_dist.models.card import Card

CHUNK = 256
PLAN_WAIT_S = 120.0  # how long a rank waits for a first one that shows no life
MAX_WORKERS = 256
_FILES_PER_WORKER = 64  # a process costs 0.22 s of a processor before it reads, a radiograph of 0.2 megapixels 3.3 ms
_AT_ONCE, _AT_ONCE_BYTES = 8, 1 << 20  # files a worker takes at once, and their pixels at most
_POLL_S = 0.2


@pseudonyms.hushed
def predict(
    model_path: Path,
    directory: Path,
    out: Path,
    *,
    study_by: str = "auto",
    study_type: str | None = None,
    provider: str = "cpu",
    format: str = "csv",
    batch_size: int | None = None,
    workers: int | None = None,
    autotune: bool = False,
    strict: bool = False,
    overlays: bool = False,
    allow_pixels: bool = False,
    keytable: Path | None = None,
    limits: Limits = worker_pool.DEFAULT,
    say: Callable[[str], None] = lambda line: None,
    walking: Callable[[int], None] = lambda num_found: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """Predict every radiograph below `directory` into tables in `out`; returns predict.json's content, on ranks but the first
    None. Resumes.

    study_by: auto, folder or file; study_type: a study type for all, or a CSV of path,study_type; provider: see
    Model.load; format: csv or parquet; batch_size: radiographs at once, None: as an earlier autotune found best on this
    machine, or by provider; autotune: find it now, `say` hears how; workers: processes that read; strict: any failure, once
    the tables are written, ends it; overlays: draw every radiograph and its map, with allow_pixels those too whose pixels
    may show a name; keytable: files and studies go by pseudonyms, and this file leads back; limits: what reading one file
    may take. `out` is not looked into where it lies inside `directory`. Raises Refusal, Failure, Stopped (SIGINT, SIGTERM:
    after the current chunk), OSError when the disk is full.
    """
    started = time.perf_counter()
    _check(directory, out, study_by, format, batch_size, workers)
    names = _names(keytable, out, directory)
    _check_tuning(autotune, batch_size)
    model = Model.load(model_path, provider, flowing(batch_size))
    known = frozenset((*model.card.study_types, *model.card.thresholds))
    given = study_types.read(study_type)
    warnings = study_types.check(given, known)
    _refuse_foreign(out)
    place = _Place(out, environment.rank(), environment.world_size())
    claim = Claim(f"--out {out}", "give another --out", wait_s=0, doubt_s=lock.DOUBT_S)
    with (
        _stop_asked() as asked,
        heartbeat.taking_part(place.parts, place.rank, claim, asked),
        _walked(directory, place, names, keytable, asked, walking) as files,
    ):
        if (way := _way(place, model, provider, batch_size, model_path if autotune else None, say)) != model.tuning:
            model = Model.load(model_path, provider, way)
        warnings += study_types.match(given, (file_list.printable(file.path) for file in files.all()))
        options = {"study_by": study_by, "format": format, "overlays": overlays, "allow_pixels": allow_pixels}
        plan = _plan(model, files, given, names, options)
        if keytable is not None and place.rank == 0 and not place.done.is_file():
            paths = (file_list.printable(file.path) for file in files.all())
            pseudonyms.check_files(keytable, ((path, names.file(path)) for path in paths))
        summary = _begun(place, plan, asked)
        if summary is None:
            root = Path(os.path.abspath(directory)).as_posix()
            groups = Grouping(root, study_by, given, known, names, apart=(out, directory))
            work = _Work(
                model, directory, groups, files, place, model.tuning.batch_size or 1, workers, limits, asked, progress
            )
            if overlays:
                drawings = model.card.trained_on.kind == "phantoms"
                work.overlays = Overlays(out, allow_pixels, drawings, aside=f".{place.rank}")
                work.overlays.begin()
            work.do()
            if place.rank == 0:
                if keytable is not None:
                    pseudonyms.write(keytable, lambda: _ways_back(groups, place, files, asked), _aside(place))
                tally = tables.write(
                    out, lambda: _parts(place, files, asked), model.card, format, place.parts / "studies.sqlite"
                )
                num_overlays = counted(part["overlays"] for part in _parts(place, files, asked))
                warnings += warning(num_overlays["num_overlays_withheld"])
                if allow_pixels and not overlays:
                    warnings.append("--allow-pixels without --overlays changes nothing")
                summary = _summary(tally, model, time.perf_counter() - started, num_overlays, warnings) | {"plan": plan}
                with tables.replaced(place.done):
                    atomic.write_json(place.done, summary)
    if place.done.is_file():
        shutil.rmtree(place.parts, ignore_errors=True)
    if place.rank:
        return None
    assert summary is not None
    if strict and summary["num_failures"]:
        raise Failure(
            f"--strict: {summary['num_failures']} of {summary['num_files']} files failed, {out}/failures.{format} says why; "
            "mend or remove them and give another --out, or leave --strict out"
        )
    return summary


def _plan(
    model: Model, files: Walk, given: str | Mapping[str, str] | None, names: Names, options: dict[str, Any]
) -> dict[str, Any]:
    """What the run is; whatever differs, a run does not go on."""
    table = given if given is None or isinstance(given, str) else f"table {names.digest(_digest(given))}"
    return {
        "version": __version__,
        "model_sha256": model.sha256,
        "num_files": files.num_files,
        "files_sha256": names.digest(files.digest),
        "study_type": table,
        "provider": model.provider,
        "optimisation": model.tuning.optimisation,
        # Bits do not depend on it in ONNX Runtime on a CPU; nobody promises that of the others.
        "batch_size": None if model.provider == PROVIDERS["cpu"] else model.tuning.batch_size,
        "pseudonyms": names.fingerprint,
        "gate": gate.VERSION,
        **options,
    }


@dataclass(frozen=True)
class _Place:
    """Where the run is, and which of its ranks this process is."""

    out: Path
    rank: int
    num_ranks: int

    @property
    def parts(self) -> Path:
        return self.out / ".parts"

    @property
    def plan(self) -> Path:
        return self.parts / "plan.json"

    @property
    def done(self) -> Path:
        return self.out / "predict.json"

    def part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.json"

    def missing(self, num_chunks: int) -> list[int]:
        try:
            names = set(os.listdir(self.parts))
        except FileNotFoundError:
            if not self.done.is_file():
                raise
            return []  # the first rank has finished, and tidied up
        return [number for number in range(num_chunks) if self.part(number).name not in names]


def _check_tuning(autotune: bool, batch_size: int | None) -> None:
    if autotune and batch_size is not None:
        raise Refusal(f"--autotune finds the batch size, --batch-size {batch_size} sets it; leave one of them out")
    if autotune and environment.world_size() > 1:
        raise Refusal("--autotune measures one process alone; run it once without torchrun or srun, then leave it out")


def _way(
    place: "_Place",
    model: Model,
    provider: str,
    batch_size: int | None,
    to_measure: Path | None,
    say: Callable[[str], None],
) -> Tuning:
    """How to run `model`: what moves bits as the run in `out` began, else as it was measured to run fastest on this machine,
    `to_measure` now or some time before, else as it comes."""
    alone = batch_size is None and environment.world_size() == 1
    usual = (tuning.stored(model) if alone else None) or model.tuning
    for path in (place.plan, place.done):
        begun = _load(path) if path.is_file() else {}
        plan = begun.get("plan", begun)
        if (plan.get("model_sha256"), plan.get("provider")) == (model.sha256, model.provider):
            way = replace(usual, optimisation=plan.get("optimisation", usual.optimisation))
            return replace(way, batch_size=batch_size or plan.get("batch_size") or way.batch_size)
    return usual if to_measure is None else tuning.choose(to_measure, provider, say)


def _check(directory: Path, out: Path, study_by: str, format: str, batch_size: int | None, workers: int | None) -> None:
    if not directory.is_dir():
        what = "a file" if directory.exists() else "no such folder"
        raise Refusal(f"{directory}: {what}; give a folder of radiographs")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise Refusal(f"{directory} cannot be listed: permission denied; give a folder you may read")
    if study_by not in grouping.STUDY_BY:
        raise Refusal(f"--study-by {study_by}: must be one of {', '.join(grouping.STUDY_BY)}; auto is the default")
    if format not in tables.FORMATS:
        raise Refusal(f"--format {format}: must be one of {', '.join(tables.FORMATS)}; csv is the default")
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise Refusal(
            "--format parquet needs pyarrow, which is not installed; pip install 'mura-dist[parquet]', or use csv"
        )
    for name, number in (("--batch-size", batch_size), ("--workers", workers)):
        if number is not None and number < 1:
            raise Refusal(f"{name} {number}: must be at least 1; leave it out for a choice by the machine")
    if workers is not None and workers > MAX_WORKERS:
        raise Refusal(f"--workers {workers}: must be at most {MAX_WORKERS}; leave it out for a choice by the machine")
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file; give a folder")
    if out.is_dir() and out.samefile(directory):
        raise Refusal(f"--out {out} is the directory of radiographs itself; give another folder")


def _names(keytable: Path | None, out: Path, directory: Path) -> Names:
    if keytable is None:
        return Names()
    pseudonyms.check(keytable, out, directory)
    return Names(pseudonyms.site_key(out, directory))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _refuse_foreign(out: Path) -> None:
    if (out / "predict.json").is_file() or (out / ".parts" / "plan.json").is_file():
        return
    names = [f"{name}.{format}" for name in tables.NAMES for format in tables.FORMATS]
    if found := [name for name in (*names, FOLDER) if (out / name).exists()]:
        raise Refusal(f"--out {out} holds {found[0]}, which is not of this run; give another folder, or move it away")


@contextlib.contextmanager
def _walked(
    directory: Path,
    place: _Place,
    names: Names,
    keytable: Path | None,
    asked: threading.Event,
    walking: Callable[[int], None],
) -> Iterator[Walk]:
    """The walk, on disk while the block runs: with a key table beside it, for it names every file, and in the order of the
    pseudonyms, for in that of the paths a list of patients could be laid beside the tables. Raises Refusal where there is
    no file."""

    def found(num: int) -> None:
        if asked.is_set():
            raise Stopped("stopped while looking for files; the same command goes on")
        walking(num)

    def by_name(path: bytes) -> bytes:
        return names.file(file_list.printable(os.fsdecode(path))).encode() + b"\0" + path  # two alike stay two

    database = place.parts / f"walk-{place.rank}.sqlite"
    more: dict[str, Any] = {}
    if keytable is not None:
        database = keytable.with_name(f".{keytable.name}.walk{_aside(place)}.sqlite")
        more = {"sort_by": by_name, "mode": 0o600}
    try:
        files = file_list.find(directory, database, size=CHUNK, leave_out=place.out, found=found, **more)
        if not files.num_files:
            raise Refusal(f"{directory} holds no files; give a folder of radiographs")
        yield files
    finally:
        with contextlib.suppress(OSError):  # a start makes it anew
            database.unlink()


def _aside(place: _Place) -> str:
    """What tells this rank of this run from others that use the same key table."""
    return f"-{_digest(os.path.abspath(place.out))[:8]}-{place.rank}"


def _begun(place: _Place, plan: dict[str, Any], asked: threading.Event) -> dict[str, Any] | None:
    """The summary where `out` holds this very run, finished; None where it is to be made. Refuses any other run."""
    ears = heartbeat.Ears()
    while not place.done.is_file() and not place.plan.is_file():
        if place.rank == 0:
            atomic.write_json(place.plan, plan)
            break
        if ears.silent_s(heartbeat.heart(place.parts, 0)) > PLAN_WAIT_S:
            raise Failure(
                f"rank {place.rank} of {place.num_ranks} waited {PLAN_WAIT_S:.0f} s for rank 0 to begin in {place.out}; "
                "see what rank 0 says, and that all ranks see the same folder"
            )
        _pause(asked)
    if place.done.is_file():
        summary = _load(place.done)
        _compare(place, summary.get("plan", {}), plan)
        return summary
    _compare(place, _load(place.plan), plan)
    for stale in place.out.glob(".*.partial") if place.rank == 0 else ():  # of a run that was killed
        stale.unlink(missing_ok=True)
    return None


def _pause(asked: threading.Event) -> None:
    if asked.wait(_POLL_S):
        raise Stopped("stopped while waiting for another rank; the same command goes on")


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise Refusal(f"{path} is damaged; give another --out, or delete that folder")


def _compare(place: _Place, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            said = (
                f"--out {place.out} holds a run with {key}={before.get(key)}, this one has {key}={value}; "
                "a run goes on only as it began: give another --out, or delete that folder"
            )
            raise OwnRefusal(f"rank {place.rank}: {said}") if place.rank else Refusal(said)


# ---- the parts


@dataclass
class _Chunk:
    """Files that were read, or are being read, and the logits of those radiographs that are predicted already."""

    number: int
    files: list[File]
    readings: list[Reading] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    cells: list[np.ndarray] = field(default_factory=list)  # (h, w) float32, where overlays are wanted

    @property
    def predicted(self) -> bool:
        radiographs = sum(reading.image is not None for reading in self.readings)
        return len(self.readings) == len(self.files) and len(self.logits) == radiographs


@dataclass
class _Work:
    """What this rank does: the parts of its chunks; on the first one also those of ranks that fell silent."""

    model: Model
    directory: Path
    grouping: Grouping
    files: Walk
    place: _Place
    batch_size: int
    workers: int | None
    limits: Limits
    asked: threading.Event
    progress: Callable[[int, int], None]
    done: int = 0
    overlays: Overlays | None = None

    def do(self) -> None:
        place = self.place
        missing = self._missing()
        self.progress(self.done, self.files.num_files)
        mine = [number for number in missing if number % place.num_ranks == place.rank]
        if not missing or (place.rank and not mine):
            return
        with worker_pool.crew(
            Reader, (self.model.size,), workers=self._num_workers(len(mine)), limits=self.limits
        ) as crew:
            self._make(crew, mine)
            ears = heartbeat.Ears()
            while place.rank == 0 and (missing := self._missing()):
                self.progress(self.done, self.files.num_files)
                silent = [number for number in missing if self._is_silent(ears, number % place.num_ranks)]
                if silent:
                    self._make(crew, silent[:1])
                else:
                    _pause(self.asked)

    def _is_silent(self, ears: heartbeat.Ears, rank: int) -> bool:
        return ears.silent_s(heartbeat.heart(self.place.parts, rank)) > heartbeat.SILENCE_S

    def _missing(self) -> list[int]:
        """The chunks without a part, whoever was to make them; `done` is brought up to date."""
        missing, num_chunks = self.place.missing(self.files.num_chunks), self.files.num_chunks
        self.done = self.files.num_files - CHUNK * len(missing)
        if num_chunks - 1 in missing:
            self.done += CHUNK * num_chunks - self.files.num_files
        return missing

    def _num_workers(self, num_chunks: int) -> int:
        """Reading is a twentieth of a CPU's work here; 16 keep a GPU fed. Each may hold one radiograph of full size."""
        num_files = min(num_chunks * CHUNK, self.files.num_files)
        if self.workers is not None:
            return max(1, min(self.workers, num_files))
        return max(1, min(16, processors() // environment.ranks_here(), num_files // _FILES_PER_WORKER))

    def _make(self, crew: Crew, numbers: list[int]) -> None:
        """A part for each of these chunks. Batches never cross chunks: what is predicted together is the same in every run."""
        begun: deque[_Chunk] = deque()
        batches = self._batches(crew, numbers, begun)
        wanted = OUTPUTS if self.overlays is not None else OUTPUTS[:1]
        for logits, *cells in self.model.stream(
            batches, wanted
        ):  # aligned with the batches, however many are ahead of it
            chunk = next(chunk for chunk in begun if not chunk.predicted)
            chunk.cells += [each for part in cells for each in part]
            chunk.logits += logits.tolist()
            self._write(begun)
        self._write(begun)
        if self.asked.is_set() and self._missing():
            raise Stopped(f"stopped after {self.done:,} of {self.files.num_files:,} files; the same command goes on")

    def _batches(self, crew: Crew, numbers: list[int], begun: deque[_Chunk]) -> Iterator[np.ndarray]:
        """(B, 1, S, S) uint8, chunk after chunk; each chunk is in `begun` before its first batch. To be drawn by this thread."""
        at_once = max(1, min(_AT_ONCE, _AT_ONCE_BYTES // self.model.size**2))
        ahead = max(2, -(-2 * self.batch_size // (at_once * crew.workers)))  # two batches at least
        readings = crew.results(_tasks(self.files, numbers, self.directory, at_once), ahead=ahead)
        for number, files in zip(numbers, self.files.chunks(numbers), strict=True):
            if self.asked.is_set():
                return
            chunk, images = _Chunk(number, files), []
            begun.append(chunk)
            for file in files:
                reading = failed(*file.failure) if file.failure is not None else _reading(next(readings))
                chunk.readings.append(reading)
                self.done += 1
                self.progress(self.done, self.files.num_files)
                if reading.image is not None:
                    images.append(reading.image)
                if len(images) == self.batch_size:
                    yield np.stack(images)[:, None]
                    images = []
            if images:
                yield np.stack(images)[:, None]
            self._write(begun)  # a chunk without a radiograph gets no logits
        assert next(readings, None) is None  # read to its end, as a Crew wants it

    def _write(self, begun: deque[_Chunk]) -> None:
        """The parts of those chunks at the head that are predicted."""
        while begun and begun[0].predicted:
            chunk = begun.popleft()
            # Here a chunk's files, images, identities and logits are together: what else is made of them, is made here.
            part = json.dumps(self._part(chunk), ensure_ascii=False, allow_nan=False)
            aside = f".{self.place.rank}-{os.getpid()}"  # two ranks may make the same one
            with atomic.replacing(self.place.part(chunk.number), aside=aside) as file:
                file.write(part.encode())
            if self.place.num_ranks > 1:  # what the others have done meanwhile
                self._missing()
                self.done += sum(len(chunk.readings) for chunk in begun)

    def _part(self, chunk: _Chunk) -> Part:
        rows: list[list[Any]] = []
        failures: list[tuple[str, str, str]] = []
        logits = iter(chunk.logits)
        for file, reading in zip(chunk.files, chunk.readings, strict=True):
            name = self.grouping.name(file.path)
            if reading.image is None:
                failures.append((name, *reading.failure))
                continue
            if not np.isfinite(logit := next(logits)):
                raise Failure(f"{name}: the model's logit is {logit}; it is broken, export it again or give another")
            rows.append([name, *self.grouping.of(file.path, reading.identity), logit, reading.gate])
        return {"predictions": rows, "failures": failures, "overlays": self._draw(chunk, [row[0] for row in rows])}

    def _draw(self, chunk: _Chunk, names: list[str]) -> dict[str, int]:
        """The chunk's overlays are on disk then; how many, and how many are withheld."""
        if self.overlays is None:
            return counts(0, 0)
        read = [(reading.image, reading.identity) for reading in chunk.readings if reading.image is not None]
        some = [
            Overlay(name, image, cells, logit)
            for name, (image, identity), cells, logit in zip(names, read, chunk.cells, chunk.logits, strict=True)
            if not self.overlays.withholds(identity)
        ]
        self.overlays.write_all(some)
        return counts(len(some), len(names) - len(some))


def _tasks(files: Walk, numbers: Iterable[int], directory: Path, at_once: int) -> Iterator[list[str]]:
    """The paths to be read, in order, `at_once` at most at a time."""
    for chunk in files.chunks(numbers):
        paths = [os.path.join(directory, file.path) for file in chunk if file.failure is None]
        yield from (paths[start : start + at_once] for start in range(0, len(paths), at_once))


def _reading(result: Reading | Lost) -> Reading:
    return failed("unreadable", f"its decoder {result.why}") if isinstance(result, Lost) else result


def _parts(place: _Place, files: Walk, asked: threading.Event) -> Iterator[Part]:
    for number in range(files.num_chunks):
        if asked.is_set():
            raise Stopped("stopped while writing the tables; nothing is lost, the same command goes on")
        yield _load(place.part(number))


def _ways_back(groups: Grouping, place: _Place, files: Walk, asked: threading.Event) -> Iterator[pseudonyms.Row]:
    """A line a file for the key table. A DICOM's study has no other name than its pseudonym; what failed has no study."""
    for chunk, part in zip(files.chunks(range(files.num_chunks)), _parts(place, files, asked), strict=True):
        studies = {name: study for name, study, *_ in part["predictions"]}
        for file in chunk:
            name, study = groups.name(file.path), groups.place(file.path)
            known_as = studies.get(name, "")
            by_path = known_as == groups.names.study(study)
            yield file_list.printable(file.path), name, study if by_path else known_as, known_as


@contextlib.contextmanager
def _stop_asked() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets. The second signal does what it always did."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.signal(number, ask) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(
    tally: Tally, model: Model, seconds: float, num_overlays: dict[str, int], warnings: list[str]
) -> dict[str, Any]:
    """predict.json: counts, warnings, what computed, and the terms. `seconds` are those of the last command."""
    card, num_failures = model.card, tally.failures_by_code.total()
    return {
        "num_files": tally.num_radiographs + num_failures,
        "num_radiographs": tally.num_radiographs,
        "num_studies": tally.num_studies,
        "num_calls": tally.num_calls,
        "num_positive": tally.num_positive,
        "num_calibrated": tally.num_calibrated,
        "studies_by_band": {name: tally.studies_by_band[name] for name in BANDS},
        "num_failures": num_failures,
        "failures_by_code": dict(sorted(tally.failures_by_code.items())),
        "radiographs_by_gate": {name: tally.radiographs_by_gate[name] for name in gate.NAMES},
        **num_overlays,
        "studies_by_type": dict(sorted(tally.studies_by_type.items())),
        "warnings": warnings + _warnings(tally, card),
        "seconds": round(seconds, 3),
        "model": {
            "sha256": model.sha256,
            "size": card.size,
            "trained_on": card.trained_on.model_dump(mode="json"),
            "selected_on": card.selected_on,
            "checkpoint": card.checkpoint,
            "version": card.version,
        },
        "provider": model.provider,
        "versions": {
            "mura_dist": __version__,
            "python": platform.python_version(),
            "engine": version(model.provider),
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pillow": PIL.__version__,
        },
        "terms": mura.TERMS,
        "licence": card.licence,
    }


def _warnings(tally: Tally, card: Card) -> list[str]:
    warnings = []
    if card.trained_on.kind == "phantoms":
        warnings.append("the model was trained on drawings (phantoms): what it says of a radiograph means nothing")
    for study_type, number in sorted(tally.uncalled_by_type.items()):
        warnings.append(f"no threshold was evaluated for study type {study_type}: no call for {number} of its studies")
    if card.calibration.reason is not None:
        warnings.append(f"no calibrated probability, no uncertain band: {card.calibration.reason}")
    for name in gate.NAMES:
        if name in gate.WORDS and (number := tally.radiographs_by_gate[name]):
            many = f"{number} of {tally.num_radiographs} radiographs"
            warnings.append(f"column gate of predictions says {name} of {many}: {gate.WORDS[name]}")
    return warnings
