"""Check a shard folder whole, to the bit.

shard folder or URL -> each tar, its .idx and .crc against index.json and manifest.csv -> a line for each problem
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

from mura_dist.core.storage import StoragePath
from mura_dist.data.shards.codec import decode
from mura_dist.data.shards.reader import Shards, TarMember


def verify(folder: StoragePath) -> Iterator[str]:
    """Name what is wrong with a shard folder, a line each; nothing at all where it is sound.

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
        samples = shards.samples(path.name)
        crcs = dict(shards.crcs(path.name))
        data = path.read_bytes()
    except (OSError, ValueError, IndexError) as error:
        yield f"{path.name}: it, its .idx or its .crc is damaged ({error})"
        return
    damaged = 0
    for members in samples:
        seen.append(members[0].row)
        for problem in _verify_sample(shards, split, data, members, crcs):
            damaged += 1
            yield f"{path.name}: sample {members[0].name}: {problem}"
    if len(samples) != shard["num_samples"]:
        yield f"{path.name}: {len(samples)} samples, index.json says {shard['num_samples']}"
    if hashlib.sha256(data).hexdigest() != shard["sha256"] and not damaged:
        yield f"{path.name}: SHA-256 differs, though every sample is sound: a header is damaged, or it is of another set"


def _verify_sample(
    shards: Shards, split: str, data: bytes, members: list[TarMember], crcs: dict[int, int]
) -> Iterator[str]:
    image, label, identity = members
    part = {m.suffix: data[m.offset : m.offset + m.size] for m in members}
    known = 0 <= image.row < len(shards.manifest.frame)
    line = shards.manifest.frame.loc[image.row] if known else None
    if line is None or line["split"] != split:
        yield "its row is not of this split"
    elif part[label.suffix] != str(line["label"]).encode() or part[identity.suffix] != str(image.row).encode():
        yield f"label or row differs from the manifest's ({line['path']})"
    if zlib.crc32(part[image.suffix]) != crcs.get(image.row):
        yield "CRC-32 differs: its pixels changed"
        return
    try:
        shape = decode(part[image.suffix], shards.encoding).shape
    except (OSError, ValueError) as error:
        yield f"does not decode ({error})"
    else:
        if shape != (shards.size, shards.size):
            yield f"is {shape}, not {(shards.size, shards.size)}"
