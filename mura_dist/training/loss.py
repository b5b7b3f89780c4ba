"""Compute the loss: weighted binary cross-entropy per study type, -w1 y log p - w0 (1-y) log(1-p) (arXiv 1712.06957)."""

import torch.nn.functional as F
from torch import Tensor


def weighted_bce(logit: Tensor, label: Tensor, weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the sum of weight x BCE over a batch. The caller divides by the number of radiographs once.

    Args:
        logit: (B,)
        label: (B,) float32, 0 or 1.
        weight: (B,) float32, the weight of the true label.
        smoothing: How far labels move towards 1/2.

    Returns:
        () float32.
    """
    target = label if smoothing == 0 else label * (1 - smoothing) + smoothing / 2
    return (weight * F.binary_cross_entropy_with_logits(logit.float(), target, reduction="none")).sum()
