"""Several networks as one: image uint8 -> logit of their mean probability, mean activation_map.

An ensemble averages its members' probabilities. It gives the logit of that mean, computed from logits alone: as a
probability in fp32 a logit of 17 is 1 already.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Ensemble(torch.nn.Module):
    """One model of several. A single member is handed through: the same bits."""

    def __init__(self, networks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 1, S, S) uint8 -> logit (B,) float32, activation_map (B, h, w) float32: the mean of the members' maps.

        The mean of that map over its cells is the mean of the logits, which is not the logit of the mean probability.
        """
        outputs = [network(image) for network in self.networks]
        if len(outputs) == 1:
            return outputs[0]
        logits = torch.stack([logit for logit, _ in outputs])  # (K, B)
        maps = torch.stack([activation_map for _, activation_map in outputs])  # (K, B, h, w)
        return mean_probability(logits), maps.mean(dim=0)


def mean_probability(logits: Tensor) -> Tensor:
    """(K, B) -> (B,): the logit of the mean of the K probabilities; as log odds, so that neither end is rounded away.

    logsumexp(logsigmoid(l)) - logsumexp(logsigmoid(-l)), in steps that no exporter rewrites: torch.onnx makes log(sigmoid(l))
    of logsigmoid, which is -inf at -100.
    """
    return _logsumexp(_logsigmoid(logits)) - _logsumexp(_logsigmoid(-logits))


def _logsigmoid(x: Tensor) -> Tensor:
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def _logsumexp(x: Tensor) -> Tensor:
    """Over the first dimension."""
    largest = x.amax(dim=0)
    return largest + torch.log(torch.exp(x - largest).sum(dim=0))
