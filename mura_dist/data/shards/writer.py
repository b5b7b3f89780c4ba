"""Write one shard: samples -> tar, .crc, .idx and completion mark.

    train-000000.tar, .crc, .idx -> train-000000.json: the mark, written last, whose content goes into index.json

A shard is finished if its mark exists and matches the tar (is_complete). The bytes depend on the samples only, not on times,
owners or modes of this machine. webdataset's TarWriter is not used: it is slower, and the base install does not have it.
"""

import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from mura_dist.core import files
from mura_dist.core.errors import RunError
from mura_dist.core.storage import Storage
from mura_dist.data.io_faults import IO_ERROR
from mura_dist.data.shards.codec import SUFFIX, Sample
from mura_dist.data.shards.index import CompletionMark
from mura_dist.data.shards.reader import INDEX_HEADER

FAULTS_SUFFIX = ".faults.json"


def mark_name(tar: str) -> str:
    """Return the name of a tar's completion mark."""
    return tar.removesuffix(".tar") + ".json"


def faults_name(tar: str) -> str:
    """Return the name of the list of files that were not read because of I/O faults."""
    return tar.removesuffix(".tar") + FAULTS_SUFFIX


def read_mark(data: bytes) -> dict[str, Any]:
    """Parse a completion mark.

    Returns:
        {"name", "num_samples", "bytes", "sha256", "unreadable": [{"row", "code", "reason"}]}.

    Raises:
        ValueError: The mark is invalid.
    """
    mark: dict[str, Any] = files.parse_json(data, CompletionMark)
    return mark


def is_complete(folder: Storage, name: str, mark: bytes) -> bool:
    """Return whether the tar `name` matches its mark in size and SHA-256, and its companion files exist."""
    try:
        expected = read_mark(mark)
        if not expected["num_samples"]:
            return expected["name"] == name
        stem = name.removesuffix(".tar")
        companions = all(folder.exists(f"{stem}{suffix}") for suffix in (".crc", ".idx"))
        return expected["name"] == name and companions and folder.matches(name, expected["bytes"], expected["sha256"])
    except (ValueError, KeyError, TypeError):  # not a mark
        return False


class IncompleteShardError(Exception):
    """A shard lacks files that were not read because of I/O faults. `faults`: {"row", "code", "reason"} of each."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        super().__init__(faults)
        self.faults = faults


def write(folder: Storage, name: str, samples: Iterable[Sample], labels: Any, *, encoding: str) -> dict[str, Any]:
    """Write the shard of the tar `name`, and return its mark. Without samples only the mark is written.

    Args:
        folder: Target of the files.
        name: Name of the tar.
        samples: Samples in row order, and unreadable files.
        labels: Label by row.
        encoding: raw, png or jpeg.

    Raises:
        IncompleteShardError: An I/O fault kept a file from being read. All samples were consumed, and nothing was written.
        RunError: The tar on disk differs from what was written.
    """
    unreadable: list[dict[str, Any]] = []
    readable = _filter_readable(iter(samples), unreadable)
    mark: dict[str, Any] = {"name": name, "num_samples": 0, "bytes": 0, "sha256": None}
    if (first := next(readable, None)) is not None:  # readers may fail on an empty tar
        index, crcs = [], []
        with folder.writing(name) as file:
            tar = _Tar(file)
            for sample in itertools.chain([first], readable):
                index.append(tar.add(sample, labels[sample.row], encoding))
                crcs.append(f"{sample.row:09d} {zlib.crc32(sample.data or b''):08x}\n")
            tar.close()
            _refuse_faults(unreadable)
        if not folder.matches(name, tar.bytes, digest := tar.digest.hexdigest()):
            raise RunError(
                f"{folder}/{name} differs from what was written: another program writes to it, or the disk lost data. The same "
                "command makes it again."
            )
        stem = name.removesuffix(".tar")
        folder.write(f"{stem}.crc", "".join(crcs).encode())
        folder.write(f"{stem}.idx", "\n".join([f"{INDEX_HEADER} {len(index)}", *index, ""]).encode())
        mark |= {"num_samples": len(index), "bytes": tar.bytes, "sha256": digest}
    _refuse_faults(unreadable)
    mark["unreadable"] = unreadable
    folder.write(mark_name(name), (json.dumps(mark, indent=2) + "\n").encode())
    return mark


def _refuse_faults(unreadable: list[dict[str, Any]]) -> None:
    if faults := [item for item in unreadable if item["code"] == IO_ERROR]:
        raise IncompleteShardError(faults)


def _filter_readable(samples: Iterable[Sample], unreadable: list[dict[str, Any]]) -> Iterator[Sample]:
    for sample in samples:
        if sample.data is None:
            unreadable.append({"row": sample.row, "code": sample.code, "reason": sample.reason})
        else:
            yield sample


class _Tar:
    """A tar writer that hashes its bytes, and writes each sample at once, which is faster than tarfile's `addfile`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def add(self, sample: Sample, label: int, encoding: str) -> str:
        """Append the three members of a sample, named by its row, and return its line of the .idx file."""
        assert sample.data is not None
        blocks: list[bytes] = []
        entries, end = [], self.bytes
        for suffix, data in ((SUFFIX[encoding], sample.data), ("cls", b"%d" % label), ("id", b"%d" % sample.row)):
            name = f"{sample.row:09d}.{suffix}"
            entries.append(f"{suffix} {end + tarfile.BLOCKSIZE} {len(data)} {name}")
            blocks += [_header(name, len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
            end += tarfile.BLOCKSIZE + len(data) + len(blocks[-1])
        self._write(b"".join(blocks))
        return " ".join(entries)

    def close(self) -> None:
        """Write the end of an archive: two empty blocks, padded to a full record."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.bytes += len(data)
        self.file.write(data)


def _header(name: str, size: int) -> bytes:
    """Return a member's header block in the USTAR format, with mode 644 and no owner, host or time.

    It is patched from one header of tarfile, whose own function is slow.
    """
    block = bytearray(_TEMPLATE)
    block[: len(name)] = name.encode("ascii")
    block[124:135] = b"%011o" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _template() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _template()
