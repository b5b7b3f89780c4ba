"""Files and folders of radiographs -> predictions.csv, studies.csv, failures.csv. No torch from here on.

    inputs.Inputs -> file_list.list_files -> chunks of 256 files -> chunks.py: read by guarded processes, predicted in batches
        -> OUT/overlays, where wanted -> OUT/.parts/000000.json, one a chunk -> KEYTABLE, where wanted -> tables.py
        -> README.txt -> predict.json (last: it says "done")

Every file ends in exactly one of predictions and failures, also one that crashes, stalls or bloats its decoder: that is why
processes read, not threads, which are a little faster (2 cores, 512-px PNG to 320: 690 against 841 radiographs/s). A chunk is the
unit of work and of resumption: killed anywhere, the same command makes the missing ones, and the same bytes. A file that an I/O
fault kept from being read is in failures as io_error; then there is no predict.json, and the same command reads it again. No
list is as long as the directory: what is, lies on disk. `OUT/.parts/plan.json` says what the run is; another model, other
options or other files in the same OUT are refused, and so is a second start while the first one lives.

Several ranks (torchrun's or Slurm's) share the work: each takes every n-th chunk; the first one writes the plan and the tables,
and makes itself what a rank that fell silent has left undone. Nobody talks to anybody but through OUT/.parts.
"""

import contextlib
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mura_dist import __version__
from mura_dist.core.errors import RunError, StopRequestedError, UserError, install_remedy
from mura_dist.core.files import PRIVATE, private, scratch
from mura_dist.data import gate
from mura_dist.data.io_faults import IO_ERROR
from mura_dist.distributed import environment, worker_pool
from mura_dist.distributed.processes import end_with_launcher
from mura_dist.distributed.signals import stop_event
from mura_dist.distributed.worker_pool import PoolLimits
from mura_dist.inference import autotune, file_list, grouping, pseudonyms, study_types, table_guide, tables
from mura_dist.inference.batch_limit import LIMIT_S
from mura_dist.inference.chunks import CHUNK, ChunkPredictor
from mura_dist.inference.engine import GRAPH_OPTIMIZATIONS, PROVIDERS, SessionConfig, pipelined_config
from mura_dist.inference.file_list import FileList
from mura_dist.inference.grouping import Grouping
from mura_dist.inference.inputs import Inputs, exclude_output
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.output_folder import OutputFolder, json_sha256, refuse_foreign
from mura_dist.inference.overlays import Overlays, sum_overlay_counts
from mura_dist.inference.predict_summary import summarize
from mura_dist.inference.pseudonyms import Pseudonymizer
from mura_dist.inference.tables import ChunkResult, TableCounts
from mura_dist.models.card import Card

MAX_WORKERS = 256

Progress = Callable[[int, int | None], None]
"""Hears of files done and of all files; while the directory is walked, of files found and None."""


@dataclass(frozen=True)
class PredictOptions:
    """What a prediction is asked for beside model, directory and output folder: the command's options, by their names."""

    study_by: str = "auto"  # what makes a study: auto, folder or file
    study_type: str | None = None  # of all radiographs, or a CSV of path,study_type; None: as paths and DICOM tell
    provider: str = "cpu"  # what computes: see OnnxModel.load
    format: str = "csv"  # of the tables: csv or parquet
    batch_size: int | None = None  # radiographs at once; None: as an autotune found best here, or by provider
    workers: int | None = None  # processes that read; None: by files and processors
    autotune: bool = False  # first measure what runs this model fastest on this machine
    strict: bool = False  # any failure is an error, once the tables are written
    overlays: bool = False  # draw every radiograph and its class activation map
    allow_pixels: bool = False  # draw those too whose pixels may show a name
    shared: bool = False  # what is written is for others to read too, as the umask says; else for its owner alone
    keytable: Path | None = None  # files and studies go by pseudonyms, and this CSV leads back
    batch_limit_s: float = LIMIT_S  # what computing one batch may take
    limits: PoolLimits = worker_pool.DEFAULT_LIMITS  # what reading one file may take: seconds, bytes


