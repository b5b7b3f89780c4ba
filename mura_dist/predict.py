"""A directory of radiographs -> predictions.csv, studies.csv, failures.csv. No torch from here on.

    walk.find -> chunks of 256 files -> read ahead by threads (radiograph.read) -> batches -> Model.outputs
        -> OUT/overlays, where wanted -> OUT/.parts/000000.json, one a chunk -> KEYTABLE, where wanted -> tables
        -> predict.json (last: it says "done")

Every file ends in exactly one of predictions and failures. A chunk is the unit of resumption: killed anywhere, the same
command makes the missing ones, and the same bytes. `OUT/.parts/plan.json` says what the run is; another model, other
options or other files in the same OUT are refused. Threads, not processes: Pillow decodes outside Python's lock (2
cores, 512-px PNG to 320: one thread 401 radiographs/s, two threads 841, two processes 690).
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import PIL

from . import __version__, atomic, mura, pseudonyms, radiograph, study_types, tables, walk
from .card import Card
from .overlays import FOLDER, Overlay, Overlays, counted, counts, warning
from .points import BANDS
from .pseudonyms import Names
from .refusal import Refusal, Stopped
from .runtime import ONNXRUNTIME, PROVIDERS, Model

CHUNK = 256


class Reading(NamedTuple):
    """A file as it was read: an image (S, S) uint8 and what a DICOM says of itself; or (code, reason) why not."""

    image: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    failure: tuple[str, str]


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
    overlays: bool = False,
    allow_pixels: bool = False,
    keytable: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Predict every radiograph below `directory` into tables in `out`; returns predict.json's content. Resumes.

    study_by: auto, folder or file; study_type: a study type for all, or a CSV of path,study_type; provider: see
    Model.load; format: csv or parquet; workers: threads that read; overlays: draw every radiograph and its map, with
    allow_pixels those too whose pixels may show a name; keytable: files and studies go by pseudonyms, and this file leads back.
    `out` is not looked into where it lies inside `directory`. Raises Refusal, Stopped (SIGINT, SIGTERM: after the current
    chunk), OSError when the disk is full.
    """
    started = time.perf_counter()
    _check(directory, out, study_by, format, batch_size, workers)
    names = _names(keytable, out, directory)
    model = Model.load(model_path, provider)
    known = frozenset((*model.card.study_types, *model.card.thresholds))
    given = study_types.read(study_type)
    warnings = study_types.check(given, known)
    files = walk.find(directory, leave_out=out)
    if not files:
        raise Refusal(f"{directory} holds no files; give a folder of radiographs")
    warnings += study_types.match(given, (walk.printable(file.path) for file in files))
    if keytable is not None:
        # In the order of their names the lines would tell them to whoever has a list of the files.
        files.sort(key=lambda file: names.file(walk.printable(file.path)))
    plan = {
        "version": __version__,
        "model_sha256": model.sha256,
        "num_files": len(files),
        "files_sha256": names.digest(walk.digest(files)),
        "study_by": study_by,
        "study_type": given if given is None or isinstance(given, str) else f"table {names.digest(_digest(given))}",
        "provider": model.provider,
        "format": format,
        "overlays": overlays,
        "allow_pixels": allow_pixels,
        "pseudonyms": names.fingerprint,
    }
    if keytable is not None and not (out / "predict.json").is_file():
        paths = (walk.printable(file.path) for file in files)
        pseudonyms.check_files(keytable, ((path, names.file(path)) for path in paths))
    if (summary := _begun(out, plan)) is not None:
        return summary
    place = Path(os.path.abspath(directory)).as_posix()
    grouping = walk.Grouping(place, study_by, given, known, names, apart=(out, directory))
    batch_size = batch_size or (8 if model.provider == PROVIDERS["cpu"] else 64)
    run = _Run(model, directory, grouping, out / ".parts", batch_size, workers or _num_workers())
    if overlays:
        run = replace(run, overlays=Overlays(out, allow_pixels, model.card.trained_on.kind == "phantoms"))
    parts = _make_parts(run, files, progress)
    if keytable is not None:
        pseudonyms.write(keytable, lambda: _ways_back(run, files, parts))
    frames = tables.build(parts, model.card)
    for stale in out.glob(".*.partial"):  # of a run that was killed
        stale.unlink(missing_ok=True)
    for name, frame in frames.items():
        tables.write(out / f"{name}.{format}", frame)
    num_overlays = counted(part["overlays"] for part in parts)
    if allow_pixels and not overlays:
        warnings.append("--allow-pixels without --overlays changes nothing")
    warnings += warning(num_overlays["num_overlays_withheld"])
    summary = _summary(frames, model, time.perf_counter() - started, num_overlays, warnings) | {"plan": plan}
    atomic.write_json(out / "predict.json", summary)
    shutil.rmtree(out / ".parts")
    return summary


