"""Open a shard folder, and read its samples by row.

    shard folder or URL -> Shards: index.json, manifest.csv -> .idx and .crc of each tar -> a row's image member

docs/data.md describes the format. The files are written by convert.py and writer.py, and checked whole by verify.py.
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
from mura_dist.core.storage import StoragePath
from mura_dist.data.manifest import Manifest
from mura_dist.data.shards import cache
from mura_dist.data.shards.codec import SUFFIX, decode, npy_header
from mura_dist.data.shards.index import parse

INDEX_HEADER = "v1.2"
_OVERHEAD_BYTES = 1 << 16  # of a file, beside its pixels
_OPEN_TARS = 512  # of a process; beyond them a tar is opened for each read
_RETRY_PAUSES_S = (0.2, 1.0, 3.0)  # before each further try of a read that a disk or the network refused


class CorruptSampleError(Exception):
    """The sample of a row is not what the conversion wrote. `str(damaged)` is one line that names it."""

    def __init__(self, row: int, path: str, tar: str, why: str) -> None:
        super().__init__(row, path, tar, why)
        self.row, self.path, self.tar, self.why = row, path, tar, why

    def __str__(self) -> str:
        return f"damaged sample: row {self.row} ({self.path}) in {self.tar}: {self.why}"


class ShardReadError(RunError):
    """A tar could not be read. It is the disk's or the machine's error and says nothing about a sample."""


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar: its data start at `offset` and are `size` bytes long."""

    suffix: str
    offset: int
    size: int
    name: str

    @property
    def row(self) -> int:
        return int(self.name.split(".", 1)[0])


def read_index(path: Path) -> list[list[TarMember]]:
    """The members of each sample of one shard, from its .idx file."""
    header, *lines = path.read_text(encoding="ascii").splitlines()
    version, num_samples = header.split()
    if version != INDEX_HEADER or int(num_samples) != len(lines):
        raise ValueError(f"{path.name}: {len(lines)} samples of version {version}, header says {header[:80]!r}")
    samples = []
    for line in lines:
        words = line.split(" ")
        samples.append(
            [TarMember(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)]
        )
    return samples


def read_crcs(path: Path) -> Iterator[tuple[int, int]]:
    """(row, CRC-32 of its image member) of each sample of one shard, from its .crc file."""
    for line in path.read_text(encoding="ascii").splitlines():
        row, crc = line.split()
        yield int(row), int(crc, 16)


