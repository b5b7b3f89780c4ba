"""Open a shard folder, and read its samples by row.

    shard folder or URL -> Shards: index.json, manifest.csv -> .idx and .crc of each tar -> image member of a row

docs/data.md describes the format. convert.py and writer.py write the files, verify.py checks them.
"""

import os
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from mura_dist.core.errors import RunError, UserError, is_io_fault, os_reason
from mura_dist.core.files import json_sha256
from mura_dist.core.storage import StoragePath, sha256
from mura_dist.data.manifest import Manifest
from mura_dist.data.shards import cache
from mura_dist.data.shards.codec import SUFFIX, decode, npy_header
from mura_dist.data.shards.index import parse

INDEX_HEADER = "v1.2"
_OVERHEAD_BYTES = 1 << 16  # of an image member, beyond its pixels
_MAX_OPEN_TARS = 512  # per process; further tars are opened for each read
_RETRY_PAUSES_S = (0.2, 1.0, 3.0)  # before each retry of a failed read


class CorruptSampleError(Exception):
    """The sample of a row is not what the conversion wrote. Its text is one line that names the sample."""

    def __init__(self, row: int, path: str, tar: str, reason: str) -> None:
        super().__init__(row, path, tar, reason)
        self.row, self.path, self.tar, self.reason = row, path, tar, reason

    def __str__(self) -> str:
        return f"corrupt sample: row {self.row} ({self.path}) in {self.tar}: {self.reason}"


class ShardReadError(RunError):
    """A tar could not be read because of its disk or machine. Its samples may be valid."""


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar. Its data is `size` bytes at `offset`."""

    suffix: str
    offset: int
    size: int
    name: str

    @property
    def row(self) -> int:
        """Row of the manifest, the number in the member's name."""
        return int(self.name.split(".", 1)[0])


def read_index(path: Path) -> list[list[TarMember]]:
    """Read the members of each sample of a tar from its .idx file."""
    header, *lines = path.read_text(encoding="ascii").splitlines()
    version, num_samples = header.split()
    if version != INDEX_HEADER or int(num_samples) != len(lines):
        raise ValueError(f"{path.name}: {len(lines)} samples of version {version}, header says {header[:80]!r}")
    samples = []
    for line in lines:
        fields = line.split(" ")
        samples.append(
            [
                TarMember(fields[i], int(fields[i + 1]), int(fields[i + 2]), fields[i + 3])
                for i in range(0, len(fields), 4)
            ]
        )
    return samples


def read_crcs(path: Path) -> Iterator[tuple[int, int]]:
    """Yield (row, CRC-32 of the image member) of each sample of a tar from its .crc file."""
    for line in path.read_text(encoding="ascii").splitlines():
        row, crc = line.split()
        yield int(row), int(crc, 16)


