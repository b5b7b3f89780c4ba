"""BatchNorm's running statistics, moved once a step by the whole global batch.

The micro-batch is BatchNorm's group. A forward with momentum 1 leaves the micro-batch's mean and (unbiased) variance in the
modules' buffers; `collect` sums them over a step, the sums of all ranks ride in the step's small all-reduce, and `move`
takes their mean. So every rank holds the same statistics at every step, the world size leaves no trace, and a step
that is left out moves nothing. Left to themselves the modules would move once a micro-batch, each rank on its own.
"""

import torch
from torch import Tensor, nn

MOMENTUM = 0.1  # torchvision's default


class RunningStatistics:
    """`values` (sum of 2 x channels,) float32: what evaluation and checkpoints see; `sum`, as long: of this step on this rank."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
        found = [buffer for norm in self._norms for buffer in (norm.running_mean, norm.running_var)]
        self._buffers = [buffer for buffer in found if buffer is not None]
        assert len(self._buffers) == 2 * len(self._norms)
        self.values = torch.cat(self._buffers)
        self.sum = torch.zeros_like(self.values)
        self._sums = self.views(self.sum)
        self.moves = max(int(norm.num_batches_tracked) for norm in self._norms if norm.num_batches_tracked is not None)
        for norm in self._norms:
            norm.momentum = 1.0

    def views(self, vector: Tensor) -> list[Tensor]:
        """`vector` cut like `values` into the modules' means and variances, in their order."""
        return list(vector.split([len(buffer) for buffer in self._buffers]))

    def collect(self) -> None:
        """After a micro-batch's forward."""
        torch._foreach_add_(self._sums, self._buffers)

    def update(self, mean: Tensor) -> None:
        """`mean`: over all micro-batches of the global batch."""
        self.values.lerp_(mean, MOMENTUM)
        self.moves += 1

    def reset(self) -> None:
        """Before the next step. The buffers too: a module adds 0 times what was there, which is NaN where that is NaN."""
        self.sum.zero_()
        torch._foreach_zero_(self._buffers)

    def load_into_model(self, values: Tensor) -> None:
        """Put `values` where the modules look for them: before evaluation and before a checkpoint."""
        torch._foreach_copy_(self._buffers, self.views(values))
        for norm in self._norms:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.fill_(self.moves)
