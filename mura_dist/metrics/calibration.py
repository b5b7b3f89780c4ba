"""Fit calibration, thresholds and the uncertain band on the tune split; apply and measure them. NumPy and pandas only.

    tune studies (label, probability) -> fit -> FittedThresholds -> metrics.json["calibration"], the exported card
    any studies + FittedThresholds -> apply -> calibrated_probability, band     in evaluate and in predict
    reported studies + FittedThresholds -> compute_operating_points -> metrics.json["operating_points"]

The weighted loss multiplies a model's odds by N/A (N normal, A abnormal training radiographs, of the study type or of all).
No single temperature can calibrate that. Each study type has its own slope and intercept on the logit of the study's
probability. A study type with few tune studies uses those of the pool: all tune studies, on logits from which each type's
log(N/A) is subtracted. Its own log(N/A) is added afterwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.metrics.classification import (
    CELLS,
    compute_call_metrics,
    compute_confusion,
    fit_logistic,
    is_positive,
    logit,
    sigmoid,
)
from mura_dist.metrics.group import count_rates
from mura_dist.metrics.intervals import Bootstrap, Clusters, Interval
from mura_dist.metrics.operating_points import (
    BAND_OPERATING_POINTS,
    OPERATING_POINT_NAMES,
    Band,
    FittedThresholds,
    OperatingPoint,
    StudyTypeThresholds,
)

MIN_OWN = 50  # tune studies of the rarer label, below which a study type is fitted with the pool
MIN_POOL = 10  # tune studies of the rarer label in the pool, below which nothing is fitted
METHOD = (
    "per study type sigmoid(intercept + slope x logit of the study's probability), by maximum likelihood on Platt's smoothed "
    f"targets (1999); with fewer than {MIN_OWN} tune studies of a label, on the tune studies of all study types, log(N/A) of "
    "the weighted loss removed"
)
RATES = ("sensitivity", "specificity", "ppv", "npv")


def fit(
    tune: pd.DataFrame,
    odds_shift: Mapping[str, float],
    study_types: Sequence[str],
    *,
    num_damaged: int = 0,
    notes: Sequence[str] = (),
) -> FittedThresholds:
    """Fit calibration, operating points and the band of each study type.

    Args:
        tune: studies, with columns study_type, patient, label (0 or 1) and probability.
        odds_shift: log(N/A) by study type; 0 or missing where the loss was not weighted.
        study_types: the model's own. Studies of other types are ignored.
        num_damaged: number of corrupt tune radiographs, recorded in the result.
        notes: recorded in the result.
    """
    own = tune[tune["study_type"].isin(list(study_types))]
    pool = _FitData.from_studies(own, odds_shift)
    patient = own["patient"][own["patient"].notna() & (own["patient"] != "")]
    facts: dict[str, Any] = {"num_studies": len(own), "num_patients": patient.nunique() or None, **pool.counts()}
    facts |= {"method": METHOD, "num_damaged": num_damaged, "notes": list(notes)}
    if problem := pool.problem():
        return FittedThresholds(reason=problem, **facts)
    by_study_type = {str(name): _fit_study_type(name, own, pool, odds_shift) for name in sorted(study_types)}
    return FittedThresholds(fitted_on="tune", by_study_type=by_study_type, **facts)


@dataclass(frozen=True)
class _FitData:
    """Studies to fit to, (n,) each: label 0 or 1, raw probability, and logit without the type's shift."""

    label: np.ndarray
    probability: np.ndarray
    logit: np.ndarray

    @classmethod
    def from_studies(cls, studies: pd.DataFrame, odds_shift: Mapping[str, float]) -> "_FitData":
        probability = studies["probability"].to_numpy(dtype=np.float64)
        shift = studies["study_type"].map(lambda name: odds_shift.get(name, 0.0)).to_numpy(dtype=np.float64)
        return cls(studies["label"].to_numpy(dtype=np.int64), probability, logit(probability) - shift)

    def counts(self) -> dict[str, int]:
        positive = int(self.label.sum())
        return {"num_normal": len(self.label) - positive, "num_abnormal": positive}

    @property
    def num_of_rarer(self) -> int:
        return min(self.counts().values())

    def problem(self) -> str:
        """Return why nothing can be fitted, or ""."""
        if num_invalid := int((~np.isfinite(self.probability)).sum()):
            return f"{num_invalid} of {len(self.label)} tune studies have no finite probability"
        if self.num_of_rarer < MIN_POOL:
            counts = self.counts()
            return (
                f"{counts['num_normal']} normal and {counts['num_abnormal']} abnormal tune studies; at least {MIN_POOL} of "
                "each are needed: convert with a larger --tune"
            )
        return ""


