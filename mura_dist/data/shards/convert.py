"""From a folder in MURA's layout to shards.

    scan -> cut_tune -> manifest.csv -> for each shard: read radiographs in guarded processes, pack -> report.json -> index.json

Workers decode, one process writes, in row order: the bytes do not depend on the number of workers. A shard whose mark is there is
finished (writer.py); the same command again makes the others. conversion.json, written first, holds the plan, so that another
conversion into the same folder is refused. Source and target may be URLs.

A tar is compared with its mark before the mark is written and whenever the command starts again. A file that an I/O fault kept
from being read keeps its shard from being finished, and no other: train-000000.faults.json lists such files, the same command
makes that shard again, and until then there is no index.json.

Several ranks (torchrun's or Slurm's) share the work: each takes every n-th shard, the first one writes the other files, and makes
itself what a rank that fell silent has left undone. Nobody talks to anybody but through the target. In a local folder each rank
holds a lock, so that a second start of the same share is refused.
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
PLAN_WAIT_S = 120.0  # how long a rank waits for the first one's plan
SILENCE_S = 60.0  # without a new shard for so long, the first rank makes the missing ones itself
RANKS = ".ranks"  # the folder of the ranks' locks
_CHUNK, _CHUNK_BYTES = 8, 4 << 20  # radiographs a worker takes at once, and their pixels at most
_FETCHING_THREADS = 4  # chunks of a remote source on their way at once


@dataclass(frozen=True)
class Conversion:
    """What is made, where, by whom. `plan` is all that decides the bytes."""

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
    """Convert `source` into shards in `out`; returns index.json's content, on ranks but the first None. Finished shards stay.

    size: pixels of a side; encoding: raw, png or jpeg; tune: share of the train patients; labels: a file of corrections;
    strict: any defect of the source, any unreadable file, ends it; duplicates: keep, drop-train or group (duplicate_policy.py);
    limits: what reading one file may take. Raises UserError, RunError, StopRequestedError; OSError when the disk is full.
    """
    end_with_launcher()
    _check(source, out, size, encoding, workers)
    duplicate_policy.check_policy(duplicates)
    target = storage.open_storage(out)  # before the source is scanned: a wrong URL is said at once
    env, workers = environment.launch_env(), workers or num_processors()
    with (
        _share(out, env),
        worker_pool.start_pool(
            SampleEncoder, (size, encoding), workers=workers, limits=limits
        ) as pool,  # gets ready during the scan
    ):
        # Beside the decoding it is too late: the manifest depends on it.
        scanned = scan(source, labels, duplicates=strict or duplicates != duplicate_policy.KEEP)
        scanned = duplicate_policy.apply_policy(scanned, duplicates)
        if strict and scanned.defects:
            raise RunError(
                f"--strict: {_first_defect(scanned)}; mend the folder, or leave --strict out to go on and list it"
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
    """Hold this rank's share of the work while the block runs. Raises UserError where another process has it.

    A URL has no locks: there two starts cost time, but no bytes, for a put is whole and both put the same.
    """
    if storage.is_remote(out):
        return contextlib.nullcontext()
    folder = Path(out)
    what = f"{out} (rank {env.rank} of {env.world_size})" if env.world_size > 1 else str(out)
    options = lock.LockOptions(what, "give another folder", heartbeat.LOCK_WAIT_S, lock.UNVERIFIED_WAIT_S)
    return heartbeat.join_folder(folder / RANKS, env.rank, options, threading.Event())


def _lead(conversion: Conversion, scanned: Scan, strict: bool, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The first rank's part, which is all of it where it is alone."""
    started = time.time()
    _drop_broken(conversion)
    _drop_faults(conversion, _planned(conversion.manifest))
    _record(conversion, state="running", started=started)
    conversion.out.write("manifest.csv", conversion.manifest.to_csv())
    with ThreadPoolExecutor(1, "duplicates") as aside:  # looked for beside the decoding, which has the processors busy
        whole = aside.submit(with_duplicates, scanned)
        _write_shards(conversion, _Work(conversion, progress))
        _refuse_faults(conversion, started)
        scanned = whole.result()
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
    """Another rank's part: wait for the same plan, make the shards that are ours."""
    deadline = time.monotonic() + PLAN_WAIT_S
    while not conversion.out.exists("conversion.json"):
        if time.monotonic() > deadline:
            raise RunError(
                f"rank {conversion.rank} of {conversion.num_ranks} waited {PLAN_WAIT_S:.0f} s for rank 0 to begin in "
                f"{conversion.out}; see what rank 0 says, and that all ranks see the same folder"
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
        raise UserError(f"--size {size}: must lie between {low} and {high} pixels; MURA's paper uses 320")
    if encoding not in codec.SUFFIX:
        raise UserError(f"--encoding {encoding!r}: must be one of {', '.join(codec.SUFFIX)}; raw is the default")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1; leave it out for one per processor")
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder for the shards")
    if _same(source, out):
        raise UserError(f"{out} is the source itself; give another folder for the shards")


def _same(one: StoragePath, other: StoragePath) -> bool:
    if storage.is_remote(one) or storage.is_remote(other):
        return str(one).rstrip("/") == str(other).rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def _refuse_unreadable(unreadable: list[dict[str, Any]], strict: bool) -> None:
    if strict and unreadable:
        first = unreadable[0]
        raise RunError(
            f"--strict: {len(unreadable)} files cannot be read, the first is {first['path']}: {first['reason']}; "
            "mend them, or leave --strict out to go on and list them"
        )


def _first_defect(scanned: Scan) -> str:
    name, seen = next(iter(scanned.defects.items()))
    return f"{name}: {len(seen)}, the first is {seen[0]}"


def _finished(conversion: Conversion) -> bool:
    """True where the target holds these very shards already; UserError where it holds anything else."""
    out = conversion.out
    names = out.names()
    if "conversion.json" not in names:
        if any(not name.startswith(".") for name in names):
            raise UserError(f"{out} is not empty and holds no shards; give an empty or new folder")
        return False
    try:
        before = files.parse_json(out.read("conversion.json"), dict[str, Any])["plan"]
        if not isinstance(before, dict):
            raise ValueError("plan is none")
        before = {"duplicates": duplicate_policy.KEEP} | before
    except (ValueError, KeyError) as error:
        raise UserError(f"{out}/conversion.json is damaged; delete {out} or give another folder") from error
    for key, value in conversion.plan.items():
        if before.get(key) != value:
            raise UserError(
                f"{out} holds shards with {key}={before.get(key)}, this conversion has {key}={value}; give another folder"
            )
    return "index.json" in names


def _drop_broken(conversion: Conversion) -> int:
    """Delete the marks whose shards are not what they say, and then index.json; returns how many. They are made again."""
    out, names = conversion.out, conversion.out.names()
    tars = [shard.name for shard in _planned(conversion.manifest) if writer.mark_name(shard.name) in names]
    with ThreadPoolExecutor(num_processors(), "check") as pool:  # hashing lets go of the interpreter
        whole = pool.map(lambda tar: writer.is_complete(out, tar, out.read(writer.mark_name(tar))), tars)
        broken = [tar for tar, is_complete in zip(tars, whole, strict=True) if not is_complete]
    for name in ["index.json"] * bool(broken) + [writer.mark_name(tar) for tar in broken]:
        out.remove(name)
    return len(broken)


def _drop_faults(conversion: Conversion, shards: Sequence["_Planned"]) -> None:
    """Delete the lists of files that an earlier start could not read: they are read again."""
    for name in conversion.out.names() & {writer.faults_name(shard.name) for shard in shards}:
        conversion.out.remove(name)


def _record(conversion: Conversion, **facts: Any) -> None:
    machine: dict[str, Any] = {"host": platform.node(), "platform": platform.platform()}
    machine |= {"workers": conversion.pool.workers, "ranks": conversion.num_ranks}
    conversion.out.write("conversion.json", _json({"plan": conversion.plan, **machine, **facts}))


# ---- the shards


@dataclass(frozen=True)
class _Planned:
    """A shard to be: its split, its tar's name, the rows planned for it."""

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
    """Which shards there are still to make, and how far all of us are."""

    def __init__(self, conversion: Conversion, progress: Callable[[int, int], None]) -> None:
        self.conversion, self.progress = conversion, progress
        self.all = _planned(conversion.manifest)
        self.share = self.all[conversion.rank :: conversion.num_ranks]
        self.total, self.done = len(conversion.manifest.frame), 0

    def missing(self) -> list[_Planned]:
        """List the shards that nobody has tried to make."""
        names = self.conversion.out.names()
        missing = [
            shard for shard in self.all if not names & {writer.mark_name(shard.name), writer.faults_name(shard.name)}
        ]
        self.done = self.total - sum(len(shard.rows) for shard in missing)
        self.progress(self.done, self.total)
        return missing

    def made(self, shard: _Planned) -> None:
        self.done += len(shard.rows)
        self.progress(self.done, self.total)

    def mine(self) -> list[_Planned]:
        share = {shard.name for shard in self.share}
        return [shard for shard in self.missing() if shard.name in share]


def _write_shards(conversion: Conversion, work: _Work) -> None:
    """Ours; on the first rank also, when all is quiet, those another rank should have made."""
    _write(conversion, work.mine(), work)
    if conversion.rank:
        return
    before, since = len(work.all), time.monotonic()
    while missing := work.missing():
        if len(missing) < before:
            before, since = len(missing), time.monotonic()
        elif time.monotonic() - since > SILENCE_S:
            _write(conversion, missing[:1], work)
            before -= 1  # ours: the others are as silent as before
        else:
            time.sleep(0.2)


def _write(conversion: Conversion, todo: Sequence[_Planned], work: _Work) -> None:
    if not todo:
        return
    labels = conversion.manifest.frame["label"].to_numpy()
    rows = np.concatenate([shard.rows for shard in todo])
    stream = _samples(conversion, rows)
    try:
        for shard in todo:
            ours = itertools.islice(stream, len(shard.rows))
            try:
                writer.write(conversion.out, shard.name, ours, labels, encoding=conversion.encoding)
            except writer.IncompleteShardError as incomplete:
                conversion.out.write(writer.faults_name(shard.name), _json(incomplete.faults))
            work.made(shard)
    except KeyboardInterrupt as error:
        raise StopRequestedError("stopped; the finished shards stay, the same command goes on") from error


def _marks(conversion: Conversion) -> list[dict[str, Any]]:
    """Of all shards, in order."""
    names = [writer.mark_name(shard.name) for shard in _planned(conversion.manifest)]
    contents = conversion.out.read_many(names)
    for data in contents:
        if isinstance(data, OSError):
            raise data
    try:
        return [writer.read_mark(data) for data in contents if isinstance(data, bytes)]
    except ValueError as error:
        raise UserError(f"{conversion.out} has a damaged mark ({error}); delete it, then the same command") from error


def _unreadable(conversion: Conversion, marks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files that could not be read, in row order."""
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
        f"{len(faults)} files could not be read ({IO_ERROR}), the first is {faults[0]['path']}: {faults[0]['reason']}; "
        f"{conversion.out}/conversion.json lists them. All other shards are finished: fix the disk or the network, then the "
        f"same command makes the {len(names)} shards of these files"
    )


def _with_paths(conversion: Conversion, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Files that were not read, in row order, with their paths."""
    paths = conversion.manifest.frame["path"].to_numpy()
    return [
        {"row": item["row"], "path": paths[item["row"]], "code": item["code"], "reason": item["reason"]}
        for item in sorted(items, key=lambda item: item["row"])
    ]


# ---- the samples


def _samples(conversion: Conversion, rows: np.ndarray) -> Iterator[Sample]:
    """Samples in row order, decoded ahead by guarded processes, never far ahead."""
    paths, root, faults = conversion.manifest.frame["path"].to_numpy(), conversion.root, IoFaults(conversion.root)
    at_once = max(1, min(_CHUNK, _CHUNK_BYTES // conversion.size**2))
    chunks = (rows[start : start + at_once].tolist() for start in range(0, len(rows), at_once))
    tasks: Iterable[list[Task]]
    if storage.is_remote(root):
        tasks = _fetched(storage.open_storage(root), paths, chunks)
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


def _fetched(place: Storage, paths: np.ndarray, chunks: Iterable[list[int]]) -> Iterator[list[Task]]:
    """The contents of each chunk's files, some chunks ahead."""
    sizes = dict(place.files())

    def fetch(rows: list[int]) -> list[Task]:
        wanted = [row for row in rows if sizes.get(paths[row], 0) <= radiograph.MAX_BYTES]
        contents = place.read_many([paths[row] for row in wanted])
        found = {row: _told(content) for row, content in zip(wanted, contents, strict=True)}
        return [(row, found.get(row, _TOO_LARGE)) for row in rows]

    pool, ahead = ThreadPoolExecutor(_FETCHING_THREADS, "fetch"), deque[Future[Any]]()
    try:
        for rows in chunks:
            ahead.append(pool.submit(fetch, rows))
            if len(ahead) > _FETCHING_THREADS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_TOO_LARGE = radiograph.UnreadableFileError("too_large", f"the file is larger than {radiograph.MAX_BYTES:,} bytes")


def _told(content: bytes | OSError) -> bytes | radiograph.UnreadableFileError:
    """Return what is wrong with a file, or with the store and the way to it."""
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
        part = splits.setdefault(shard.split, {"num_studies": studies, "num_radiographs": 0, "shards": []})
        part["num_radiographs"] += mark["num_samples"]
        if mark["num_samples"]:
            part["shards"].append({key: mark[key] for key in ("name", "num_samples", "bytes", "sha256")})
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
