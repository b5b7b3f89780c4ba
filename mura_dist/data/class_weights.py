"""Compute the loss weights of both labels, over all study types or within each.

study type and label of each train radiograph -> study type -> (weight of label 0, weight of label 1)
"""

from collections.abc import Iterable
from typing import Literal

import numpy as np

LossWeights = Literal["class", "study_type", "none"]


def compute_class_weights(
    loss_weights: LossWeights, study_type: np.ndarray, label: np.ndarray, names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Compute (w0, w1) of each study type: w0 = A/(A+N) for normal, w1 = N/(A+N) for abnormal radiographs.

    A and N count abnormal and normal radiographs. "study_type" counts within each study type (arXiv 1712.06957), which
    removes the study type's prevalence from the logit. "class" counts over all study types, which keeps it. "none" gives
    weight 1. Where only one label occurs, or no radiograph, the pair is (1/2, 1/2), because the formula would give weight 0.

    Args:
        loss_weights: What to count.
        study_type: Study type of each train radiograph, str (n,).
        label: Label of each train radiograph, 0 or 1 (n,).
        names: Study types of the result.
    """
    if loss_weights == "none":
        return dict.fromkeys(names, (1.0, 1.0))
    if loss_weights == "class":
        return dict.fromkeys(names, _weight_pair(label))
    return {name: _weight_pair(label[study_type == name]) for name in names}


def _weight_pair(label: np.ndarray) -> tuple[float, float]:
    abnormal = float(label.mean()) if len(label) else 0.5
    return (abnormal, 1 - abnormal) if 0 < abnormal < 1 else (0.5, 0.5)
