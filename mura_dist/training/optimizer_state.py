"""The state of torch's own optimizer as named vectors, for checkpoints that any number of ranks can read.

tensors(): name -> (n,) or ()          of all weights; under ZeRO stage 1 of this rank's share of them
load(): all ranks' tensors(), end to end -> this rank's
"""

import torch
from torch import Tensor


class OptimizerState:
    """The state of an optimizer of one flat vector. `is_share`: it is this rank's share of the weights (ZeRO stage 1)."""

    def __init__(self, optimizer: torch.optim.Optimizer, rank: int, *, is_share: bool) -> None:
        self._optimizer, self._rank, self._is_share = optimizer, rank, is_share

    @property
    def _trained(self) -> Tensor:
        """What the optimizer moves: all weights, or under ZeRO this rank's share."""
        return self._optimizer.param_groups[0]["params"][0]

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, (n,) or (); with ZeRO stage 1 this rank's share."""
        return {k: v for k, v in self._optimizer.state.get(self._trained, {}).items() if isinstance(v, Tensor)}

    def load(self, whole: dict[str, Tensor]) -> None:
        """Take over what all ranks' `tensors` are together, end to end; of any number of ranks."""
        for name, value in whole.items():
            there = value.to(self._trained.device)
            self._optimizer.state[self._trained][name] = there.clone() if value.ndim == 0 else self._share(there)

    def _share(self, whole: Tensor) -> Tensor:
        size = self._trained.numel()
        start = self._rank * size if self._is_share else 0
        share = torch.zeros_like(self._trained)  # a last share is longer than what is left: ZeRO pads
        piece = whole[start : start + size]
        share[: len(piece)] = piece
        return share
