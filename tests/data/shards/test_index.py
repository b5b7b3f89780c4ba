"""Shards of strangers: no name leaves the folder, nothing is read outside a tar, all else is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mura_dist.core import storage
from mura_dist.core.errors import UserError
from mura_dist.data.shards import cache, codec
from mura_dist.data.shards.reader import Shards
from mura_dist.data.shards.verify import verify

HUGE = 2**62
STRANGE_NAMES = (
    *(
        "../escape.tar",
        "/tmp/escape.tar",
        "train-000000.tar/../../escape.tar",
        "..",
        ".",
        "",
        "a\0b",
        "train-00000.tar",
    ),
    *("train-000000.tar\n", "Train-000000.tar", "train-٠٠٠٠٠٠.tar", "valid-000000.tar", "test-000000.tar", 7, None, []),
)


def shards_of(index: dict[str, Any]) -> dict[str, Any]:
    return index["splits"]["train"]["shards"][0]


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(index: dict[str, Any]) -> None:
        at = index if not path[:-1] else {"shard": shards_of(index), "manifest": index["manifest"]}[path[0]]
        at[path[-1]] = value

    return change


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    *(put("shard", "name", value=name) for name in STRANGE_NAMES),
    *(
        put("shard", key, value=value)
        for key in ("bytes", "num_samples")
        for value in (-1, HUGE, 2**70, 1.5, "7", None, True)
    ),
    *(put("shard", "sha256", value=value) for value in ("../" * 20, "", None, 7)),
    *(put("size", value=value) for value in (0, -1, 4096, HUGE, "64", 64.0, None, [])),
    *(put("encoding", value=value) for value in ("pickle", "", None, {})),
    *(put("holds", value=value) for value in ("", None, 3)),
    *(put("splits", value=value) for value in ([], {"../x": {}}, {"train": []}, {"train": {"shards": 1}}, None)),
    *(put("unreadable", value=value) for value in ({}, [1], [{"row": -1}], [{"row": 2**70}], [{"row": "1"}], None)),
    *(put("defects", value=value) for value in ([], {"x": 1}, None)),
    *(put("manifest", "sha256", value=value) for value in ("x", None, 1)),
    *(put("format", value=value) for value in ("1", None, [], 2**70, True)),
    put("manifest", value=[]),
    lambda index: index["splits"]["train"]["shards"].append(shards_of(index)),
]


@pytest.fixture
def copy(shard_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shard_folder, tmp_path / "shards"))


def test_no_name_of_a_url_writes_outside_the_mirror(shard_folder: Path, tmp_path: Path) -> None:
    """The tar is there, under the name it is called by, so that nothing but the check is in its way."""
    position = storage.open_storage("memory://strangers")
    index = json.loads((shard_folder / "index.json").read_bytes())
    for name in ("manifest.csv",):
        position.write(name, (shard_folder / name).read_bytes())
    for ending in (".tar", ".idx", ".crc"):
        position.write(f"a/../../escape{ending}", (shard_folder / f"train-000000{ending}").read_bytes())
    shards_of(index)["name"] = "a/../../escape.tar"
    position.write("index.json", json.dumps(index).encode())
    (tmp_path / "mirror").mkdir()
    with pytest.raises(UserError, match=r"^memory://strangers/index.json is corrupt \(splits.train.shards.0.name"):
        Shards.open("memory://strangers", tmp_path / "mirror")
    assert not list(tmp_path.rglob("escape*"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_hostile_index_is_one_line(change: Callable[[dict[str, Any]], Any], copy: Path, tmp_path: Path) -> None:
    index = json.loads((copy / "index.json").read_bytes())
    change(index)
    (copy / "index.json").write_text(json.dumps(index))
    for open_ in (Shards.open, lambda folder: cache.local_folder(folder, tmp_path / "mirror")):
        with pytest.raises(UserError, match=r"corrupt|format") as refusal:
            open_(copy)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[" * 100_000, b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xff", b"NaN"]
)
def test_what_is_no_index_is_one_line(text: bytes, copy: Path) -> None:
    (copy / "index.json").write_bytes(text)
    with pytest.raises(UserError, match=r"index\.json is corrupt"):
        Shards.open(copy)


@pytest.mark.parametrize(
    "where", ["offset", "size", "row", "members", "header", "digits", "empty", "crc", "crc row", "crc long"]
)
def test_nothing_is_read_outside_a_tar(where: str, copy: Path) -> None:
    idx, crc = copy / "train-000000.idx", copy / "train-000000.crc"
    header, first, *rest = idx.read_text().splitlines()
    npy, offset, size, *phrases = first.split(" ")
    row, digits = crc.read_text().split()[:2]
    changed = {
        "offset": [header, " ".join([npy, str(-1), size, *phrases])],
        "size": [header, " ".join([npy, offset, str(HUGE), *phrases])],
        "row": [header, first.replace(f"{int(row):09d}.", "999999999.")],
        "members": [header, " ".join(first.split(" ")[:8])],
        "header": [f"v1.2 {HUGE}", first],
        "digits": [header, " ".join([npy, "9" * 5000, size, *phrases])],
        "empty": [],
    }
    if where in changed:
        idx.write_text("\n".join([*changed[where], *(rest if changed[where] else [])]) + "\n")
    else:
        line = {"crc": f"{row} {HUGE:x}", "crc row": f"-1 {digits}", "crc long": f"{HUGE} {digits}"}[where]
        crc.write_text(line + "\n")
    shards = Shards.open(copy)
    with pytest.raises(UserError, match=r"the .idx or .crc of train-000000.tar is missing or corrupt"):
        shards.read_pixels(0)
    assert any("train-000000.tar: the tar, its .idx or its .crc is corrupt" in line for line in verify(copy))


def test_a_sample_larger_than_a_radiograph_is_not_decoded(copy: Path) -> None:
    """2 x 64 x 64 pixels and 64 KiB are the most that a member of 64 px may take; the tar is said to hold more."""
    index = json.loads((copy / "index.json").read_bytes())
    shards_of(index)["bytes"] = 2**39
    (copy / "index.json").write_text(json.dumps(index))
    idx = copy / "train-000000.idx"
    header, first, *rest = idx.read_text().splitlines()
    suffix, offset, _, *phrases = first.split(" ")
    idx.write_text("\n".join([header, " ".join([suffix, offset, str(2**38), *phrases]), *rest]) + "\n")
    with pytest.raises(UserError, match=r"bytes \(at most 73,728\)"):
        Shards.open(copy).read_pixels(0)


def test_no_member_unpickles_or_takes_more_than_its_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    small = codec.npy_header((64, 64))
    huge = small.replace(b"(64, 64), }" + b" " * 13, b"(4611686018427387904, 4)"[:24])
    bomb = tmp_path / "bomb.png"
    Image.new("1", (4096, 4096)).save(bomb)
    for data, encoding in (
        ((tmp_path / "objects.npy").read_bytes(), "raw"),
        (huge, "raw"),
        (small + bytes(7), "raw"),
        (b"", "raw"),
        (bomb.read_bytes(), "png"),
        (b"", "png"),
        (bomb.read_bytes()[:100], "jpeg"),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            codec.decode(data, encoding)
