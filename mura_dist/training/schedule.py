"""Compute the learning rate and fp16's loss scale, as pure functions of a few numbers.

    lr(step) = learning_rate x scaling x warm-up(step) x factor ** drops

The state of the plateau is three numbers, which a checkpoint holds. torch's ReduceLROnPlateau does not accept DeepSpeed's ZeRO
optimizer.
"""

import math
from dataclasses import dataclass, replace

from mura_dist.core.config import Settings


@dataclass(frozen=True)
class Plateau:
    """The best loss so far, the number of epochs since that were not better, and the number of learning rate drops."""

    best: float = math.inf
    bad_epochs: int = 0
    drops: int = 0

    def is_better(self, loss: float, settings: Settings) -> bool:
        """Return whether a loss is better than the best one by more than plateau_threshold, relative."""
        return self.best == math.inf or loss < self.best * (1 - settings.plateau_threshold)

    def after(self, loss: float, settings: Settings) -> "Plateau":
        """Return the state after an epoch's loss. A loss that is not finite changes nothing."""
        if not math.isfinite(loss):
            return self
        if self.is_better(loss, settings):
            return replace(self, best=loss, bad_epochs=0)
        if self.bad_epochs < settings.plateau_patience:
            return replace(self, bad_epochs=self.bad_epochs + 1)
        return replace(self, bad_epochs=0, drops=self.drops + 1)


def learning_rate(settings: Settings, plateau: Plateau, step: int) -> float:
    """Return the learning rate of optimizer step `step`, 0-based over the whole run."""
    warm_up = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * scaling(settings) * warm_up * settings.plateau_factor**plateau.drops


def scaling(settings: Settings) -> float:
    """Return the factor of the learning rate for the global batch: 1, sqrt(ratio) (Adam) or ratio (SGD)."""
    ratio = settings.global_batch / settings.reference_batch
    return {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}[settings.lr_scaling]


GROWTH_STEPS = 2000  # number of steps without overflow after which the scale doubles


@dataclass(frozen=True)
class LossScale:
    """The factor of an fp16 loss that keeps small gradients from vanishing. It is a power of two, so that nothing is rounded."""

    value: float = 1.0
    good_steps: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> "LossScale":
        """Return the initial scale: 2**16 for fp16, else 1."""
        return cls(2.0**16) if settings.precision == "fp16" else cls()

    def after(self, finite: bool, settings: Settings) -> "LossScale":
        """Return the scale after a step: halved by an overflow, doubled after GROWTH_STEPS steps without one."""
        if settings.precision != "fp16":
            return self
        if not finite:
            return LossScale(max(1.0, self.value / 2))
        if self.good_steps + 1 == GROWTH_STEPS:
            return LossScale(min(2.0**24, self.value * 2))
        return replace(self, good_steps=self.good_steps + 1)

    @property
    def may_shrink(self) -> bool:
        """Whether the scale may be the cause of an overflow."""
        return self.value > 1
