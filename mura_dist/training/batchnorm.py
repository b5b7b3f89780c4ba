"""Update BatchNorm's running statistics once a step from the whole global batch.

The micro-batch is BatchNorm's group. A forward with momentum 1 leaves the micro-batch's mean and (unbiased) variance in the
modules' buffers. `collect` sums them over a step, the step's small all-reduce sums them over the ranks, and `update` takes
their mean. So every rank has the same statistics at every step for any world size, and a skipped step changes nothing. torch's
modules would update them once a micro-batch, differently on each rank.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.1  # torchvision's default


class RunningStatistics:
    """The running statistics of all BatchNorm2d modules.

    Attributes:
        values: (sum of 2 x channels,) float32. Evaluation and checkpoints use them.
        sum: The batch statistics summed over this rank's micro-batches of the step, same shape.
        num_updates: Number of updates so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
        buffers = [buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var)]
        self._buffers = [buffer for buffer in buffers if buffer is not None]
        assert len(self._buffers) == 2 * len(self._norms)
        self.values = torch.cat(self._buffers)
        self.sum = torch.zeros_like(self.values)
        self._sums = self.views(self.sum)
        self.num_updates = max(
            int(norm.num_batches_tracked) for norm in self._norms if norm.num_batches_tracked is not None
        )
        for norm in self._norms:
            norm.momentum = 1.0

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector in the layout of `values`: each module's mean and variance, in order."""
        return list(vector.split([len(buffer) for buffer in self._buffers]))

    def collect(self) -> None:
        """Add the batch statistics of a micro-batch after its forward."""
        torch._foreach_add_(self._sums, self._buffers)

    def update(self, mean: Tensor) -> None:
        """Update the running statistics with the mean over all micro-batches of the global batch."""
        self.values.lerp_(mean, MOMENTUM)
        self.num_updates += 1

    def reset(self) -> None:
        """Zero the sum and the buffers before the next step.

        With momentum 1 a module multiplies its buffer by 0, and 0 x NaN is NaN.
        """
        self.sum.zero_()
        torch._foreach_zero_(self._buffers)

    def load_into_model(self, values: Tensor) -> None:
        """Copy `values` into the modules' buffers, before an evaluation and before a checkpoint."""
        torch._foreach_copy_(self._buffers, self.views(values))
        for norm in self._norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(self.num_updates)