def _check(directory: Path, out: Path, study_by: str, format: str, batch_size: int | None, workers: int | None) -> None:
    if not directory.is_dir():
        what = "a file" if directory.exists() else "no such folder"
        raise Refusal(f"{directory}: {what}; give a folder of radiographs")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise Refusal(f"{directory} cannot be listed: permission denied; give a folder you may read")
    if study_by not in walk.STUDY_BY:
        raise Refusal(f"--study-by {study_by}: must be one of {', '.join(walk.STUDY_BY)}; auto is the default")
    if format not in tables.FORMATS:
        raise Refusal(f"--format {format}: must be one of {', '.join(tables.FORMATS)}; csv is the default")
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise Refusal(
            "--format parquet needs pyarrow, which is not installed; pip install 'mura-dist[parquet]', or use csv"
        )
    for name, number in (("--batch-size", batch_size), ("--workers", workers)):
        if number is not None and number < 1:
            raise Refusal(f"{name} {number}: must be at least 1; leave it out for a choice by the machine")
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


def _begun(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The summary where `out` holds this very run, finished; None where it is to be made. Refuses any other run."""
    done, planned = out / "predict.json", out / ".parts" / "plan.json"
    if done.is_file():
        summary = _load(done)
        _compare(out, summary.get("plan", {}), plan)
        shutil.rmtree(out / ".parts", ignore_errors=True)
        return summary
    if planned.is_file():
        _compare(out, _load(planned), plan)
        return None
    names = [f"{name}.{format}" for name in tables.NAMES for format in tables.FORMATS]
    if found := [name for name in (*names, FOLDER) if (out / name).exists()]:
        raise Refusal(f"--out {out} holds {found[0]}, which is not of this run; give another folder, or move it away")
    atomic.write_json(planned, plan)
    return None


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
    except ValueError:
        pass
    raise Refusal(f"{path} is damaged; give another --out, or delete that folder")


def _compare(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            raise Refusal(
                f"--out {out} holds a run with {key}={before.get(key)}, this one has {key}={value}; "
                "a run goes on only as it began: give another --out, or delete that folder"
            )


def _num_workers() -> int:
    """Reading is a twentieth of a CPU's work here; 16 keep a GPU fed. Each may hold one radiograph of full size."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on Windows and macOS
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


@dataclass(frozen=True)
class _Run:
    model: Model
    directory: Path
    grouping: walk.Grouping
    parts: Path
    batch_size: int
    workers: int
    overlays: Overlays | None = None

    def name(self, file: walk.File) -> str:
        """Of a file, as the tables have it."""
        return self.grouping.names.file(walk.printable(file.path))


def _make_parts(run: _Run, files: list[walk.File], progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """One part a chunk, in the files' order; those on disk are taken as they are."""
    chunks = {
        run.parts / f"{start // CHUNK:06d}.json": files[start : start + CHUNK] for start in range(0, len(files), CHUNK)
    }
    todo = {path: chunk for path, chunk in chunks.items() if not path.is_file()}
    done = len(files) - sum(map(len, todo.values()))
    progress(done, len(files))
    if run.overlays is not None:
        run.overlays.begin()
    with _stop_asked() as asked, ThreadPoolExecutor(run.workers) as pool:
        readings = _read_ahead(run, pool, itertools.chain.from_iterable(todo.values()))
        readings = _count(readings, done, len(files), progress)
        for path, chunk in todo.items():
            if asked.is_set():
                raise Stopped(f"stopped after {done:,} of {len(files):,} files; the same command goes on")
            atomic.write_json(path, _part(run, chunk, readings))
            done += len(chunk)
    return [_load(path) for path in chunks]


def _read_ahead(run: _Run, pool: ThreadPoolExecutor, files: Iterable[walk.File]) -> Iterator[Reading]:
    """The readings of `files`, in order; never more than a batch and some waits in memory."""
    ahead: deque[Future[Reading]] = deque()
    for file in files:
        ahead.append(pool.submit(_read, run, file))
        if len(ahead) > run.batch_size + 2 * run.workers:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _count(
    readings: Iterable[Reading], done: int, total: int, progress: Callable[[int, int], None]
) -> Iterator[Reading]:
    for number, reading in enumerate(readings, start=done + 1):
        progress(number, total)
        yield reading


def _read(run: _Run, file: walk.File) -> Reading:
    if file.failure is not None:
        return Reading(None, None, file.failure)
    path = run.directory / file.path
    try:
        return Reading(radiograph.read(path, run.model.size), radiograph.identity(path), ("", ""))
    except radiograph.Unreadable as error:
        return Reading(None, None, (error.code, error.reason))


def _part(run: _Run, chunk: list[walk.File], readings: Iterator[Reading]) -> dict[str, Any]:
    """What tables.build takes, of one chunk; `readings` begin with the chunk's and go on into the next."""
    rows: list[tuple[str, str, str]] = []
    failures: list[tuple[str, str, str]] = []
    batch: list[_View] = []
    logits: list[float] = []
    num_withheld = 0
    for file in chunk:
        name, reading = run.name(file), next(readings)
        if reading.image is None:
            failures.append((name, *reading.failure))
            continue
        rows.append((name, *run.grouping.of(file.path, reading.identity)))
        draw = run.overlays is not None and not run.overlays.withholds(reading.identity)
        num_withheld += run.overlays is not None and not draw
        batch.append(_View(name, reading.image, draw))
        if len(batch) == run.batch_size:
            logits += _flush(run, batch)
    logits += _flush(run, batch)
    return {
        "predictions": [[*row, logit] for row, logit in zip(rows, logits, strict=True)],
        "failures": failures,
        "overlays": counts(len(rows) - num_withheld if run.overlays is not None else 0, num_withheld),
    }


class _View(NamedTuple):
    name: str
    image: np.ndarray  # (S, S) uint8
    draw: bool


def _flush(run: _Run, batch: list[_View]) -> list[float]:
    """The logits of `batch`, whose overlays are on disk then; nothing stays in it."""
    if not batch:
        return []
    images = np.stack([view.image for view in batch])[:, None]
    if run.overlays is None:
        logits = run.model.logits(images)
    else:
        logits, cells = run.model.outputs(images)
        seen = zip(batch, cells, logits.tolist(), strict=True)
        run.overlays.write_all([Overlay(view.name, view.image, *found) for view, *found in seen if view.draw])
    batch.clear()
    return logits.tolist()


def _ways_back(run: _Run, files: list[walk.File], parts: list[dict[str, Any]]) -> Iterator[pseudonyms.Row]:
    """A line a file for the key table. A DICOM's study has no other name than its pseudonym; what failed has no study."""
    studies = {name: study for part in parts for name, study, *_ in part["predictions"]}
    for file in files:
        name, study = run.name(file), run.grouping.place(file.path)
        known_as = studies.get(name, "")
        by_path = known_as == run.grouping.names.study(study)
        yield walk.printable(file.path), name, study if by_path else known_as, known_as


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
    frames: dict[str, pd.DataFrame], model: Model, seconds: float, num_overlays: dict[str, int], warnings: list[str]
) -> dict[str, Any]:
    """predict.json: counts, warnings, what computed, and the terms. `seconds` are those of the last command."""
    views, studies, failures = (frames[name] for name in tables.NAMES)
    card = model.card
    return {
        "num_files": len(views) + len(failures),
        "num_radiographs": len(views),
        "num_studies": len(studies),
        "num_calls": int(studies["call"].notna().sum()),
        "num_positive": int(studies["call"].sum()),
        "num_calibrated": int(studies["calibrated_probability"].notna().sum()),
        "studies_by_band": {name: int((studies["band"] == name).sum()) for name in BANDS},
        "num_failures": len(failures),
        "failures_by_code": dict(sorted(Counter(failures["code"]).items())),
        **num_overlays,
        "studies_by_type": dict(sorted(Counter(studies["study_type"]).items())),
        "warnings": warnings + _warnings(studies, card),
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
            "onnxruntime": ONNXRUNTIME,
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pillow": PIL.__version__,
        },
        "terms": mura.TERMS,
        "licence": card.licence,
    }


def _warnings(studies: pd.DataFrame, card: Card) -> list[str]:
    warnings = []
    if card.trained_on.kind == "phantoms":
        warnings.append("the model was trained on drawings (phantoms): what it says of a radiograph means nothing")
    for study_type, number in sorted(Counter(studies.loc[studies["call"].isna(), "study_type"]).items()):
        warnings.append(f"no threshold was evaluated for study type {study_type}: no call for {number} of its studies")
    if card.calibration.reason is not None:
        warnings.append(f"no calibrated probability, no uncertain band: {card.calibration.reason}")
    return warnings
