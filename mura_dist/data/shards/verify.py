"""Verify all files of a shard folder.

shard folder or URL -> each tar, .idx and .crc against index.json and manifest.csv -> a line for each problem
"""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Any

from mura_dist.core.storage import StoragePath
from mura_dist.data.shards.codec import decode
from mura_dist.data.shards.reader import Shards, TarMember


def verify(folder: StoragePath) -> Iterator[str]:
    """Yield a line for each problem of a shard folder. Valid shards give none.

    Every tar must exist with its SHA-256, and its samples must decode to (S, S), each row once, with the manifest's label. In a
    corrupt tar, the corrupt samples are identified by CRC-32.
    """
    shards = Shards.open(folder)
    rows: list[int] = []
    for split, content in shards.index["splits"].items():
        for shard in content["shards"]:
            yield from _verify_shard(shards, split, shard, rows)
    expected = [
        row for split in shards.index["splits"] if shards.index["splits"][split]["shards"] for row in shards.rows(split)
    ]
    paths = shards.manifest.frame["path"].to_numpy()
    for row in sorted(set(expected) - set(rows)):
        yield f"row {row} ({paths[row]}): no sample in any shard"


def _verify_shard(shards: Shards, split: str, shard: dict[str, Any], rows: list[int]) -> Iterator[str]:
    """Yield the problems of one shard, and append the rows of its samples to `rows`."""
    path = shards.folder / shard["name"]
    if not path.is_file():
        yield f"{path.name}: missing"
        return
    try:
        samples = shards.read_members(path.name)
        crcs = dict(shards.read_crcs(path.name))
        data = path.read_bytes()
    except (OSError, ValueError, IndexError) as error:
        yield f"{path.name}: the tar, its .idx or its .crc is corrupt ({error})"
        return
    num_corrupt = 0
    for members in samples:
        rows.append(members[0].row)
        for problem in _verify_sample(shards, split, data, members, crcs):
            num_corrupt += 1
            yield f"{path.name}: sample {members[0].name}: {problem}"
    if len(samples) != shard["num_samples"]:
        yield f"{path.name}: {len(samples)} samples, index.json says {shard['num_samples']}"
    if hashlib.sha256(data).hexdigest() != shard["sha256"] and not num_corrupt:
        yield f"{path.name}: SHA-256 differs, but every sample is valid. A header is corrupt, or the tar is of other shards"


def _verify_sample(
    shards: Shards, split: str, data: bytes, members: list[TarMember], crcs: dict[int, int]
) -> Iterator[str]:
    image, label, identity = members
    content = {m.suffix: data[m.offset : m.offset + m.size] for m in members}
    in_manifest = 0 <= image.row < len(shards.manifest.frame)
    line = shards.manifest.frame.loc[image.row] if in_manifest else None
    if line is None or line["split"] != split:
        yield "its row is not in this split"
    elif content[label.suffix] != str(line["label"]).encode() or content[identity.suffix] != str(image.row).encode():
        yield f"label or row differs from the manifest ({line['path']})"
    if zlib.crc32(content[image.suffix]) != crcs.get(image.row):
        yield "CRC-32 differs: its pixels changed"
        return
    try:
        shape = decode(content[image.suffix], shards.encoding).shape
    except (OSError, ValueError) as error:
        yield f"does not decode ({error})"
    else:
        if shape != (shards.size, shards.size):
            yield f"is {shape}, not {(shards.size, shards.size)}"
