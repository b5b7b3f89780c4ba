"""Test class_weights.py: the weights of the MURA paper from its counts, and one pair of weights for all study types."""

import numpy as np
import pytest

from mura_dist.data import mura
from mura_dist.data.class_weights import LossWeights, compute_class_weights

COUNTS = mura.IMAGES_V1_1["train"]  # study type -> (normal, abnormal)
STUDY_TYPE = np.concatenate([[name] * sum(pair) for name, pair in COUNTS.items()])
LABEL = np.concatenate([np.repeat([0, 1], pair) for pair in COUNTS.values()])


def test_class_weights_equal_the_mura_papers() -> None:
    weights = compute_class_weights("study_type", STUDY_TYPE, LABEL, COUNTS)
    assert weights["XR_ELBOW"] == pytest.approx((0.406814, 0.593186), abs=5e-7)
    assert weights["XR_HAND"] == pytest.approx((0.267725, 0.732275), abs=5e-7)
    assert weights["XR_WRIST"] == pytest.approx((0.408839, 0.591161), abs=5e-7)


def test_one_pair_of_weights_covers_all_study_types() -> None:
    normal, abnormal = (sum(pair[label] for pair in COUNTS.values()) for label in (0, 1))
    weights = compute_class_weights("class", STUDY_TYPE, LABEL, [*COUNTS, "XR_NEW"])
    assert set(weights) == {*COUNTS, "XR_NEW"}
    for pair in weights.values():
        assert pair == pytest.approx((abnormal / (normal + abnormal), normal / (normal + abnormal)))


def test_weights_are_one_when_weighting_is_off() -> None:
    assert compute_class_weights("none", STUDY_TYPE, LABEL, ["XR_HAND"]) == {"XR_HAND": (1.0, 1.0)}


@pytest.mark.parametrize("loss_weights", ["class", "study_type"])
@pytest.mark.parametrize("label", [[], [1, 1], [0]])
def test_weights_are_equal_when_one_label_is_missing(loss_weights: LossWeights, label: list[int]) -> None:
    """The paper's formula would give the label that is present a weight of zero."""
    study_type = np.array(["A"] * len(label))
    assert compute_class_weights(loss_weights, study_type, np.array(label), ["A"]) == {"A": (0.5, 0.5)}
