"""Shards on disk: plain WebDataset tars, their indexes, and random access by row.

    OUT/manifest.csv            every radiograph, its row, its split (also those that could not be read)
    OUT/train-000000.tar        samples of three members: <row>.npy|.png|.jpg, <row>.cls (label), <row>.id (row), all ASCII names
    OUT/train-000000.crc        "<row> <crc32>" a line: which sample a flipped bit is in
    OUT/train-000000.idx        DALI's index v1.2 ("ext offset size name" a member); written when its tar is complete
    OUT/index.json              written last: format, size, encoding, shards with SHA-256, unreadable files, terms
    OUT/conversion.json         how it was made (times, host, workers): the one file that differs between two conversions

shards/README.md is the same for readers of the format. Writing lives in convert.py; here one opens, reads and verifies.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from .manifest import Manifest
from .refusal import Refusal

FORMAT = 1
SUFFIX = {"raw": "npy", "png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95
INDEX_HEADER = "v1.2"


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """uint8 (S, S) -> the bytes of a sample's image member."""
    data = io.BytesIO()
    if encoding == "raw":
        np.lib.format.write_array(data, pixels, version=(1, 0), allow_pickle=False)
    elif encoding == "png":
        Image.fromarray(pixels).save(data, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def decode(data: bytes, encoding: str) -> np.ndarray:
    """The bytes of a sample's image member -> uint8 (S, S)."""
    if encoding == "raw":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@dataclass(frozen=True)
class Member:
    """A file inside a tar: its data start at `offset` and are `size` bytes long."""

    suffix: str
    offset: int
    size: int
    name: str

    @property
    def row(self) -> int:
        return int(self.name.split(".", 1)[0])


def read_index(path: Path) -> list[list[Member]]:
    """The members of each sample of one shard, from its .idx file."""
    header, *lines = path.read_text(encoding="ascii").splitlines()
    version, num_samples = header.split()
    if version != INDEX_HEADER or int(num_samples) != len(lines):
        raise ValueError(f"{path.name}: {len(lines)} samples of version {version}, header says {header!r}")
    samples = []
    for line in lines:
        words = line.split(" ")
        samples.append(
            [Member(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3]) for i in range(0, len(words), 4)]
        )
    return samples


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shards:
    """An open shard folder. Reading is by row, from memory-mapped tars; threads may share it."""

    folder: Path
    index: dict[str, Any]
    manifest: Manifest
    _maps: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Raises Refusal where `folder` holds no finished shards of this format."""
        folder = Path(folder)
        path = folder / "index.json"
        if not path.is_file():
            unfinished = (folder / "conversion.json").is_file()
            raise Refusal(
                f"{folder}: the conversion is not finished; run the same `mura-dist shards` command again"
                if unfinished
                else f"{folder} holds no shards (no index.json); make them with `mura-dist shards SOURCE {folder}`"
            )
        try:
            index = json.loads(path.read_bytes())
            version = index["format"]
            whole = version != FORMAT or all(
                key in index for key in ("size", "encoding", "holds", "splits", "unreadable")
            )
            digest = index["manifest"]["sha256"] if version == FORMAT else ""
            if not whole:
                raise KeyError("a key is missing")
        except (ValueError, KeyError, TypeError) as error:
            raise Refusal(f"{path} is damaged ({error}); make the shards again") from error
        if version != FORMAT:
            raise Refusal(
                f"{folder} has shards of format {version}, this mura-dist reads format {FORMAT}; "
                "make them again, or install the version that wrote them"
            )
        shards = cls(folder, index, Manifest.load(folder / "manifest.csv"))
        if shards.manifest.digest != digest:
            raise Refusal(f"{folder}/manifest.csv is not the one index.json was written with; make the shards again")
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

    def names(self, split: str | None = None) -> list[str]:
        """The tars of one split, or of all, in order."""
        splits = self.index["splits"]
        return [shard["name"] for name in splits if split in (None, name) for shard in splits[name]["shards"]]

    @cached_property
    def _unreadable(self) -> np.ndarray:
        return np.array([item["row"] for item in self.index["unreadable"]], dtype=np.int64)

    def rows(self, split: str) -> np.ndarray:
        """The rows of a split that have a sample, ascending: int64 (n,). Refusal where there are none."""
        rows = np.setdiff1d(self.manifest.rows(split), self._unreadable, assume_unique=True)
        if not len(rows):
            present = ", ".join(name for name, part in self.index["splits"].items() if part["num_radiographs"])
            raise Refusal(f"split {split!r} of {self.folder} is empty; it has {present or 'no radiographs at all'}")
        return rows

    @cached_property
    def _places(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Tar names, and by row: which tar, where in it, how long. int64 (num_rows,) each; tar -1: no sample."""
        names = self.names()
        tar, offset, length = (np.full(len(self.manifest.frame), fill, np.int64) for fill in (-1, 0, 0))
        for number, name in enumerate(names):
            for image, *_ in read_index((self.folder / name).with_suffix(".idx")):
                tar[image.row], offset[image.row], length[image.row] = number, image.offset, image.size
        return names, tar, offset, length

    def encoded(self, row: int) -> np.ndarray:
        """The image member of `row` as stored: uint8 (num_bytes,), a view into the mapped tar."""
        names, tar, offset, length = self._places
        if tar[row] < 0:
            raise KeyError(f"row {row} has no sample")
        name = names[tar[row]]
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / name, dtype=np.uint8, mode="r")
        return self._maps[name][offset[row] : offset[row] + length[row]]

    @cached_property
    def _npy_header_bytes(self) -> int:
        return len(encode(np.zeros((self.size, self.size), np.uint8), "raw")) - self.size**2

    def pixels(self, row: int) -> np.ndarray:
        """uint8 (S, S); of raw shards a view into the mapped tar, nothing copied."""
        data = self.encoded(row)
        if self.encoding == "raw":
            return data[self._npy_header_bytes :].reshape(self.size, self.size)
        return decode(data.tobytes(), self.encoding)


