"""Test Wilson's interval against published values and its equation, and its use in metrics.json."""

from decimal import Decimal, getcontext

import numpy as np
import pandas as pd
import pytest
from helpers.studies import simulated

from mura_dist.metrics import calibration, intervals, summary
from mura_dist.metrics.intervals import compute_wilson_interval

TRIALS = (1, 2, 3, 4, 7, 10, 29, 30, 138, 263, 1199, 100_000)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 10, 0.0000, 0.2775),
    ],
)
def test_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    assert compute_wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


def _roots(successes: int, trials: int) -> tuple[Decimal, Decimal]:
    """Return both roots p of (x/n - p)^2 = z^2 p (1 - p) / n, in 50 digits."""
    getcontext().prec = 50
    z2, n, share = Decimal("1.96") ** 2, Decimal(trials), Decimal(successes) / Decimal(trials)
    a, b, c = 1 + z2 / n, -(2 * share + z2 / n), share * share
    root = (b * b - 4 * a * c).sqrt()
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.mark.parametrize("trials", TRIALS)
def test_ends_are_roots_of_the_score_test(trials: int) -> None:
    for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials} & set(range(trials + 1)):
        low, high = compute_wilson_interval(successes, trials)
        exact = _roots(successes, trials)
        assert (low, high) == pytest.approx([float(end) for end in exact], abs=1e-13), successes


@pytest.mark.parametrize("trials", TRIALS)
def test_interval_is_symmetric_and_monotonic(trials: int) -> None:
    """The interval contains its estimate, lies in 0 .. 1, and is mirrored for the complement."""
    for successes in np.unique(np.linspace(0, trials, 41).astype(int)).tolist():
        low, high = compute_wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1
        assert low < high
        assert (low == 0) == (successes == 0)
        assert (high == 1) == (successes == trials)
        assert compute_wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low), abs=1e-15)
        wider = compute_wilson_interval(successes, trials)
        narrower = compute_wilson_interval(2 * successes, 2 * trials)
        assert narrower[1] - narrower[0] < wider[1] - wider[0]
    assert np.isnan(compute_wilson_interval(0, 0)).all()


# ---- intervals in metrics.json


def _studies(normal: list[float], abnormal: list[float]) -> pd.DataFrame:
    """Return studies of the hand with these probabilities, each of its own patient."""
    probability = [*normal, *abnormal]
    label = [0] * len(normal) + [1] * len(abnormal)
    patient = [f"patient{index}" for index in range(len(label))]
    return pd.DataFrame({"study_type": "XR_HAND", "patient": patient, "label": label, "probability": probability})


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("num", [2, 4, 30])
def test_degenerate_rate_has_wilson_interval(num: int, right: bool) -> None:
    """For a rate of 0 or 1 the bootstrap has no spread. The other rate keeps its bootstrap interval."""
    mixed = [0.2, 0.3, 0.6, 0.7] * 10
    group = summary.compute_metrics(_studies(mixed, [0.9 if right else 0.1] * num), resamples=200)["overall"]
    ends = group["sensitivity_low"], group["sensitivity_high"]
    assert ends == compute_wilson_interval(num if right else 0, num)
    assert group["sensitivity_interval"] == "wilson"
    assert "sensitivity_low" not in group["reasons"]
    assert group["specificity_interval"] == "bootstrap"
    wilson_ends = group["specificity_wilson_low"], group["specificity_wilson_high"]
    assert (group["specificity_low"], group["specificity_high"]) != wilson_ends


def test_other_rates_have_bootstrap_intervals() -> None:
    studies = simulated(300, 90)
    for group in summary.metrics_by_group(summary.compute_metrics(studies, resamples=200)).values():
        assert {group[f"{name}_interval"] for name in ("sensitivity", "specificity", "ppv", "npv")} == {"bootstrap"}


def test_kappa_and_auroc_have_a_reason_and_no_interval() -> None:
    group = summary.compute_metrics(_studies([0.1] * 5, [0.9] * 5), resamples=100)["overall"]
    for name in ("kappa", "auroc"):
        assert group[f"{name}_low"] is None
        assert group["reasons"][f"{name}_low"].startswith("every resample gave the same value")
        assert f"{name}_interval" not in group


def test_subgroups_have_wilson_intervals() -> None:
    studies = _studies([0.1] * 6, [0.9] * 6).assign(num_views=[1, 2] * 6)
    for group in summary.compute_subgroup_metrics(studies, resamples=100)["num_views"].values():
        assert group["specificity_interval"] == "wilson"
        assert (group["specificity_low"], group["specificity_high"]) == compute_wilson_interval(3, 3)


def test_every_curve_point_has_an_interval_and_its_method() -> None:
    studies = simulated(120, 60)
    for name, curve in summary.compute_threshold_curves(studies, resamples=100).items():
        entry = studies[studies["study_type"] == name]
        for rate, label in (("sensitivity", 1), ("specificity", 0)):
            trials = int((entry["label"] == label).sum())
            assert set(curve[f"{rate}_interval"]) == {"bootstrap", "wilson"}
            columns = (curve[key] for key in (rate, f"{rate}_low", f"{rate}_high", f"{rate}_interval"))
            for value, low, high, kind in zip(*columns, strict=True):
                assert 0 <= low <= high <= 1
                if kind == "wilson":
                    expected = compute_wilson_interval(round(value * trials), trials)
                    assert (low, high) == pytest.approx(expected, abs=6e-5), (name, rate, value)
                    assert low <= value <= high


def test_operating_points_and_band_have_wilson_intervals() -> None:
    """The labels of tune are separated, so that all calls at the fitted thresholds are correct."""
    normal, abnormal = np.linspace(0.05, 0.4, 60).tolist(), np.linspace(0.6, 0.95, 60).tolist()
    tune = _studies(normal + [0.7] * 6, abnormal + [0.3] * 6)
    points = calibration.fit(tune, {}, ["XR_HAND"])
    reported = calibration.apply(points, _studies([0.05] * 8, [0.95] * 9))
    measured = calibration.compute_operating_points(points, reported, resamples=50)
    assert measured is not None
    group = measured["by_study_type"]["XR_HAND"]
    point = group["points"]["sensitivity=0.8"]
    assert (point["sensitivity_low"], point["sensitivity_high"]) == compute_wilson_interval(9, 9)
    assert point["sensitivity_interval"] == "wilson"
    band = group["band"]
    assert (band["share_uncertain_low"], band["share_uncertain_high"]) == compute_wilson_interval(0, 17)
    assert (band["accuracy_outside_low"], band["accuracy_outside_high"]) == compute_wilson_interval(17, 17)
    assert band["accuracy_outside_interval"] == "wilson"


def test_interval_kinds_are_described() -> None:
    kinds = summary.compute_metrics(_studies([0.1], [0.9]), resamples=0)["interval_kinds"]
    assert kinds[intervals.WILSON] == "Wilson's score interval; assumes independent studies"
    assert kinds[intervals.BOOTSTRAP].startswith("95 % percentile bootstrap over whole patients")
