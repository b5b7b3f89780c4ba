"""Binary cross-entropy on logits, weighted per study type (arXiv 1712.06957): -w1 y log p - w0 (1-y) log(1-p)."""

import torch.nn.functional as F
from torch import Tensor


def weighted_bce(logit: Tensor, label: Tensor, weight: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sum over the batch of weight x BCE; each argument (B,), the result () float32. Divide by a count yourself, once.

    smoothing: labels are drawn this far towards 1/2; the weight stays that of the true label.
    """
    target = label if smoothing == 0 else label * (1 - smoothing) + smoothing / 2
    return (weight * F.binary_cross_entropy_with_logits(logit.float(), target, reduction="none")).sum()