@dataclass(frozen=True)
class Shards:
    """An open shard folder, whose samples are read by row. Threads may share it.

    `os.pread` is used because a failing disk raises an error, where a memory map would kill the process.
    """

    folder: Path
    index: dict[str, Any]
    manifest: Manifest
    _files: dict[int, int] = field(default_factory=dict, repr=False)  # number of the tar -> file descriptor
    _replaced: list[int] = field(default_factory=list, repr=False)  # descriptors that a thread may still read from
    _open_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    corrupt: dict[int, CorruptSampleError] = field(default_factory=dict, repr=False)  # by row, recorded by the loader

    @classmethod
    def open(cls, folder: StoragePath, mirror: Path | None = None) -> Self:
        """Open a local folder or a URL. A URL is copied to this machine first, and so is a folder if `mirror` is given.

        Raises:
            UserError: There are no finished shards of this format.
        """
        folder = cache.local_folder(folder, mirror)
        path = folder / "index.json"
        if not path.is_file():
            raise cache.no_shards_error(folder, is_unfinished=(folder / "conversion.json").is_file())
        index = parse(path.read_bytes(), folder)
        shards = cls(folder, index, Manifest.load(folder / "manifest.csv"))
        if shards.manifest.digest != index["manifest"]["sha256"]:
            raise UserError(f"{folder}/manifest.csv does not match index.json. Make the shards again.")
        return shards

    @property
    def size(self) -> int:
        """Side of the radiographs in pixels."""
        return self.index["size"]

    @property
    def encoding(self) -> str:
        """Encoding of the image members: raw, png or jpeg."""
        return self.index["encoding"]

    @property
    def trained_on(self) -> str:
        """Content of the shards, `phantoms` or `radiographs`, which a model's card records."""
        return self.index["holds"]

    def tar_names(self, split: str | None = None) -> list[str]:
        """Return the names of the tars of one split, or of all, in order."""
        return [shard["name"] for shard in self._index_entries(split)]

    def _index_entries(self, split: str | None = None) -> list[dict[str, Any]]:
        splits = self.index["splits"]
        return [shard for name in splits if split in (None, name) for shard in splits[name]["shards"]]

    @cached_property
    def _unreadable(self) -> np.ndarray:
        return np.array([item["row"] for item in self.index["unreadable"]], dtype=np.int64)

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of a split that have a sample, ascending, int64 (n,). Raises UserError where there are none."""
        rows = np.setdiff1d(self.manifest.rows(split), self._unreadable, assume_unique=True)
        if not len(rows):
            present = [name for name, content in self.index["splits"].items() if content["num_radiographs"]]
            remedy = f"Give one of {', '.join(present)}." if present else "All splits are."
            raise UserError(f"split {split!r} of {self.folder} is empty. {remedy}")
        return rows

    def check_tars(self, *splits: str) -> None:
        """Check the tars of splits without reading samples, before a run begins.

        Raises:
            UserError: A tar is missing or truncated, or index.json contradicts the .idx files.
        """
        for split in splits:
            for shard in self._index_entries(split):
                path = self.folder / shard["name"]
                size = path.stat().st_size if path.is_file() else None
                if size != shard["bytes"]:
                    problem = "is missing" if size is None else f"has {size:,} bytes (index.json: {shard['bytes']:,})"
                    raise UserError(
                        f"{path} {problem}. Delete {path.with_suffix('.json').name} and index.json, then run the same "
                        "`mura-dist shards` command again."
                    )
        _ = self._locations

    def digest(self, *splits: str) -> str:
        """Return the SHA-256 of the manifest, the indexes of all tars and the tars of `splits`, by reading them.

        A file that cannot be read counts as None: reading its samples raises the error.
        """

        def file_digest(name: str) -> str | None:
            try:
                return sha256(self.folder / name)
            except OSError:
                return None

        tars = self.tar_names()
        tables = [str(Path(name).with_suffix(suffix)) for name in tars for suffix in (".idx", ".crc")]
        names = ["index.json", "manifest.csv", *tables, *(name for split in splits for name in self.tar_names(split))]
        return json_sha256({name: file_digest(name) for name in names})

    def read_members(self, name: str) -> list[list[TarMember]]:
        """Read the image, label and row members of each sample of a tar from its .idx file.

        Raises:
            ValueError: A member lies outside the tar, is too large, or is of no row of the manifest.
        """
        num_bytes = next(shard["bytes"] for shard in self._index_entries() if shard["name"] == name)
        samples = read_index((self.folder / name).with_suffix(".idx"))
        for sample in samples:
            if len(sample) != 3 or {member.row for member in sample} - {sample[0].row}:
                raise ValueError(f"a sample has {len(sample)} members (3 of one row are needed)")
            self._check_row(sample[0].row)
            for member in sample:
                if min(member.offset, member.size) < 0 or member.offset + member.size > num_bytes:
                    raise ValueError(f"{member.name} lies outside the tar's {num_bytes:,} bytes")
            if sample[0].size > (limit := 2 * self.size**2 + _OVERHEAD_BYTES):
                raise ValueError(f"{sample[0].name} has {sample[0].size:,} bytes (at most {limit:,})")
        return samples

    def read_crcs(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield (row, CRC-32 of the image member) of each sample of a tar. Raises ValueError for invalid entries."""
        for row, crc in read_crcs((self.folder / name).with_suffix(".crc")):
            self._check_row(row)
            if not 0 <= crc < 2**32:
                raise ValueError(f"{crc:x} is not a CRC-32")
            yield row, crc

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.manifest.frame):
            raise ValueError(f"row {row} is not in the manifest of {len(self.manifest.frame):,} rows")

    @cached_property
    def _locations(self) -> "_Locations":
        return _Locations.read(self)

    def read_encoded(self, row: int) -> bytes:
        """Read the image member of a row as stored. Its CRC-32 is checked at the first read.

        Raises:
            KeyError: The row has no sample, because its file was unreadable.
            CorruptSampleError: The sample is not what the conversion wrote.
            ShardReadError: The tar cannot be read, after several attempts.
        """
        at = self._locations
        number = at.tar[row]
        if number < 0:
            raise KeyError(f"row {row} has no sample")
        length = int(at.length[row])
        data = self._read(row, number, length, int(at.offset[row]))
        if not at.checked[row] or len(data) != length:
            if zlib.crc32(data) != at.crc[row]:
                raise self._corrupt_error(row, "its CRC-32 differs: its pixels changed, or its tar is truncated")
            at.checked[row] = True
        return data

    def describe(self, row: int) -> str:
        """Return text that names the sample of a row: row, path, tar."""
        return f"row {row} ({self.manifest.frame['path'].at[row]}) in {self._locations.names[self._locations.tar[row]]}"

    def record_corrupt(self, error: CorruptSampleError) -> bool:
        """Record a corrupt sample. Return whether it is the first record of its row."""
        return self.corrupt.setdefault(error.row, error) is error

    def _corrupt_error(self, row: int, reason: str) -> CorruptSampleError:
        tar = self._locations.names[self._locations.tar[row]]
        return CorruptSampleError(row, str(self.manifest.frame.at[row, "path"]), tar, reason)

    def _read(self, row: int, number: int, length: int, offset: int) -> bytes:
        """Read from tar `number`, with retries after I/O faults. Raises ShardReadError."""
        for pause_s in (*_RETRY_PAUSES_S, None):
            try:
                return self._read_once(number, length, offset)
            except OSError as error:
                if pause_s is None or not is_io_fault(error):
                    attempts = f" in {1 + len(_RETRY_PAUSES_S)} attempts" if pause_s is None else ""
                    raise ShardReadError(
                        f"{self.folder / self._locations.names[number]} cannot be read{attempts}: {os_reason(error)} (at row "
                        f"{row}). Fix or mount its disk. The same command resumes."
                    ) from error
                self._reopen(number)
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _read_once(self, number: int, length: int, offset: int) -> bytes:
        file = self._files.get(number)
        if file is not None:
            return os.pread(file, length, offset)
        if not hasattr(os, "pread"):  # Windows
            with open(self.folder / self._locations.names[number], "rb") as opened:
                opened.seek(offset)
                return opened.read(length)
        file = os.open(self.folder / self._locations.names[number], os.O_RDONLY)
        with self._open_lock:
            is_stored = len(self._files) < _MAX_OPEN_TARS and self._files.setdefault(number, file) == file
        try:
            return os.pread(file, length, offset)
        finally:
            if not is_stored:
                os.close(file)

    def _reopen(self, number: int) -> None:
        """Forget a tar's descriptor, which may be stale, so that the next read opens the tar again."""
        with self._open_lock:
            file = self._files.pop(number, None)
            self._replaced.extend([] if file is None else [file])

    def __del__(self) -> None:
        for file in (*self._files.values(), *self._replaced):
            os.close(file)

    @cached_property
    def _npy_header_bytes(self) -> int:
        return len(npy_header((self.size, self.size)))

    @property
    def sample_bytes(self) -> int:
        """Length of an image member of raw shards in bytes."""
        return self._npy_header_bytes + self.size**2

    def read_pixels(self, row: int) -> np.ndarray:
        """Read the pixels of a row, uint8 (S, S), read-only. Raises as `read_encoded`."""
        data = self.read_encoded(row)
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8, offset=self._npy_header_bytes).reshape(self.size, self.size)
        try:
            pixels = decode(data, self.encoding)
        except (OSError, ValueError) as error:
            raise self._corrupt_error(row, f"does not decode: {error}") from error
        if pixels.shape != (self.size, self.size):
            raise self._corrupt_error(row, f"is {pixels.shape}, not {(self.size, self.size)}")
        return pixels