def verify(folder: Path) -> Iterator[str]:
    """What is wrong with a shard folder, a line each; nothing at all where it is sound.

    Checks that every tar is there, has its SHA-256, holds samples that decode to (S, S), each row once, with the manifest's
    label; a damaged tar is searched for the damaged samples by their CRC-32.
    """
    shards = Shards.open(folder)
    seen: list[int] = []
    for split, part in shards.index["splits"].items():
        for shard in part["shards"]:
            yield from _verify_shard(shards, split, shard, seen)
    expected = [
        row for split in shards.index["splits"] if shards.index["splits"][split]["shards"] for row in shards.rows(split)
    ]
    paths = shards.manifest.frame["path"].to_numpy()
    for row in sorted(set(expected) - set(seen)):
        yield f"row {row} ({paths[row]}): no sample in any shard"


def _verify_shard(shards: Shards, split: str, shard: dict[str, Any], seen: list[int]) -> Iterator[str]:
    path = shards.folder / shard["name"]
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    try:
        samples = read_index(path.with_suffix(".idx"))
        crcs = dict(line.split() for line in path.with_suffix(".crc").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError, IndexError) as error:
        yield f"{path.name}: its .idx or .crc is damaged ({error})"
        return
    data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    damaged = 0
    for members in samples:
        seen.append(members[0].row)
        for problem in _verify_sample(shards, split, data, members, crcs):
            damaged += 1
            yield f"{path.name}: sample {members[0].name}: {problem}"
    if len(samples) != shard["num_samples"]:
        yield f"{path.name}: {len(samples)} samples, index.json says {shard['num_samples']}"
    if sha256(path) != shard["sha256"] and not damaged:
        yield f"{path.name}: SHA-256 differs, though every sample is sound: a header is damaged, or it is of another set"


def _verify_sample(
    shards: Shards, split: str, data: np.ndarray, members: list[Member], crcs: dict[str, str]
) -> Iterator[str]:
    image, label, identity = members
    part = {m.suffix: data[m.offset : m.offset + m.size].tobytes() for m in members}
    known = 0 <= image.row < len(shards.manifest.frame)
    line = shards.manifest.frame.loc[image.row] if known else None
    if line is None or line["split"] != split:
        yield "its row is not of this split"
    elif part[label.suffix] != str(line["label"]).encode() or part[identity.suffix] != str(image.row).encode():
        yield f"label or row differs from the manifest's ({line['path']})"
    if f"{zlib.crc32(part[image.suffix]):08x}" != crcs.get(image.name.split(".", 1)[0]):
        yield "CRC-32 differs: its pixels changed"
        return
    try:
        shape = decode(part[image.suffix], shards.encoding).shape
    except (OSError, ValueError) as error:
        yield f"does not decode ({error})"
    else:
        if shape != (shards.size, shards.size):
            yield f"is {shape}, not {(shards.size, shards.size)}"
