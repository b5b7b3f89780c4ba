"""Test calibration, fitted thresholds and the band against scikit-learn, exhaustive search and simulated studies."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from mura_dist.core.errors import UserError
from mura_dist.metrics import calibration, operating_points
from mura_dist.metrics.classification import compute_calibration_slope, logit, sigmoid
from mura_dist.metrics.operating_points import BAND_OPERATING_POINTS, OPERATING_POINT_NAMES, FittedThresholds
from mura_dist.metrics.summary import compute_metrics

SHIFT = {"XR_HAND": 1.0, "XR_HUMERUS": 0.2, "XR_WRIST": -0.5}


def simulate_studies(counts: dict[str, int], seed: int = 0, slope: float = 1.6, intercept: float = 0.3) -> pd.DataFrame:
    """Return studies whose true probabilities are known. Log odds are slope x true + intercept + the type's shift."""
    rng = np.random.default_rng(seed)
    study_type = np.repeat(list(counts), list(counts.values()))
    true = rng.normal(0, 2, len(study_type)) - 0.3
    shift = np.array([SHIFT.get(name, 0.0) for name in study_type])
    frame = pd.DataFrame(
        {
            "study": [f"study{index}" for index in range(len(true))],
            "study_type": study_type,
            "patient": [f"patient{index // 2}" for index in range(len(true))],
            "label": (rng.random(len(true)) < sigmoid(true)).astype(int),
            "probability": sigmoid(slope * true + intercept + shift),
            "true": sigmoid(true),
        }
    )
    return frame.sample(frac=1, random_state=seed).reset_index(drop=True)


