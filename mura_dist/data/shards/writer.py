"""One shard: samples in, a tar with its .crc, .idx and mark out.

    train-000000.tar, .crc, .idx -> train-000000.json: the mark, written last; what it says, index.json will say

A shard whose mark is there is finished, if its tar is what the mark says (is_whole). The bytes depend on the samples alone: no
times, owners or modes of this machine.

webdataset's TarWriter does not write them. It sorts a sample's members by name, so these bytes come out of it only member by
member. It takes longer than one write a sample. Its package imports torch, and the base install does not have it.
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
    """The mark's name, of a tar's."""
    return tar.removesuffix(".tar") + ".json"


def faults_name(tar: str) -> str:
    """Return the name of the list of files that an I/O fault kept out of a shard; `tar`: its tar's."""
    return tar.removesuffix(".tar") + FAULTS_SUFFIX


def read_mark(data: bytes) -> dict[str, Any]:
    """{"name", "num_samples", "bytes", "sha256", "unreadable": [{"row", "code", "reason"}]}, or ValueError."""
    mark: dict[str, Any] = files.parse_json(data, CompletionMark)
    return mark


def is_complete(place: Storage, name: str, mark: bytes) -> bool:
    """Return whether a shard is what its mark says: the tar's size and SHA-256, and its companions are there."""
    try:
        told = read_mark(mark)
        if not told["num_samples"]:
            return told["name"] == name
        stem = name.removesuffix(".tar")
        companions = all(place.exists(f"{stem}{suffix}") for suffix in (".crc", ".idx"))
        return told["name"] == name and companions and place.matches(name, told["bytes"], told["sha256"])
    except (ValueError, KeyError, TypeError):  # not a mark
        return False


class IncompleteShardError(Exception):
    """A shard lacks files for no fault of theirs. `faults`: {"row", "code", "reason"} of each."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        super().__init__(faults)
        self.faults = faults


def write(place: Storage, name: str, samples: Iterable[Sample], labels: Any, *, encoding: str) -> dict[str, Any]:
    """Write the shard `name` (its tar's) and return its mark. `labels`: row -> label. Without samples there is a mark only.

    Raises IncompleteShardError, all samples drawn and nothing written, where an I/O fault kept a file from being read; RunError where the
    tar on the disk is not what was written.
    """
    unreadable: list[dict[str, Any]] = []
    readable = _sorted_out(iter(samples), unreadable)
    mark: dict[str, Any] = {"name": name, "num_samples": 0, "bytes": 0, "sha256": None}
    if (first := next(readable, None)) is not None:  # an empty tar would only trip its readers
        index, crcs = [], []
        with place.writing(name) as file:
            tar = _Tar(file)
            for sample in itertools.chain([first], readable):
                index.append(tar.add(sample, labels[sample.row], encoding))
                crcs.append(f"{sample.row:09d} {zlib.crc32(sample.data or b''):08x}\n")
            tar.close()
            _refuse_faults(unreadable)
        if not place.matches(name, tar.bytes, digest := tar.digest.hexdigest()):
            raise RunError(
                f"{place}/{name} is not what was written: another program writes there, or the disk lost it; the same "
                "command makes it again"
            )
        stem = name.removesuffix(".tar")
        place.write(f"{stem}.crc", "".join(crcs).encode())
        place.write(f"{stem}.idx", "\n".join([f"{INDEX_HEADER} {len(index)}", *index, ""]).encode())
        mark |= {"num_samples": len(index), "bytes": tar.bytes, "sha256": digest}
    _refuse_faults(unreadable)
    mark["unreadable"] = unreadable
    place.write(mark_name(name), (json.dumps(mark, indent=2) + "\n").encode())
    return mark


def _refuse_faults(unreadable: list[dict[str, Any]]) -> None:
    if faults := [item for item in unreadable if item["code"] == IO_ERROR]:
        raise IncompleteShardError(faults)


def _sorted_out(samples: Iterable[Sample], unreadable: list[dict[str, Any]]) -> Iterator[Sample]:
    for sample in samples:
        if sample.data is None:
            unreadable.append({"row": sample.row, "code": sample.code, "reason": sample.reason})
        else:
            yield sample


class _Tar:
    """A tar that knows the SHA-256 of its bytes so far. A sample is one write: tarfile's own `addfile` costs far more."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def add(self, sample: Sample, label: int, encoding: str) -> str:
        """Append the three members of a sample; returns its line in the index. The key is the row: it never tells the label."""
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
        """The end of an archive: two empty blocks, filled up to a whole record."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.bytes += len(data)
        self.file.write(data)


def _header(name: str, size: int) -> bytes:
    """A member's block, as tarfile writes it in the USTAR format with mode 644 and no owner, host or time.

    Patched into one that tarfile made: its own way costs 25 microseconds a member, three members a radiograph.
    """
    block = bytearray(_BLANK)
    block[: len(name)] = name.encode("ascii")
    block[124:135] = b"%011o" % size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _blank() -> bytes:
    member = tarfile.TarInfo("")
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _blank()
