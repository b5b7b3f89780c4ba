"""Shards on this node's own disk: copied there once, by one process of the node, checked, then shared by all its ranks.

    s3://bucket/shards, or a slow network folder -> MIRROR/<digest of index.json>/ (index.json last) -> Shards.open

Whoever gets the lock copies; the others wait for it, and find the copy there. The kernel lets go of a dead process's lock, so the
next one goes on where that one was killed. A second run with the same shards copies nothing.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mura_dist.core import files, storage
from mura_dist.core.errors import RunError, UserError
from mura_dist.core.storage import Storage, StoragePath
from mura_dist.data.shards.index import parse

_COPIES_AT_ONCE = 4
_ROOM = 1.02  # of the shards' bytes: what indexes and file system take beside them


def local_folder(where: StoragePath, mirror: Path | None = None) -> Path:
    """The local folder to open `where` in: itself, unless it is a URL or `mirror` (a folder of this node's disk) is given.

    A URL without `mirror` is copied below $XDG_CACHE_HOME/mura-dist. Raises UserError where there are no finished shards, not
    enough room or no home, RunError where a copy differs from its SHA-256.
    """
    if mirror is None and not storage.is_remote(where):
        return Path(where)
    place = storage.open_storage(where)
    try:
        data = place.read("index.json")
    except FileNotFoundError:
        why = (
            "the conversion is not finished; run the same `mura-dist shards` command again"
            if place.exists("conversion.json")
            else f"holds no shards (no index.json); make them with `mura-dist shards SOURCE {where}`"
        )
        raise UserError(f"{where}: {why}") from None
    index = parse(data, where)
    folder = (mirror or _cache()) / hashlib.sha256(data).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if not (folder / "index.json").is_file():
            _copy(place, folder, index)
            files.write_bytes(folder / "index.json", data)
    return folder


def _cache() -> Path:
    return files.user_folder("XDG_CACHE_HOME", ".cache") / "mura-dist" / "shards"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process of this machine at a time."""
    with open(path, "wb") as file:
        with contextlib.suppress(
            ImportError
        ):  # a system without flock: its copies may meet, each file is renamed whole
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(place: Storage, folder: Path, index: dict[str, Any]) -> None:
    shards = [shard for part in index["splits"].values() for shard in part["shards"]]
    needed = int(sum(shard["bytes"] for shard in shards if not (folder / shard["name"]).is_file()) * _ROOM)
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: {place} needs {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free; "
            "make room, or name another disk with mirror=FOLDER"
        )
    small = ["manifest.csv"] + [
        shard["name"].removesuffix(".tar") + end for shard in shards for end in (".idx", ".crc")
    ]
    digests = dict.fromkeys(small, None) | {shard["name"]: shard["sha256"] for shard in shards}
    with ThreadPoolExecutor(_COPIES_AT_ONCE, "mirror") as pool:
        list(pool.map(lambda name: _copy_one(place, name, folder, digests[name]), digests))


def _copy_one(place: Storage, name: str, folder: Path, digest: str | None) -> None:
    """One file, unless an earlier start has it; a tar is checked, and fetched a second time where it differs."""
    path = folder / name
    if path.is_file():
        return
    for _ in range(2):
        with files.scratch(path) as copy:
            place.copy_to(name, copy)
            if digest is None or storage.sha256(copy) == digest:
                os.replace(copy, path)
                return
    raise RunError(f"{place}/{name} differs from its SHA-256 in index.json, twice; `mura-dist verify` tells more")
