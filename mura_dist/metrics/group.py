"""Hold a group of labeled studies as arrays, and compute its metrics under any weights. NumPy and pandas only.

studies (label, probability or call, patient) -> sort_studies -> StudyGroup.from_studies -> values(weight) -> name -> (R,)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pandas as pd

from mura_dist.metrics import classification
from mura_dist.metrics.intervals import Clusters


def sort_studies(studies: pd.DataFrame) -> pd.DataFrame:
    """Return the labeled studies in a canonical order, so that sums of floats do not depend on the caller's order."""
    labeled = studies[studies["label"].notna()]
    columns = [column for column in ("probability", "call", "calibrated_probability") if column in labeled]
    keys = labeled[["study_type", "label", *columns]].assign(patient=_patient_names(labeled["patient"]))
    order = keys.reset_index(drop=True).sort_values(["patient", "study_type", "label", *columns], kind="stable").index
    return labeled.iloc[order]


@dataclass(frozen=True)
class StudyGroup:
    """Labeled studies as arrays (n,)."""

    label: np.ndarray  # int64
    call: np.ndarray  # bool
    probability: np.ndarray | None  # float64; None: calls only
    calibrated: np.ndarray | None  # float64; None: not calibrated, or not all of them
    clusters: Clusters

    @classmethod
    def from_studies(cls, studies: pd.DataFrame, threshold: float) -> Self:
        """Read the arrays from a table of labeled studies. Without a column `call`, `threshold` makes the calls."""
        label = studies["label"].to_numpy(dtype=np.int64)
        probability = _floats(studies, "probability")
        calibrated = _floats(studies, "calibrated_probability")
        if calibrated is not None and not np.isfinite(calibrated).all():
            calibrated = None
        if "call" in studies:
            call = studies["call"].to_numpy(dtype=np.int64) == 1
        else:
            assert probability is not None, "studies have neither probabilities nor calls"
            call = classification.is_positive(probability, threshold)
        return cls(label, call, probability, calibrated, Clusters.from_patients(_patient_names(studies["patient"])))

    def problem(self) -> str:
        """Return why nothing can be measured, or ""."""
        if not len(self.label):
            return "no labeled studies"
        num_invalid = 0 if self.probability is None else int((~np.isfinite(self.probability)).sum())
        return f"{num_invalid} of {len(self.label)} studies have no finite probability" if num_invalid else ""

    def values(self, weight: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Compute the metrics in `names`, (R,) each, under weight (R, n); without probabilities only those of calls."""
        confusion = classification.compute_confusion(self.label, self.call, weight)
        metrics = classification.compute_call_metrics(confusion)
        values = {name: value for name, value in metrics.items() if name in names}
        if self.probability is not None:
            values |= compute_probability_metrics(self.label, self.probability, weight, names)
        return values

    def counts(self) -> np.ndarray:
        """Return the confusion, float64 (4,)."""
        return classification.compute_confusion(self.label, self.call)

    def rate_counts(self) -> dict[str, tuple[int, int]]:
        """Return the number of successes and of trials of each rate of the calls."""
        return count_rates(self.counts())

    def unit_weight(self) -> np.ndarray:
        """Return the weight that counts each study once, (1, n)."""
        return np.ones((1, len(self.label)))


def count_rates(confusion: np.ndarray) -> dict[str, tuple[int, int]]:
    """Return the number of successes and of trials of each rate of a confusion (4,)."""
    tn, fp, fn, tp = map(int, confusion)
    return {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}


def compute_probability_metrics(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Compute those of `names` that are metrics of probabilities, (R,) each, under weight (R, n)."""
    functions: dict[str, tuple[Callable[..., np.ndarray], bool]] = {  # name -> function, whether it takes logits
        "auroc": (classification.compute_auroc, False),
        "average_precision": (classification.compute_average_precision, False),
        "brier": (classification.compute_brier_score, False),
        "calibration_intercept": (classification.compute_calibration_intercept, True),
        "calibration_slope": (classification.compute_calibration_slope, True),
    }
    logits = classification.logit(probability)
    return {
        name: function(label, logits if takes_logits else probability, weight)
        for name, (function, takes_logits) in functions.items()
        if name in names
    }


def _floats(studies: pd.DataFrame, column: str) -> np.ndarray | None:
    return studies[column].to_numpy(dtype=np.float64) if column in studies else None


def _patient_names(patient: pd.Series) -> np.ndarray:
    """Return the patients' names, object (n,) of str; "" where unknown."""
    return patient.astype(object).where(patient.notna(), "").astype(str).to_numpy(dtype=object)
