"""A group of labelled studies as arrays, and its numbers under any weights. NumPy and pandas only.

studies (label, probability or call, patient) -> in_order -> Group.of -> Group.values(weight) -> name -> numbers
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from mura_dist.metrics import classification as metrics
from mura_dist.metrics.intervals import Clusters


def sort_studies(studies: pd.DataFrame) -> pd.DataFrame:
    """Return the labelled studies in an order of their own, so that sums of floats do not depend on the caller's order."""
    labelled = studies[studies["label"].notna()]
    keys = [key for key in ("probability", "call", "calibrated_probability") if key in labelled]
    by = (
        labelled[["study_type", "label", *keys]]
        .assign(patient=_patient_names(labelled["patient"]))
        .reset_index(drop=True)
    )
    return labelled.iloc[by.sort_values(["patient", "study_type", "label", *keys], kind="stable").index]


@dataclass(frozen=True)
class StudyGroup:
    """Labelled studies as arrays (n,)."""

    label: np.ndarray  # int64
    call: np.ndarray  # bool
    probability: np.ndarray | None  # float64; None: calls only
    calibrated: np.ndarray | None
    clusters: Clusters

    @classmethod
    def of(cls, studies: pd.DataFrame, threshold: float) -> Self:
        """Read the arrays from a table of labelled studies, in its order."""
        label = studies["label"].to_numpy(dtype=np.int64)
        probability = _floats(studies, "probability")
        calibrated = _floats(studies, "calibrated_probability")
        if calibrated is not None and not np.isfinite(calibrated).all():
            calibrated = None
        if "call" in studies:
            call = studies["call"].to_numpy(dtype=np.int64) == 1
        else:
            assert probability is not None, "studies have neither probabilities nor calls"
            call = metrics.is_positive(probability, threshold)
        return cls(label, call, probability, calibrated, Clusters.of(_patient_names(studies["patient"])))

    def problem(self) -> str:
        """Return why nothing can be measured; "" where something can."""
        if not len(self.label):
            return "no labelled studies"
        lost = 0 if self.probability is None else int((~np.isfinite(self.probability)).sum())
        return f"{lost} of {len(self.label)} studies have no finite probability" if lost else ""

    def values(self, weight: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the numbers of `names`, (R,) each, under weight (R, n); without probabilities, those of calls alone."""
        of_calls = metrics.compute_call_metrics(metrics.compute_confusion(self.label, self.call, weight))
        values = {key: value for key, value in of_calls.items() if key in names}
        if self.probability is not None:
            values |= compute_probability_metrics(self.label, self.probability, weight, names)
        return values

    def counts(self) -> np.ndarray:
        """Return the confusion, float64 (4,)."""
        return metrics.compute_confusion(self.label, self.call)

    def rate_counts(self) -> dict[str, tuple[int, int]]:
        """Return the count of successes and of trials of each rate of the calls."""
        return count_rates(self.counts())

    def ones(self) -> np.ndarray:
        """Return the weight of each study counted once, (1, n)."""
        return np.ones((1, len(self.label)))


def count_rates(confusion: np.ndarray) -> dict[str, tuple[int, int]]:
    """Return the count of successes and of trials of each rate of a confusion (4,)."""
    tn, fp, fn, tp = map(int, confusion)
    return {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}


def compute_probability_metrics(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return those of `names` that come from probabilities, (R,) each, under weight (R, n)."""
    how: dict[str, tuple[Callable[..., np.ndarray], bool]] = {  # from probabilities, or from their logits
        "auroc": (metrics.compute_auroc, False),
        "average_precision": (metrics.compute_average_precision, False),
        "brier": (metrics.compute_brier_score, False),
        "calibration_intercept": (metrics.compute_calibration_intercept, True),
        "calibration_slope": (metrics.compute_calibration_slope, True),
    }
    logits = metrics.logit(probability)
    return {
        name: function(label, logits if of_logits else probability, weight)
        for name, (function, of_logits) in how.items()
        if name in names
    }


def _floats(studies: pd.DataFrame, name: str) -> np.ndarray | None:
    return studies[name].to_numpy(dtype=np.float64) if name in studies else None


def _patient_names(patient: pd.Series) -> np.ndarray:
    """Return the patients' names, object (n,) of str; "" where unknown."""
    return patient.astype(object).where(patient.notna(), "").astype(str).to_numpy(dtype=object)
