"""Thresholds, calibration and the uncertain band that were fitted on the tune split, as data. They travel with the model.

    calibration.fit -> FittedThresholds -> metrics.json["calibration"], Card.calibration -> calibration.apply (predict, page)

All of it applies to the study's raw probability, the mean over its views. classification.is_positive makes the call.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mura_dist.core.errors import UserError

FORMAT = 1
PAPER_OPERATING_POINT = "paper"  # MURA's paper: one threshold for every study type, not fitted
PAPER_THRESHOLD = 0.5
TARGET_RATES = (0.8, 0.9, 0.95, 0.98)
RATES = ("sensitivity", "specificity")
OPERATING_POINT_NAMES = tuple(f"{rate}={target:g}" for rate in RATES for target in TARGET_RATES)
BAND_VALUES = ("negative", "uncertain", "positive")
BAND_OPERATING_POINTS = ("sensitivity=0.95", "specificity=0.95")  # their thresholds are the ends of the uncertain band
# The columns of studies.csv, as predict and evaluate write it.
STUDY_COLUMNS = (
    *("study", "study_type", "num_views", "probability", "calibrated_probability"),
    *("threshold", "call", "band"),
)

Share = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class OperatingPoint(BaseModel):
    """A threshold, with its sensitivity and specificity on the studies it was fitted to (optimistic)."""

    model_config = ConfigDict(frozen=True)

    threshold: Share
    sensitivity: Share
    specificity: Share


class Band(BaseModel):
    """The uncertain band: a study is negative at `low` and below, positive above `high`, else uncertain."""

    model_config = ConfigDict(frozen=True)

    low: Share
    high: Share


class StudyTypeThresholds(BaseModel):
    """What was fitted for one study type. `reasons` explains what is missing: calibration, band or an operating point."""

    model_config = ConfigDict(frozen=True)

    num_normal: Count  # the type's own tune studies
    num_abnormal: Count
    pooled: bool  # too few of its own: fitted on the tune studies of all study types, with their shifts removed
    odds_shift: FiniteFloat  # log(N/A) of the weighted loss; 0 where the loss was not weighted
    slope: FiniteFloat | None = None  # calibrated = sigmoid(intercept + slope * logit(probability))
    intercept: FiniteFloat | None = None
    operating_points: dict[str, OperatingPoint] = {}
    band: Band | None = None
    reasons: dict[str, str] = {}


class FittedThresholds(BaseModel):
    """What was fitted for all study types. The default means that nothing was fitted, as in cards older than calibration."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    fitted_on: Literal["tune"] | None = None  # None: nothing was fitted, `reason` says why
    reason: str | None = None
    method: str | None = None
    num_studies: Count = 0  # the pool: tune studies of all the model's study types
    num_patients: Count | None = None  # None: no study names its patient
    num_normal: Count = 0
    num_abnormal: Count = 0
    num_damaged: Count = 0  # corrupt radiographs of tune
    notes: list[str] = []
    by_study_type: dict[str, StudyTypeThresholds] = {}

    def thresholds(self, operating_point: str) -> dict[str, float]:
        """Return the threshold of an operating point for each study type that has one."""
        return {
            study_type: fitted.operating_points[operating_point].threshold
            for study_type, fitted in self.by_study_type.items()
            if operating_point in fitted.operating_points
        }

    @property
    def bands(self) -> dict[str, Band]:
        """The band of each study type that has one."""
        return {study_type: fitted.band for study_type, fitted in self.by_study_type.items() if fitted.band is not None}

    def missing_reason(self, study_type: str, name: str) -> str:
        """Return why a study type has no `name`: calibration, band or an operating point."""
        fitted = self.by_study_type.get(study_type)
        if fitted is not None:
            return fitted.reasons[name]
        return self.reason or f"{study_type} is none of the study types the model was trained on"


def parse_operating_point(text: str) -> str:
    """Return the canonical name of an operating point: `sensitivity=.95` -> `sensitivity=0.95`.

    Raises:
        UserError: `text` is neither `paper` nor one of OPERATING_POINT_NAMES.
    """
    rate, _, number = text.partition("=")
    try:
        name = f"{rate}={float(number):g}" if number else text
    except ValueError:
        name = text
    if name not in (PAPER_OPERATING_POINT, *OPERATING_POINT_NAMES):
        targets = ", ".join(f"{target:g}" for target in TARGET_RATES)
        raise UserError(
            f"--operating-point {text} is unknown. Pass {PAPER_OPERATING_POINT}, sensitivity=W or specificity=W, W one of "
            f"{targets}."
        )
    return name


def thresholds_at(fitted: FittedThresholds, operating_point: str, study_types: Mapping[str, int]) -> dict[str, float]:
    """Return the threshold of a fitted operating point for each study type.

    Args:
        fitted: the model's thresholds.
        operating_point: one of OPERATING_POINT_NAMES.
        study_types: with the number of studies of each.

    Raises:
        UserError: a study type has no such threshold. Fitted thresholds are not mixed with the paper's.
    """
    thresholds = fitted.thresholds(operating_point)
    for study_type, num in study_types.items():
        if study_type not in thresholds:
            raise UserError(
                f"--operating-point {operating_point}: no threshold was fitted for {study_type} ({num} studies): "
                f"{fitted.missing_reason(study_type, operating_point)}. Pass --operating-point {PAPER_OPERATING_POINT}, or fix "
                "the cause and evaluate again."
            )
    return {study_type: thresholds[study_type] for study_type in study_types}
