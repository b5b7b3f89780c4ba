"""A moving average of a run's weights (EMA), with BatchNorm statistics of its own.

The average forgets slowly once training has gone on for a while, quickly at first: decay = min(ema, (1 + t) / (10 + t)) after t
updates, so that it never remembers the random start. Its statistics are the same average of the batches' statistics: the
running ones remember ten steps, far fewer than the weights average over.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class WeightAverage:
    """`weights` (n,), flat_parameters.py's layout; `statistics` (sum of 2 x channels,), batchnorm.py's; `updates` so far."""

    decay: float
    weights: Tensor
    statistics: Tensor
    updates: int = 0

    def update(self, weights: Tensor, mean: Tensor) -> None:
        """After a step: its new weights, and the mean over its micro-batches of BatchNorm's batch statistics."""
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.weights.lerp_(weights, share)
        self.statistics.lerp_(mean, share)
        self.updates += 1
