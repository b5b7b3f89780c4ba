"""Average a run's weights over time (EMA), with BatchNorm statistics of their own.

The decay is min(ema, (1 + t) / (10 + t)) after t updates, so that the random initialization loses its weight soon. The
statistics are averaged in the same way. BatchNorm's running statistics cover about ten steps, far fewer than the average of the
weights.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class WeightAverage:
    """A moving average.

    Attributes:
        decay: The setting `ema`.
        weights: (n,) float32 in the layout of flat_parameters.py.
        statistics: (sum of 2 x channels,) float32 in the layout of batchnorm.py.
        updates: Number of updates so far.
    """

    decay: float
    weights: Tensor
    statistics: Tensor
    updates: int = 0

    def update(self, weights: Tensor, mean: Tensor) -> None:
        """Update the average after a step.

        Args:
            weights: The new weights, (n,).
            mean: The mean of BatchNorm's batch statistics over the micro-batches of the step.
        """
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.weights.lerp_(weights, share)
        self.statistics.lerp_(mean, share)
        self.updates += 1
