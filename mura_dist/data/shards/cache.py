"""Copy shards to a local disk of this node, where all its ranks share them.

    s3://bucket/shards, or a slow network folder -> MIRROR/<digest of index.json>/ (index.json last) -> Shards.open

The process that holds the lock copies and checks the shards. The others wait. The kernel releases the lock of a killed process,
and the next one resumes the copy. A second run with the same shards copies nothing.
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

_NUM_THREADS = 4
_DISK_FACTOR = 1.02  # of the tars' bytes, with indexes and file system


def local_folder(source: StoragePath, mirror: Path | None = None) -> Path:
    """Return a local folder with the shards of `source`: a copy of a URL or if `mirror` is given, else `source` itself.

    Args:
        source: Folder or URL of finished shards.
        mirror: Folder on a disk of this node. Default for URLs: $XDG_CACHE_HOME/mura-dist/shards.

    Raises:
        UserError: No finished shards, not enough disk space, or no home folder.
        RunError: A copy differs from its SHA-256.
    """
    if mirror is None and not storage.is_remote(source):
        return Path(source)
    remote = storage.open_storage(source)
    try:
        data = remote.read("index.json")
    except FileNotFoundError:
        raise no_shards_error(source, is_unfinished=remote.exists("conversion.json")) from None
    index = parse(data, source)
    folder = (mirror or _cache()) / hashlib.sha256(data).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / ".lock"):
        if not (folder / "index.json").is_file():
            _copy(remote, folder, index)
            files.write_bytes(folder / "index.json", data)
    return folder


def no_shards_error(folder: StoragePath, *, is_unfinished: bool) -> UserError:
    """Return the error for a folder without index.json."""
    if is_unfinished:
        return UserError(f"{folder}: the conversion is not finished. Run the same `mura-dist shards` command again.")
    return UserError(f"{folder} holds no shards (no index.json). Make them with `mura-dist shards SOURCE {folder}`.")


def _cache() -> Path:
    return files.user_folder("XDG_CACHE_HOME", ".cache") / "mura-dist" / "shards"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file: one process of this machine at a time. Without flock two may copy, and each renames whole files."""
    with open(path, "wb") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy(remote: Storage, folder: Path, index: dict[str, Any]) -> None:
    shards = [shard for split in index["splits"].values() for shard in split["shards"]]
    needed_bytes = int(sum(shard["bytes"] for shard in shards if not (folder / shard["name"]).is_file()) * _DISK_FACTOR)
    if needed_bytes > (free_bytes := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: a copy of {remote} needs {needed_bytes / 1e9:.1f} GB ({free_bytes / 1e9:.1f} GB are free). "
            "Free space, or name another disk with mirror=FOLDER."
        )
    companions = ["manifest.csv"] + [
        shard["name"].removesuffix(".tar") + end for shard in shards for end in (".idx", ".crc")
    ]
    digests = dict.fromkeys(companions, None) | {shard["name"]: shard["sha256"] for shard in shards}
    with ThreadPoolExecutor(_NUM_THREADS, "mirror") as pool:
        list(pool.map(lambda name: _copy_file(remote, name, folder, digests[name]), digests))


def _copy_file(remote: Storage, name: str, folder: Path, digest: str | None) -> None:
    """Copy a file unless it exists. A tar that differs from its SHA-256 is fetched a second time."""
    path = folder / name
    if path.is_file():
        return
    for _ in range(2):
        with files.scratch(path) as copy:
            remote.copy_to(name, copy)
            if digest is None or storage.sha256(copy) == digest:
                os.replace(copy, path)
                return
    raise RunError(
        f"{remote}/{name} differs from its SHA-256 in index.json (2 attempts). Run `mura-dist verify` on it."
    )
