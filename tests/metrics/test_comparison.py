"""Test the comparison of two sets of predictions against plain loops, SciPy and symmetry."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions


def sides(num: int = 300, num_patients: int = 90, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return two scores of the same studies, the second with more noise."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    shared = 2.4 * label - 1.2 + rng.normal(0, 1, num)
    frame = pd.DataFrame(
        {
            "study": [f"study{i}" for i in range(num)],
            "study_type": rng.choice(["XR_ELBOW", "XR_HAND"], num),
            "patient": [f"patient{i:05}" for i in rng.integers(0, num_patients, num)],
            "label": label,
        }
    )
    a, b = (
        frame.assign(probability=classification.sigmoid(shared + rng.normal(0, noise, num))) for noise in (0.3, 2.0)
    )
    return a, b.sample(frac=1, random_state=1)


def plain(value: object) -> None:
    assert json.loads(json.dumps(value, allow_nan=False)) == value


def test_differences_equal_scikit_learn() -> None:
    a, b = sides()
    comparison = compare_predictions(a, b, resamples=200)
    plain(comparison)
    b = b.set_index("study").loc[a["study"]].reset_index()
    for name, chosen in [("overall", slice(None)), *((t, a["study_type"] == t) for t in ("XR_ELBOW", "XR_HAND"))]:
        group = comparison["overall"] if name == "overall" else comparison["by_study_type"][name]
        label, first, second = (
            column[chosen].to_numpy() for column in (a["label"], a["probability"], b["probability"])
        )
        kappas = [cohen_kappa_score(label, score > 0.5) for score in (first, second)]
        areas = [roc_auc_score(label, score) for score in (first, second)]
        for key, (value_a, value_b) in (("kappa", kappas), ("auroc", areas)):
            assert [group[key][column] for column in ("a", "b", "difference")] == pytest.approx(
                [value_a, value_b, value_a - value_b], abs=1e-12
            )
            assert group[key]["low"] < group[key]["difference"] < group[key]["high"]
        value_b = [(score > 0.5) == (label == 1) for score in (first, second)]
        discordant = int((value_b[0] & ~value_b[1]).sum()), int((value_b[1] & ~value_b[0]).sum())
        assert (group["mcnemar"]["a_only_right"], group["mcnemar"]["b_only_right"]) == discordant
        assert group["mcnemar"]["p_value"] == pytest.approx(binomtest(discordant[0], sum(discordant)).pvalue, abs=1e-12)
    assert comparison["overall"]["kappa"]["low"] > 0  # the noisier side is significantly worse
    assert comparison["confirmatory"] == "overall kappa difference"
    assert "not two recipes" in comparison["note"]


def test_interval_equals_paired_resampling_of_patients() -> None:
    a, b = sides(60, 15)
    b = b.set_index("study").loc[a["study"]].reset_index()
    patients = sorted(set(a["patient"]))
    raw = np.random.Philox(key=3).random_raw(80 * len(patients))
    resamples = np.array([(int(word) >> 32) * len(patients) >> 32 for word in raw]).reshape(80, -1)
    differences = []
    for first in resamples:
        rows = np.concatenate([np.flatnonzero(a["patient"] == patients[i]) for i in first])
        label = a["label"].to_numpy()[rows]
        if len(set(label)) == 2:
            kappas = [cohen_kappa_score(label, side["probability"].to_numpy()[rows] > 0.5) for side in (a, b)]
            differences.append(kappas[0] - kappas[1])
    comparison = compare_predictions(a, b, resamples=80, seed=3)["overall"]["kappa"]
    assert [comparison["low"], comparison["high"]] == pytest.approx(np.quantile(differences, (0.025, 0.975)), abs=1e-12)


def test_swapping_sides_negates_differences() -> None:
    a, b = sides()
    first, second = (
        compare_predictions(a, b, resamples=100)["overall"],
        compare_predictions(b, a, resamples=100)["overall"],
    )
    for key in ("kappa", "auroc"):
        assert first[key]["difference"] == pytest.approx(-second[key]["difference"], abs=1e-12)
        assert first[key]["low"] == pytest.approx(-second[key]["high"], abs=1e-12)
    assert first["delong"]["low"] == pytest.approx(-second["delong"]["high"], abs=1e-12)
    assert first["delong"]["p_value"] == pytest.approx(second["delong"]["p_value"], abs=1e-12)
    assert first["mcnemar"]["p_value"] == second["mcnemar"]["p_value"]


def test_side_against_itself_has_no_difference() -> None:
    a, _ = sides()
    comparison = compare_predictions(a, a, resamples=50)["overall"]
    assert comparison["kappa"]["difference"] == comparison["auroc"]["difference"] == 0
    assert comparison["kappa"]["low"] is comparison["delong"] is None
    assert "rank the studies alike" in comparison["reasons"]["delong"]
    assert comparison["mcnemar"] == {"a_only_right": 0, "b_only_right": 0, "p_value": 1.0}


def test_delong_p_values_are_uniform_under_the_null() -> None:
    """Of 200 sets of independent studies, about 5 % have a p-value below 0.05."""
    rng, low = np.random.default_rng(0), 0
    for _ in range(200):
        label = rng.integers(0, 2, 120)
        shared = label + rng.normal(0, 1, 120)
        frame = pd.DataFrame(
            {
                "study": np.arange(120).astype(str),
                "study_type": "x",
                "patient": None,
                "label": label,
                "probability": 0.5,
            }
        )
        a, b = (frame.assign(probability=classification.sigmoid(shared + rng.normal(0, 0.7, 120))) for _ in range(2))
        low += compare_predictions(a, b, resamples=0)["overall"]["delong"]["p_value"] < 0.05
    assert 3 <= low <= 20


@pytest.mark.filterwarnings("error")
def test_missing_comparisons_have_a_reason() -> None:
    a, b = sides(40)
    calls = b.assign(call=1).drop(columns="probability")
    comparison = compare_predictions(a, calls, resamples=20)["overall"]
    assert comparison["auroc"] is comparison["delong"] is None
    assert comparison["reasons"]["auroc"].startswith("calls only")
    assert comparison["kappa"]["b"] == 0
    one_class = compare_predictions(a.assign(label=1), b.assign(label=1), resamples=20)["overall"]
    plain(one_class)
    assert one_class["kappa"] is one_class["delong"] is None
    assert one_class["reasons"]["kappa"] == one_class["reasons"]["delong"] == "one class only"
    none = compare_predictions(a.assign(label=None), b.assign(label=None))["overall"]
    assert none["kappa"] is None
    assert none["reasons"]["kappa"] == "no labeled studies"
    with pytest.raises(AssertionError, match="different studies"):
        compare_predictions(a, b.iloc[1:])
