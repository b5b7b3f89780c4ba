"""Test the learning rate (warm-up, plateau, scaling), fp16's loss scale and skipped steps."""

import math

import pytest
import torch

from mura_dist.core.config import Settings
from mura_dist.training import schedule
from mura_dist.training.schedule import LossScale, Plateau
from mura_dist.training.state import State

SETTINGS = Settings(shards="s", run="r", learning_rate=1e-4, plateau_patience=1)


def trajectory(losses: list[float]) -> list[float]:
    plateau, rates = Plateau(), []
    for loss in losses:
        plateau = plateau.after(loss, SETTINGS)
        rates.append(schedule.learning_rate(SETTINGS, plateau, step=10))
    return rates


def test_plateau_equals_torchs() -> None:
    losses = [1.0, 0.9, 0.95, 0.91, 0.89, 0.9, 0.9, 0.9, 0.9, 0.5, 0.49999, 0.51, 0.4]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1, threshold=1e-4)
    expected = []
    for loss in losses:
        torchs.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert trajectory(losses) == pytest.approx(expected)
    assert len(set(expected)) > 2  # it did drop, more than once


def test_nonfinite_loss_does_not_change_the_plateau() -> None:
    plateau = Plateau(best=0.5, bad_epochs=1)
    for loss in (math.nan, math.inf):
        assert plateau.after(loss, SETTINGS) == plateau


@pytest.mark.parametrize(("rule", "factor"), [("none", 1), ("sqrt", 4), ("linear", 16)])
def test_learning_rate_scales_with_the_global_batch(rule: str, factor: float) -> None:
    """launch/recipes/mura-8gpu.toml: 1e-4 for a batch of 8, used at 128."""
    chosen = {"lr_scaling": rule, "global_batch": 128, "reference_batch": 8}
    settings = SETTINGS.model_copy(update=chosen)
    assert schedule.learning_rate(settings, Plateau(), 0) == pytest.approx(1e-4 * factor)


def test_fp16_scale_halves_and_doubles() -> None:
    """An overflow halves it down to 1, GROWTH_STEPS without one double it. It stays 1 for other precisions."""
    half = SETTINGS.model_copy(update={"precision": "fp16"})
    scale = LossScale.from_settings(half)
    assert scale.value == 2.0**16
    scales = [scale := scale.after(False, half) for _ in range(20)]
    assert [item.value for item in scales] == [max(1.0, 2.0**n) for n in range(15, -5, -1)]
    for _ in range(schedule.GROWTH_STEPS - 1):
        scale = scale.after(True, half)
    assert scale.value == 1
    assert (scale.after(False, half).good_steps, scale.after(True, half)) == (0, LossScale(2.0, 0))
    for precision in ("bf16", "fp32"):
        other_settings = SETTINGS.model_copy(update={"precision": precision})
        assert (
            LossScale.from_settings(other_settings).after(True, other_settings)
            == LossScale.from_settings(other_settings).after(False, other_settings)
            == LossScale(1.0, 0)
        )


def test_overflow_counts_only_at_the_smallest_scale() -> None:
    state = State(loss_scale=LossScale(4.0))
    for value, in_row in ((4.0, 0), (2.0, 0), (1.0, 1), (1.0, 2)):
        state.loss_scale = LossScale(value)
        state.record_skipped_step()
        assert state.skipped_in_row == in_row
    assert (state.skipped_steps, state.step) == (4, 4)
    state.record_step(0.5)
    assert (state.skipped_in_row, state.train_loss_sum, state.taken_steps) == (0, 0.5, 1)


def test_warm_up_is_linear() -> None:
    settings = SETTINGS.model_copy(update={"warmup_steps": 4})
    rates = [schedule.learning_rate(settings, Plateau(drops=1), step) for step in range(6)]
    assert rates == pytest.approx([2.5e-6, 5e-6, 7.5e-6, 1e-5, 1e-5, 1e-5])
