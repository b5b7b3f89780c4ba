"""What changes from step to step besides tensors: the learning rate, and fp16's loss scale. Pure functions of a few numbers.

    lr(step) = learning_rate x scaling x warm-up(step) x factor ** drops

The plateau keeps three numbers, so that a checkpoint can hold them (torch's ReduceLROnPlateau refuses DeepSpeed's ZeRO
optimiser, and forgetting its state on resume is a well-known trap).
"""

import math
from dataclasses import dataclass, replace

from mura_dist.core.config import Settings


@dataclass(frozen=True)
class Plateau:
    """The best loss so far, epochs since that were not better, how often the learning rate has dropped."""

    best: float = math.inf
    bad_epochs: int = 0
    drops: int = 0

    def is_better(self, loss: float, settings: Settings) -> bool:
        return self.best == math.inf or loss < self.best * (1 - settings.plateau_threshold)

    def after(self, loss: float, settings: Settings) -> "Plateau":
        """The state after an epoch's loss. A loss that is not finite says nothing about a plateau and changes nothing."""
        if not math.isfinite(loss):
            return self
        if self.is_better(loss, settings):
            return replace(self, best=loss, bad_epochs=0)
        if self.bad_epochs < settings.plateau_patience:
            return replace(self, bad_epochs=self.bad_epochs + 1)
        return replace(self, bad_epochs=0, drops=self.drops + 1)


def learning_rate(settings: Settings, plateau: Plateau, step: int) -> float:
    """For the optimiser step number `step` (0-based over the whole run)."""
    warm_up = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * scaling(settings) * warm_up * settings.plateau_factor**plateau.drops


def scaling(settings: Settings) -> float:
    """What the global batch does to the learning rate: nothing, its root's share (Adam), or its share (SGD)."""
    share = settings.global_batch / settings.reference_batch
    return {"none": 1.0, "sqrt": math.sqrt(share), "linear": share}[settings.lr_scaling]


GROWTH_STEPS = 2000  # without overflow, after which the scale doubles


@dataclass(frozen=True)
class LossScale:
    """What an fp16 loss is multiplied with, so that small gradients do not vanish; a power of two, so that nothing is rounded."""

    value: float = 1.0
    good_steps: int = 0

    @classmethod
    def from_settings(cls, settings: Settings) -> "LossScale":
        return cls(2.0**16) if settings.precision == "fp16" else cls()

    def after(self, finite: bool, settings: Settings) -> "LossScale":
        """Halved by an overflow, doubled after many steps without one; with other precisions always 1."""
        if settings.precision != "fp16":
            return self
        if not finite:
            return LossScale(max(1.0, self.value / 2))
        if self.good_steps + 1 == GROWTH_STEPS:
            return LossScale(min(2.0**24, self.value * 2))
        return replace(self, good_steps=self.good_steps + 1)

    @property
    def may_shrink(self) -> bool:
        """Whether an overflow may only mean that the scale is too large."""
        return self.value > 1
