"""Convert a folder in MURA's layout to shards.

    scan -> cut_tune -> manifest.csv -> for each shard: read radiographs in a worker pool, pack -> report.json -> index.json

Workers decode, and one process writes in row order, so that the bytes do not depend on the number of workers. The same command
resumes: a shard with a completion mark is finished (writer.py). conversion.json, written first, holds the plan, so that another
conversion into the same folder is refused. Source and target may be URLs.

A tar is compared with its mark before the mark is written and at each start of the command. An I/O fault leaves only its own
shard unfinished: train-000000.faults.json lists the files, the same command makes that shard again, and index.json is written
after that.

Several ranks (torchrun or Slurm) divide the shards, and communicate through the target only. Rank r of n takes every n-th shard.
Rank 0 writes the other files, and also the shards of ranks that make no progress. In a local folder each rank holds a lock, so
that a second start of the same rank is refused.
"""

import contextlib
import itertools
import json
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist import __version__
from mura_dist.core import files, storage
from mura_dist.core.errors import RunError, StopRequestedError, UserError, os_reason
from mura_dist.core.storage import Storage, StoragePath
from mura_dist.data import mura, radiograph
from mura_dist.data.io_faults import IO_ERROR, IoFaults
from mura_dist.data.manifest import Manifest, cut_tune
from mura_dist.data.shards import codec, writer
from mura_dist.data.shards.codec import MAX_SIZE_PX, Sample, SampleEncoder, Task
from mura_dist.data.shards.index import FORMAT, FileFault, parse
from mura_dist.data.source import duplicate_policy
from mura_dist.data.source import report as audit
from mura_dist.data.source.scan import Scan, scan, with_duplicates
from mura_dist.distributed import environment, heartbeat, lock, worker_pool
from mura_dist.distributed.processes import end_with_launcher, num_processors
from mura_dist.distributed.worker_pool import PoolLimits, TaskFailed, WorkerPool

SAMPLES_PER_SHARD = 512
SIZE_LIMITS = (32, MAX_SIZE_PX)
PLAN_WAIT_S = 120.0  # timeout of other ranks for rank 0's plan
SILENCE_S = 60.0  # without a new shard for this long, rank 0 makes the missing ones
RANKS = ".ranks"  # folder of the ranks' locks
_CHUNK, _CHUNK_BYTES = 8, 4 << 20  # radiographs per message to a worker, and their pixels at most
_HEADER_BYTES = 1 << 10  # at least a sample's bytes beyond its pixels; larger samples take longer
_FETCH_THREADS = 4  # each fetches a chunk of a remote source


@dataclass(frozen=True)
class Conversion:
    """One rank's view of a conversion. `plan` contains everything that determines the bytes."""

    out: Storage
    root: StoragePath
    manifest: Manifest
    size: int
    encoding: str
    plan: dict[str, Any]
    pool: WorkerPool
    rank: int
    num_ranks: int


