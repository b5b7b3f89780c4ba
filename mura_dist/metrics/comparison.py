"""Two files of predictions on the same studies: is one better? NumPy and pandas only.

    a, b (studies with probabilities or calls) -> compare -> metrics.json's `comparison`

Differences are a less b, each with a 95 % interval of one kind: whole patients are drawn, and both sides measured in the same
resample. The overall difference in kappa is the one confirmatory comparison; the others explore. McNemar's test and DeLong's
paired one stand beside, labelled: they take studies as independent.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.metrics.entries import MIN_RARER_LABEL
from mura_dist.metrics.group import StudyGroup
from mura_dist.metrics.intervals import (
    Bootstrap,
    Z,
    compute_delong_covariance,
    compute_mcnemar_p_value,
    compute_two_sided_p_value,
)

NAMES = ("kappa", "auroc")
NOTE = "compares two files of predictions on these studies, not two recipes: training again with another seed moves both sides"
_ONE_CLASS = "one class only"
_CALLS_ONLY = "calls only: no probabilities were given for both"


def compare_predictions(
    a: pd.DataFrame, b: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """metrics.json's `comparison`. a, b: studies as for `measure`, with a column study: the same ones, with the same labels."""
    a, b = (side.sort_values("study").reset_index(drop=True) for side in (a, b))
    assert a["study"].equals(b["study"]), "the two sides have other studies"
    assert a["label"].equals(b["label"]), "the two sides have other labels"
    labelled = a["label"].notna()
    a, b = a[labelled], b[labelled]
    task = _Task(threshold, resamples, seed)
    parts = {str(name): np.flatnonzero(a["study_type"] == name) for name in sorted(set(a["study_type"]))}
    return {
        "overall": task.group(a, b),
        "by_study_type": {name: task.group(a.iloc[place], b.iloc[place]) for name, place in parts.items()},
        "confirmatory": "overall kappa difference",
        "exploratory": "AUROC, and every study type: many looks at the same studies, no correction made",
        "assumes_independent_studies": ["mcnemar", "delong"],
        "note": NOTE,
    }


@dataclass(frozen=True)
class _Task:
    threshold: float
    resamples: int
    seed: int

    def group(self, a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Any]:
        one, other = StudyGroup.of(a, self.threshold), StudyGroup.of(b, self.threshold)
        problem = one.problem() or other.problem()
        reasons = dict.fromkeys(("kappa", "auroc", "mcnemar", "delong"), problem) if problem else {}
        found: dict[str, Any] = {"num_studies": len(a), "num_patients": one.clusters.num_patients}
        if problem:
            return {**found, **dict.fromkeys(reasons), "interval_method": f"no interval: {problem}", "reasons": reasons}

        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            left, right = one.values(weight, NAMES), other.values(weight, NAMES)
            return {name: left[name] - right[name] for name in left if name in right}

        drawn = Bootstrap.of(one.clusters, one.label, statistic, resamples=self.resamples, seed=self.seed)
        values = one.values(one.ones(), NAMES), other.values(one.ones(), NAMES)
        for name in NAMES:
            found[name] = _difference(name, *values, drawn, reasons)
        found["mcnemar"] = _mcnemar(one, other)
        found["delong"] = _delong(one, other, reasons)
        return {**found, "interval_method": drawn.method(), "reasons": reasons}


def _difference(
    name: str,
    left: dict[str, np.ndarray],
    right: dict[str, np.ndarray],
    drawn: Bootstrap,
    reasons: dict[str, str],
) -> dict[str, float | None] | None:
    """Both sides' number, their difference and its interval; None, or an interval of None, with the reason."""
    if name not in left or name not in right:
        reasons[name] = _CALLS_ONLY
        return None
    a, b = float(left[name][0]), float(right[name][0])
    if not math.isfinite(a - b):
        reasons[name] = _ONE_CLASS
        return None
    bounds = drawn.interval(name)
    if isinstance(bounds, str):
        reasons[f"{name}_low"] = reasons[f"{name}_high"] = bounds
        return {"a": a, "b": b, "difference": a - b, "low": None, "high": None}
    return {"a": a, "b": b, "difference": a - b, "low": bounds.low, "high": bounds.high}


def _mcnemar(one: StudyGroup, other: StudyGroup) -> dict[str, Any]:
    """Exact, on which side called a study rightly."""
    a_right, b_right = one.call == (one.label == 1), other.call == (other.label == 1)
    a_only, b_only = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    return {"a_only_right": a_only, "b_only_right": b_only, "p_value": compute_mcnemar_p_value(a_only, b_only)}


def _delong(one: StudyGroup, other: StudyGroup, reasons: dict[str, str]) -> dict[str, Any] | None:
    """The paired difference in AUROC, its interval and p-value."""
    if one.probability is None or other.probability is None:
        reasons["delong"] = _CALLS_ONLY
        return None
    rarer = int(min(one.label.sum(), (1 - one.label).sum()))
    if rarer < MIN_RARER_LABEL:
        reasons["delong"] = (
            f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_RARER_LABEL}"
            if rarer
            else _ONE_CLASS
        )
        return None
    areas, covariance = compute_delong_covariance(one.label, np.stack([one.probability, other.probability]))
    difference = float(areas[0] - areas[1])
    error = math.sqrt(max(float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), 0.0))
    if error < 1e-12:
        reasons["delong"] = "both sides rank the studies alike: the standard error of their difference is 0"
        return None
    bounds = {"low": difference - Z * error, "high": difference + Z * error}
    return {"difference": difference, **bounds, "p_value": compute_two_sided_p_value(difference / error)}
