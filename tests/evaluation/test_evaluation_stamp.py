"""Test that evaluate keeps its files if nothing changed, and evaluates anew if an input, an option or an output changed."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import killed_when, run, torchrun

from mura_dist.cli.main import DONE, main
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import results
from mura_dist.training import stamp

UNCHANGED, REUSED = "nothing changed since the last evaluation", "logits are used again"
FITTED = ("--operating-point", "specificity=.9")


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and the content of each file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    """Return a copy of the run, without its stamp."""
    shutil.copytree(untrained, tmp_path / "run")
    (tmp_path / "run" / results.STAMP).unlink()
    return tmp_path / "run"


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that evaluates, checks that stdout is the usual summary, and returns stderr without line breaks."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments)]) == DONE
        captured = capsys.readouterr()
        assert "overall" in captured.out
        assert "report: " in captured.out
        return " ".join(captured.err.split())

    return call


@pytest.mark.parametrize("kind", ["run", "onnx"])
def test_unchanged_evaluation_keeps_its_files(
    folder: Path, halved: Path, evaluate: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    target, out = (folder, folder) if kind == "run" else (folder / "model.onnx", tmp_path / "out")
    arguments = (target, halved, "--out", out)
    assert UNCHANGED not in evaluate(*arguments)
    before = state(out)
    assert UNCHANGED in evaluate(*arguments)
    assert state(out) == before


@pytest.mark.slow
def test_missing_or_changed_output_is_written_again(folder: Path, halved: Path, evaluate: Callable[..., str]) -> None:
    evaluate(folder, halved)
    expected = state(folder)
    pictures = [next(name for name in expected if name.startswith(start)) for start in ("pictures/", "gallery/")]
    for name in ("metrics.json", "studies.csv", *pictures, results.STAMP):
        (folder / name).write_bytes(expected[name][1][:-9])
        assert UNCHANGED not in evaluate(folder, halved)
        if name != results.STAMP:  # it has the digests of the reports, which hold times
            assert (folder / name).read_bytes() == expected[name][1]
        (folder / name).unlink()
        assert UNCHANGED not in evaluate(folder, halved)
        assert UNCHANGED in evaluate(folder, halved)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_each_changed_input_or_option_is_evaluated_anew(
    folder: Path, halved: Path, evaluate: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(halved, shards)
    evaluate(folder, shards)
    for options, is_reused in (
        (FITTED, True),
        (("--prevalence", "0.1"), True),
        (("--no-gallery",), True),
        (("--shared",), True),
        (("--split", "tune"), False),
    ):
        messages = evaluate(folder, shards, *options)
        assert (UNCHANGED in messages, REUSED in messages) == (False, is_reused), options
        evaluate(folder, shards)
    assert UNCHANGED in evaluate(folder, shards, "--checkpoint", "last")  # another name of the same checkpoint
    tune, valid = (Shards.open(shards).tar_names(split)[0] for split in ("tune", "valid"))
    code = tmp_path / "code"
    shutil.copytree(stamp._PACKAGE, code, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stamp, "_PACKAGE", code)
    assert UNCHANGED in evaluate(folder, shards)  # the same code in another place
    for path in (
        *(folder / name for name in ("recipe.toml", "data.json", "metrics.jsonl")),
        shards / "index.json",  # which holds the digest of the manifest
        code / "metrics" / "calibration.py",
    ):
        path.write_bytes(path.read_bytes() + b"\n")
        assert UNCHANGED not in evaluate(folder, shards), path
        assert UNCHANGED in evaluate(folder, shards)
    for name in (tune, valid):
        flip_byte(shards / name)
        assert UNCHANGED not in evaluate(folder, shards), name
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert UNCHANGED not in evaluate(folder, shards)
    renamed = folder.rename(folder.with_name("renamed"))  # the title of the report
    assert UNCHANGED not in evaluate(renamed, shards)
    assert UNCHANGED in evaluate(renamed, shards)


@pytest.mark.slow
def test_logits_are_used_again_for_another_operating_point(
    folder: Path, halved: Path, evaluate: Callable[..., str], tmp_path: Path
) -> None:
    evaluate(folder, halved)
    assert REUSED in evaluate(folder, halved, *FITTED)
    assert REUSED not in evaluate(folder, halved, *FITTED, "--out", tmp_path / "out")
    for name in ("metrics.json", "predictions.csv", "studies.csv"):
        assert (folder / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_killed_evaluation_is_evaluated_anew(folder: Path, halved: Path, evaluate: Callable[..., str]) -> None:
    evaluate(folder, halved)
    metrics = (folder / "metrics.json").read_bytes()
    arguments = ("mura-dist", "evaluate", folder, halved, *FITTED)
    killed_when(lambda: (folder / "metrics.json").read_bytes() != metrics, folder, *arguments)
    for options in ((), FITTED):  # the stamp is that of the evaluation without FITTED, the files are of both
        assert UNCHANGED not in evaluate(folder, halved, *options)
    evaluate(folder, halved)
    assert (folder / "metrics.json").read_bytes() == metrics


@pytest.mark.slow
def test_two_ranks_agree_that_nothing_changed(folder: Path, halved: Path) -> None:
    for is_unchanged in (False, True):
        result = torchrun(2, "mura_dist", "evaluate", folder, halved, "--no-gallery")
        assert result.returncode == 0, result.stderr
        assert (UNCHANGED in " ".join(result.stderr.split())) == is_unchanged
    assert UNCHANGED not in run("mura-dist", "evaluate", folder, halved, "--no-gallery").stderr  # one rank