def predict(
    model_path: Path,
    inputs: Path | Sequence[Path | str],
    out: Path,
    options: PredictOptions = PredictOptions(),
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any] | None:
    """Predict every radiograph of `inputs`, a folder, or files and folders, into tables in `out`. Resumes.

    `out` is not looked into where it lies inside a folder of `inputs`, or where it is one of several and holds a prediction.
    Returns predict.json's content, on ranks but the first None. `log` hears how an autotune goes. Raises UserError, RunError,
    StopRequestedError (SIGINT, SIGTERM: after the current chunk), and OSError when the disk is full.
    """
    end_with_launcher()
    paths = [inputs] if isinstance(inputs, Path) else exclude_output(inputs, out)
    with pseudonyms.redact_paths(paths, options.keytable):
        started = time.perf_counter()
        sources = Inputs.parse(paths)
        _check(sources, out, options)
        names = _names(options.keytable, out, sources)
        _check_autotune(options)
        model = OnnxModel.load(
            model_path, options.provider, pipelined_config(options.batch_size), options.batch_limit_s
        )
        groups, warnings = _grouping(sources, out, options, names, model.card)
        refuse_foreign(out)
        folder = OutputFolder(out, environment.rank(), environment.world_size())
        with (
            contextlib.nullcontext() if options.shared else private(out),
            stop_event(patience_s=0) as stop,
            folder.locked(stop),
            _walked(sources, folder, names, options.keytable, stop, progress) as files,
        ):
            if (
                session_config := _resolve_session_config(folder, model, model_path, options, log)
            ) != model.session_config:
                model = OnnxModel.load(model_path, options.provider, session_config, options.batch_limit_s)
            warnings += study_types.match(groups.override, files.printable_paths())
            if options.allow_pixels and not options.overlays:
                warnings.append("--allow-pixels without --overlays changes nothing")
            plan = _plan(model, files, groups, options)
            _check_keytable(options.keytable, folder, files, names)
            summary = folder.begin(plan, stop)
            if summary is None:
                overlays = _overlays(model, folder, options)
                chunks = ChunkPredictor(model, sources.directory, groups, files, folder, overlays, stop, progress)
                chunks.run(options.workers, options.limits)
                if folder.rank == 0:
                    tally, num_overlays = _write_tables(folder, files, groups, model.card, options, stop)
                    _refuse_faults(tally, folder.load_parts(files.num_chunks, stop))
                    seconds = time.perf_counter() - started
                    summary = summarize(tally, model, num_overlays, warnings, seconds)
                    summary |= {"throughput": chunks.throughput.summary(), "plan": plan}
                    folder.finish(summary, table_guide.readme(model.card, options.format))
            if folder.rank == 0:
                folder.clean()
        if folder.rank:
            return None
        assert summary is not None
        _check_strict(summary, out, options)
        return summary


