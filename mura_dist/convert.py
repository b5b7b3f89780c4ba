"""From a folder in MURA's layout to shards.

    scan -> cut_tune -> manifest.csv -> for each shard: read radiographs in worker processes, write tar, .crc, .idx -> index.json

Workers decode, one process writes, in row order: the bytes do not depend on the number of workers. A shard whose .idx is
there is finished; the same command again makes the others. conversion.json, written first, holds the plan, so that another
conversion into the same folder is refused.
"""

import contextlib
import io
import json
import os
import platform
import tarfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import __version__, atomic, mura, radiograph, shards
from .manifest import Manifest, Scan, cut_tune, scan
from .refusal import Failure, Refusal, Stopped
from .workers import processors
from .workers import start as start_workers

SAMPLES_PER_SHARD = 512
SIZE_LIMITS = (32, 2048)
_CHUNK = 8  # radiographs a worker takes at once


class Sample(NamedTuple):
    """A radiograph on its way into a tar, or the reason it has no place there."""

    row: int
    data: bytes | None
    code: str
    reason: str


@dataclass(frozen=True)
class Conversion:
    """What is made, where. `plan` is all that decides the bytes."""

    out: Path
    root: Path
    manifest: Manifest
    size: int
    encoding: str
    plan: dict[str, Any]


