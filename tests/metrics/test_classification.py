"""Test the classification metrics against scikit-learn, SciPy and plain loops."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    cohen_kappa_score,
    precision_recall_curve,
    roc_auc_score,
)

from mura_dist.metrics import classification


def simulate_scores(num: int = 500, seed: int = 0, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return label and probability (n,), with many ties, zeros and ones."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    return label, np.round(classification.sigmoid(1.5 * (2 * label - 1) + rng.normal(0, 1.7, num)), decimals)


def random_weights(num: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, (3, num)).astype(float)


def test_is_positive_is_strict() -> None:
    scores = np.array([0.5, np.nextafter(0.5, 1), np.nextafter(0.5, 0), 0.0, 1.0, np.nan])
    expected = [False, True, False, False, True, False]
    for probability in (scores, pd.Series(scores, index=range(6, 0, -1))):
        call = classification.is_positive(probability, 0.5)
        assert (type(call), call.dtype, call.tolist()) == (np.ndarray, bool, expected)
    own = pd.Series([0.2, 0.3, np.nan])  # a threshold each; a study type without one is never positive
    assert classification.is_positive(np.array([0.3, 0.3, 1.0]), own).tolist() == [True, False, False]
    assert classification.is_positive(scores[:2, None], np.array([0.4, 0.5])).tolist() == [[True, False], [True, True]]
    assert not classification.is_positive(1.0, 1.0)


def test_kappa_equals_scikit_learn() -> None:
    label, probability = simulate_scores()
    call = probability > 0.5
    assert classification.compute_kappa(classification.compute_confusion(label, call)) == pytest.approx(
        cohen_kappa_score(label, call), abs=1e-12
    )
    weight = random_weights(500)
    expected = [cohen_kappa_score(label, call, sample_weight=row) for row in weight]
    assert classification.compute_kappa(classification.compute_confusion(label, call, weight)) == pytest.approx(
        expected, abs=1e-12
    )


def test_auroc_equals_scikit_learn_with_ties_and_weights() -> None:
    label, probability = simulate_scores()
    assert len(np.unique(probability)) < 120
    assert classification.compute_auroc(label, probability) == pytest.approx(
        roc_auc_score(label, probability), abs=1e-12
    )
    weight = random_weights(500)
    expected = [roc_auc_score(label, probability, sample_weight=row) for row in weight]
    assert classification.compute_auroc(label, probability, weight) == pytest.approx(expected, abs=1e-12)


def test_area_under_roc_curve_equals_auroc() -> None:
    label, probability = simulate_scores(300)
    false, true = classification.compute_roc_curve(label, probability)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.diff(false) @ (true[1:] + true[:-1]) / 2 == pytest.approx(
        float(classification.compute_auroc(label, probability)), abs=1e-12
    )


def manifest_frame() -> pd.DataFrame:
    """Return the manifest of three studies of two, one and three views."""
    study = ["a", "a", "b", "c", "c", "c"]
    patient = ["p", "p", "p", "q", "q", "q"]
    frame = pd.DataFrame({"split": "valid", "study_type": "XR_HAND", "patient": patient, "study": study, "view": 1})
    return frame.assign(label=[0, 0, 1, 1, 1, 1], path="").rename_axis("row")


def test_study_table_averages_views_in_any_order() -> None:
    rows, probability = np.array([5, 0, 3, 1, 4, 2]), np.array([0.9, 0.2, 0.6, 0.4, 0.3, 0.7])
    table = classification.build_study_table(rows, probability, manifest_frame())
    assert list(table.columns) == ["study", "study_type", "patient", "label", "num_views", "probability"]
    assert table["study"].tolist() == ["a", "b", "c"]
    assert table["num_views"].tolist() == [2, 1, 3]
    assert table["label"].tolist() == [0, 1, 1]
    assert table["probability"].tolist() == pytest.approx([0.3, 0.7, 0.6])
    order = np.random.default_rng(0).permutation(6)
    pd.testing.assert_frame_equal(
        classification.build_study_table(rows[order], probability[order], manifest_frame()), table, check_exact=True
    )


def test_study_table_keeps_nan_and_refuses_repeated_rows() -> None:
    table = classification.build_study_table(np.array([0, 1, 3]), np.array([0.2, np.nan, 0.5]), manifest_frame())
    assert np.isnan(table["probability"][0])
    assert table["num_views"].tolist() == [2, 1]
    with pytest.raises(AssertionError, match="twice"):
        classification.build_study_table(np.array([0, 0]), np.array([0.1, 0.2]), manifest_frame())


def test_average_precision_equals_scikit_learn() -> None:
    label, probability = simulate_scores()
    assert classification.compute_average_precision(label, probability) == pytest.approx(
        average_precision_score(label, probability), abs=1e-12
    )
    weight = random_weights(500)
    expected = [average_precision_score(label, probability, sample_weight=row) for row in weight]
    assert classification.compute_average_precision(label, probability, weight) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(classification.compute_average_precision(np.ones(3, int), np.array([0.1, 0.2, 0.3])))


def test_pr_curve_equals_scikit_learn() -> None:
    label, probability = simulate_scores()
    precision, recall, _ = precision_recall_curve(label, probability)
    curve = classification.compute_pr_curve(label, probability)
    np.testing.assert_allclose(curve[0][::-1], recall[:-1], atol=1e-12)
    np.testing.assert_allclose(curve[1][::-1], precision[:-1], atol=1e-12)


def test_brier_score_equals_scikit_learn() -> None:
    label, probability = simulate_scores()
    assert classification.compute_brier_score(label, probability) == pytest.approx(
        brier_score_loss(label, probability), abs=1e-12
    )
    weight = random_weights(500)
    expected = [brier_score_loss(label, probability, sample_weight=row) for row in weight]
    assert classification.compute_brier_score(label, probability, weight) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_slope_equals_scikit_learn(seed: int) -> None:
    label, probability = simulate_scores(200, seed)
    logits = classification.logit(probability)
    assert np.abs(logits).max() <= classification.LOGIT_LIMIT  # of probabilities that are 0 and 1
    weight = random_weights(200, seed)
    for row, value in zip(
        [None, *weight], [None, *classification.compute_calibration_slope(label, logits, weight)], strict=True
    ):
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
        expected = model.fit(logits[:, None], label, sample_weight=row).coef_[0, 0]
        value = classification.compute_calibration_slope(label, logits) if value is None else value
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_intercept_solves_its_equation(seed: int) -> None:
    """At the maximum likelihood, the probabilities add up to the number of abnormal studies."""
    label, probability = simulate_scores(200, seed)
    logits = classification.logit(probability)
    for weight, value in zip(
        random_weights(200),
        classification.compute_calibration_intercept(label, logits, random_weights(200)),
        strict=True,
    ):
        expected = brentq(
            lambda a, w=weight: (w * (classification.sigmoid(a + logits) - label)).sum(), -60, 60, xtol=1e-13
        )
        assert value == pytest.approx(expected, abs=1e-9)
    assert classification.compute_calibration_intercept(label, logits) == pytest.approx(
        classification.compute_calibration_intercept(label, logits, np.ones((1, 200)))[0]
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "logits",
    [
        [-3.0, -1.0, 1.0, 2.0],  # separated
        [-3.0, 1.0, 1.0, 2.0],  # they touch
        [3.0, 1.0, -1.0, -2.0],  # inverted
        [1.0, 1.0, 1.0, 1.0],
    ],
)
def test_separated_logits_have_no_slope(logits: list[float]) -> None:
    label = np.array([0, 0, 1, 1])
    assert np.isnan(classification.compute_calibration_slope(label, np.array(logits)))
    assert np.isfinite(classification.compute_calibration_intercept(label, np.array(logits)))
    assert np.isnan(classification.compute_calibration_intercept(np.ones(4, int), np.array(logits)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steep", [0.01, 1.0, 30.0])
def test_slope_of_extreme_scores_converges(steep: float) -> None:
    """One study lies among those of the other label. The maximum exists, far from the steps of plain Newton."""
    rng = np.random.default_rng(3)
    label = np.repeat([0, 1], 30)
    logits = np.clip(steep * (6 * label - 3 + rng.normal(0, 0.5, 60)), -30, 30)
    logits[0], logits[59] = logits[40] + 1e-3, logits[10] - 1e-3
    slope = classification.compute_calibration_slope(label, logits, np.ones((5, 60)))
    model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=100_000).fit(logits[:, None], label)
    assert slope == pytest.approx(np.full(5, model.coef_[0, 0]), rel=1e-3)


def test_calibration_error_of_miscalibrated_scores() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    label = (rng.random(40_000) < classification.sigmoid(logits)).astype(int)
    for shift, steep in ((0.0, 1.0), (1.0, 1.0), (0.0, 2.0)):
        scaled = shift + steep * logits
        error, method = classification.compute_calibration_error(label, classification.sigmoid(scaled))
        assert classification.compute_calibration_slope(label, scaled) == pytest.approx(1 / steep, abs=0.05)
        assert (error < 0.012) == ((shift, steep) == (0.0, 1.0))
        assert method == "10 bins of equal number of studies"
        if steep == 1:
            assert classification.compute_calibration_intercept(label, scaled) == pytest.approx(-shift, abs=0.05)


@pytest.mark.parametrize(("num", "count"), [(1, 1), (9, 1), (10, 2), (49, 9), (500, 10)])
def test_bins_hold_equal_numbers_of_studies(num: int, count: int) -> None:
    rng = np.random.default_rng(num)
    label, probability = rng.integers(0, 2, num), rng.random(num)
    bins = classification.bin_by_quantile(label, probability)
    assert len(bins.num) == count
    assert bins.num.sum() == num
    assert np.ptp(bins.num) <= 1
    assert (bins.num * bins.share).sum() == pytest.approx(label.sum())
    assert (bins.num * bins.probability).sum() == pytest.approx(probability.sum())
    parts = np.array_split(np.argsort(probability), count)
    assert sorted(bins.num) == sorted(map(len, parts))


def test_ties_stay_in_one_bin() -> None:
    label, probability = np.array([0, 1] * 50), np.repeat([0.2, 0.2, 0.7, 0.9], 25)
    bins = classification.bin_by_quantile(label, probability)
    assert bins.probability.tolist() == pytest.approx([0.2, 0.7, 0.9])
    assert bins.num.tolist() == [50, 25, 25]