def _fit_study_type(
    name: str, tune: pd.DataFrame, pool: _FitData, odds_shift: Mapping[str, float]
) -> StudyTypeThresholds:
    own = _FitData.from_studies(tune[tune["study_type"] == name], odds_shift)
    shift = float(odds_shift.get(name, 0.0))
    pooled = own.num_of_rarer < MIN_OWN
    reasons: dict[str, str] = {}
    facts: dict[str, Any] = {"pooled": pooled, "odds_shift": shift, "reasons": reasons, **own.counts()}
    line = _fit_line(pool.label, pool.logit) if pooled else _fit_line(own.label, logit(own.probability))
    if isinstance(line, str):
        reasons["calibration"] = line
    else:
        facts |= {"slope": line[1], "intercept": line[0] - (line[1] * shift if pooled else 0.0)}
    operating_points = facts["operating_points"] = {}
    for point_name in OPERATING_POINT_NAMES:
        point = _fit_operating_point(point_name, pool if pooled else own, shift if pooled else None)
        if point is None:
            reasons[point_name] = "no threshold from 0 to 1 reaches it"
        else:
            operating_points[point_name] = point
    facts["band"] = band = _fit_band(operating_points)
    if isinstance(band, str):
        facts["band"], reasons["band"] = None, band
    return StudyTypeThresholds(**facts)


def _fit_line(label: np.ndarray, x: np.ndarray) -> tuple[float, float] | str:
    """Return intercept and slope, or why there are none."""
    if np.ptp(x) == 0:
        return "all tune studies have the same probability"
    negative, positive = np.bincount(label, minlength=2)
    # Platt's smoothed targets (1999): with 0 and 1, labels that the logits separate would need an infinite slope.
    target = np.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    intercept, slope = (float(value[0]) for value in fit_logistic(target, x, np.ones((1, len(x)))))
    if not (math.isfinite(intercept) and math.isfinite(slope)):
        return "the fit did not converge to finite numbers"
    if slope <= 0:
        return f"the slope is {slope:.3g}, not positive: on tune, abnormal studies do not score higher"
    return intercept, slope


# ---- thresholds


def _fit_operating_point(name: str, studies: _FitData, shift: float | None) -> OperatingPoint | None:
    """Fit an operating point on the raw probability (shift None), or on logits without shift, to which `shift` is added."""
    scores = studies.probability if shift is None else studies.logit
    # The scale ends at 0 and 1. Logits have no end: take odds four times beyond the last score.
    ends = (0.0, 1.0) if shift is None else (scores.min() - math.log(4), scores.max() + math.log(4))
    cutoff = choose_threshold(name, studies.label, scores, ends)
    if cutoff is None:
        return None
    tn, fp, fn, tp = compute_confusion(studies.label, is_positive(scores, cutoff))
    threshold = cutoff if shift is None else float(sigmoid(np.array(cutoff + shift)))
    return OperatingPoint(threshold=threshold, sensitivity=tp / (tp + fn), specificity=tn / (tn + fp))


def choose_threshold(name: str, label: np.ndarray, scores: np.ndarray, ends: tuple[float, float]) -> float | None:
    """Choose the threshold of an operating point.

    sensitivity=W: the largest threshold with at least W of the positives above it. specificity=W: the smallest threshold with
    at least W of the negatives at or below it. Either is set half-way to the next score, so that a study with a slightly
    different score gets the same call.

    Args:
        name: `sensitivity=W` or `specificity=W`.
        label: 0 or 1, (n,).
        scores: (n,).
        ends: of the scale of the scores.

    Returns:
        The threshold, or None where none within `ends` reaches the rate.
    """
    rate, _, target = name.partition("=")
    if rate == "sensitivity":
        ordered = np.sort(scores[label == 1])[::-1]
        last = ordered[_min_count(float(target), len(ordered)) - 1]
        below = scores[scores < last].max(initial=ends[0])
        middle = (below + last) / 2
        threshold = middle if middle < last else below  # adjacent floats have nothing in between
        return float(threshold) if threshold < last else None
    ordered = np.sort(scores[label == 0])
    last = ordered[_min_count(float(target), len(ordered)) - 1]
    above = scores[scores > last].min(initial=ends[1])
    middle = (last + above) / 2
    return float(middle if middle < above else last)


def _min_count(share: float, num: int) -> int:
    """Return the smallest count that is at least `share` of `num`: 0.95 of 60 is 57 despite rounding of floats."""
    return max(1, math.ceil(share * num - 1e-9))