@dataclass(frozen=True)
class _Locations:
    """Locations of the image members by row, (num_rows,) each: int64 tar (-1: no sample), offset, length; uint32 crc."""

    names: list[str]
    tar: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray
    checked: np.ndarray  # bool: the CRC-32 was verified

    @classmethod
    def read(cls, shards: Shards) -> "_Locations":
        """Read the .idx and .crc files.

        Raises:
            UserError: A file is missing or corrupt, or index.json has another encoding or size than the samples.
        """
        names, num_rows = shards.tar_names(), len(shards.manifest.frame)
        tar, offset, length = (np.full(num_rows, fill, np.int64) for fill in (-1, 0, 0))
        crc = np.zeros(num_rows, np.uint32)
        for number, name in enumerate(names):
            try:
                for image, *_ in shards.read_members(name):
                    if image.suffix != SUFFIX.get(shards.encoding):
                        raise _contradiction_error(shards, f"encoding {shards.encoding!r}", f"{image.name} of {name}")
                    tar[image.row], offset[image.row], length[image.row] = number, image.offset, image.size
                values = dict(shards.read_crcs(name))
                if values.keys() != set(np.flatnonzero(tar == number).tolist()):
                    raise ValueError(f"{len(values)} CRC-32 do not match its samples")
                for row, value in values.items():
                    crc[row] = value
            except (OSError, ValueError, IndexError) as error:
                if is_io_fault(error):
                    raise
                raise UserError(
                    f"{shards.folder}: the .idx or .crc of {name} is missing or corrupt ({error}). "
                    f"Delete {Path(name).with_suffix('.json')} and index.json, then convert again."
                ) from error
        if shards.encoding == "raw" and (differs := (tar >= 0) & (length != shards.sample_bytes)).any():
            row = int(np.flatnonzero(differs)[0])
            sample = f"{length[row]:,} bytes for row {row} in {names[tar[row]]}, not {shards.sample_bytes:,}"
            raise _contradiction_error(shards, f"raw pixels of size {shards.size}", sample)
        return cls(names, tar, offset, length, crc, np.zeros(num_rows, bool))


def _contradiction_error(shards: Shards, stated: str, sample: str) -> UserError:
    return UserError(
        f"{shards.folder}/index.json has {stated}, its .idx files have {sample}: index.json was changed, or is of other shards. "
        "Make the shards again."
    )