def convert(
    source: StoragePath,
    out: StoragePath,
    *,
    size: int = 320,
    encoding: str = "raw",
    workers: int | None = None,
    tune: float = 0.1,
    seed: int = 0,
    labels: Path | None = None,
    strict: bool = False,
    duplicates: str = duplicate_policy.KEEP,
    limits: PoolLimits = worker_pool.DEFAULT_LIMITS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """Convert a folder in MURA's layout to shards, or resume that.

    Args:
        source: Folder or URL in MURA's layout.
        out: Folder or URL of the shards.
        size: Side of the radiographs in pixels.
        encoding: raw, png or jpeg.
        workers: Worker processes. Default: one per processor.
        tune: Share of the train patients for the split tune.
        seed: Seed of that choice.
        labels: CSV of corrected labels (`study,label`).
        strict: Fail on any defect of the source and on any unreadable file.
        duplicates: keep, drop-train or group (duplicate_policy.py).
        limits: Limits of reading one file.
        progress: Called with the numbers of finished and of all radiographs.

    Returns:
        The content of index.json on rank 0, None on other ranks.

    Raises:
        UserError: Invalid arguments, or `out` holds something else.
        RunError: The source failed `strict`, or could not be read.
        StopRequestedError: Interrupted. Finished shards stay.
        OSError: The disk is full, for instance.
    """
    end_with_launcher()
    _check(source, out, size, encoding, workers)
    duplicate_policy.check_policy(duplicates)
    target = storage.open_storage(out)  # before the scan, so that a wrong URL fails at once
    env, workers = environment.launch_env(), workers or num_processors()
    with (
        _share(out, env),
        worker_pool.start_pool(
            SampleEncoder,
            (size, encoding),
            workers=workers,
            limits=limits,
            chunk_bytes=_chunk_length(size) * (size**2 + _HEADER_BYTES),
        ) as pool,
    ):
        # The manifest depends on duplicates unless they are kept. Then they are searched during the decoding.
        scanned = scan(source, labels, duplicates=strict or duplicates != duplicate_policy.KEEP)
        scanned = duplicate_policy.apply_policy(scanned, duplicates)
        if strict and scanned.defects:
            raise RunError(
                f"--strict: {_first_defect(scanned)}. Fix the folder, or omit --strict to list defects and continue."
            )
        manifest = cut_tune(scanned.manifest, tune, seed, scanned.resolution.groups)
        plan = {"format": FORMAT, "size": size, "encoding": encoding, "tune": tune, "seed": seed}
        plan |= {"duplicates": duplicates, "manifest_sha256": manifest.digest, "version": __version__}
        conversion = Conversion(target, scanned.root, manifest, size, encoding, plan, pool, env.rank, env.world_size)
        if env.rank:
            _follow(conversion, progress)
            return None
        if _finished(conversion) and not _drop_broken(conversion):
            index = parse(conversion.out.read("index.json"), str(conversion.out))
            _refuse_unreadable(index["unreadable"], strict)
            return index
        index = _lead(conversion, scanned, strict, progress)
        if isinstance(target, storage.LocalStorage):
            heartbeat.clear_folder(target.folder / RANKS)
        return index


def _share(out: StoragePath, env: environment.LaunchEnv) -> contextlib.AbstractContextManager[None]:
    """Hold this rank's lock while the block runs. Raises UserError where another process holds it.

    A URL has no locks. Two conversions to it are safe, because uploads are atomic and have the same content.
    """
    if storage.is_remote(out):
        return contextlib.nullcontext()
    folder = Path(out)
    what = f"{out} (rank {env.rank} of {env.world_size})" if env.world_size > 1 else str(out)
    options = lock.LockOptions(what, "give another folder", heartbeat.LOCK_WAIT_S, lock.UNVERIFIED_WAIT_S)
    return heartbeat.join_folder(folder / RANKS, env.rank, options, threading.Event())


def _lead(conversion: Conversion, scanned: Scan, strict: bool, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Convert as rank 0, and return the content of index.json."""
    started = time.time()
    _drop_broken(conversion)
    _drop_faults(conversion, _planned(conversion.manifest))
    _record(conversion, state="running", started=started)
    conversion.out.write("manifest.csv", conversion.manifest.to_csv())
    with ThreadPoolExecutor(1, "duplicates") as thread:
        search = thread.submit(with_duplicates, scanned)
        _write_shards(conversion, _Work(conversion, progress))
        _refuse_faults(conversion, started)
        scanned = search.result()
    marks = _marks(conversion)
    unreadable = _unreadable(conversion, marks)
    _refuse_unreadable(unreadable, strict)
    report = audit.report(scanned, conversion.manifest, unreadable)
    index = _index(conversion, scanned, marks, unreadable)
    conversion.out.write("report.json", _json(report))
    conversion.out.write("index.json", _json(index))
    _record(conversion, state="done", started=started, seconds=time.time() - started)
    return index


def _follow(conversion: Conversion, progress: Callable[[int, int], None]) -> None:
    """Convert as another rank: wait for rank 0's plan, and make this rank's shards."""
    deadline = time.monotonic() + PLAN_WAIT_S
    while not conversion.out.exists("conversion.json"):
        if time.monotonic() > deadline:
            raise RunError(
                f"rank {conversion.rank} of {conversion.num_ranks} waited {PLAN_WAIT_S:.0f} s for rank 0 to begin in "
                f"{conversion.out}. Check the output of rank 0, and that all ranks see the same folder."
            )
        time.sleep(0.2)
    if not _finished(conversion):
        work = _Work(conversion, progress)
        _drop_faults(conversion, work.share)
        _write_shards(conversion, work)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")


def _check(source: StoragePath, out: StoragePath, size: int, encoding: str, workers: int | None) -> None:
    low, high = SIZE_LIMITS
    if not low <= size <= high:
        raise UserError(f"--size {size}: must lie between {low} and {high} pixels. MURA's paper uses 320.")
    if encoding not in codec.SUFFIX:
        raise UserError(f"--encoding {encoding!r}: must be one of {', '.join(codec.SUFFIX)}. The default is raw.")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1. Omit it for one per processor.")
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file. Give a folder for the shards.")
    if _is_same_folder(source, out):
        raise UserError(f"{out} is the source itself. Give another folder for the shards.")


def _is_same_folder(source: StoragePath, out: StoragePath) -> bool:
    if storage.is_remote(source) or storage.is_remote(out):
        return str(source).rstrip("/") == str(out).rstrip("/")
    return Path(source).resolve() == Path(out).resolve()


def _refuse_unreadable(unreadable: list[dict[str, Any]], strict: bool) -> None:
    if strict and unreadable:
        first = unreadable[0]
        raise RunError(
            f"--strict: {len(unreadable)} files cannot be read (first: {first['path']}: {first['reason']}). "
            "Fix them, or omit --strict to list them and continue."
        )


def _first_defect(scanned: Scan) -> str:
    name, examples = next(iter(scanned.defects.items()))
    return f"{name}: {len(examples)} (first: {examples[0]})"


def _finished(conversion: Conversion) -> bool:
    """Return whether the target holds the finished shards of this plan. Raises UserError where it holds something else."""
    out = conversion.out
    names = out.names()
    if "conversion.json" not in names:
        if any(not name.startswith(".") for name in names):
            raise UserError(f"{out} is not empty and holds no shards. Give an empty or new folder.")
        return False
    try:
        previous = files.parse_json(out.read("conversion.json"), dict[str, Any])["plan"]
        if not isinstance(previous, dict):
            raise ValueError("plan is not an object")
        previous = {"duplicates": duplicate_policy.KEEP} | previous
    except (ValueError, KeyError) as error:
        raise UserError(f"{out}/conversion.json is corrupt. Delete {out} or give another folder.") from error
    for key, value in conversion.plan.items():
        if previous.get(key) != value:
            raise UserError(
                f"{out} holds shards with {key}={previous.get(key)}, this conversion has {key}={value}. Give another folder."
            )
    return "index.json" in names


def _drop_broken(conversion: Conversion) -> int:
    """Delete index.json and the marks of shards that do not match them, to make these again. Return their number."""
    out, names = conversion.out, conversion.out.names()
    tars = [shard.name for shard in _planned(conversion.manifest) if writer.mark_name(shard.name) in names]
    with ThreadPoolExecutor(num_processors(), "check") as pool:  # hashing releases the GIL
        checks = pool.map(lambda tar: writer.is_complete(out, tar, out.read(writer.mark_name(tar))), tars)
        broken = [tar for tar, is_complete in zip(tars, checks, strict=True) if not is_complete]
    for name in ["index.json"] * bool(broken) + [writer.mark_name(tar) for tar in broken]:
        out.remove(name)
    return len(broken)


def _drop_faults(conversion: Conversion, shards: Sequence["_Planned"]) -> None:
    """Delete the lists of files that an earlier start could not read, to read them again."""
    for name in conversion.out.names() & {writer.faults_name(shard.name) for shard in shards}:
        conversion.out.remove(name)


def _record(conversion: Conversion, **facts: Any) -> None:
    machine: dict[str, Any] = {"host": platform.node(), "platform": platform.platform()}
    machine |= {"workers": conversion.pool.workers, "ranks": conversion.num_ranks}
    conversion.out.write("conversion.json", _json({"plan": conversion.plan, **machine, **facts}))


# ---- the shards


@dataclass(frozen=True)
class _Planned:
    """A shard to write: split, name of the tar, rows."""

    split: str
    name: str
    rows: np.ndarray


def _planned(manifest: Manifest) -> list[_Planned]:
    return [
        _Planned(split, f"{split}-{number:06d}.tar", rows[start : start + SAMPLES_PER_SHARD])
        for split in mura.SPLITS
        for rows in [manifest.rows(split)]
        for number, start in enumerate(range(0, len(rows), SAMPLES_PER_SHARD))
    ]


class _Work:
    """The shards of a conversion, and the progress of all ranks."""

    def __init__(self, conversion: Conversion, progress: Callable[[int, int], None]) -> None:
        self.conversion, self.progress = conversion, progress
        self.all = _planned(conversion.manifest)
        self.share = self.all[conversion.rank :: conversion.num_ranks]
        self.total, self.done = len(conversion.manifest.frame), 0

    def missing(self) -> list[_Planned]:
        """Return the shards that no rank has finished or tried."""
        names = self.conversion.out.names()
        missing = [
            shard for shard in self.all if not names & {writer.mark_name(shard.name), writer.faults_name(shard.name)}
        ]
        self.done = self.total - sum(len(shard.rows) for shard in missing)
        self.progress(self.done, self.total)
        return missing

    def add_done(self, shard: _Planned) -> None:
        self.done += len(shard.rows)
        self.progress(self.done, self.total)

    def missing_of_rank(self) -> list[_Planned]:
        share = {shard.name for shard in self.share}
        return [shard for shard in self.missing() if shard.name in share]


def _write_shards(conversion: Conversion, work: _Work) -> None:
    """Write this rank's shards. Rank 0 also writes those of other ranks while these make no progress."""
    _write(conversion, work.missing_of_rank(), work)
    if conversion.rank:
        return
    num_missing, since = len(work.all), time.monotonic()
    while missing := work.missing():
        if len(missing) < num_missing:
            num_missing, since = len(missing), time.monotonic()
        elif time.monotonic() - since > SILENCE_S:
            _write(conversion, missing[:1], work)
            num_missing -= 1  # written here, hence no progress of another rank
        else:
            time.sleep(0.2)


def _write(conversion: Conversion, todo: Sequence[_Planned], work: _Work) -> None:
    if not todo:
        return
    labels = conversion.manifest.frame["label"].to_numpy()
    rows = np.concatenate([shard.rows for shard in todo])
    stream = _samples(conversion, rows)
    finishing: tuple[_Planned, Future[Any]] | None = None  # its disk is awaited while the next shard is packed

    def finish() -> None:
        if finishing is not None:
            finishing[1].result()
            work.add_done(finishing[0])

    try:
        with ThreadPoolExecutor(1, "finish") as thread:
            for shard in todo:
                samples = itertools.islice(stream, len(shard.rows))
                try:
                    write: Callable[[], Any] = writer.pack(
                        conversion.out, shard.name, samples, labels, encoding=conversion.encoding
                    )
                except writer.IncompleteShardError as incomplete:
                    write = partial(conversion.out.write, writer.faults_name(shard.name), _json(incomplete.faults))
                finish()
                finishing = shard, thread.submit(write)
            finish()
    except KeyboardInterrupt as error:
        raise StopRequestedError("stopped. Finished shards stay, and the same command resumes.") from error


def _marks(conversion: Conversion) -> list[dict[str, Any]]:
    """Return the completion marks of all shards, in order."""
    names = [writer.mark_name(shard.name) for shard in _planned(conversion.manifest)]
    contents = conversion.out.read_many(names)
    for data in contents:
        if isinstance(data, OSError):
            raise data
    try:
        return [writer.read_mark(data) for data in contents if isinstance(data, bytes)]
    except ValueError as error:
        raise UserError(
            f"{conversion.out} has a corrupt mark ({error}). Delete it, then run the same command."
        ) from error


def _unreadable(conversion: Conversion, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the files that could not be read, in row order."""
    return _with_paths(conversion, [item for mark in marks for item in mark["unreadable"]])


def _refuse_faults(conversion: Conversion, started: float) -> None:
    """Raise RunError where I/O faults kept files from being read; conversion.json lists them."""
    names = sorted(name for name in conversion.out.names() if name.endswith(writer.FAULTS_SUFFIX))
    if not names:
        return
    faults = _with_paths(
        conversion, [item for name in names for item in files.parse_json(conversion.out.read(name), list[FileFault])]
    )
    _record(conversion, state="incomplete", started=started, faults=faults)
    raise RunError(
        f"{len(faults)} files could not be read ({IO_ERROR}), first {faults[0]['path']}: {faults[0]['reason']}. "
        f"{conversion.out}/conversion.json lists them. All other shards are finished. Fix the disk or the network, then the "
        f"same command makes the {len(names)} shards of these files."
    )


def _with_paths(conversion: Conversion, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return entries of marks or fault lists in row order, with their paths."""
    paths = conversion.manifest.frame["path"].to_numpy()
    return [
        {"row": item["row"], "path": paths[item["row"]], "code": item["code"], "reason": item["reason"]}
        for item in sorted(items, key=lambda item: item["row"])
    ]


# ---- the samples


def _chunk_length(size: int) -> int:
    return max(1, min(_CHUNK, _CHUNK_BYTES // size**2))


def _samples(conversion: Conversion, rows: np.ndarray) -> Iterator[Sample]:
    """Yield samples in row order, decoded ahead by the worker pool."""
    paths, root, faults = conversion.manifest.frame["path"].to_numpy(), conversion.root, IoFaults(conversion.root)
    step = _chunk_length(conversion.size)
    chunks = (rows[start : start + step].tolist() for start in range(0, len(rows), step))
    tasks: Iterable[list[Task]]
    if storage.is_remote(root):
        tasks = _fetch(storage.open_storage(root), paths, chunks)
    else:
        tasks = ([(row, os.path.join(root, paths[row])) for row in chunk] for chunk in chunks)
    for row, result in zip(rows.tolist(), conversion.pool.results(tasks), strict=True):
        sample = (
            Sample(row, None, "unreadable", f"its decoder {result.reason}")
            if isinstance(result, TaskFailed)
            else result
        )
        faults.check(sample.code, sample.reason)
        yield sample


def _fetch(source: Storage, paths: np.ndarray, chunks: Iterable[list[int]]) -> Iterator[list[Task]]:
    """Yield the tasks of each chunk with its files' contents, fetched some chunks ahead."""
    sizes = dict(source.files())

    def fetch(rows: list[int]) -> list[Task]:
        fitting = [row for row in rows if sizes.get(paths[row], 0) <= radiograph.MAX_BYTES]
        contents = source.read_many([paths[row] for row in fitting])
        results = {row: _content_or_error(content) for row, content in zip(fitting, contents, strict=True)}
        return [(row, results.get(row, _TOO_LARGE)) for row in rows]

    pool, ahead = ThreadPoolExecutor(_FETCH_THREADS, "fetch"), deque[Future[Any]]()
    try:
        for rows in chunks:
            ahead.append(pool.submit(fetch, rows))
            if len(ahead) > _FETCH_THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_TOO_LARGE = radiograph.UnreadableFileError("too_large", f"the file is larger than {radiograph.MAX_BYTES:,} bytes")


def _content_or_error(content: bytes | OSError) -> bytes | radiograph.UnreadableFileError:
    if isinstance(content, FileNotFoundError | PermissionError | IsADirectoryError):
        return radiograph.UnreadableFileError("unreadable", f"cannot be opened: {os_reason(content)}")
    if isinstance(content, OSError):
        return radiograph.UnreadableFileError(IO_ERROR, f"cannot be read: {os_reason(content)}")
    return content


def _index(
    conversion: Conversion, scanned: Scan, marks: list[dict[str, Any]], unreadable: list[dict[str, Any]]
) -> dict[str, Any]:
    frame = conversion.manifest.frame
    splits: dict[str, dict[str, Any]] = {}
    for shard, mark in zip(_planned(conversion.manifest), marks, strict=True):
        studies = int(frame.loc[frame["split"] == shard.split, "study"].nunique())
        entry = splits.setdefault(shard.split, {"num_studies": studies, "num_radiographs": 0, "shards": []})
        entry["num_radiographs"] += mark["num_samples"]
        if mark["num_samples"]:
            entry["shards"].append({key: mark[key] for key in ("name", "num_samples", "bytes", "sha256")})
    return {
        "what": "bone radiographs as WebDataset tars, by mura-dist; see shards/README.md for the format",
        "format": FORMAT,
        "version": __version__,
        "holds": "phantoms" if scanned.phantoms else "radiographs",
        "size": conversion.size,
        "encoding": conversion.encoding,
        "tune": conversion.plan["tune"],
        "seed": conversion.plan["seed"],
        "manifest": {"name": "manifest.csv", "num_rows": len(frame), "sha256": conversion.manifest.digest},
        "splits": splits,
        "unreadable": unreadable,
        "defects": scanned.defects,
        "corrections": scanned.corrections,
        "terms": mura.TERMS,
        "licence": mura.LICENSE,
    }
