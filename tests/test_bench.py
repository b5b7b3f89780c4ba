"""bench: every WHAT at a size of seconds, the clock on contenders of known speed, the workload, what is refused."""

import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import laws
import pytest
from conftest import run as command

from mura_dist import bench, mura
from mura_dist.bench import Contender, Load, Options
from mura_dist.manifest import scan
from mura_dist.refusal import Failure, Refusal

NUM_CONTENDERS = {"shards": (1, 1), "pipeline": (2, 3), "train": (2, 2), "predict": (1, 3)}  # ours, theirs


def sleeper(pause_s: float, load: Load) -> Callable[[Path], int]:
    def work(out: Path) -> int:
        assert not any(out.iterdir())
        (out / "something").write_text("left for the next turn to find")
        print("a library that talks")
        time.sleep(pause_s)
        return 1

    return work


def dier(load: Load) -> Callable[[Path], int]:
    os._exit(7)


def quarreller(load: Load) -> Callable[[Path], int]:
    raise Refusal("a contender's own words")


@pytest.fixture
def nothing(tmp_path: Path) -> Load:
    return Load(tmp_path, tmp_path, [], 64, 1, "tiny")


def check(measured: dict[str, Any], what: str) -> None:
    """What `run` documents: the keys, the contenders, every number finite and positive."""
    keys = {"what", "command", "hardware", "versions", "workload", "rounds", "contenders", "ratios"}
    assert set(measured) == keys
    assert (measured["what"], measured["rounds"], measured["workload"]["radiographs"]) == (what, 1, 24)
    assert measured["command"].startswith(f"mura-dist bench {what} --data ")
    ours, theirs = ([c["name"] for c in measured["contenders"] if c["ours"] is side] for side in (True, False))
    assert (len(ours), len(theirs)) == NUM_CONTENDERS[what]
    assert set(measured["ratios"]) == {f"{a} / {b}" for a, b in itertools.product(ours, theirs)}
    for spread in [*(c["images_per_s"] for c in measured["contenders"]), *measured["ratios"].values()]:
        assert 0 < spread["min"] <= spread["median"] <= spread["max"] < math.inf
    assert all(c["num_images"] >= (8 if what == "train" else 24) for c in measured["contenders"])
    text = bench.table(measured)
    assert all(name in text for name in (*ours, *theirs, *measured["ratios"]))


@pytest.mark.parametrize("what", ["pipeline", "predict", pytest.param("train", marks=pytest.mark.slow)])
def test_every_bench_gives_the_documented_numbers(
    what: str, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines: list[str] = []
    options = Options(data=phantoms, size=64, radiographs=24, rounds=1, seconds=0, architecture="tiny")
    measured = bench.run(what, lines.append, options)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    check(measured, what)
    assert len(lines) == sum(NUM_CONTENDERS[what])
    assert not list(tmp_path.glob("mura-dist-*"))  # nothing of ours stays behind


def test_the_command_prints_json_and_nothing_else_on_stdout(phantoms: Path) -> None:
    sizes = ("--size", 64, "--radiographs", 24, "--rounds", 1)
    done = command("mura-dist", "bench", "shards", "--data", phantoms, *sizes, "--json")
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), "shards")
    assert "round 1 of 1: decode and resize only: " in done.stderr


def test_the_clock_and_the_turns(nothing: Load, capfd: pytest.CaptureFixture[str]) -> None:
    contenders = [Contender("quick", partial(sleeper, 0.01), ours=True), Contender("slow", partial(sleeper, 0.1))]
    lines: list[str] = []
    measured = bench._play(contenders, nothing, Options(rounds=3, seconds=0.15), lines.append)
    quick, slow = measured["contenders"]
    assert quick["images_per_s"]["max"] <= 100  # a sleep lasts as long as asked or longer: only upper bounds are sure
    assert slow["images_per_s"]["max"] <= 10
    assert 3 <= slow["num_images"] <= 3 * 2  # two make 0.15 s, on a busy machine one may; the warm-up does not count
    assert (
        1 < measured["ratios"]["quick / slow"]["median"] <= quick["images_per_s"]["max"] / slow["images_per_s"]["min"]
    )
    assert [line.split(": ")[1] for line in lines] == ["quick", "slow"] * 3
    out, err = capfd.readouterr()
    assert "talks" not in out
    assert "talks" in err  # stdout is for the result


def test_a_contender_that_fails_says_so(nothing: Load) -> None:
    with pytest.raises(Failure, match="a contender's process died"):
        bench._play([Contender("dies", dier)], nothing, Options(), print)
    with pytest.raises(Refusal, match="a contender's own words"):
        bench._play([Contender("quarrels", quarreller)], nothing, Options(), print)


@pytest.mark.parametrize("number", [16, 500])
def test_the_workload_has_as_many_radiographs_as_wanted(number: int, phantoms: Path, tmp_path: Path) -> None:
    total = len(scan(phantoms).manifest.frame)
    assert 16 < total < 500 < 5 * total
    load = bench._load("shards", Options(data=phantoms, radiographs=number), tmp_path)
    scanned = scan(load.folder)
    assert sorted(scanned.manifest.frame["path"]) == sorted(load.paths)
    assert len(set(load.paths)) == number
    assert set(scanned.manifest.frame["split"]) == {"train", "valid"}
    assert not scanned.defects  # copies are other patients', on the side of the original
    sources = {(load.folder / path).resolve() for path in load.paths}
    assert len(sources) == min(number, total)
    assert all(mura.parse(path).label == mura.parse(str((load.folder / path).resolve())).label for path in load.paths)


def test_what_not_every_contender_reads_is_left_out(phantoms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(phantoms, source)
    broken, other, *_ = (source / path for path in scan(source).manifest.frame["path"])
    broken.write_bytes(broken.read_bytes()[:200])
    other.rename(other.with_suffix(".dcm"))
    load = bench._load("predict", Options(data=source, radiographs=1000), tmp_path)
    used = {(load.folder / path).resolve() for path in load.paths}
    assert len(load.paths) == 1000
    assert broken not in used
    assert other.with_suffix(".dcm") not in used
    for path in source.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(Refusal, match="none of its files is a sound PNG or JPEG; give a folder"):
        bench._load("predict", Options(data=source), tmp_path / "again")


def test_wrong_requests_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    laws.refusal(capsys, ["bench", "trian"], "'trian'", "did you mean train?", "shards, pipeline, train, predict")
    laws.refusal(capsys, ["bench", "shards", "--rounds", 0], "--rounds", "0 is not in the range x>=1")
    laws.refusal(capsys, ["bench", "shards", "--data", tmp_path / "none"], "none: no such folder", "give the folder")