@dataclass(frozen=True)
class Shards:
    """An open shard folder. Reading is by row, at a place of a tar; threads may share it.

    `os.pread`, not a memory map: measured a quarter faster (no page faults), and a disk that fails is an error, not a
    dead process.
    """

    folder: Path
    index: dict[str, Any]
    manifest: Manifest
    _files: dict[int, int] = field(default_factory=dict, repr=False)  # tar's number -> file descriptor
    _replaced: list[int] = field(default_factory=list, repr=False)  # descriptors that a thread may still read from
    _opening: threading.Lock = field(default_factory=threading.Lock, repr=False)
    damaged: dict[int, CorruptSampleError] = field(default_factory=dict, repr=False)  # row -> what its reader noted

    @classmethod
    def open(cls, folder: StoragePath, mirror: Path | None = None) -> Self:
        """Of a local folder or a URL, which is copied to this machine first, as everything is where `mirror` names a folder.

        Raises UserError where there are no finished shards of this format.
        """
        folder = cache.local_folder(folder, mirror)
        path = folder / "index.json"
        if not path.is_file():
            unfinished = (folder / "conversion.json").is_file()
            raise UserError(
                f"{folder}: the conversion is not finished; run the same `mura-dist shards` command again"
                if unfinished
                else f"{folder} holds no shards (no index.json); make them with `mura-dist shards SOURCE {folder}`"
            )
        index = parse(path.read_bytes(), folder)
        shards = cls(folder, index, Manifest.load(folder / "manifest.csv"))
        if shards.manifest.digest != index["manifest"]["sha256"]:
            raise UserError(f"{folder}/manifest.csv is not the one index.json was written with; make the shards again")
        return shards

    @property
    def size(self) -> int:
        return self.index["size"]

    @property
    def encoding(self) -> str:
        return self.index["encoding"]

    @property
    def trained_on(self) -> str:
        """`phantoms` or `radiographs`: what a model trained on these has seen."""
        return self.index["holds"]

    def tar_names(self, split: str | None = None) -> list[str]:
        """The tars of one split, or of all, in order."""
        return [shard["name"] for shard in self._listed(split)]

    def _listed(self, split: str | None = None) -> list[dict[str, Any]]:
        splits = self.index["splits"]
        return [shard for name in splits if split in (None, name) for shard in splits[name]["shards"]]

    @cached_property
    def _unreadable(self) -> np.ndarray:
        return np.array([item["row"] for item in self.index["unreadable"]], dtype=np.int64)

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that have a sample, ascending: int64 (n,). UserError where there are none."""
        rows = np.setdiff1d(self.manifest.rows(split), self._unreadable, assume_unique=True)
        if not len(rows):
            present = ", ".join(name for name, part in self.index["splits"].items() if part["num_radiographs"])
            raise UserError(f"split {split!r} of {self.folder} is empty; it has {present or 'no radiographs at all'}")
        return rows

    def check_tars(self, *splits: str) -> None:
        """Check what can be checked without reading samples, so that no run begins on half its data.

        Raises:
            UserError: a tar of these splits is missing or was cut short, or index.json contradicts the .idx files.
        """
        for split in splits:
            for shard in self._listed(split):
                path = self.folder / shard["name"]
                size = path.stat().st_size if path.is_file() else None
                if size != shard["bytes"]:
                    found = "is missing" if size is None else f"has {size:,} bytes, index.json says {shard['bytes']:,}"
                    raise UserError(
                        f"{path} {found}; delete {path.with_suffix('.json').name} and index.json, then run the same "
                        "`mura-dist shards` command again"
                    )
        _ = self._places

    def samples(self, name: str) -> list[list[TarMember]]:
        """The image, label and row of each sample of the tar `name`, from its .idx file.

        Raises:
            ValueError: where one lies outside the tar, is larger than a radiograph can be, or is of no row of the manifest.
        """
        num_bytes = next(shard["bytes"] for shard in self._listed() if shard["name"] == name)
        samples = read_index((self.folder / name).with_suffix(".idx"))
        for sample in samples:
            if len(sample) != 3 or {member.row for member in sample} - {sample[0].row}:
                raise ValueError(f"a sample of {len(sample)} members, of one row each")
            self._check_row(sample[0].row)
            for member in sample:
                if min(member.offset, member.size) < 0 or member.offset + member.size > num_bytes:
                    raise ValueError(f"{member.name} lies outside the tar's {num_bytes:,} bytes")
            if sample[0].size > (limit := 2 * self.size**2 + _OVERHEAD_BYTES):
                raise ValueError(f"{sample[0].name} has {sample[0].size:,} bytes, a radiograph at most {limit:,}")
        return samples

    def crcs(self, name: str) -> Iterator[tuple[int, int]]:
        """(row, CRC-32 of its image member) of each sample of the tar `name`. Raises ValueError as `samples`."""
        for row, crc in read_crcs((self.folder / name).with_suffix(".crc")):
            self._check_row(row)
            if not 0 <= crc < 2**32:
                raise ValueError(f"{crc:x} is no CRC-32")
            yield row, crc

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.manifest.frame):
            raise ValueError(f"row {row} is not in the manifest, which has {len(self.manifest.frame):,}")

    @cached_property
    def _places(self) -> "_Places":
        return _Places.read(self)

    def read_encoded(self, row: int) -> bytes:
        """Return the image member of `row` as stored. Its CRC-32 is checked the first time.

        Raises:
            KeyError: there is no sample, since the file was unreadable.
            CorruptSampleError: the sample is not what the conversion wrote.
            ShardReadError: its tar cannot be read, after some tries.
        """
        at = self._places
        number = at.tar[row]
        if number < 0:
            raise KeyError(f"row {row} has no sample")
        length = int(at.length[row])
        data = self._read(row, number, length, int(at.offset[row]))
        if not at.checked[row] or len(data) != length:
            if zlib.crc32(data) != at.crc[row]:
                raise self._damaged(row, "its CRC-32 differs: its pixels changed, or its tar was cut short")
            at.checked[row] = True
        return data

    def describe(self, row: int) -> str:
        """Name the sample of a row: row, path, tar."""
        return f"row {row} ({self.manifest.frame['path'].at[row]}) in {self._places.names[self._places.tar[row]]}"

    def record_corrupt(self, one: CorruptSampleError) -> bool:
        """Whether this is news."""
        return self.damaged.setdefault(one.row, one) is one

    def _damaged(self, row: int, why: str) -> CorruptSampleError:
        return CorruptSampleError(
            row, str(self.manifest.frame.at[row, "path"]), self._places.names[self._places.tar[row]], why
        )

    def _read(self, row: int, number: int, length: int, offset: int) -> bytes:
        """Read from tar `number`, again after a pause where a disk or the network refuses. Raises ShardReadError."""
        for pause_s in (*_RETRY_PAUSES_S, None):
            try:
                return self._read_once(number, length, offset)
            except OSError as error:
                if pause_s is None or not is_io_fault(error):
                    again = f" in {1 + len(_RETRY_PAUSES_S)} tries" if pause_s is None else ""
                    raise ShardReadError(
                        f"{self.folder / self._places.names[number]} cannot be read{again}: {os_reason(error)} (at row {row}); "
                        "its disk is at fault, no sample: mend or mount it, then the same command resumes"
                    ) from error
                self._reopen(number)
                time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    def _read_once(self, number: int, length: int, offset: int) -> bytes:
        file = self._files.get(number)
        if file is not None:
            return os.pread(file, length, offset)
        if not hasattr(os, "pread"):  # Windows
            with open(self.folder / self._places.names[number], "rb") as opened:
                opened.seek(offset)
                return opened.read(length)
        file = os.open(self.folder / self._places.names[number], os.O_RDONLY)
        with self._opening:
            kept = len(self._files) < _OPEN_TARS and self._files.setdefault(number, file) == file
        try:
            return os.pread(file, length, offset)
        finally:
            if not kept:
                os.close(file)

    def _reopen(self, number: int) -> None:
        """Open a tar anew at its next read: a descriptor that went stale stays so."""
        with self._opening:
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
        """Length of an image member of raw shards."""
        return self._npy_header_bytes + self.size**2

    def read_pixels(self, row: int) -> np.ndarray:
        """uint8 (S, S), read-only. Raises as `read_encoded`."""
        data = self.read_encoded(row)
        if self.encoding == "raw":
            return np.frombuffer(data, np.uint8, offset=self._npy_header_bytes).reshape(self.size, self.size)
        try:
            pixels = decode(data, self.encoding)
        except (OSError, ValueError) as error:
            raise self._damaged(row, f"does not decode: {error}") from error
        if pixels.shape != (self.size, self.size):
            raise self._damaged(row, f"is {pixels.shape}, not {(self.size, self.size)}")
        return pixels


@dataclass(frozen=True)
class _Places:
    """Where each row's image member lies, all arrays (num_rows,): int64 tar (-1: no sample), offset, length; uint32 crc."""

    names: list[str]
    tar: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray
    checked: np.ndarray  # bool: its CRC-32 was found right

    @classmethod
    def read(cls, shards: Shards) -> "_Places":
        """Read the .idx and .crc files.

        Raises:
            UserError: one of them is missing or damaged, or index.json names another encoding or size than the samples have.
        """
        names, num_rows = shards.tar_names(), len(shards.manifest.frame)
        tar, offset, length = (np.full(num_rows, fill, np.int64) for fill in (-1, 0, 0))
        crc = np.zeros(num_rows, np.uint32)
        for number, name in enumerate(names):
            try:
                for image, *_ in shards.samples(name):
                    if image.suffix != SUFFIX.get(shards.encoding):
                        raise _contradicted(shards, f"encoding {shards.encoding!r}", f"{image.name} of {name}")
                    tar[image.row], offset[image.row], length[image.row] = number, image.offset, image.size
                values = dict(shards.crcs(name))
                if values.keys() != set(np.flatnonzero(tar == number).tolist()):
                    raise ValueError(f"{len(values)} CRC-32 are not of its samples")
                for row, value in values.items():
                    crc[row] = value
            except (OSError, ValueError, IndexError) as error:
                if is_io_fault(error):
                    raise
                raise UserError(
                    f"{shards.folder}: the .idx or .crc of {name} is missing or damaged ({error}); "
                    f"delete {Path(name).with_suffix('.json')} and index.json, then convert again"
                ) from error
        if shards.encoding == "raw" and (other := (tar >= 0) & (length != shards.sample_bytes)).any():
            row = int(np.flatnonzero(other)[0])
            sample = f"{length[row]:,} bytes for row {row} in {names[tar[row]]}, not {shards.sample_bytes:,}"
            raise _contradicted(shards, f"raw pixels of size {shards.size}", sample)
        return cls(names, tar, offset, length, crc, np.zeros(num_rows, bool))


def _contradicted(shards: Shards, claim: str, sample: str) -> UserError:
    return UserError(
        f"{shards.folder}/index.json says {claim}, its .idx files say {sample}: index.json was changed, or is of other shards; "
        "make the shards again"
    )
