"""Files that are either the old one or the new one, never half of either.

Write aside in the same folder, fsync, rename. Whoever is killed in between leaves only a `.NAME.partial` file, which nothing
reads and the next write of the same name replaces. Two writers of one name would share that file: `aside` tells them apart.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mura_dist.core.errors import Refusal


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders: there the rename alone has to do."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, aside: str = "") -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and vanishes when it does not.

    `aside`: tells writers of the same name apart, where there is more than one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{aside}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def creating(path: Path, *, mode: int = 0o666, aside: str = "") -> Iterator[IO[bytes]]:
    """As `replacing`, but what lies at `path` stays: FileExistsError at the block's end. Of several writers one is first.

    `mode`: the file's permissions from its first byte on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{aside}.partial")
    partial.unlink(missing_ok=True)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)  # the last is Windows' own
        with open(os.open(partial, flags, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if os.name == "nt":
            os.rename(partial, path)  # there it refuses what exists
        else:
            os.link(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Indented, keys in the order given, NaN refused: JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_folder(folder: Path, option: str) -> None:
    """Refusal where `folder` neither is nor can become one to write into: asked before the work, not after it."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise Refusal(f"{option}: {there} is a file, {folder} has to be a folder; give another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refusal(
            f"{option}: {there} cannot be written (read-only, or another user's); make it so, or give another place"
        )
