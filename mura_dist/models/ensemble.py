"""Combine several networks into one: image uint8 -> logit of their mean probability, mean activation_map.

An ensemble averages its members' probabilities and returns the logit of that mean, computed from logits alone: the fp32
probability of a logit of 17 is already 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Ensemble(torch.nn.Module):
    """An ensemble of networks. A single member's output is returned unchanged."""

    def __init__(self, networks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map image (B, 1, S, S) uint8 to logit (B,) float32 and activation_map (B, h, w) float32.

        The map is the mean of the members' maps. Its mean over cells is the mean logit, not the returned logit.
        """
        outputs = [network(image) for network in self.networks]
        if len(outputs) == 1:
            return outputs[0]
        logits = torch.stack([logit for logit, _ in outputs])  # (K, B)
        maps = torch.stack([activation_map for _, activation_map in outputs])  # (K, B, h, w)
        return mean_probability_logit(logits), maps.mean(dim=0)


def mean_probability_logit(logits: Tensor) -> Tensor:
    """Return the logit of the mean probability of K logits: (K, B) -> (B,), without loss of precision near 0 and 1.

    It is logsumexp(logsigmoid(l)) - logsumexp(logsigmoid(-l)), in operations that no exporter rewrites: torch.onnx turns
    logsigmoid into log(sigmoid(l)), which is -inf at -100.
    """
    return _logsumexp(_logsigmoid(logits)) - _logsumexp(_logsigmoid(-logits))


def _logsigmoid(x: Tensor) -> Tensor:
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def _logsumexp(x: Tensor) -> Tensor:
    """Compute logsumexp over the first dimension."""
    largest = x.amax(dim=0)
    return largest + torch.log(torch.exp(x - largest).sum(dim=0))