def _check(inputs: Inputs, out: Path, options: PredictOptions) -> None:
    if options.study_by not in grouping.STUDY_BY:
        raise UserError(
            f"--study-by {options.study_by}: must be one of {', '.join(grouping.STUDY_BY)}; auto is the default"
        )
    if options.format not in tables.FORMATS:
        raise UserError(f"--format {options.format}: must be one of {', '.join(tables.FORMATS)}; csv is the default")
    if options.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        remedy = install_remedy("parquet")
        raise UserError(f"--format parquet needs pyarrow, which is not installed; {remedy}, or use csv")
    for name, number in (("--batch-size", options.batch_size), ("--workers", options.workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: must be at least 1; leave it out for a choice by the machine")
    if not 0 < options.batch_limit_s < 1e8:
        raise UserError(
            f"--batch-limit {options.batch_limit_s:g}: must be seconds, more than 0; {LIMIT_S:g} is the default"
        )
    if options.workers is not None and options.workers > MAX_WORKERS:
        raise UserError(
            f"--workers {options.workers}: must be at most {MAX_WORKERS}; leave it out for a choice by the machine"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    if out.is_dir() and any(out.samefile(folder) for folder in inputs.folders):
        what = "the directory of radiographs itself" if inputs.members == ("",) else "one of the inputs"
        raise UserError(f"--out {out} is {what}. Give another folder.")


def _names(keytable: Path | None, out: Path, inputs: Inputs) -> Pseudonymizer:
    if keytable is None:
        return Pseudonymizer()
    pseudonyms.check_keytable(keytable, out, inputs.folders)
    return Pseudonymizer(pseudonyms.site_key(out, *inputs.folders))


def _check_autotune(options: PredictOptions) -> None:
    if options.autotune and options.batch_size is not None:
        raise UserError(
            f"--autotune finds the batch size, --batch-size {options.batch_size} sets it; leave one of them out"
        )
    if options.autotune and environment.world_size() > 1:
        raise UserError(
            "--autotune measures one process alone; run it once without torchrun or srun, then leave it out"
        )


def _grouping(
    inputs: Inputs, out: Path, options: PredictOptions, names: Pseudonymizer, card: Card
) -> tuple[Grouping, list[str]]:
    """Decide how files become studies, and what to warn of. Raises UserError for a study type that looks like a typo."""
    known = frozenset((*card.study_types, *card.thresholds))
    given = study_types.read_override(options.study_type)
    warnings = study_types.check(given, known)
    root = Path(os.path.abspath(inputs.directory)).as_posix().rstrip("/")
    return Grouping(root, options.study_by, given, known, names, key_free_folders=(out, *inputs.folders)), warnings


@contextlib.contextmanager
def _walked(
    inputs: Inputs,
    folder: OutputFolder,
    names: Pseudonymizer,
    keytable: Path | None,
    stop: threading.Event,
    progress: Progress,
) -> Iterator[FileList]:
    """List the files on disk while the block runs. Raises UserError where there is none.

    With a key table the list lies beside that, for it names every file, and has the order of the pseudonyms, for in that of
    the paths a list of patients could be laid beside the tables.
    """

    def found(num: int) -> None:
        if stop.is_set():
            raise StopRequestedError("stopped while looking for files; the same command goes on")
        progress(num, None)

    def by_name(path: bytes) -> bytes:
        return names.file(file_list.printable_path(os.fsdecode(path))).encode() + b"\0" + path  # two alike stay two

    more: dict[str, Any] = {} if keytable is None else {"sort_by": by_name}
    with scratch(keytable or folder.parts / "walk", mode=PRIVATE) as database:
        more |= {"chunk_size": CHUNK, "exclude": folder.path, "progress": found}
        files = file_list.list_files(inputs.directory, database, members=inputs.members, **more)
        if not files.num_files:
            raise UserError(f"{inputs.directory} holds no files. Give radiographs, or a folder of them.")
        yield files


def _resolve_session_config(
    folder: OutputFolder, model: OnnxModel, model_path: Path, options: PredictOptions, log: Callable[[str], None]
) -> SessionConfig:
    """Decide how to run `model`: what moves bits as the run in `folder` began, else as it was measured to run fastest on this
    machine, now (autotune) or some time before, else as it comes."""
    alone = options.batch_size is None and environment.world_size() == 1
    usual = (autotune.load_tuned_config(model) if alone else None) or model.session_config
    for plan in folder.plans():
        if (plan.get("model_sha256"), plan.get("provider")) == (model.sha256, model.provider):
            optimization, batch_size = plan.get("optimisation"), plan.get("batch_size")
            session_config = (
                replace(usual, optimization=optimization) if optimization in tuple(GRAPH_OPTIMIZATIONS) else usual
            )
            if (
                isinstance(batch_size, int) and 0 < batch_size < 2**16
            ):  # what is neither is refused with the rest of the plan
                session_config = replace(session_config, batch_size=batch_size)
            return replace(session_config, batch_size=options.batch_size or session_config.batch_size)
    return autotune.tune(model_path, options.provider, log) if options.autotune else usual


def _check_keytable(keytable: Path | None, folder: OutputFolder, files: FileList, names: Pseudonymizer) -> None:
    """Before any work: UserError where the key table is there and is not of these files."""
    if keytable is not None and folder.rank == 0 and not folder.done.is_file():
        pseudonyms.check_keytable_files(keytable, ((path, names.file(path)) for path in files.printable_paths()))


def _plan(model: OnnxModel, files: FileList, groups: Grouping, options: PredictOptions) -> dict[str, Any]:
    """Say what the run is; whatever differs, a run does not go on."""
    given, names = groups.override, groups.pseudonymizer
    table = given if given is None or isinstance(given, str) else f"table {names.digest(json_sha256(given))}"
    return {
        "version": __version__,
        "model_sha256": model.sha256,
        "num_files": files.num_files,
        "files_sha256": names.digest(files.digest),
        "study_type": table,
        "provider": model.provider,
        "optimisation": model.session_config.optimization,
        # Bits do not depend on it in ONNX Runtime on a CPU; nobody promises that of the others.
        "batch_size": None if model.provider == PROVIDERS["cpu"] else model.session_config.batch_size,
        "pseudonyms": names.fingerprint,
        "gate": gate.VERSION,
        "study_by": options.study_by,
        "format": options.format,
        "overlays": options.overlays,
        "allow_pixels": options.allow_pixels,
    }


def _overlays(model: OnnxModel, folder: OutputFolder, options: PredictOptions) -> Overlays | None:
    if not options.overlays:
        return None
    drawings = model.card.of_drawings
    return Overlays(folder.path, options.allow_pixels, drawings)


def _write_tables(
    folder: OutputFolder, files: FileList, groups: Grouping, card: Card, options: PredictOptions, stop: threading.Event
) -> tuple[TableCounts, dict[str, int]]:
    """Write the key table, where it is wanted, then the tables; what they hold, and how many overlays there are."""

    def parts() -> Iterator[ChunkResult]:
        return folder.load_parts(files.num_chunks, stop)

    if options.keytable is not None:
        pseudonyms.write_keytable(options.keytable, lambda: _ways_back(groups, files, parts()))
    tally = tables.write(folder.path, parts, card, options.format, folder.parts / "studies.sqlite")
    return tally, sum_overlay_counts(part["overlays"] for part in parts())


def _refuse_faults(tally: TableCounts, parts: Iterable[ChunkResult]) -> None:
    """Raise RunError where I/O faults kept files from being read: the prediction is not done."""
    if not (num := tally.failures_by_code[IO_ERROR]):
        return
    first = next(failure for part in parts for failure in part["failures"] if failure[1] == IO_ERROR)
    raise RunError(
        f"{num} files could not be read ({IO_ERROR}), the first is {first[0]}: {first[2]}; the tables hold all others. Fix the "
        "disk or the network, then the same command reads these files again"
    )


def _ways_back(groups: Grouping, files: FileList, parts: Iterable[ChunkResult]) -> Iterator[pseudonyms.KeyRow]:
    """A line a file for the key table. A DICOM's study has no other name than its pseudonym; what failed has no study."""
    for chunk, part in zip(files.chunks(range(files.num_chunks)), parts, strict=True):
        studies = {name: study for name, study, *_ in part["predictions"]}
        for file in chunk:
            name, study = groups.public_name(file.path), groups.study_of_path(file.path)
            known_as = studies.get(name, "")
            by_path = known_as == groups.pseudonymizer.study(study)
            yield file_list.printable_path(file.path), name, study if by_path else known_as, known_as


def _check_strict(summary: dict[str, Any], out: Path, options: PredictOptions) -> None:
    if options.strict and summary["num_failures"]:
        raise RunError(
            f"--strict: {summary['num_failures']} of {summary['num_files']} files failed, "
            f"{out}/failures.{options.format} says why; mend or remove them and give another --out, or leave --strict out"
        )
