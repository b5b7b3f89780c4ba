"""Test that training equals the plain loop of tools/bench/learning.py from the same weights on the same batches.

Two computations that differ in roundings alone drift apart exponentially, the faster the larger the learning rate. How far
is measured, not guessed: plain loops whose first weights are a rounding apart say what roundings do.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.commands import run
from helpers.runs import losses
from helpers.tools import tool
from safetensors.torch import load_file

from mura_dist.data.loaders.loader import Batch, BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.training import metrics_log
from mura_dist.training.plan import Plan
from mura_dist.training.run import Run

learning = tool("bench/learning")
learning.DEVICE = torch.device("cpu")  # as the runs of the suite, also beside a GPU

EPOCHS = 16  # of 13 steps: 208
STAGES = (slice(0, 10), slice(10, 50), slice(50, None))  # steps
NUM_ROUNDED = 4  # plain loops that start a rounding apart


def train(shards: Path, folder: Path, *arguments: str) -> None:
    settings = ("architecture=tiny", "global_batch=8", "micro_batch=8", f"epochs={EPOCHS}", "log_every=1")
    unlimited = ("plateau_patience=100", f"keep_checkpoints={EPOCHS + 1}", "tensorboard=false")
    result = run(
        "mura-dist", "train", f"shards={shards}", f"run={folder}", *settings, *unlimited, *arguments, "--quiet"
    )
    assert result.returncode == 0, result.stderr


def last_tune_loss(folder: Path) -> float:
    return [line["tune_loss"] for line in metrics_log.read(folder / "metrics.jsonl") if line["kind"] == "epoch"][-1]


def batches_of_run(folder: Path) -> Iterator[Batch]:
    """Load the batches of a run of one rank and one micro-batch a step, from its first step to its last."""
    plan = Plan.from_settings(Run.load(folder).settings, 1)
    assert plan.accumulation == 1
    loader = BatchLoader.from_settings(
        plan.settings, plan.shards, RowTargets.from_shards(plan.shards), torch.device("cpu")
    )
    for epoch in range(plan.settings.epochs):
        permutation = plan.epoch(epoch)
        yield from loader.load(
            micro for step in range(plan.steps_per_epoch) for micro in plan.micro_batches(permutation, step, 0)
        )


class Plain:
    """Plain loops over the batches of a run, from its first weights."""

    def __init__(self, shards: Path, folder: Path, learning_rate: float, *, bf16: bool = False) -> None:
        opened = Shards.open(shards)
        self.recipe, self.bf16 = learning.Recipe(architecture="tiny", learning_rate=learning_rate), bf16
        self.tune, train = (learning.Split.read(opened, name, "class") for name in ("tune", "train"))
        self.weight_of = {label: train.weight[train.label == label][0].item() for label in (0, 1)}
        self.weights = load_file(folder / "checkpoints" / "step-00000000" / "model.safetensors")
        self.batches = list(batches_of_run(folder))

    def train(self, rounding: int | None = None) -> tuple[np.ndarray, float]:
        """Return the loss of each step, and that of the tune split at the end.

        rounding: a seed by which each first weight is moved by one rounding of float32, up or down.
        """
        loop = learning.PlainLoop(self.recipe, bf16=self.bf16, weights=self.weights)
        if rounding is not None:
            generator = torch.Generator().manual_seed(rounding)
            with torch.no_grad():
                for weight in loop.network.parameters():
                    sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
                    weight.mul_(1 + sign * torch.finfo(torch.float32).eps)
        steps = [loop.step(batch.image, batch.label, self.weigh(batch.label)) for batch in self.batches]
        logit, label = loop.logits(self.tune.image), self.tune.label
        each = F.binary_cross_entropy_with_logits(logit, label, weight=self.weigh(label))
        return np.array(steps), each.item()

    def weigh(self, label: torch.Tensor) -> torch.Tensor:
        return torch.where(label == 1, self.weight_of[1], self.weight_of[0])


def distances(trained: tuple[np.ndarray, float], plain: tuple[np.ndarray, float]) -> np.ndarray:
    """Return the differences of two trainings: RMS of the loss by stage, mean of the last stage, tune loss."""
    difference = trained[0] - plain[0]
    by_stage = [np.sqrt(np.square(difference[stage]).mean()) for stage in STAGES]
    return np.array([*by_stage, abs(difference[STAGES[-1]].mean()), abs(trained[1] - plain[1])])


@pytest.mark.parametrize(
    ("precision", "learning_rate", "further"),
    [
        ("fp32", 2e-5, 5),
        pytest.param("bf16", 2e-5, 2.5, marks=pytest.mark.slow),
        pytest.param("bf16", 1e-3, 2.5, marks=pytest.mark.slow),
    ],
)
def test_training_equals_a_plain_loop_up_to_rounding(
    shard_folder: Path, tmp_path: Path, precision: str, learning_rate: float, further: float
) -> None:
    """The distance to a plain fp32 loop is at most `further` times the largest of several plain loops of the same precision.

    At the low learning rate fp32's roundings stay below 1e-6 for ten steps; at the high one roundings decide everything, and
    what remains to compare is where the losses end.
    """
    train(shard_folder, tmp_path / "run", f"precision={precision}", f"learning_rate={learning_rate}")
    trained = np.array(losses(tmp_path / "run")), last_tune_loss(tmp_path / "run")
    reference = Plain(shard_folder, tmp_path / "run", learning_rate).train()
    assert len(trained[0]) == len(reference[0]) >= 200
    plain = Plain(shard_folder, tmp_path / "run", learning_rate, bf16=precision == "bf16")
    rounded = np.max([distances(plain.train(seed), reference) for seed in range(NUM_ROUNDED)], axis=0)
    assert rounded[0] < {"fp32": 1e-6, "bf16": 0.01}[precision], "the test would see nothing"
    assert (distances(trained, reference) <= further * rounded).all(), (distances(trained, reference), rounded)


@pytest.mark.nightly(part="training")
def test_auroc_is_no_lower_than_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean AUROC over 733 valid drawings and three seeds is at most one standard error lower.

    Of a seed the first weights are the same; order, flips and rotations are each one's own.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for arguments in (
        ("phantoms", tmp_path / "drawings", "--studies", 1200),
        ("shards", tmp_path / "drawings", tmp_path / "s"),
    ):
        size = ("--size", 128 if arguments[0] == "phantoms" else 64)
        assert run("mura-dist", *arguments, *size).returncode == 0
    shards, recipe = Shards.open(tmp_path / "s"), learning.Recipe(epochs=3, learning_rate=4e-4, rotate_deg=15.0)
    trained, plain = [], []
    for seed in range(3):
        folder = tmp_path / f"run-{seed}"
        *_, (trained_auroc, plain_auroc) = learning.compare(shards, recipe, seed, folder, split="valid", overrides=[])
        trained.append(trained_auroc[0])
        plain.append(plain_auroc[0])
    assert np.mean(plain) > 0.75, "the test would see nothing"
    assert np.mean(trained) >= np.mean(plain) - learning.standard_error(trained, plain), (trained, plain)