def _fit_band(points: Mapping[str, OperatingPoint]) -> Band | str:
    """Return the band between the thresholds of BAND_OPERATING_POINTS, or why there is none."""
    if missing := [name for name in BAND_OPERATING_POINTS if name not in points]:
        return f"no threshold of {missing[0]}"
    low, high = (points[name].threshold for name in BAND_OPERATING_POINTS)
    if low >= high:
        first, second = BAND_OPERATING_POINTS
        return f"the thresholds cross ({first} at {low:.4g}, {second} at {high:.4g}): one threshold reaches both"
    return Band(low=low, high=high)


# ---- application


def apply(fitted: FittedThresholds, studies: pd.DataFrame) -> pd.DataFrame:
    """Add calibrated_probability and band to studies.

    Args:
        fitted: what was fitted on tune.
        studies: columns study_type and probability.

    Returns:
        `studies` with calibrated_probability (NaN where none was fitted) and band ("" where none was fitted).
    """
    probability, study_type = studies["probability"].to_numpy(dtype=np.float64), studies["study_type"]
    # study type -> slope, intercept, low, high; NaN where missing, and NaN propagates
    table = {name: _line_and_band(entry) for name, entry in fitted.by_study_type.items()}
    rows = [table.get(name, (math.nan,) * 4) for name in study_type]
    slope, intercept, low, high = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    band = np.where(probability > high, "positive", np.where(probability <= low, "negative", "uncertain"))
    has_band = np.isfinite(low) & np.isfinite(probability)
    with np.errstate(invalid="ignore"):
        calibrated = sigmoid(intercept + slope * logit(probability))
    return studies.assign(calibrated_probability=calibrated, band=np.where(has_band, band, ""))


def _line_and_band(entry: StudyTypeThresholds) -> tuple[float, float, float, float]:
    if entry.slope is None or entry.intercept is None:
        slope, intercept = math.nan, math.nan
    else:
        slope, intercept = entry.slope, entry.intercept
    low, high = (math.nan, math.nan) if entry.band is None else (entry.band.low, entry.band.high)
    return slope, intercept, low, high


# ---- measurement on studies that were not fitted to


