"""Files and folders of radiographs -> predictions.csv, studies.csv, failures.csv. No torch from here on.

    inputs.Inputs -> file_list.list_files -> chunks of 256 files -> chunks.py: read by worker processes, predicted in batches
        -> OUT/overlays, with --overlays -> OUT/.parts/000000.json, one per chunk -> KEYTABLE, with --pseudonyms -> tables.py
        -> README.txt -> predict.json (last: it marks the prediction as complete)

Every file ends in exactly one of predictions and failures, even if it crashes its decoder, stalls it or exhausts the memory.
Therefore processes read, although threads are a little faster (2 cores, 512-px PNG to 320 px: 841 against 690 radiographs/s).

A chunk is the unit of work and of resumption. After a crash the same command predicts the missing chunks and writes the same
bytes. A file that an I/O fault kept from being read is in failures as io_error. Then predict.json is not written, and the same
command reads the file again. Lists as long as the directory are on disk, not in memory. `OUT/.parts/plan.json` describes the run.
A start with another model, other options or other files in the same OUT raises UserError, and so does a second start while the
first one runs.

Several ranks (torchrun or Slurm) share the work through OUT/.parts alone. Each takes every n-th chunk. Rank 0 writes the plan and
the tables, and predicts the chunks of a rank whose heartbeat expired.
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
from mura_dist.core.files import PRIVATE, json_sha256, private, scratch
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
from mura_dist.inference.output_folder import OutputFolder, refuse_foreign
from mura_dist.inference.overlays import Overlays, sum_overlay_counts
from mura_dist.inference.predict_summary import summarize
from mura_dist.inference.pseudonyms import Pseudonymizer
from mura_dist.inference.reader_pool import start_readers
from mura_dist.inference.tables import ChunkResult, TableCounts
from mura_dist.models.card import Card

MAX_WORKERS = 256

Progress = Callable[[int, int | None], None]
"""Called with the numbers of finished files and of all files; while files are listed, with the number so far and None."""


@dataclass(frozen=True)
class PredictOptions:
    """Options of `mura-dist predict`, by their names.

    Attributes:
        study_by: What forms a study: auto, folder or file.
        study_type: Study type of all radiographs, or a CSV of path,study_type. None takes it from paths and DICOM.
        provider: Provider that computes, as in OnnxModel.load.
        format: Format of the tables, csv or parquet.
        batch_size: Radiographs per batch. None takes it from an autotune, or else from the provider.
        workers: Number of reading processes. None chooses by the numbers of files and processors.
        autotune: Measure the fastest configuration of this model on this machine first.
        strict: Raise RunError for any failure, after the tables are written.
        overlays: Draw every radiograph with its class activation map.
        allow_pixels: Draw also radiographs whose pixels may show a name.
        shared: Create files with the permissions of the umask. Otherwise only their owner may read them.
        keytable: Replace names of files and studies by pseudonyms, and write this CSV that maps them back.
        batch_limit_s: Time limit of a batch in seconds.
        limits: Limits of reading one file.
    """

    study_by: str = "auto"
    study_type: str | None = None
    provider: str = "cpu"
    format: str = "csv"
    batch_size: int | None = None
    workers: int | None = None
    autotune: bool = False
    strict: bool = False
    overlays: bool = False
    allow_pixels: bool = False
    shared: bool = False
    keytable: Path | None = None
    batch_limit_s: float = LIMIT_S
    limits: PoolLimits = worker_pool.DEFAULT_LIMITS


def predict(
    model_path: Path,
    inputs: Path | Sequence[Path | str],
    out: Path,
    options: PredictOptions = PredictOptions(),
    *,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any] | None:
    """Predict radiographs into tables. The same call resumes.

    Args:
        model_path: The file that `mura-dist export` wrote.
        inputs: A folder, or several files and folders. `out` is skipped if it lies inside a folder, or if it is one of several
            paths and holds a prediction.
        out: Folder to write.
        options: Options of the command.
        log: Called with each line of an autotune.
        progress: See Progress.

    Returns:
        Content of predict.json; None on ranks other than 0.

    Raises:
        UserError: an input, an option or the model is wrong.
        RunError: a file could not be read for an I/O fault, a batch failed, or a table could not be written.
        StopRequestedError: SIGINT or SIGTERM. The current chunk is complete.
        OSError: the disk is full.
    """
    end_with_launcher()
    paths = [inputs] if isinstance(inputs, Path) else exclude_output(inputs, out)
    with pseudonyms.redact_paths(paths, options.keytable):
        start = time.perf_counter()
        sources = Inputs.parse(paths)
        _check(sources, out, options)
        pseudonymizer = _load_pseudonymizer(options.keytable, out, sources)
        _check_autotune(options)
        config = pipelined_config(options.batch_size)
        loading_start = time.perf_counter()
        model = OnnxModel.load(model_path, options.provider, config, options.batch_limit_s)
        loading_s = time.perf_counter() - loading_start
        groups, warnings = _build_grouping(sources, out, options, pseudonymizer, model.card)
        refuse_foreign(out)
        folder = OutputFolder(out, environment.rank(), environment.world_size())
        with (
            contextlib.nullcontext() if options.shared else private(out),
            stop_event(patience_s=0) as stop,
            folder.locked(stop),
            start_readers(
                model.size, min(model.session_config.batch_size or 1, CHUNK), options.workers, options.limits
            ) as readers,
            _listed_files(sources, folder, pseudonymizer, options.keytable, stop, progress) as files,
        ):
            if (config := _resolve_session_config(folder, model, model_path, options, log)) != model.session_config:
                model = OnnxModel.load(model_path, options.provider, config, options.batch_limit_s)
            warnings += study_types.match(groups.override, files.printable_paths())
            if options.allow_pixels and not options.overlays:
                warnings.append("--allow-pixels has no effect without --overlays")
            plan = _build_plan(model, files, groups, options)
            _check_keytable(options.keytable, folder, files, pseudonymizer)
            summary = folder.begin(plan, stop)
            if summary is None:
                overlays = (
                    Overlays(out, options.allow_pixels, model.card.trained_on_phantoms) if options.overlays else None
                )
                chunks = ChunkPredictor(model, sources.directory, groups, files, folder, overlays, stop, progress)
                chunks.run(readers)
                if folder.rank == 0:
                    counts, num_overlays = _write_tables(folder, files, groups, model.card, options, stop)
                    _check_io_faults(counts, folder.load_chunks(files.num_chunks, stop))
                    seconds = time.perf_counter() - start
                    summary = summarize(counts, model, num_overlays, warnings, seconds)
                    summary |= {
                        "throughput": chunks.throughput.summary(),
                        "loading_s": round(loading_s, 3),
                        "plan": plan,
                    }
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
            f"--study-by {options.study_by}: must be one of {', '.join(grouping.STUDY_BY)}. The default is auto."
        )
    if options.format not in tables.FORMATS:
        raise UserError(f"--format {options.format}: must be one of {', '.join(tables.FORMATS)}. The default is csv.")
    if options.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        remedy = install_remedy("parquet")
        raise UserError(f"--format parquet needs pyarrow, which is not installed. Install it: {remedy}, or use csv.")
    for name, number in (("--batch-size", options.batch_size), ("--workers", options.workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}: must be at least 1. Leave it out to let the machine choose.")
    if not 0 < options.batch_limit_s < 1e8:
        raise UserError(
            f"--batch-limit {options.batch_limit_s:g}: must be a number of seconds above 0. The default is {LIMIT_S:g}."
        )
    if options.workers is not None and options.workers > MAX_WORKERS:
        raise UserError(
            f"--workers {options.workers}: must be at most {MAX_WORKERS}. Leave it out to let the machine choose."
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Give a folder.")
    if out.is_dir() and any(out.samefile(folder) for folder in inputs.folders):
        role = "the directory of radiographs itself" if inputs.members == ("",) else "one of the inputs"
        raise UserError(f"--out {out} is {role}. Give another folder.")


def _load_pseudonymizer(keytable: Path | None, out: Path, inputs: Inputs) -> Pseudonymizer:
    if keytable is None:
        return Pseudonymizer()
    pseudonyms.check_keytable(keytable, out, inputs.folders)
    return Pseudonymizer(pseudonyms.site_key(out, *inputs.folders))


def _check_autotune(options: PredictOptions) -> None:
    if options.autotune and options.batch_size is not None:
        raise UserError(
            f"--autotune chooses the batch size, and --batch-size {options.batch_size} sets it. Leave one of them out."
        )
    if options.autotune and environment.world_size() > 1:
        raise UserError(
            "--autotune measures a single process. Run it once without torchrun or srun, then leave it out."
        )


def _build_grouping(
    inputs: Inputs, out: Path, options: PredictOptions, pseudonymizer: Pseudonymizer, card: Card
) -> tuple[Grouping, list[str]]:
    """Return the grouping, and warnings. Raises UserError for a mistyped study type."""
    model_types = frozenset((*card.study_types, *card.thresholds))
    override = study_types.read_override(options.study_type)
    warnings = study_types.check(override, model_types)
    root = Path(os.path.abspath(inputs.directory)).as_posix().rstrip("/")
    key_free_folders = (out, *inputs.folders)
    return Grouping(root, options.study_by, override, model_types, pseudonymizer, key_free_folders), warnings


@contextlib.contextmanager
def _listed_files(
    inputs: Inputs,
    folder: OutputFolder,
    pseudonymizer: Pseudonymizer,
    keytable: Path | None,
    stop: threading.Event,
    progress: Progress,
) -> Iterator[FileList]:
    """Keep a list of the files on disk while the block runs. Raises UserError if there are no files.

    With a key table the list lies beside it, since it names every file. It then has the order of the pseudonyms: the order of
    the paths would let anybody who has a list of the patients align it with the tables.
    """

    def report(num_files: int) -> None:
        if stop.is_set():
            raise StopRequestedError("stopped while listing the files. The same command resumes.")
        progress(num_files, None)

    def sort_by_pseudonym(path: bytes) -> bytes:
        name = pseudonymizer.file(file_list.printable_path(os.fsdecode(path)))
        return name.encode() + b"\0" + path  # unique, even if two pseudonyms are equal

    with scratch(keytable or folder.parts / "walk", mode=PRIVATE) as database:
        arguments: dict[str, Any] = {} if keytable is None else {"sort_by": sort_by_pseudonym}
        arguments |= {"members": inputs.members, "chunk_size": CHUNK, "exclude": folder.path, "progress": report}
        files = file_list.list_files(inputs.directory, database, **arguments)
        if not files.num_files:
            raise UserError(f"{inputs.directory} holds no files. Give radiographs, or a folder of them.")
        yield files


def _resolve_session_config(
    folder: OutputFolder, model: OnnxModel, model_path: Path, options: PredictOptions, log: Callable[[str], None]
) -> SessionConfig:
    """Return how to run `model`.

    A resumed run keeps what changes bits. A new run uses an autotune of now or of earlier, or else the default.
    """
    may_tune = options.batch_size is None and environment.world_size() == 1
    default = (autotune.load_tuned_config(model) if may_tune else None) or model.session_config
    for plan in folder.load_plans():
        if (plan.get("model_sha256"), plan.get("provider")) == (model.sha256, model.provider):
            optimization, batch_size = plan.get("optimisation"), plan.get("batch_size")
            config = default
            if optimization in tuple(GRAPH_OPTIMIZATIONS):
                config = replace(config, optimization=optimization)
            if isinstance(batch_size, int) and 0 < batch_size < 2**16:
                config = replace(config, batch_size=batch_size)
            return replace(config, batch_size=options.batch_size or config.batch_size)
    return autotune.tune(model_path, options.provider, log) if options.autotune else default


def _check_keytable(keytable: Path | None, folder: OutputFolder, files: FileList, pseudonymizer: Pseudonymizer) -> None:
    """Raise UserError if an existing key table names other files."""
    if keytable is not None and folder.rank == 0 and not folder.summary_path.is_file():
        names = ((path, pseudonymizer.file(path)) for path in files.printable_paths())
        pseudonyms.check_keytable_files(keytable, names)


def _build_plan(model: OnnxModel, files: FileList, groups: Grouping, options: PredictOptions) -> dict[str, Any]:
    """Return the description of the run. A run with another plan does not resume."""
    override, pseudonymizer = groups.override, groups.pseudonymizer
    is_table = override is not None and not isinstance(override, str)
    return {
        "version": __version__,
        "model_sha256": model.sha256,
        "num_files": files.num_files,
        "files_sha256": pseudonymizer.digest(files.digest),
        "study_type": f"table {pseudonymizer.digest(json_sha256(override))}" if is_table else override,
        "provider": model.provider,
        "optimisation": model.session_config.optimization,
        # ONNX Runtime computes the same bits for any batch size on a CPU. The other providers do not promise that.
        "batch_size": None if model.provider == PROVIDERS["cpu"] else model.session_config.batch_size,
        "pseudonyms": pseudonymizer.fingerprint,
        "gate": gate.VERSION,
        "study_by": options.study_by,
        "format": options.format,
        "overlays": options.overlays,
        "allow_pixels": options.allow_pixels,
    }


def _write_tables(
    folder: OutputFolder, files: FileList, groups: Grouping, card: Card, options: PredictOptions, stop: threading.Event
) -> tuple[TableCounts, dict[str, int]]:
    """Write the key table, if requested, and the tables. Return what they hold and the numbers of overlays."""

    def load_results() -> Iterator[ChunkResult]:
        return folder.load_chunks(files.num_chunks, stop)

    if options.keytable is not None:
        pseudonyms.write_keytable(options.keytable, lambda: _key_rows(groups, files, load_results()))
    counts = tables.write(folder.path, load_results, card, options.format, folder.parts / "studies.sqlite")
    return counts, sum_overlay_counts(result["overlays"] for result in load_results())


def _check_io_faults(counts: TableCounts, results: Iterable[ChunkResult]) -> None:
    """Raise RunError if I/O faults kept files from being read: the prediction is not complete."""
    if not (num_faults := counts.failures_by_code[IO_ERROR]):
        return
    first = next(failure for result in results for failure in result["failures"] if failure[1] == IO_ERROR)
    raise RunError(
        f"{num_faults} files could not be read ({IO_ERROR}), the first is {first[0]}: {first[2]}. The tables hold all others. "
        "Fix the disk or the network. The same command then reads these files again."
    )


def _key_rows(groups: Grouping, files: FileList, results: Iterable[ChunkResult]) -> Iterator[pseudonyms.KeyRow]:
    """Yield the key table's rows. The study of a DICOM has no name but its pseudonym, and a failed file has no study."""
    for chunk, result in zip(files.chunks(range(files.num_chunks)), results, strict=True):
        studies = {name: study for name, study, *_ in result["predictions"]}
        for file in chunk:
            name, study = groups.public_name(file.path), groups.study_of_path(file.path)
            public_study = studies.get(name, "")
            is_of_path = public_study == groups.pseudonymizer.study(study)
            yield file_list.printable_path(file.path), name, study if is_of_path else public_study, public_study


def _check_strict(summary: dict[str, Any], out: Path, options: PredictOptions) -> None:
    if options.strict and summary["num_failures"]:
        raise RunError(
            f"--strict: {summary['num_failures']} of {summary['num_files']} files failed. {out}/failures.{options.format} gives "
            "the reasons. Fix or remove them and give another --out, or leave --strict out."
        )
