"""The learning rate: warm-up, then divided at each plateau of the loss on the selecting split.

    lr(step) = learning_rate x warm-up(step) x factor ** drops

The plateau keeps three numbers, so that a checkpoint can hold them (torch's ReduceLROnPlateau refuses DeepSpeed's ZeRO
optimiser, and forgetting its state on resume is a well-known trap).
"""

import math
from dataclasses import dataclass, replace

from .config import Settings


@dataclass(frozen=True)
class Plateau:
    """The best loss so far, epochs since that were not better, how often the learning rate has dropped."""

    best: float = math.inf
    bad_epochs: int = 0
    drops: int = 0

    def after(self, loss: float, settings: Settings) -> "Plateau":
        """The state after an epoch's loss. A loss that is not finite says nothing about a plateau and changes nothing."""
        if not math.isfinite(loss):
            return self
        if self.best == math.inf or loss < self.best * (1 - settings.plateau_threshold):
            return replace(self, best=loss, bad_epochs=0)
        if self.bad_epochs < settings.plateau_patience:
            return replace(self, bad_epochs=self.bad_epochs + 1)
        return replace(self, bad_epochs=0, drops=self.drops + 1)


def learning_rate(settings: Settings, plateau: Plateau, step: int) -> float:
    """For the optimiser step number `step` (0-based over the whole run)."""
    warm_up = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * warm_up * settings.plateau_factor**plateau.drops
