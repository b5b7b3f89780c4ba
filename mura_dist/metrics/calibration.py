"""Calibration, thresholds and the uncertain band: fitted on the tune split, measured on the reported one. NumPy and pandas only.

    tune studies (label, probability) -> fit -> FittedThresholds -> metrics.json["calibration"], the exported card
    any studies + FittedThresholds -> apply -> calibrated_probability, band       in evaluate and in predict, by this one function
    reported studies + FittedThresholds -> measured                               -> metrics.json["operating_points"]

The weighted loss moves a model's odds by N/A (N normal, A abnormal training radiographs, of the study type or of all), so that
no one temperature can calibrate it: each study type has a slope and an intercept on the logit of the study's probability.
A study type with few tune studies uses those of the pool: all tune studies, on logits from which each type's log(N/A)
was subtracted, and to which it is then added.
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
MIN_POOL = 10  # the same of the pool, below which nothing is fitted
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
    """Everything there is to fit, from studies with study_type, patient, label (0 or 1) and probability.

    odds_shift: log(N/A) by study type, 0 or missing where the loss was not weighted; study_types: the model's own, which
    alone get anything. num_damaged and notes are handed on.
    """
    own = tune[tune["study_type"].isin(list(study_types))]
    pool = _FitData.of(own, odds_shift)
    patient = own["patient"][own["patient"].notna() & (own["patient"] != "")]
    facts: dict[str, Any] = {"num_studies": len(own), "num_patients": patient.nunique() or None, **pool.counts()}
    facts |= {"method": METHOD, "num_damaged": num_damaged, "notes": list(notes)}
    if problem := pool.problem():
        return FittedThresholds(reason=problem, **facts)
    found = {str(name): _fit_study_type(name, own, pool, odds_shift) for name in sorted(study_types)}
    return FittedThresholds(fitted_on="tune", by_study_type=found, **facts)


@dataclass(frozen=True)
class _FitData:
    """Studies to fit to, (n,) each: label 0 or 1, raw probability, and logit without the type's shift."""

    label: np.ndarray
    probability: np.ndarray
    logit: np.ndarray

    @classmethod
    def of(cls, studies: pd.DataFrame, odds_shift: Mapping[str, float]) -> "_FitData":
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
        """Why nothing can be fitted; "" where something can."""
        if lost := int((~np.isfinite(self.probability)).sum()):
            return f"{lost} of {len(self.label)} tune studies have no finite probability"
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
    own, shift = _FitData.of(tune[tune["study_type"] == name], odds_shift), float(odds_shift.get(name, 0.0))
    pooled = own.num_of_rarer < MIN_OWN
    reasons: dict[str, str] = {}
    facts: dict[str, Any] = {"pooled": pooled, "odds_shift": shift, "reasons": reasons, **own.counts()}
    line = _fit_line(pool.label, pool.logit) if pooled else _fit_line(own.label, logit(own.probability))
    if isinstance(line, str):
        reasons["calibration"] = line
    else:
        facts |= {"slope": line[1], "intercept": line[0] - (line[1] * shift if pooled else 0.0)}
    points = facts["operating_points"] = {}
    for point in OPERATING_POINT_NAMES:
        found = _fit_operating_point(point, pool if pooled else own, shift if pooled else None)
        if found is None:
            reasons[point] = "no threshold from 0 to 1 reaches it"
        else:
            points[point] = found
    facts["band"] = band = _fit_band(points)
    if isinstance(band, str):
        facts["band"], reasons["band"] = None, band
    return StudyTypeThresholds(**facts)


