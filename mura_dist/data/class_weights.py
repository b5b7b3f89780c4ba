"""Weigh the loss by label, over all study types or within each.

study type and label of each radiograph of the train split -> study type -> (weight of 0, weight of 1)
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

LossWeights = Literal["class", "study_type", "none"]


def compute_class_weights(
    loss_weights: LossWeights, study_type: np.ndarray, label: np.ndarray, names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Compute (w0, w1) for each study type: w1 = N/(A+N) weighs positives, w0 = A/(A+N) negatives.

    A and N count abnormal and normal radiographs. "study_type" counts them within each study type (arXiv 1712.06957), which
    takes the study type's own share of abnormals out of the logit. "class" counts them over all study types, which leaves
    that share in. "none" weighs every radiograph 1. With one label only the formula would give that label no weight
    at all, so the pair is (1/2, 1/2), as it is for a study type without radiographs.

    Args:
        loss_weights: how to count.
        study_type: of each training radiograph, str (n,).
        label: of each training radiograph, 0 or 1 (n,).
        names: the study types wanted.
    """
    if loss_weights == "none":
        return dict.fromkeys(names, (1.0, 1.0))
    if loss_weights == "class":
        return dict.fromkeys(names, _pair(label))
    return {name: _pair(label[study_type == name]) for name in names}


def _pair(label: np.ndarray) -> tuple[float, float]:
    abnormal = float(label.mean()) if len(label) else 0.5
    return (abnormal, 1 - abnormal) if 0 < abnormal < 1 else (0.5, 0.5)
