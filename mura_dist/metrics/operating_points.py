"""What was fitted on the tune split, as data: calibration, thresholds, the uncertain band. It travels with the model.

    calibration.fit -> FittedThresholds -> metrics.json["calibration"], Card.calibration -> calibration.apply (predict, page)

Everything is of the study's raw probability, the mean over its views; classification.is_positive calls it.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mura_dist.core.errors import UserError

FORMAT = 1
PAPER_OPERATING_POINT = "paper"  # the paper's threshold for every study type, which nobody fitted
PAPER_THRESHOLD = 0.5  # the paper's
TARGET_RATES = (0.8, 0.9, 0.95, 0.98)
RATES = ("sensitivity", "specificity")
OPERATING_POINT_NAMES = tuple(f"{rate}={wanted:g}" for rate in RATES for wanted in TARGET_RATES)
BAND_VALUES = ("negative", "uncertain", "positive")
BAND_OPERATING_POINTS = ("sensitivity=0.95", "specificity=0.95")  # whose thresholds are the ends of the uncertain band
# The columns of studies.csv, as predict and evaluate write it.
STUDY_COLUMNS = (
    "study",
    "study_type",
    "num_views",
    "probability",
    "calibrated_probability",
    "threshold",
    "call",
    "band",
)

Share = Annotated[float, Field(ge=0, le=1)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class OperatingPoint(BaseModel):
    """A threshold, and the sensitivity and specificity it has on the studies it was fitted to: they flatter."""

    model_config = ConfigDict(frozen=True)

    threshold: Share
    sensitivity: Share
    specificity: Share


class Band(BaseModel):
    """A study is negative at `low` and below, positive above `high`, else uncertain."""

    model_config = ConfigDict(frozen=True)

    low: Share
    high: Share


class StudyTypeThresholds(BaseModel):
    """What was fitted for a study type. What is missing has its reason: calibration, band, or an operating point's name."""

    model_config = ConfigDict(frozen=True)

    num_normal: Count  # its own tune studies
    num_abnormal: Count
    pooled: bool  # too few of its own: fitted on the tune studies of all study types, shifts removed
    odds_shift: FiniteFloat  # log(N/A) of the weighted loss; 0 where the loss was not weighted
    slope: FiniteFloat | None = None  # calibrated = sigmoid(intercept + slope * logit(probability))
    intercept: FiniteFloat | None = None
    operating_points: dict[str, OperatingPoint] = {}
    band: Band | None = None
    reasons: dict[str, str] = {}


class FittedThresholds(BaseModel):
    """All study types'. Without any argument: nothing was fitted, as in a card of before there was calibration."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    fitted_on: Literal["tune"] | None = None  # None: nothing was fitted, `reason` says why
    reason: str | None = None
    method: str | None = None
    num_studies: Count = 0  # the pool: tune studies of all the model's study types
    num_patients: Count | None = None  # None: no study names one
    num_normal: Count = 0
    num_abnormal: Count = 0
    num_damaged: Count = 0  # radiographs of tune that could not be read
    notes: list[str] = []
    by_study_type: dict[str, StudyTypeThresholds] = {}

    def thresholds(self, name: str) -> dict[str, float]:
        """Those of the operating point `name`, by study type, where it was fitted."""
        found = self.by_study_type.items()
        return {key: one.operating_points[name].threshold for key, one in found if name in one.operating_points}

    @property
    def bands(self) -> dict[str, Band]:
        return {key: one.band for key, one in self.by_study_type.items() if one.band is not None}

    def why_not(self, study_type: str, name: str) -> str:
        """Why `study_type` has no `name`: calibration, band or an operating point."""
        one = self.by_study_type.get(study_type)
        if one is not None:
            return one.reasons[name]
        return self.reason or f"{study_type} is none of the study types the model was trained on"


def parse_operating_point(word: str) -> str:
    """`word` as NAMES or PAPER has it: `sensitivity=.95` -> `sensitivity=0.95`. UserError where none such is fitted."""
    rate, _, number = word.partition("=")
    try:
        name = f"{rate}={float(number):g}" if number else word
    except ValueError:
        name = word
    if name not in (PAPER_OPERATING_POINT, *OPERATING_POINT_NAMES):
        wanted = ", ".join(f"{one:g}" for one in TARGET_RATES)
        raise UserError(
            f"--operating-point {word}: must be {PAPER_OPERATING_POINT}, sensitivity=W or specificity=W, W one of {wanted}"
        )
    return name


def thresholds_at(points: FittedThresholds, name: str, study_types: Mapping[str, int]) -> dict[str, float]:
    """The threshold of the fitted operating point `name` for each of `study_types` (with its number of studies).

    UserError where one of them has none: a mixture of fitted thresholds and the paper's would be neither.
    """
    found = points.thresholds(name)
    for study_type, num in study_types.items():
        if study_type not in found:
            why = points.why_not(study_type, name)
            raise UserError(
                f"--operating-point {name}: no such threshold was fitted for {study_type} ({num} studies here): {why}; "
                f"give --operating-point {PAPER_OPERATING_POINT}, or mend that"
            )
    return {study_type: found[study_type] for study_type in study_types}
