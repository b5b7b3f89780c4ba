"""convert.py, reader.py and verify.py: byte-identical, resumable, readable by others, every damage named."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import laws
from helpers.commands import ROOT, run, warm_python

from mura_dist.core.errors import RunError, UserError
from mura_dist.data import radiograph
from mura_dist.data.shards import codec, reader
from mura_dist.data.shards.convert import convert
from mura_dist.data.shards.reader import Shards
from mura_dist.data.shards.verify import verify

DIFFERS = ("conversion.json",)  # times, host, workers: the one file that may


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A few studies, with a file that is no image and one that is cut short."""
    folder = tmp_path_factory.mktemp("small") / "set"
    for study in sorted((phantoms / "train").glob("*/*/*"))[:12] + sorted((phantoms / "valid").glob("*/*/*"))[:4]:
        shutil.copytree(study, folder / study.relative_to(phantoms))
    first, second, *_ = sorted(folder.rglob("image1.png"))
    (first.parent / f"image{len(list(first.parent.iterdir())) + 1}.png").write_bytes(b"<html>not found</html>")
    second.write_bytes(second.read_bytes()[: second.stat().st_size // 2])
    return folder


@pytest.mark.slow
def test_pixels_are_predicts_pixels(shared: Path, tmp_path: Path) -> None:
    """Law of parity: what training sees of a file is bit for bit what prediction sees of it (raw, png)."""
    source = shared / "radiographs" / "fracatlas-mura"
    folders = {encoding: tmp_path / encoding for encoding in codec.SUFFIX}
    for encoding, out in folders.items():
        convert(source, out, size=96, encoding=encoding, workers=2)
    raw, png, jpeg = (Shards.open(folder) for folder in folders.values())
    worst = 0.0
    for row in range(0, len(raw.manifest.frame), 7):
        expected = radiograph.read(source / raw.manifest.frame.at[row, "path"], 96)
        np.testing.assert_array_equal(raw.read_pixels(row), expected)
        np.testing.assert_array_equal(png.read_pixels(row), expected)
        worst = max(worst, float(np.abs(jpeg.read_pixels(row).astype(int) - expected).mean()))
    assert 0 < worst < 2.5, worst  # gray levels, the mean over the worst radiograph


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_webdataset_reads_them_without_us(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """The lines of docs/data.md read each tar; of png and jpeg with the key that the page gives for them."""
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    lines = lines.replace('"npy"', f'"{codec.SUFFIX[encoding]}"')
    monkeypatch.chdir(tmp_path)
    convert(small, Path("shards/NAME"), size=48, encoding=encoding, workers=1)
    actual = Shards.open(Path("shards/NAME"))
    visited = []
    for tar in actual.tar_names():
        scope: dict[str, Any] = {}
        exec(lines.replace("train-000000.tar", tar), scope)
        np.testing.assert_array_equal(scope["pixels"], actual.read_pixels(scope["row"]))
        assert scope["label"] == actual.manifest.frame.at[scope["row"], "label"]
        for sample in scope["samples"]:
            row = sample["id"]
            np.testing.assert_array_equal(sample[codec.SUFFIX[encoding]], actual.read_pixels(row))
            assert sample["cls"] == actual.manifest.frame.at[row, "label"]
            assert sample["__key__"] == f"{row:09d}"  # a key tells the row, never the label
            visited.append(row)
    expected = np.concatenate([actual.rows(split) for split in ("train", "tune", "valid")])
    assert visited == expected.tolist()


def test_dalis_own_reader_takes_our_index(shard_folder: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    actual = Shards.open(shard_folder)
    tars = [str(actual.folder / name) for name in actual.tar_names("valid")]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read():
        label, row = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["cls", "id"],
            missing_component_behavior="error",
        )
        return label, row

    pipe = read()
    pipe.build()
    rows = []
    for _ in actual.rows("valid"):
        label, row = (bytes(piece.at(0)) for piece in pipe.run())
        rows.append(int(row))
        assert int(label) == actual.manifest.frame.at[int(row), "label"]
    assert sorted(rows) == actual.rows("valid").tolist()


def test_the_bytes_do_not_depend_on_the_workers(small: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 7):
        convert(small, tmp_path / str(workers), size=48, workers=workers)
    laws.same_bytes(tmp_path / "1", tmp_path / "2", leave_out=DIFFERS)
    laws.same_bytes(tmp_path / "1", tmp_path / "7", leave_out=DIFFERS)


def test_no_time_host_or_path_in_the_shards(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out", size=48, workers=1)
    text = (tmp_path / "out" / "index.json").read_text()
    assert str(tmp_path) not in text
    assert str(small) not in text
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


KILLER = """
import os, signal, sys
moment, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
replace, count = os.replace, 0
def counted(*words):
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*words)
os.replace = counted
from mura_dist.cli.main import main
if __name__ == "__main__":
    sys.exit(main(["shards", source, out, "--size", "48", "--workers", "2", "--quiet"]))
"""


@pytest.mark.slow
def test_killed_at_any_write_the_same_command_finishes(small: Path, tmp_path: Path) -> None:
    """Law of torn writes, at the plan, the manifest, a tar, its .crc, its .idx, and index.json."""
    convert(small, tmp_path / "whole", size=48, workers=1)
    script = tmp_path / "killer.py"
    script.write_text(KILLER)

    def work(moment: int) -> int:
        return run(warm_python(), script, moment, small, tmp_path / "torn").returncode

    def check() -> None:
        laws.same_bytes(tmp_path / "whole", tmp_path / "torn", leave_out=DIFFERS)
        shutil.rmtree(tmp_path / "torn")

    laws.torn_write(work, check, moments=[1, 2, 3, 5, 9, 12])


def test_unreadable_files_are_listed_and_left_out(small: Path, tmp_path: Path) -> None:
    index = convert(small, tmp_path / "out", size=48, workers=2)
    assert sorted(item["code"] for item in index["unreadable"]) == ["not_image", "unreadable"]
    opened = Shards.open(tmp_path / "out")
    rows = np.concatenate([opened.rows(split) for split in index["splits"]])
    lost = [item["row"] for item in index["unreadable"]]
    assert sorted([*rows.tolist(), *lost]) == list(range(len(opened.manifest.frame)))
    with pytest.raises(KeyError, match="no sample"):
        opened.read_pixels(lost[0])
    assert list(verify(tmp_path / "out")) == []
    with pytest.raises(RunError, match="--strict: 2 files cannot be read"):
        convert(small, tmp_path / "strict", size=48, workers=2, strict=True)


def test_a_finished_conversion_is_not_done_again(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out", size=48, workers=1)
    before = (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns
    assert convert(small, tmp_path / "out", size=48, workers=2) == json.loads(
        (tmp_path / "out" / "index.json").read_bytes()
    )
    assert (tmp_path / "out" / "train-000000.tar").stat().st_mtime_ns == before


def test_verify_names_each_damage(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "whole", size=48, workers=1)
    assert list(verify(tmp_path / "whole")) == []
    [first, second, *_] = reader.read_index(tmp_path / "whole" / "train-000000.idx")

    def damaged(work) -> list[str]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "bad")
        work(tmp_path / "bad" / "train-000000.tar")
        return list(verify(tmp_path / "bad"))

    def flip(offset: int):
        def work(tar: Path) -> None:
            data = bytearray(tar.read_bytes())
            data[offset] ^= 1
            tar.write_bytes(data)

        return work

    assert damaged(flip(first[0].offset + 700)) == [
        f"train-000000.tar: sample {first[0].name}: CRC-32 differs: its pixels changed"
    ]
    [problem] = damaged(flip(second[1].offset))
    assert "label or row differs from the manifest (" in problem
    [problem] = damaged(flip(first[0].offset - 512))  # the tar's own header
    assert "SHA-256 differs" in problem
    missing = damaged(lambda tar: tar.unlink())
    assert missing[0] == "train-000000.tar: missing"
    assert len(missing) == 1 + len(Shards.open(tmp_path / "whole").rows("train"))
    another = damaged(lambda tar: shutil.copy(tar.with_name("valid-000000.tar"), tar))
    assert len(another) >= len(Shards.open(tmp_path / "whole").rows("train"))  # each sample is not what it should be


def test_what_cannot_be_converted_is_refused(small: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    laws.refusal(capsys, ["shards", tmp_path / "none", out], "no such folder", "train/")
    laws.refusal(capsys, ["shards", small, out, "--size", 9], "--size 9", "32", "2048")
    laws.refusal(capsys, ["shards", small, out, "--encoding", "webp"], "'webp'", "raw, png, jpeg")
    laws.refusal(capsys, ["shards", small, out, "--workers", 0], "--workers 0", "at least 1")
    laws.refusal(capsys, ["shards", small, out, "--tune", "0.9"], "--tune 0.9", "0.5")
    laws.refusal(capsys, ["shards", small, out, "--labels", tmp_path / "none"], "no such file")
    laws.refusal(capsys, ["shards", small, small], "is the source itself")
    assert not out.exists()
    convert(small, out, size=48, workers=1)
    laws.refusal(capsys, ["shards", small, out, "--size", 64], "size=48", "size=64", "another folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").touch()
    laws.refusal(capsys, ["shards", small, tmp_path / "full"], "not empty")


def test_what_are_no_shards_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no shards.*mura-dist shards"):
        Shards.open(tmp_path)
    convert(small, tmp_path / "out", size=48, workers=1, tune=0)
    path = tmp_path / "out" / "index.json"
    complete = json.loads(path.read_bytes())
    path.write_text(json.dumps(complete | {"format": 99}))
    with pytest.raises(UserError, match=r"format 99.*reads format 1"):
        Shards.open(tmp_path / "out")
    path.write_text("{")
    with pytest.raises(UserError, match="corrupt"):
        Shards.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="not finished"):
        Shards.open(tmp_path / "out")
    path.write_text(json.dumps(complete))
    with pytest.raises(UserError, match=r"split 'tune'.*is empty\. Give one of train, valid"):
        Shards.open(tmp_path / "out").rows("tune")
    manifest = tmp_path / "out" / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",1,train", ",0,train", 1))
    with pytest.raises(UserError, match=r"manifest\.csv does not match"):
        Shards.open(tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(small: Path, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails as it would there."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); import signal; \
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from mura_dist.cli.main import main; sys.exit(main(sys.argv[1:]))"
    argv = ["shards", str(small), str(tmp_path / "out"), "--size", "48", "--workers", "1"]
    failed = subprocess.run([sys.executable, "-c", limited, *argv], capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert "too large" in failed.stderr
    assert run("mura-dist", *argv).returncode == 0
    convert(small, tmp_path / "whole", size=48, workers=1)
    laws.same_bytes(tmp_path / "whole", tmp_path / "out", leave_out=DIFFERS)
