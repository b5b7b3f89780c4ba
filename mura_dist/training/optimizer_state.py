"""Convert the state of torch's optimizer to named vectors, for checkpoints that any number of ranks can read.

tensors(): name -> (n,) or ()          of all weights, or of this rank's share under ZeRO stage 1
load(): tensors() of all ranks, concatenated -> this rank's
"""

import torch
from torch import Tensor


class OptimizerState:
    """The state of an optimizer of one flat vector, or of this rank's share of it (`is_share`, ZeRO stage 1)."""

    def __init__(self, optimizer: torch.optim.Optimizer, rank: int, *, is_share: bool) -> None:
        self._optimizer, self._rank, self._is_share = optimizer, rank, is_share

    @property
    def _parameter(self) -> Tensor:
        """The optimizer's parameter."""
        return self._optimizer.param_groups[0]["params"][0]

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name: vectors (n,) and scalars ()."""
        return {k: v for k, v in self._optimizer.state.get(self._parameter, {}).items() if isinstance(v, Tensor)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load the `tensors` of all ranks, concatenated by rank. Their number may differ from this run's."""
        for name, value in tensors.items():
            tensor = value.to(self._parameter.device)
            self._optimizer.state[self._parameter][name] = tensor.clone() if value.ndim == 0 else self._share(tensor)

    def _share(self, vector: Tensor) -> Tensor:
        size = self._parameter.numel()
        start = self._rank * size if self._is_share else 0
        share = torch.zeros_like(self._parameter)  # ZeRO pads the last share
        piece = vector[start : start + size]
        share[: len(piece)] = piece
        return share
