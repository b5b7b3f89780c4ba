"""tools/bench/learning.py: the command, on the small network; its weights and standard error."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import ROOT, run
from helpers.tools import tool

from mura_dist.data.loaders.loader import RowTargets
from mura_dist.data.shards.reader import Shards

learning = tool("bench/learning")


@pytest.mark.slow
def test_two_seeds_are_trained_and_compared(shard_folder: Path, tmp_path: Path) -> None:
    settings = ("--architecture", "tiny", "--epochs", 2, "--seeds", 2, "--out", tmp_path, "precision=fp32")
    result = run("python", ROOT / "tools/bench/learning.py", shard_folder, *settings, "tensorboard=false")
    assert result.returncode == 0, result.stderr
    *epochs, means, difference = result.stdout.splitlines()
    matches = [
        re.match(r"seed (\d), epoch (\d): mura-dist (\S+) .*, plain loop (\S+) ", line).groups() for line in epochs
    ]
    assert [(seed, epoch) for seed, epoch, *_ in matches] == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    last = np.array([[float(mura), float(plain)] for _, epoch, mura, plain in matches if epoch == "2"])
    printed = [float(number) for number in re.findall(r"[-+]?\d\.\d+", means + difference)]
    error = np.sqrt((last.var(axis=0, ddof=1) / 2).sum())
    assert printed == pytest.approx([*last.mean(axis=0), last[:, 0].mean() - last[:, 1].mean(), error], abs=2e-3)
    assert all((tmp_path / f"class-{seed}" / "status.json").is_file() for seed in (0, 1))


@pytest.mark.parametrize("loss_weights", ["class", "study_type", "none"])
def test_the_plain_loop_weighs_as_ours_does(shard_folder: Path, loss_weights: str) -> None:
    shards = Shards.open(shard_folder)
    plain, mura = learning.Split.read(shards, "train", loss_weights), RowTargets.from_shards(shards, loss_weights)
    both = np.isin(
        plain.study_type, [t for t in set(plain.study_type) if 0 < plain.label[plain.study_type == t].mean() < 1]
    )
    assert both.sum() > 50
    np.testing.assert_allclose(plain.weight[both], mura.weight[shards.rows("train")][both], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("nowhere",), "nowhere"), (("--loss-weights", "clas"), "loss_weights"), (("epoch=2",), "epoch")],
)
def test_a_wrong_word_is_one_line(
    shard_folder: Path, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    shards = [] if arguments == ("nowhere",) else [shard_folder]
    result = run("python", ROOT / "tools/bench/learning.py", *shards, *arguments, "--out", tmp_path, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