def convert(
    source: Path,
    out: Path,
    *,
    size: int = 320,
    encoding: str = "raw",
    workers: int | None = None,
    tune: float = 0.1,
    seed: int = 0,
    labels: Path | None = None,
    strict: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Convert `source` into shards in `out`; returns index.json's content. Finished shards are not made again.

    size: pixels of a side; encoding: raw, png or jpeg; tune: share of the train patients; labels: a file of corrections;
    strict: any defect of the source, any unreadable file, ends it. Raises Refusal, Failure, Stopped; OSError when
    the disk is full.
    """
    _check(source, out, size, encoding, workers)
    scanned = scan(source, labels)
    if strict and scanned.defects:
        raise Failure(
            f"--strict: {_first_defect(scanned)}; mend the folder, or leave --strict out to go on and list it"
        )
    manifest = cut_tune(scanned.manifest, tune, seed)
    plan = {"format": shards.FORMAT, "size": size, "encoding": encoding, "tune": tune, "seed": seed}
    plan |= {"manifest_sha256": manifest.digest, "version": __version__}
    conversion = Conversion(out, scanned.root, manifest, size, encoding, plan)
    if _finished(conversion):
        index = json.loads((out / "index.json").read_bytes())
        _refuse_unreadable(index["unreadable"], strict)
        return index
    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    workers = workers or processors()
    _record(conversion, workers, state="running", started=started)
    manifest.save(out / "manifest.csv")
    unreadable = _write_all(conversion, workers, progress)
    _refuse_unreadable(unreadable, strict)
    index = _index(conversion, scanned, unreadable)
    atomic.write_json(out / "index.json", index)
    _record(conversion, workers, state="done", started=started, seconds=time.time() - started)
    return index


def _check(source: Path, out: Path, size: int, encoding: str, workers: int | None) -> None:
    low, high = SIZE_LIMITS
    if not low <= size <= high:
        raise Refusal(f"--size {size}: must lie between {low} and {high} pixels; MURA's paper uses 320")
    if encoding not in shards.SUFFIX:
        raise Refusal(f"--encoding {encoding!r}: must be one of {', '.join(shards.SUFFIX)}; raw is the default")
    if workers is not None and workers < 1:
        raise Refusal(f"--workers {workers}: must be at least 1; leave it out for one per processor")
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file; give a folder for the shards")
    if source.is_dir() and out.resolve() == source.resolve():
        raise Refusal(f"{out} is the source itself; give another folder for the shards")


def _refuse_unreadable(unreadable: list[dict[str, Any]], strict: bool) -> None:
    if strict and unreadable:
        first = unreadable[0]
        raise Failure(
            f"--strict: {len(unreadable)} files cannot be read, the first is {first['path']}: {first['reason']}"
        )


def _first_defect(scanned: Scan) -> str:
    name, seen = next(iter(scanned.defects.items()))
    return f"{name}: {len(seen)}, the first is {seen[0]}"


def _finished(conversion: Conversion) -> bool:
    """True where `out` holds these very shards already; Refusal where it holds anything else."""
    out, path = conversion.out, conversion.out / "conversion.json"
    if not path.is_file():
        if out.is_dir() and any(not name.startswith(".") for name in os.listdir(out)):
            raise Refusal(f"{out} is not empty and holds no shards; give an empty or new folder")
        return False
    try:
        before = json.loads(path.read_bytes())["plan"]
    except (ValueError, KeyError) as error:
        raise Refusal(f"{path} is damaged; delete {out} or give another folder") from error
    for key, value in conversion.plan.items():
        if before.get(key) != value:
            raise Refusal(
                f"{out} holds shards with {key}={before.get(key)}, this conversion has {key}={value}; give another folder"
            )
    return (out / "index.json").is_file()


def _record(conversion: Conversion, workers: int, **facts: Any) -> None:
    machine = {"host": platform.node(), "platform": platform.platform(), "workers": workers}
    atomic.write_json(conversion.out / "conversion.json", {"plan": conversion.plan, **machine, **facts})


def _shards_of(manifest: Manifest) -> Iterator[tuple[str, str, np.ndarray]]:
    """(split, tar's name, the rows planned for it), in row order."""
    for split in mura.SPLITS:
        rows = manifest.rows(split)
        for number, start in enumerate(range(0, len(rows), SAMPLES_PER_SHARD)):
            yield split, f"{split}-{number:06d}.tar", rows[start : start + SAMPLES_PER_SHARD]


def _write_all(conversion: Conversion, workers: int, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
    """Write the shards that are not there yet; returns the unreadable files of all of them, in row order."""
    todo: list[tuple[str, np.ndarray]] = []
    unreadable: list[dict[str, Any]] = []
    total, done = len(conversion.manifest.frame), 0
    for _, name, rows in _shards_of(conversion.manifest):
        index = (conversion.out / name).with_suffix(".idx")
        if index.is_file():
            missing = sorted(set(rows.tolist()) - {sample[0].row for sample in shards.read_index(index)})
            unreadable += [_failure(conversion, sample) for sample in map(_Reader(conversion), missing)]
            done += len(rows)
        else:
            todo.append((name, rows))
    progress(done, total)
    with _samples(
        conversion, np.concatenate([rows for _, rows in todo] or [np.zeros(0, np.int64)]), workers
    ) as samples:
        for name, rows in todo:
            failures = _write_shard(conversion, name, (next(samples) for _ in rows))
            unreadable += [_failure(conversion, sample) for sample in failures]
            done += len(rows)
            progress(done, total)
    return sorted(unreadable, key=lambda item: item["row"])


def _failure(conversion: Conversion, sample: Sample) -> dict[str, Any]:
    path = conversion.manifest.frame.at[sample.row, "path"]
    return {"row": sample.row, "path": path, "code": sample.code, "reason": sample.reason}


class _Reader:
    """row -> Sample. Sent to the worker processes once, with the table of paths."""

    def __init__(self, conversion: Conversion) -> None:
        self.root = conversion.root
        self.paths = conversion.manifest.frame["path"].to_numpy()
        self.size, self.encoding = conversion.size, conversion.encoding

    def __call__(self, row: int) -> Sample:
        try:
            pixels = radiograph.read(self.root / self.paths[row], self.size)
        except radiograph.Unreadable as error:
            return Sample(row, None, error.code, error.reason)
        return Sample(row, shards.encode(pixels, self.encoding), "", "")


_reader: _Reader  # in a worker process: its own


def _hold(reader: _Reader) -> None:
    global _reader
    _reader = reader


def _read_chunk(rows: list[int]) -> list[Sample]:
    return [_reader(row) for row in rows]


@contextlib.contextmanager
def _samples(conversion: Conversion, rows: np.ndarray, workers: int) -> Iterator[Iterator[Sample]]:
    """An iterator of Samples in row order, decoded ahead by `workers` processes, never far ahead."""
    workers = max(1, min(workers, -(-len(rows) // _CHUNK)))
    pool = start_workers(workers, _hold, _Reader(conversion))
    try:
        yield _in_order(pool, rows.tolist(), window=4 * workers)
    except KeyboardInterrupt as error:
        raise Stopped("stopped; the finished shards stay, the same command goes on") from error
    except BrokenProcessPool as error:
        raise Failure("a worker process died, perhaps out of memory; try again with fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, rows: list[int], window: int) -> Iterator[Sample]:
    ahead: deque[Future[list[Sample]]] = deque()
    for start in range(0, len(rows), _CHUNK):
        ahead.append(pool.submit(_read_chunk, rows[start : start + _CHUNK]))
        if len(ahead) > window:
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


def _write_shard(conversion: Conversion, name: str, samples: Iterable[Sample]) -> list[Sample]:
    """One tar with its .crc and .idx, the .idx last; returns the samples that could not be read."""
    path, suffix = conversion.out / name, shards.SUFFIX[conversion.encoding]
    labels = conversion.manifest.frame["label"]
    failures, index, crcs = [], [], []
    with atomic.replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            if sample.data is None:
                failures.append(sample)
                continue
            key = f"{sample.row:09d}"  # the row and nothing else: a key never tells the label
            parts = ((suffix, sample.data), ("cls", str(labels[sample.row]).encode()), ("id", str(sample.row).encode()))
            index.append(" ".join(_add(tar, key, extension, data) for extension, data in parts))
            crcs.append(f"{key} {zlib.crc32(sample.data):08x}")
    if index:
        atomic.write_text(path.with_suffix(".crc"), "\n".join(crcs) + "\n")
        atomic.write_text(path.with_suffix(".idx"), "\n".join([f"{shards.INDEX_HEADER} {len(index)}", *index]) + "\n")
    else:
        path.unlink()  # an empty tar would only trip its readers
    return failures


def _add(tar: tarfile.TarFile, key: str, extension: str, data: bytes) -> str:
    """Append a member without times, owners or modes of this machine; returns its entry in the index."""
    member = tarfile.TarInfo(f"{key}.{extension}")
    member.size, member.mode = len(data), 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(member, io.BytesIO(data))
    return f"{extension} {offset} {len(data)} {member.name}"


def _index(conversion: Conversion, scanned: Scan, unreadable: list[dict[str, Any]]) -> dict[str, Any]:
    frame = conversion.manifest.frame
    lost = {item["row"] for item in unreadable}
    splits: dict[str, dict[str, Any]] = {}
    for split, name, rows in _shards_of(conversion.manifest):
        studies = int(frame.loc[frame["split"] == split, "study"].nunique())
        part = splits.setdefault(split, {"num_studies": studies, "num_radiographs": 0, "shards": []})
        num_samples = sum(row not in lost for row in rows.tolist())
        part["num_radiographs"] += num_samples
        if num_samples:
            path = conversion.out / name
            part["shards"].append(
                {"name": name, "num_samples": num_samples, "bytes": path.stat().st_size, "sha256": shards.sha256(path)}
            )
    return {
        "what": "bone radiographs as WebDataset tars, by mura-dist; see shards/README.md for the format",
        "format": shards.FORMAT,
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
        "terms": mura.TERMS,
        "licence": mura.LICENCE,
    }
