"""comparison.py: differences against loops, SciPy, and what must hold by symmetry."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions


def sides(num: int = 300, num_patients: int = 90, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two scores of the same studies, the second one noisier."""
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


def test_differences_are_those_of_scikit_learn() -> None:
    a, b = sides()
    found = compare_predictions(a, b, resamples=200)
    plain(found)
    b = b.set_index("study").loc[a["study"]].reset_index()
    for name, chosen in [("overall", slice(None)), *((t, a["study_type"] == t) for t in ("XR_ELBOW", "XR_HAND"))]:
        group = found["overall"] if name == "overall" else found["by_study_type"][name]
        label, one, other = (part[chosen].to_numpy() for part in (a["label"], a["probability"], b["probability"]))
        kappas = [cohen_kappa_score(label, score > 0.5) for score in (one, other)]
        areas = [roc_auc_score(label, score) for score in (one, other)]
        for key, (left, right) in (("kappa", kappas), ("auroc", areas)):
            assert [group[key][part] for part in ("a", "b", "difference")] == pytest.approx(
                [left, right, left - right], abs=1e-12
            )
            assert group[key]["low"] < group[key]["difference"] < group[key]["high"]
        right = [(score > 0.5) == (label == 1) for score in (one, other)]
        discordant = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        assert (group["mcnemar"]["a_only_right"], group["mcnemar"]["b_only_right"]) == discordant
        assert group["mcnemar"]["p_value"] == pytest.approx(binomtest(discordant[0], sum(discordant)).pvalue, abs=1e-12)
    assert found["overall"]["kappa"]["low"] > 0  # the noisier side is worse, and 300 studies show it
    assert found["confirmatory"] == "overall kappa difference"
    assert "not two recipes" in found["note"]


def test_the_interval_is_the_paired_loop_over_patients() -> None:
    a, b = sides(60, 15)
    b = b.set_index("study").loc[a["study"]].reset_index()
    patients = sorted(set(a["patient"]))
    raw = np.random.Philox(key=3).random_raw(80 * len(patients))
    drawn = np.array([(int(word) >> 32) * len(patients) >> 32 for word in raw]).reshape(80, -1)
    differences = []
    for one in drawn:
        rows = np.concatenate([np.flatnonzero(a["patient"] == patients[i]) for i in one])
        label = a["label"].to_numpy()[rows]
        if len(set(label)) == 2:
            kappas = [cohen_kappa_score(label, side["probability"].to_numpy()[rows] > 0.5) for side in (a, b)]
            differences.append(kappas[0] - kappas[1])
    found = compare_predictions(a, b, resamples=80, seed=3)["overall"]["kappa"]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(differences, (0.025, 0.975)), abs=1e-12)


def test_swapping_the_sides_mirrors_everything() -> None:
    a, b = sides()
    one, other = (
        compare_predictions(a, b, resamples=100)["overall"],
        compare_predictions(b, a, resamples=100)["overall"],
    )
    for key in ("kappa", "auroc"):
        assert one[key]["difference"] == pytest.approx(-other[key]["difference"], abs=1e-12)
        assert one[key]["low"] == pytest.approx(-other[key]["high"], abs=1e-12)
    assert one["delong"]["low"] == pytest.approx(-other["delong"]["high"], abs=1e-12)
    assert one["delong"]["p_value"] == pytest.approx(other["delong"]["p_value"], abs=1e-12)
    assert one["mcnemar"]["p_value"] == other["mcnemar"]["p_value"]


def test_a_side_against_itself_differs_in_nothing() -> None:
    a, _ = sides()
    found = compare_predictions(a, a, resamples=50)["overall"]
    assert found["kappa"]["difference"] == found["auroc"]["difference"] == 0
    assert found["kappa"]["low"] is found["delong"] is None
    assert "rank the studies alike" in found["reasons"]["delong"]
    assert found["mcnemar"] == {"a_only_right": 0, "b_only_right": 0, "p_value": 1.0}


def test_delong_holds_its_level() -> None:
    """Two sides as good as each other: of 200 sets of independent studies about 5 % have a p-value below 0.05."""
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
def test_what_cannot_be_compared_says_why() -> None:
    a, b = sides(40)
    calls = b.assign(call=1).drop(columns="probability")
    found = compare_predictions(a, calls, resamples=20)["overall"]
    assert found["auroc"] is found["delong"] is None
    assert found["reasons"]["auroc"].startswith("calls only")
    assert found["kappa"]["b"] == 0
    one_class = compare_predictions(a.assign(label=1), b.assign(label=1), resamples=20)["overall"]
    plain(one_class)
    assert one_class["kappa"] is one_class["delong"] is None
    assert one_class["reasons"]["kappa"] == one_class["reasons"]["delong"] == "one class only"
    none = compare_predictions(a.assign(label=None), b.assign(label=None))["overall"]
    assert none["kappa"] is None
    assert none["reasons"]["kappa"] == "no labeled studies"
    with pytest.raises(AssertionError, match="different studies"):
        compare_predictions(a, b.iloc[1:])