def fit_scikit(label: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """Return an unpenalized logistic regression on Platt's targets, with each study as a weighted 1 and 0."""
    positive, negative = label.sum(), (1 - label).sum()
    target = np.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    model = LogisticRegression(C=np.inf, tol=1e-12, max_iter=10_000)
    labels, weight = np.repeat([1, 0], len(x)), np.concatenate([target, 1 - target])
    model.fit(np.concatenate([x, x])[:, None], labels, weight)
    return float(model.intercept_[0]), float(model.coef_[0, 0])


# ---- fit


@pytest.mark.parametrize("seed", range(5))
def test_type_with_many_studies_has_its_own_fit(seed: int) -> None:
    tune = simulate_studies({"XR_HAND": 400, "XR_WRIST": 300}, seed)
    fitted = calibration.fit(tune, SHIFT, list(SHIFT))
    for name in ("XR_HAND", "XR_WRIST"):
        subset, entry = tune[tune["study_type"] == name], fitted.by_study_type[name]
        expected = fit_scikit(subset["label"].to_numpy(), logit(subset["probability"].to_numpy()))
        assert not entry.pooled
        assert (entry.intercept, entry.slope) == pytest.approx(expected, abs=1e-6)
        assert (entry.num_normal, entry.num_abnormal) == ((subset["label"] == 0).sum(), subset["label"].sum())


@pytest.mark.parametrize("seed", range(5))
def test_type_with_few_studies_uses_the_pool(seed: int) -> None:
    tune = simulate_studies({"XR_HAND": 200, "XR_WRIST": 150, "XR_HUMERUS": 30}, seed)
    fitted = calibration.fit(tune, SHIFT, [*SHIFT, "XR_ELBOW"])
    shift = tune["study_type"].map(SHIFT).to_numpy()
    intercept, slope = fit_scikit(tune["label"].to_numpy(), logit(tune["probability"].to_numpy()) - shift)
    for name, num in (("XR_HUMERUS", 30), ("XR_ELBOW", 0)):  # tune has no study of the latter
        entry = fitted.by_study_type[name]
        assert entry.pooled
        assert entry.num_normal + entry.num_abnormal == num
        assert (entry.intercept, entry.slope) == pytest.approx(
            (intercept - slope * SHIFT.get(name, 0.0), slope), abs=1e-6
        )
    assert (fitted.num_studies, fitted.num_patients) == (380, tune["patient"].nunique())
    assert fitted.num_abnormal == tune["label"].sum()


@pytest.mark.parametrize(("normal", "abnormal"), [(50, 50), (49, 50), (50, 49), (120, 49)])
def test_pool_is_used_below_min_own(normal: int, abnormal: int) -> None:
    label = np.repeat([0, 1, 0, 1], [normal, abnormal, 60, 60])
    name = np.repeat(["XR_HAND", "XR_WRIST"], [normal + abnormal, 120])
    probability = np.clip(0.4 * label + np.linspace(0.01, 0.55, len(label)), 0, 1)
    tune = pd.DataFrame({"study_type": name, "patient": "", "label": label, "probability": probability})
    fitted = calibration.fit(tune, {}, ["XR_HAND", "XR_WRIST"])
    assert fitted.by_study_type["XR_HAND"].pooled == (min(normal, abnormal) < calibration.MIN_OWN)
    assert not fitted.by_study_type["XR_WRIST"].pooled
    assert fitted.num_patients is None


@pytest.mark.parametrize("pooled", [False, True])
def test_calibration_recovers_true_probabilities(pooled: bool) -> None:
    """A weighted loss shifts the odds of each study type by another amount."""
    num_humerus = 12_000 if not pooled else 40
    tune = simulate_studies({"XR_HAND": 12_000, "XR_WRIST": 12_000, "XR_HUMERUS": num_humerus}, seed=3)
    fresh = simulate_studies({"XR_HUMERUS": 4000}, seed=4)
    fitted = calibration.fit(tune, SHIFT, list(SHIFT))
    assert fitted.by_study_type["XR_HUMERUS"].pooled == pooled
    calibrated = calibration.apply(fitted, fresh)["calibrated_probability"]
    assert np.abs(calibrated - fresh["true"]).max() < 0.03
    assert np.abs(fresh["probability"] - fresh["true"]).max() > 0.1
    if pooled:  # without the known shift it would equal that of the other types
        blind = calibration.apply(calibration.fit(tune, {}, list(SHIFT)), fresh)["calibrated_probability"]
        assert np.abs(blind - fresh["true"]).max() > 2 * np.abs(calibrated - fresh["true"]).max()


def test_slope_on_fresh_studies_is_near_one() -> None:
    slopes = []
    for seed in range(40):
        tune, fresh = (simulate_studies({"XR_HAND": 300, "XR_HUMERUS": 50}, 1000 * subset + seed) for subset in (1, 2))
        calibrated = calibration.apply(calibration.fit(tune, SHIFT, list(SHIFT)), fresh)["calibrated_probability"]
        slopes.append(float(compute_calibration_slope(fresh["label"].to_numpy(), logit(calibrated.to_numpy()))))
    assert np.mean(slopes) == pytest.approx(1, abs=0.08)
    raw = [float(compute_calibration_slope(fresh["label"].to_numpy(), logit(fresh["probability"].to_numpy())))]
    assert raw[0] < 0.8  # and it was not before


def test_separated_studies_have_a_finite_fit() -> None:
    label = np.repeat([0, 1], 60)
    probability = np.where(label == 1, 1.0, 0.0)  # to the precision of float64
    tune = pd.DataFrame({"study_type": "XR_HAND", "patient": "p", "label": label, "probability": probability})
    entry = calibration.fit(tune, {}, ["XR_HAND"]).by_study_type["XR_HAND"]
    assert entry.slope is not None
    assert 0 < entry.slope < 1
    table = calibration.apply(FittedThresholds(fitted_on="tune", by_study_type={"XR_HAND": entry}), tune)
    expected = np.where(label == 1, 61 / 62, 1 / 62)
    np.testing.assert_allclose(table["calibrated_probability"], expected, atol=1e-6)


# ---- missing fits


def missing_reason(tune: pd.DataFrame, name: str = "XR_HAND", key: str = "calibration") -> str:
    return calibration.fit(tune, SHIFT, list(SHIFT)).missing_reason(name, key)


def test_missing_calibration_has_a_reason() -> None:
    tune = simulate_studies({"XR_HAND": 100})
    small = tune.groupby("label").head(9)
    assert "9 normal and 9 abnormal tune studies; at least 10" in missing_reason(small)
    assert "at least 10" in missing_reason(small, key="sensitivity=0.95")
    assert "0 normal and 0 abnormal tune studies" in missing_reason(tune[:0])
    assert "1 of 100 tune studies have no finite" in missing_reason(tune.assign(probability=[math.nan] + [0.5] * 99))
    assert "same probability" in missing_reason(tune.assign(probability=0.25))
    assert "none of the study types the model was trained on" in missing_reason(tune, "XR_FOOT")
    inverted = tune.assign(label=1 - tune["label"])
    assert "slope is -" in missing_reason(inverted)
    assert "sensitivity=0.95" in calibration.fit(inverted, SHIFT, list(SHIFT)).by_study_type["XR_HAND"].operating_points


def test_unknown_study_types_are_ignored() -> None:
    tune = simulate_studies({"XR_HAND": 200, "XR_HUMERUS": 40, "XR_FOOT": 300})
    without = calibration.fit(tune[tune["study_type"] != "XR_FOOT"], SHIFT, list(SHIFT))
    fitted = calibration.fit(tune, SHIFT, list(SHIFT))
    assert fitted == without
    table = calibration.apply(fitted, tune)
    foot = table["study_type"] == "XR_FOOT"
    assert table.loc[foot, "calibrated_probability"].isna().all()
    assert (table.loc[foot, "band"] == "").all()
    assert table.loc[~foot, "calibrated_probability"].notna().all()


# ---- thresholds and band


@pytest.mark.parametrize("size", [1, 2, 3, 7, 19, 20, 21, 60])
@pytest.mark.parametrize("values", [2, 3, 11, 10_000])
def test_thresholds_equal_exhaustive_search(size: int, values: int) -> None:
    rng = np.random.default_rng(size * values)
    label = np.concatenate([[0, 1], rng.integers(0, 2, 2 * size - 2)]) if size > 1 else np.array([0, 1])
    scores = rng.integers(0, values + 1, len(label)) / values
    candidates = np.unique(np.concatenate([scores, [0.0, 1.0]]))
    between = [(a + b) / 2 for a, b in itertools.pairwise(candidates)]
    for name in OPERATING_POINT_NAMES:
        rate, expected = name.split("=")
        cut = calibration.choose_threshold(name, label, scores, (0.0, 1.0))
        if rate == "sensitivity":
            good = [t for t in between if (scores[label == 1] > t).mean() >= float(expected) - 1e-12]
            assert cut == (max(good) if good else None)
        else:
            good = [t for t in [*between, 1.0] if (scores[label == 0] <= t).mean() >= float(expected) - 1e-12]
            assert cut == min(good)


@pytest.mark.parametrize("low", [0.3, 1e-300, 1 - 2**-53])
def test_thresholds_separate_adjacent_floats(low: float) -> None:
    scores, label = np.array([low, np.nextafter(low, 2)]), np.array([0, 1])
    for name in OPERATING_POINT_NAMES:
        cut = calibration.choose_threshold(name, label, scores, (0.0, 1.0))
        assert cut is not None
        assert (scores > cut).tolist() == [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_pooled_thresholds_reach_their_rates_on_the_pool(seed: int) -> None:
    tune = simulate_studies({"XR_HAND": 200, "XR_HUMERUS": 40}, seed)
    fitted = calibration.fit(tune, SHIFT, list(SHIFT))
    positive, shift = tune["label"] == 1, tune["study_type"].map(SHIFT)
    for name in OPERATING_POINT_NAMES:
        rate, expected = name.split("=")
        point = fitted.by_study_type["XR_HUMERUS"].operating_points[name]
        cut = logit(np.array([point.threshold]))[0] - SHIFT["XR_HUMERUS"]
        above = logit(tune["probability"].to_numpy()) - shift > cut
        assert (above[positive].mean(), (~above)[~positive].mean()) == pytest.approx(
            (point.sensitivity, point.specificity)
        )
        assert getattr(point, rate) >= float(expected) - 1e-12


def test_band_boundaries() -> None:
    tune = simulate_studies({"XR_HAND": 400})
    fitted = calibration.fit(tune, SHIFT, ["XR_HAND"])
    entry = fitted.by_study_type["XR_HAND"]
    assert entry.band is not None
    low, high = (entry.operating_points[name].threshold for name in BAND_OPERATING_POINTS)
    assert (entry.band.low, entry.band.high) == (low, high)
    grid = [
        0.0,
        np.nextafter(low, 0),
        low,
        np.nextafter(low, 1),
        np.nextafter(high, 0),
        high,
        np.nextafter(high, 1),
        1.0,
    ]
    table = calibration.apply(fitted, pd.DataFrame({"study_type": "XR_HAND", "probability": [*grid, math.nan]}))
    assert table["band"].tolist() == ["negative"] * 3 + ["uncertain"] * 3 + ["positive"] * 2 + [""]
    assert (np.diff(table["calibrated_probability"][:-1]) >= 0).all()


def test_no_band_where_the_thresholds_cross() -> None:
    label = np.repeat([0, 1], 60)
    tune = pd.DataFrame({"study_type": "XR_HAND", "patient": "p", "label": label, "probability": 0.2 + label / 2})
    entry = calibration.fit(tune, {}, ["XR_HAND"]).by_study_type["XR_HAND"]
    assert entry.band is None
    assert entry.reasons == {"band": entry.reasons["band"]}
    assert (
        "cross (sensitivity=0.95 at 0.45, specificity=0.95 at 0.45): one threshold reaches both"
        in entry.reasons["band"]
    )


# ---- operating points


def compute_rates(call: np.ndarray, label: np.ndarray) -> dict[str, float]:
    return {
        "sensitivity": call[label == 1].mean(),
        "specificity": (~call)[label == 0].mean(),
        "ppv": label[call].mean(),
        "npv": 1 - label[~call].mean(),
    }


def test_operating_points_measured_on_fresh_studies() -> None:
    tune = simulate_studies({"XR_HAND": 300, "XR_HUMERUS": 60}, 1)
    fitted = calibration.fit(tune, SHIFT, ["XR_HAND", "XR_HUMERUS"])
    valid = calibration.apply(fitted, simulate_studies({"XR_HAND": 200, "XR_HUMERUS": 80, "XR_FOOT": 30}, 2))
    measured = calibration.compute_operating_points(fitted, valid, resamples=200)
    assert measured is not None
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["left_out"] == {"XR_FOOT": 30}
    assert list(measured["by_study_type"]) == ["XR_HAND", "XR_HUMERUS"]
    known_types = valid[valid["study_type"] != "XR_FOOT"]
    for name in OPERATING_POINT_NAMES:
        cut = known_types["study_type"].map(fitted.thresholds(name))
        for group_name, chosen in (("overall", slice(None)), ("XR_HUMERUS", known_types["study_type"] == "XR_HUMERUS")):
            subset, group = (
                known_types[chosen],
                measured["overall"] if group_name == "overall" else measured["by_study_type"][group_name],
            )
            point = group["points"][name]
            expected = compute_rates((subset["probability"] > cut[chosen]).to_numpy(), subset["label"].to_numpy())
            assert {key: point[key] for key in expected} == pytest.approx(expected)
            assert all(
                point[f"{key}_low"] < point[key] < point[f"{key}_high"] for key in expected if 0 < point[key] < 1
            )
            assert sum(point["confusion"].values()) == point["num_studies"] == len(subset)
    band = measured["overall"]["band"]
    is_certain = known_types["band"] != "uncertain"
    assert band["num_uncertain"] == (~is_certain).sum()
    assert band["share_uncertain"] == pytest.approx((~is_certain).mean())
    right = (known_types["band"] == "positive") == (known_types["label"] == 1)
    assert band["accuracy_outside"] == pytest.approx(right[is_certain].mean())
    assert band["share_uncertain_low"] < band["share_uncertain"] < band["share_uncertain_high"]
    assert band["low"] is None
    assert band["reasons"]["low"] == "each study type has its own"


def test_study_type_without_a_point_is_excluded_and_counted() -> None:
    fitted = calibration.fit(simulate_studies({"XR_HAND": 300, "XR_WRIST": 300}), SHIFT, ["XR_HAND", "XR_WRIST"])
    wrist, name = fitted.by_study_type["XR_WRIST"], "sensitivity=0.98"
    remaining = {key: value for key, value in wrist.operating_points.items() if key != name}
    wrist = wrist.model_copy(
        update={"operating_points": remaining, "band": None, "reasons": {name: "no", "band": "no"}}
    )
    fitted = fitted.model_copy(update={"by_study_type": fitted.by_study_type | {"XR_WRIST": wrist}})
    valid = calibration.apply(fitted, simulate_studies({"XR_HAND": 70, "XR_WRIST": 50}, 2))
    measured = calibration.compute_operating_points(fitted, valid, resamples=50)
    assert measured is not None
    all_types, of_hand, of_wrist = (
        measured["overall"],
        measured["by_study_type"]["XR_HAND"],
        measured["by_study_type"]["XR_WRIST"],
    )
    assert (all_types["band"]["num_studies"], all_types["band"]["num_without"]) == (70, 50)
    assert all_types["band"]["share_uncertain"] == of_hand["band"]["share_uncertain"]
    overall, hand, wrists = (group["points"][name] for group in (all_types, of_hand, of_wrist))
    assert (overall["num_studies"], overall["num_without"]) == (70, 50)
    assert overall["confusion"] == hand["confusion"]
    assert (wrists["num_studies"], wrists["sensitivity"], wrists["reasons"]["sensitivity"]) == (0, None, "no")
    assert measured["overall"]["points"]["sensitivity=0.95"]["num_studies"] == 120


def test_operating_point_intervals_equal_compute_metrics() -> None:
    """Both resample the same patients."""
    fitted = calibration.fit(simulate_studies({"XR_HAND": 300}, 1), SHIFT, ["XR_HAND"])
    valid = calibration.apply(fitted, simulate_studies({"XR_HAND": 200}, 2))
    measured = calibration.compute_operating_points(fitted, valid, resamples=300, seed=5)
    assert measured is not None
    for name in OPERATING_POINT_NAMES:
        cut = fitted.thresholds(name)["XR_HAND"]
        expected = compute_metrics(valid.assign(call=(valid["probability"] > cut) * 1), resamples=300, seed=5)[
            "overall"
        ]
        point = measured["overall"]["points"][name]
        for key in ("sensitivity", "specificity", "ppv", "npv"):
            for end in ("", "_low", "_high"):
                assert point[key + end] == expected[key + end], (name, key + end)


def test_no_metrics_without_thresholds() -> None:
    valid = simulate_studies({"XR_HAND": 100})
    assert (
        calibration.compute_operating_points(FittedThresholds(), calibration.apply(FittedThresholds(), valid)) is None
    )
    fitted = calibration.fit(valid, SHIFT, ["XR_HAND"])
    assert calibration.compute_operating_points(fitted, calibration.apply(fitted, valid[:0])) is None


def test_one_class_has_a_reason_for_each_missing_rate() -> None:
    fitted = calibration.fit(simulate_studies({"XR_HAND": 300}), SHIFT, ["XR_HAND"])
    valid = calibration.apply(fitted, simulate_studies({"XR_HAND": 50}, 7).assign(label=0))
    measured = calibration.compute_operating_points(fitted, valid, resamples=20)
    assert measured is not None
    for group in (measured["overall"], measured["by_study_type"]["XR_HAND"]):
        for subset in (*group["points"].values(), group["band"]):
            assert {key for key, value in subset.items() if value is None} == set(subset["reasons"])
        assert group["points"]["sensitivity=0.9"]["reasons"]["sensitivity"] == "no abnormal study"


# ---- serialization


def test_fitted_thresholds_round_trip_through_json() -> None:
    fitted = calibration.fit(simulate_studies({"XR_HAND": 300, "XR_HUMERUS": 40}), SHIFT, list(SHIFT), notes=["a note"])
    assert FittedThresholds.model_validate_json(json.dumps(fitted.model_dump(mode="json"), allow_nan=False)) == fitted
    assert FittedThresholds.model_validate({}) == FittedThresholds()
    with pytest.raises(ValidationError):
        FittedThresholds.model_validate({"by_study_type": {"XR_HAND": {"slope": "steep"}}})


@pytest.mark.parametrize(
    ("text", "name"),
    [("paper", "paper"), ("sensitivity=.95", "sensitivity=0.95"), ("specificity=0.80", "specificity=0.8")],
)
def test_parse_operating_point(text: str, name: str) -> None:
    assert operating_points.parse_operating_point(text) == name


@pytest.mark.parametrize(
    "text", ["", "0.5", "sensitivity", "sensitivity=", "sensitivity=0.93", "ppv=0.9", "sensitivity=x"]
)
def test_unknown_operating_point_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--operating-point .*paper, sensitivity=W .* 0\.8, 0\.9, 0\.95, 0\.98"):
        operating_points.parse_operating_point(text)


def test_thresholds_at_needs_every_study_type() -> None:
    fitted = calibration.fit(simulate_studies({"XR_HAND": 300}), SHIFT, ["XR_HAND"])
    assert list(operating_points.thresholds_at(fitted, "sensitivity=0.9", {"XR_HAND": 3})) == ["XR_HAND"]
    with pytest.raises(UserError, match=r"sensitivity=0\.9: .* for XR_FOOT \(4 studies\): XR_FOOT is none of.*paper"):
        operating_points.thresholds_at(fitted, "sensitivity=0.9", {"XR_HAND": 3, "XR_FOOT": 4})
