"""Binary cross-entropy on logits, weighted per study type (arXiv 1712.06957): -w1 y log p - w0 (1-y) log(1-p)."""

import torch.nn.functional as F
from torch import Tensor


def weighted_bce(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """The sum over the batch of weight x BCE; each argument (B,), the result () float32. Divide by a count yourself, once."""
    return (weight * F.binary_cross_entropy_with_logits(logit.float(), label, reduction="none")).sum()
