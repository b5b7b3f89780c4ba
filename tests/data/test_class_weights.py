"""class_weights.py: the paper's weights, from the paper's counts."""

import numpy as np
import pytest

from mura_dist.data import mura
from mura_dist.data.class_weights import class_weights


def test_class_weights_are_the_papers() -> None:
    counts = mura.IMAGES_V1_1["train"]
    study_type = np.concatenate([[name] * sum(pair) for name, pair in counts.items()])
    label = np.concatenate([np.repeat([0, 1], pair) for pair in counts.values()])
    weights = class_weights(study_type, label)
    assert weights["XR_ELBOW"] == pytest.approx((0.406814, 0.593186), abs=5e-7)
    assert weights["XR_HAND"] == pytest.approx((0.267725, 0.732275), abs=5e-7)
    assert weights["XR_WRIST"] == pytest.approx((0.408839, 0.591161), abs=5e-7)
    assert class_weights(np.array(["A", "A"]), np.array([1, 1])) == {"A": (0.5, 0.5)}
