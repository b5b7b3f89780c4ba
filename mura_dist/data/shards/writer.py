"""Write one shard: samples -> tar, .crc, .idx and completion mark.

    pack: samples -> the tar's bytes -> finish: sync, rename, compare with the disk, write the other files

    train-000000.tar, .crc, .idx -> train-000000.json: the mark, written last, whose content goes into index.json

A shard is finished if its mark exists and matches the tar (is_complete). The bytes depend on the samples only, not on times,
owners or modes of this machine. webdataset's TarWriter is not used: it is slower, and the base install does not have it.
"""

import contextlib
import hashlib
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from mura_dist.core import files
from mura_dist.core.errors import RunError
from mura_dist.core.storage import Storage
from mura_dist.data.io_faults import IO_ERROR
from mura_dist.data.shards.codec import SUFFIX, Buffer, Sample
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


Finish = Callable[[], dict[str, Any]]


def pack(folder: Storage, name: str, samples: Iterable[Sample], labels: Any, *, encoding: str) -> Finish:
    """Consume the samples of the tar `name`, and return a function that finishes the shard and returns its mark.

    That function mostly waits for the disk, so another thread may call it. Without samples it writes the mark only.

    Args:
        folder: Target of the files.
        name: Name of the tar.
        samples: Samples in row order, and unreadable files.
        labels: Label by row.
        encoding: raw, png or jpeg.

    Raises:
        IncompleteShardError: An I/O fault kept a file from being read. All samples were consumed, and nothing was written.
        RunError: By the function: the tar on disk differs from what was written.
    """
    unreadable: list[dict[str, Any]] = []
    readable = _filter_readable(iter(samples), unreadable)
    index: list[str] = []
    crcs: list[str] = []
    with contextlib.ExitStack() as stack:
        tar = None
        if (first := next(readable, None)) is not None:  # readers may fail on an empty tar
            tar = _Tar(stack.enter_context(folder.writing(name)))
            for sample in itertools.chain([first], readable):
                assert sample.data is not None
                index.append(tar.add(sample.row, sample.data, labels[sample.row], encoding))
                crcs.append(f"{sample.row:09d} {zlib.crc32(sample.data):08x}\n")
            tar.close()
        if faults := [item for item in unreadable if item["code"] == IO_ERROR]:
            raise IncompleteShardError(faults)
        written = stack.pop_all()

    def finish() -> dict[str, Any]:
        written.close()
        mark: dict[str, Any] = {"name": name, "num_samples": 0, "bytes": 0, "sha256": None}
        if tar is not None:
            mark |= {"num_samples": len(index), "bytes": tar.bytes, "sha256": tar.digest.hexdigest()}
            _check(folder, mark)
            stem = name.removesuffix(".tar")
            folder.write(f"{stem}.crc", "".join(crcs).encode())
            folder.write(f"{stem}.idx", "\n".join([f"{INDEX_HEADER} {len(index)}", *index, ""]).encode())
        mark["unreadable"] = unreadable
        folder.write(mark_name(name), (json.dumps(mark, indent=2) + "\n").encode())
        return mark

    return finish


def _check(folder: Storage, mark: dict[str, Any]) -> None:
    if not folder.matches(mark["name"], mark["bytes"], mark["sha256"]):
        raise RunError(
            f"{folder}/{mark['name']} differs from what was written: another program writes to it, or the disk lost data. The "
            "same command makes it again."
        )


def _filter_readable(samples: Iterable[Sample], unreadable: list[dict[str, Any]]) -> Iterator[Sample]:
    for sample in samples:
        if sample.data is None:
            unreadable.append({"row": sample.row, "code": sample.code, "reason": sample.reason})
        else:
            yield sample


class _Tar:
    """A tar writer that hashes its bytes, and does not copy images, which is faster than tarfile's `addfile`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def add(self, row: int, image: Buffer, label: int, encoding: str) -> str:
        """Append the three members of a sample, named by its row, and return its line of the .idx file."""
        entries, start = [], self.bytes
        small: list[Buffer] = []
        for suffix, data in ((SUFFIX[encoding], image), ("cls", b"%d" % label), ("id", b"%d" % row)):
            name, size = f"{row:09d}.{suffix}", len(memoryview(data))
            start += tarfile.BLOCKSIZE
            entries.append(f"{suffix} {start} {size} {name}")
            start += size + -size % tarfile.BLOCKSIZE
            small.append(_header(name, size))
            if data is image:
                self._write(b"".join(small))
                self._write(data)
                small = [bytes(-size % tarfile.BLOCKSIZE)]
            else:
                small += [data, bytes(-size % tarfile.BLOCKSIZE)]
        self._write(b"".join(small))
        return " ".join(entries)

    def close(self) -> None:
        """Write the end of an archive: two empty blocks, padded to a full record."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    def _write(self, data: Buffer) -> None:
        self.digest.update(data)
        self.bytes += len(memoryview(data))
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