def compute_operating_points(
    fitted: FittedThresholds, studies: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Measure the fitted operating points and the band: metrics.json["operating_points"].

    Args:
        fitted: what was fitted on tune.
        studies: columns label, patient and those of `apply`.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        None where nothing was fitted, else {"fitted_on": "tune", "left_out": {study type without thresholds: number of
        studies}, "overall": G, "by_study_type": {name: G}}. G, without the studies left out, has num_studies, num_patients,
        interval_method, num_resamples_dropped, points {name: P} and band B. P: threshold (null in `overall`, where each study
        type has its own), num_studies, num_without (studies whose type lacks this point), confusion, and sensitivity,
        specificity, ppv, npv. B: low, high, num_studies, num_without, num_uncertain, share_uncertain and accuracy_outside.
        Each rate has _low, _high and _interval (the method). What is undefined is null and has a reason in `reasons`.
    """
    studies = studies[studies["label"].notna()]
    if fitted.fitted_on is None or not len(studies) or not np.isfinite(studies["probability"]).all():
        return None
    has_thresholds = studies["study_type"].isin(list(fitted.by_study_type))
    groups = studies[has_thresholds].groupby("study_type", sort=True)
    left_out = studies.loc[~has_thresholds, "study_type"].value_counts().sort_index()
    return {
        "fitted_on": fitted.fitted_on,
        "left_out": {str(name): int(num) for name, num in left_out.items()},
        "overall": _measure_group(fitted, studies[has_thresholds], resamples, seed, None),
        "by_study_type": {
            str(name): _measure_group(fitted, group, resamples, seed, str(name)) for name, group in groups
        },
    }


def _measure_group(
    fitted: FittedThresholds, studies: pd.DataFrame, resamples: int, seed: int, study_type: str | None
) -> dict[str, Any]:
    label = studies["label"].to_numpy(dtype=np.int64)
    patient = studies["patient"].astype(object).where(studies["patient"].notna(), "").astype(str)
    clusters = Clusters.from_patients(patient.to_numpy(dtype=object))
    outcomes = {
        name: _OutcomeCounts.from_calls(studies, label, fitted.thresholds(name)) for name in OPERATING_POINT_NAMES
    }
    outcomes["band"] = _OutcomeCounts.from_band(studies, label)
    bootstrap = Bootstrap.run(
        clusters,
        label,
        lambda weight: {
            f"{name} {rate}": values
            for name, counts in outcomes.items()
            for rate, values in counts.rates(weight).items()
        },
        resamples=resamples,
        seed=seed,
    )
    entries = {name: counts.entry(name, bootstrap, fitted, study_type) for name, counts in outcomes.items()}
    return {
        "num_studies": len(label),
        "num_patients": clusters.num_patients,
        "interval_method": bootstrap.method(),
        "num_resamples_dropped": bootstrap.num_dropped,
        "band": entries.pop("band"),
        "points": entries,
    }


@dataclass(frozen=True)
class _OutcomeCounts:
    """The outcomes of n studies at an operating point, or in the band, one-hot: `cells` float64 (n, k).

    The outcomes are CELLS, or of the band uncertain, right outside, wrong outside. A study whose type has no such operating
    point has none.
    """

    cells: np.ndarray

    @classmethod
    def from_calls(cls, studies: pd.DataFrame, label: np.ndarray, thresholds: Mapping[str, float]) -> "_OutcomeCounts":
        threshold = studies["study_type"].map(dict(thresholds)).to_numpy(dtype=np.float64)
        call = is_positive(studies["probability"], threshold)
        return cls(np.eye(4)[2 * label + call] * np.isfinite(threshold)[:, None])

    @classmethod
    def from_band(cls, studies: pd.DataFrame, label: np.ndarray) -> "_OutcomeCounts":
        band = studies["band"].to_numpy(dtype=object)
        right = (band == "positive") == (label == 1)
        outcome = np.where(band == "uncertain", 0, np.where(right, 1, 2))
        return cls(np.eye(3)[outcome] * (band != "")[:, None])

    def rates(self, weight: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return the rates (R,) under weight (R, n), or as numbers without weights."""
        counts = self.cells.sum(axis=0) if weight is None else weight @ self.cells
        if counts.shape[-1] == len(CELLS):
            metrics = compute_call_metrics(counts)
            return {name: metrics[name] for name in RATES}
        uncertain, right, wrong = np.moveaxis(counts, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            share, accuracy = uncertain / (uncertain + right + wrong), right / (right + wrong)
        return {"share_uncertain": share, "accuracy_outside": accuracy}

    def _successes_and_trials(self) -> dict[str, tuple[int, int]]:
        """Return the number of successes and of trials of each rate."""
        counts = self.cells.sum(axis=0)
        if len(counts) == len(CELLS):
            return count_rates(counts)
        uncertain, right, wrong = map(int, counts)
        return {"share_uncertain": (uncertain, int(counts.sum())), "accuracy_outside": (right, right + wrong)}

    def entry(
        self, name: str, bootstrap: Bootstrap, fitted: FittedThresholds, study_type: str | None
    ) -> dict[str, Any]:
        """Return the rates with their intervals and the reasons of what is missing, as metrics.json has them."""
        counts, reasons = self.cells.sum(axis=0), dict[str, str]()
        num = int(counts.sum())
        entry: dict[str, Any] = {"num_studies": num, "num_without": len(self.cells) - num, "reasons": reasons}
        entry |= _threshold_entries(name, fitted, study_type, reasons)
        if study_type is None:
            missing_reason = "no study type has it"
        else:
            missing_reason = fitted.missing_reason(study_type, name) if not num else ""
        if name == "band":
            entry["num_uncertain"] = int(counts[0])
        else:
            entry["confusion"] = dict(zip(CELLS, map(int, counts), strict=True))
        for rate, value in self.rates(None).items():
            defined = bool(np.isfinite(value))
            if defined:
                successes_and_trials = self._successes_and_trials()[rate]
                interval: Interval | None = bootstrap.rate_interval(f"{name} {rate}", *successes_and_trials)
            else:
                interval = None
                keys = (rate, f"{rate}_low", f"{rate}_high", f"{rate}_interval")
                reasons |= dict.fromkeys(keys, _UNDEFINED[rate] if num else missing_reason)
            entry |= {
                rate: float(value) if defined else None,
                f"{rate}_low": interval and interval.low,
                f"{rate}_high": interval and interval.high,
                f"{rate}_interval": interval and interval.kind,
            }
        return entry


def _threshold_entries(
    name: str, fitted: FittedThresholds, study_type: str | None, reasons: dict[str, str]
) -> dict[str, float | None]:
    """Return the threshold of an operating point, or low and high of the band; null with their reason."""
    entry = fitted.by_study_type.get(study_type) if study_type is not None else None
    if entry is not None and name == "band" and entry.band is not None:
        return {"low": entry.band.low, "high": entry.band.high}
    if entry is not None and name in entry.operating_points:
        return {"threshold": entry.operating_points[name].threshold}
    keys = ("low", "high") if name == "band" else ("threshold",)
    reason = "each study type has its own" if study_type is None else fitted.missing_reason(study_type, name)
    reasons |= dict.fromkeys(keys, reason)
    return dict.fromkeys(keys)


_UNDEFINED = {
    "sensitivity": "no abnormal study",
    "specificity": "no normal study",
    "ppv": "no study was called abnormal",
    "npv": "every study was called abnormal",
    "share_uncertain": "no study",
    "accuracy_outside": "every study is uncertain",
}
