"""Compare two tables of predictions of the same studies. NumPy and pandas only.

    a, b (studies with probabilities or calls) -> compare_predictions -> metrics.json["comparison"]

Differences are a - b. Their 95 % intervals resample whole patients and measure both sides in the same resample. The overall
difference in kappa is the one confirmatory comparison. The others are exploratory. McNemar's test and DeLong's paired
comparison, reported beside them, assume independent studies.
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
_CALLS_ONLY = "calls only: one side has no probabilities"


def compare_predictions(
    a: pd.DataFrame, b: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Compare two sets of predictions: metrics.json["comparison"].

    Args:
        a: studies as for `compute_metrics`, with a column study.
        b: the same studies with the same labels, in any order.
        threshold: makes the calls of a side without a column `call`.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.
    """
    a, b = (side.sort_values("study").reset_index(drop=True) for side in (a, b))
    assert a["study"].equals(b["study"]), "the two sides have different studies"
    assert a["label"].equals(b["label"]), "the two sides have different labels"
    labeled = a["label"].notna()
    a, b = a[labeled], b[labeled]
    comparison = _Comparison(threshold, resamples, seed)
    types = {str(name): np.flatnonzero(a["study_type"] == name) for name in sorted(set(a["study_type"]))}
    return {
        "overall": comparison.group(a, b),
        "by_study_type": {name: comparison.group(a.iloc[index], b.iloc[index]) for name, index in types.items()},
        "confirmatory": "overall kappa difference",
        "exploratory": "AUROC, and every study type: many looks at the same studies, no correction made",
        "assumes_independent_studies": ["mcnemar", "delong"],
        "note": NOTE,
    }


@dataclass(frozen=True)
class _Comparison:
    threshold: float
    resamples: int
    seed: int

    def group(self, studies_a: pd.DataFrame, studies_b: pd.DataFrame) -> dict[str, Any]:
        """Compare one group of studies."""
        a = StudyGroup.from_studies(studies_a, self.threshold)
        b = StudyGroup.from_studies(studies_b, self.threshold)
        entry: dict[str, Any] = {"num_studies": len(a.label), "num_patients": a.clusters.num_patients}
        if problem := a.problem() or b.problem():
            reasons = dict.fromkeys(("kappa", "auroc", "mcnemar", "delong"), problem)
            return {**entry, **dict.fromkeys(reasons), "interval_method": f"no interval: {problem}", "reasons": reasons}

        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            values_a, values_b = a.values(weight, NAMES), b.values(weight, NAMES)
            return {name: values_a[name] - values_b[name] for name in values_a if name in values_b}

        reasons = {}
        bootstrap = Bootstrap.run(a.clusters, a.label, statistic, resamples=self.resamples, seed=self.seed)
        values = a.values(a.unit_weight(), NAMES), b.values(b.unit_weight(), NAMES)
        for name in NAMES:
            entry[name] = _difference(name, *values, bootstrap, reasons)
        entry["mcnemar"] = _mcnemar(a, b)
        entry["delong"] = _delong(a, b, reasons)
        return {**entry, "interval_method": bootstrap.method(), "reasons": reasons}


def _difference(
    name: str,
    values_a: dict[str, np.ndarray],
    values_b: dict[str, np.ndarray],
    bootstrap: Bootstrap,
    reasons: dict[str, str],
) -> dict[str, float | None] | None:
    """Return both sides' value, their difference and its interval; None, or an interval of None, with the reason."""
    if name not in values_a or name not in values_b:
        reasons[name] = _CALLS_ONLY
        return None
    a, b = float(values_a[name][0]), float(values_b[name][0])
    if not math.isfinite(a - b):
        reasons[name] = _ONE_CLASS
        return None
    interval = bootstrap.interval(name)
    if isinstance(interval, str):
        reasons[f"{name}_low"] = reasons[f"{name}_high"] = interval
        return {"a": a, "b": b, "difference": a - b, "low": None, "high": None}
    return {"a": a, "b": b, "difference": a - b, "low": interval.low, "high": interval.high}


def _mcnemar(a: StudyGroup, b: StudyGroup) -> dict[str, Any]:
    """Compute McNemar's exact test on which side calls a study correctly."""
    a_right, b_right = a.call == (a.label == 1), b.call == (b.label == 1)
    a_only, b_only = int((a_right & ~b_right).sum()), int((b_right & ~a_right).sum())
    return {"a_only_right": a_only, "b_only_right": b_only, "p_value": compute_mcnemar_p_value(a_only, b_only)}


def _delong(a: StudyGroup, b: StudyGroup, reasons: dict[str, str]) -> dict[str, Any] | None:
    """Compute DeLong's paired difference in AUROC, its interval and p-value."""
    if a.probability is None or b.probability is None:
        reasons["delong"] = _CALLS_ONLY
        return None
    rarer = int(min(a.label.sum(), (1 - a.label).sum()))
    if rarer < MIN_RARER_LABEL:
        few = f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_RARER_LABEL}"
        reasons["delong"] = few if rarer else _ONE_CLASS
        return None
    areas, covariance = compute_delong_covariance(a.label, np.stack([a.probability, b.probability]))
    difference = float(areas[0] - areas[1])
    error = math.sqrt(max(float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]), 0.0))
    if error < 1e-12:
        reasons["delong"] = "both sides rank the studies alike: the standard error of their difference is 0"
        return None
    interval = {"low": difference - Z * error, "high": difference + Z * error}
    return {"difference": difference, **interval, "p_value": compute_two_sided_p_value(difference / error)}
