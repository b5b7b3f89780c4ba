"""Weigh the loss by study type and label, as MURA's paper does.

study type and label of each radiograph of the train split -> study type -> (weight of 0, weight of 1)
"""

import numpy as np


def class_weights(study_type: np.ndarray, label: np.ndarray) -> dict[str, tuple[float, float]]:
    """Compute study type -> (w0, w1): w1 = N/(A+N) weighs positives, w0 = A/(A+N) negatives (arXiv 1712.06957).

    A abnormal, N normal, counted in radiographs. With one class only the formula would give that class no weight at all
    and the other all of it; such a study type gets (1/2, 1/2).
    """
    weights = {}
    for name in sorted(set(study_type.tolist())):
        abnormal = float(label[study_type == name].mean())
        weights[name] = (abnormal, 1 - abnormal) if 0 < abnormal < 1 else (0.5, 0.5)
    return weights