def _fit_line(label: np.ndarray, x: np.ndarray) -> tuple[float, float] | str:
    """Intercept and slope, or why there are none."""
    if np.ptp(x) == 0:
        return "all tune studies have the same probability"
    negative, positive = np.bincount(label, minlength=2)
    # Platt's targets, short of 0 and 1: without them labels that the logits separate would want an infinite slope.
    target = np.where(label == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    intercept, slope = (float(value[0]) for value in fit_logistic(target, x, np.ones((1, len(x)))))
    if not (math.isfinite(intercept) and math.isfinite(slope)):
        return "the fit did not end in numbers"
    if slope <= 0:
        return f"the slope is {slope:.3g}, not positive: on tune, abnormal studies do not score higher"
    return intercept, slope


# ---- thresholds


def _fit_operating_point(name: str, studies: _FitData, shift: float | None) -> OperatingPoint | None:
    """shift: None to choose on the raw probability; a number to choose on logits without shift, and put this one's back."""
    scores = studies.probability if shift is None else studies.logit
    # Beyond the last score lies the end of the scale, or, of logits, which have none, odds four times as far.
    ends = (0.0, 1.0) if shift is None else (scores.min() - math.log(4), scores.max() + math.log(4))
    cut = choose_threshold(name, studies.label, scores, ends)
    if cut is None:
        return None
    tn, fp, fn, tp = compute_confusion(studies.label, is_positive(scores, cut))
    value = cut if shift is None else float(sigmoid(np.array(cut + shift)))
    return OperatingPoint(threshold=value, sensitivity=tp / (tp + fn), specificity=tn / (tn + fp))


def choose_threshold(name: str, label: np.ndarray, scores: np.ndarray, ends: tuple[float, float]) -> float | None:
    """The cut of an operating point, by which is_positive calls a score; None where no cut in `ends` does it.

    sensitivity=W: the largest that leaves at least W of the positives above, as far below the lowest of these as half-way
    to the next score there is. specificity=W: the smallest that has at least W of the negatives at or below it, half-way
    to the next score above. Half-way, so that a study a hair off is still called as these were.
    """
    rate, _, wanted = name.partition("=")
    if rate == "sensitivity":
        ordered = np.sort(scores[label == 1])[::-1]
        last = ordered[_min_count(float(wanted), len(ordered)) - 1]
        below = scores[scores < last].max(initial=ends[0])
        middle = (below + last) / 2
        cut = middle if middle < last else below  # neighbours among the floats have nothing in between
        return float(cut) if cut < last else None
    ordered = np.sort(scores[label == 0])
    last = ordered[_min_count(float(wanted), len(ordered)) - 1]
    above = scores[scores > last].min(initial=ends[1])
    middle = (last + above) / 2
    return float(middle if middle < above else last)


def _min_count(wanted: float, num: int) -> int:
    """The smallest count that is a share of at least `wanted`; 0.95 of 60 is 57, whatever the floats make of it."""
    return max(1, math.ceil(wanted * num - 1e-9))


def _fit_band(points: Mapping[str, OperatingPoint]) -> Band | str:
    """From the first of BAND's thresholds to the second, or why there is none."""
    if missing := [name for name in BAND_OPERATING_POINTS if name not in points]:
        return f"no threshold of {missing[0]}"
    low, high = (points[name].threshold for name in BAND_OPERATING_POINTS)
    if low >= high:
        return f"the thresholds cross ({BAND_OPERATING_POINTS[0]} at {low:.4g}, {BAND_OPERATING_POINTS[1]} at {high:.4g}): one threshold reaches both"
    return Band(low=low, high=high)


# ---- use


def apply(points: FittedThresholds, studies: pd.DataFrame) -> pd.DataFrame:
    """`studies` (study_type, probability) with calibrated_probability, NaN where none was fitted, and band, "" likewise."""
    probability, study_type = studies["probability"].to_numpy(dtype=np.float64), studies["study_type"]
    # study type -> slope, intercept, low, high, NaN where missing; NaN is passed on by each of them
    table = {name: _numbers(points, name) for name in points.by_study_type}
    rows = [table.get(name, _NOTHING) for name in study_type]
    slope, intercept, low, high = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    band = np.where(probability > high, "positive", np.where(probability <= low, "negative", "uncertain"))
    known = np.isfinite(low) & np.isfinite(probability)
    with np.errstate(invalid="ignore"):
        calibrated = sigmoid(intercept + slope * logit(probability))
    return studies.assign(calibrated_probability=calibrated, band=np.where(known, band, ""))


_NOTHING = (math.nan,) * 4


def _numbers(points: FittedThresholds, study_type: str) -> tuple[float, ...]:
    one = points.by_study_type[study_type]
    line = (math.nan, math.nan) if one.slope is None or one.intercept is None else (one.slope, one.intercept)
    return (*line, *((math.nan, math.nan) if one.band is None else (one.band.low, one.band.high)))


# ---- what they are worth, on studies they were not fitted to


def compute_operating_points(
    points: FittedThresholds, studies: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """metrics.json["operating_points"], of studies with label, patient and the columns of `apply`; None where nothing was fitted.

    {"fitted_on": "tune", "left_out": {study type for which nothing was fitted: its studies}, "overall": G, "by_study_type":
    {name: G}}; G, without those left out, has num_studies, num_patients, interval_method, num_resamples_dropped, points
    {name: P} and band B. P: threshold (null in `overall`: each study type has its own), num_studies, num_without (studies
    whose type lacks this one point), confusion, and sensitivity, specificity, ppv, npv, each with _low and _high. B: low,
    high, num_studies, num_without, num_uncertain, share_uncertain and accuracy_outside, with _low and _high. What cannot
    be had is null and has a reason in `reasons`. Each rate's `_interval` names the method of its interval.
    """
    studies = studies[studies["label"].notna()]
    if points.fitted_on is None or not len(studies) or not np.isfinite(studies["probability"]).all():
        return None
    fitted = studies["study_type"].isin(list(points.by_study_type))
    groups = studies[fitted].groupby("study_type", sort=True)
    left_out = studies.loc[~fitted, "study_type"].value_counts().sort_index()
    return {
        "fitted_on": points.fitted_on,
        "left_out": {str(name): int(num) for name, num in left_out.items()},
        "overall": _measured_group(points, studies[fitted], resamples, seed, None),
        "by_study_type": {
            str(name): _measured_group(points, part, resamples, seed, str(name)) for name, part in groups
        },
    }


def _measured_group(
    points: FittedThresholds, studies: pd.DataFrame, resamples: int, seed: int, study_type: str | None
) -> dict[str, Any]:
    label = studies["label"].to_numpy(dtype=np.int64)
    patient = studies["patient"].astype(object).where(studies["patient"].notna(), "").astype(str)
    clusters = Clusters.of(patient.to_numpy(dtype=object))
    parts = {name: _OutcomeCounts.of_calls(studies, label, points.thresholds(name)) for name in OPERATING_POINT_NAMES}
    parts["band"] = _OutcomeCounts.of_band(studies, label)
    drawn = Bootstrap.of(
        clusters,
        label,
        lambda weight: {
            f"{place} {name}": value for place, part in parts.items() for name, value in part.numbers(weight).items()
        },
        resamples=resamples,
        seed=seed,
    )
    told = {name: part.told(name, drawn, points, study_type) for name, part in parts.items()}
    return {
        "num_studies": len(label),
        "num_patients": clusters.num_patients,
        "interval_method": drawn.method(),
        "num_resamples_dropped": drawn.dropped,
        "band": told.pop("band"),
        "points": told,
    }


@dataclass(frozen=True)
class _OutcomeCounts:
    """An operating point, or the band, on n studies. `cells` float64 (n, k): in which count each study is.

    The counts: CELLS; of the band: uncertain, right outside, wrong outside. In none where its study type has no such point.
    """

    cells: np.ndarray

    @classmethod
    def of_calls(cls, studies: pd.DataFrame, label: np.ndarray, thresholds: Mapping[str, float]) -> "_OutcomeCounts":
        cut = studies["study_type"].map(dict(thresholds)).to_numpy(dtype=np.float64)
        call = is_positive(studies["probability"], cut)
        return cls(np.eye(4)[2 * label + call] * np.isfinite(cut)[:, None])

    @classmethod
    def of_band(cls, studies: pd.DataFrame, label: np.ndarray) -> "_OutcomeCounts":
        band = studies["band"].to_numpy(dtype=object)
        right = (band == "positive") == (label == 1)
        state = np.where(band == "uncertain", 0, np.where(right, 1, 2))
        return cls(np.eye(3)[state] * (band != "")[:, None])

    def numbers(self, weight: np.ndarray | None) -> dict[str, np.ndarray]:
        """weight (R, n) -> name -> (R,); None -> name -> ()."""
        counts = self.cells.sum(axis=0) if weight is None else weight @ self.cells
        if counts.shape[-1] == len(CELLS):
            rates = compute_call_metrics(counts)
            return {name: rates[name] for name in RATES}
        uncertain, right, wrong = np.moveaxis(counts, -1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            share, accuracy = uncertain / (uncertain + right + wrong), right / (right + wrong)
        return {"share_uncertain": share, "accuracy_outside": accuracy}

    def _rate_counts(self) -> dict[str, tuple[int, int]]:
        """Return the count of successes and of trials of each number."""
        counts = self.cells.sum(axis=0)
        if len(counts) == len(CELLS):
            return count_rates(counts)
        uncertain, right, wrong = map(int, counts)
        return {"share_uncertain": (uncertain, int(counts.sum())), "accuracy_outside": (right, right + wrong)}

    def told(self, place: str, drawn: Bootstrap, points: FittedThresholds, study_type: str | None) -> dict[str, Any]:
        """The numbers, their intervals, their reasons."""
        counts, reasons = self.cells.sum(axis=0), dict[str, str]()
        num = int(counts.sum())
        entry: dict[str, Any] = {"num_studies": num, "num_without": len(self.cells) - num, "reasons": reasons}
        entry |= _threshold_entries(place, points, study_type, reasons)
        why = "no study type has it" if study_type is None else points.why_not(study_type, place) if not num else ""
        if place == "band":
            entry["num_uncertain"] = int(counts[0])
        else:
            entry["confusion"] = dict(zip(CELLS, map(int, counts), strict=True))
        for name, value in self.numbers(None).items():
            known = bool(np.isfinite(value))
            if known:
                interval: Interval | None = drawn.rate_interval(f"{place} {name}", *self._rate_counts()[name])
            else:
                interval = None
                missing = (name, f"{name}_low", f"{name}_high", f"{name}_interval")
                reasons |= dict.fromkeys(missing, _UNDEFINED[name] if num else why)
            entry |= {
                name: float(value) if known else None,
                f"{name}_low": interval and interval.low,
                f"{name}_high": interval and interval.high,
                f"{name}_interval": interval and interval.kind,
            }
        return entry


def _threshold_entries(
    place: str, points: FittedThresholds, study_type: str | None, reasons: dict[str, str]
) -> dict[str, float | None]:
    """The threshold of an operating point, or low and high of the band; null with their reason."""
    one = points.by_study_type.get(study_type) if study_type is not None else None
    found: dict[str, float | None] = dict.fromkeys(("low", "high") if place == "band" else ("threshold",))
    if one is not None and place == "band" and one.band is not None:
        found = {"low": one.band.low, "high": one.band.high}
    elif one is not None and place in one.operating_points:
        found = {"threshold": one.operating_points[place].threshold}
    else:
        why = "each study type has its own" if study_type is None else points.why_not(study_type, place)
        reasons |= dict.fromkeys(found, why)
    return found


_UNDEFINED = {
    "sensitivity": "no abnormal study",
    "specificity": "no normal study",
    "ppv": "no study was called abnormal",
    "npv": "every study was called abnormal",
    "share_uncertain": "no study",
    "accuracy_outside": "every study is uncertain",
}
