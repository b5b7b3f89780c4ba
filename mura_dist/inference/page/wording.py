"""Hold the texts of the page: the outcome, how often the model was wrong on measured studies, and which studies those are.

    StudyAnswer, Card -> outcome, headline, explanation
    Card, study type -> how many studies were missed or falsely flagged
    a threshold -> the same at that threshold

The page never says "normal". "No abnormality flagged" comes with the number of abnormal studies that the model missed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mura_dist.data.mura import display_name
from mura_dist.inference.page.frequencies import Frequency
from mura_dist.inference.page.study import StudyAnswer
from mura_dist.metrics.intervals import BOOTSTRAP
from mura_dist.metrics.summary import CURVE_THRESHOLDS
from mura_dist.models.card import Card
from mura_dist.reports.heatmap import MIN_CELLS

Outcome = Literal["none_flagged", "flagged", "uncertain", "no_call"]

TITLE = "Bone radiographs: one study, one answer"
PURPOSE = (
    "Upload the radiographs of one study to see the probability of an abnormality and how often the model was wrong."
)
HEADLINES: dict[Outcome, str] = {
    "none_flagged": "No abnormality flagged",
    "flagged": "Flagged",
    "uncertain": "Uncertain",
    "no_call": "No call",
}
DEMO_BANNER = "Demo on computer drawings, not for radiographs"
WITHHELD = (
    "This model was trained only on computer drawings of bones. These files are not known drawings, and the model's output for "
    "a radiograph means nothing.",
    "Next step: train on radiographs. Run mura-dist shards MURA-v1.1 shards/mura, then mura-dist train "
    "launch/recipes/mura.toml. Evaluate and export the run, and open the page with that model.",
)
THRESHOLD_RANGE = (CURVE_THRESHOLDS[0], CURVE_THRESHOLDS[-1])
MAP_CAVEAT = "The map shows what changed this model's output, not where a lesion is."
ERROR_RATES_BY_OUTCOME: dict[Outcome, list[str]] = {
    "none_flagged": ["missed"],
    "flagged": ["alarms"],
    "uncertain": ["missed", "alarms"],
    "no_call": [],
}
SPLIT_NAMES = {"train": "training set", "tune": "tuning set", "valid": "test set", "test": "test set"}


def averaging_note(num: int) -> str:
    """Return the note on a probability that is the mean of `num` views."""
    return "one picture" if num == 1 else f"mean of {num} pictures"


def outcome(result: StudyAnswer) -> Outcome:
    """Return the outcome of a study. A probability in the uncertain band is "uncertain", whatever the call."""
    call, band = result.cell("call"), result.cell("band")
    if result.withheld or (call is None and band is None):
        return "no_call"
    if band == "uncertain":
        return "uncertain"
    if call is None:
        return "flagged" if band == "positive" else "none_flagged"
    return "flagged" if call else "none_flagged"


def lead_sentence(result: StudyAnswer) -> str:
    """Return the sentence below the headline: the probability, or why there is none."""
    if result.withheld:
        return WITHHELD[0]
    return f"Probability of an abnormality: {result.probability:.2f} ({averaging_note(len(result.predictions))})."


def explanation_lines(result: StudyAnswer, card: Card) -> list[str]:
    """Return the sentences below that: how often the model was wrong, then the threshold and the band."""
    headline = outcome(result)
    if result.withheld:
        return [WITHHELD[1]]
    if headline == "no_call":
        return [f"No threshold was evaluated for {display_name(result.study_type).lower()} studies."]
    lines = error_rate_lines(headline, result.study_type, card)
    call, threshold, band = result.cell("call"), result.cell("threshold"), result.cell("band")
    if call is not None:
        side = "above" if call else "not above"
        lines.append(
            f"The model's call is {'flagged' if call else 'not flagged'} (probability {side} the threshold {threshold:.2f})."
        )
    ends = card.calibration.bands.get(result.study_type)
    if band is not None and ends is not None:
        side_of_band = {"uncertain": "inside", "negative": "below", "positive": "above"}[str(band)]
        lines.append(f"The probability is {side_of_band} the uncertain band, {ends.low:.2f} to {ends.high:.2f}.")
    if (calibrated := result.cell("calibrated_probability")) is not None:
        lines.append(f"The calibrated probability, corrected for over- or underconfidence, is {calibrated:.2f}.")
    return lines


def map_unavailable_reason(shapes: Iterable[tuple[int, ...]]) -> str:
    """Return why there is no activation map, or "". shapes: (h, w) of each map in cells."""
    height, width = min(shapes, key=min)
    if min(height, width) >= MIN_CELLS:
        return ""
    return (
        f"No activation map: the map of this model has {height} x {width} cells, which is too coarse. At least "
        f"{MIN_CELLS} x {MIN_CELLS} cells are needed, from a model with a larger input."
    )


def error_rate_lines(headline: Outcome, study_type: str, card: Card) -> list[str]:
    """Return how often the model was wrong on measured studies, for the error types of the outcome."""
    if not has_matching_metrics(card):
        return [
            f"How often the model is wrong was not measured on {'drawings' if card.trained_on_phantoms else 'radiographs'}."
        ]
    group, type_name = card.metrics["by_study_type"].get(study_type), display_name(study_type).lower()
    confusion = group.get("confusion") if group else None
    if not confusion:
        return [f"How often the model is wrong on {type_name} studies was not measured."]
    if card.metrics.get("thresholds", {}).get(study_type) != card.thresholds.get(study_type):
        return [f"How often the model is wrong on {type_name} studies at this threshold was not measured."]
    missed = _frequency(group, "sensitivity", confusion["fn"], confusion["tp"])
    alarms = _frequency(group, "specificity", confusion["fp"], confusion["tn"])
    lines = {
        "missed": f"{missed.sentence(f'abnormal {type_name} studies {_in(card)}', 'missed')}.",
        "alarms": f"{alarms.sentence(f'normal {type_name} studies {_in(card)}', 'flagged')}.",
    }
    return [*(lines[name] for name in ERROR_RATES_BY_OUTCOME[headline]), caveat(card)]


def caveat(card: Card) -> str:
    """Return the sentence on the studies, the split and the precision of the card's metrics."""
    parts = [
        "The test set consists of computer drawings"
        if card.trained_on_phantoms
        else f"The {_set(card)} is not from your hospital"
    ]
    if note := card.metrics.get("note"):
        parts.append(str(note).replace("this split", "this set"))
    if card.precision != "fp32":
        parts.append("measured in fp32")
        if (change := card.change) is not None:
            parts.append(f"{card.precision} changed {change.num_changed_calls} of {change.num_studies} calls")
    return f"{'; '.join(parts)}."


def has_matching_metrics(card: Card) -> bool:
    """Return whether the card's metrics were measured on the kind of data the model was trained on."""
    return bool(card.metrics) and card.metrics.get("measured_on") == card.trained_on.kind


def _set(card: Card) -> str:
    return SPLIT_NAMES.get(card.metrics.get("split", "valid"), "test set")


def _in(card: Card) -> str:
    return f"in the {_set(card)}"


def _frequency(group: Mapping[str, Any], rate: str, wrong: int, right: int) -> Frequency:
    """Return the frequency of wrong calls. rate: the metric of correct calls, whose interval is used."""
    if group.get(f"{rate}_interval", BOOTSTRAP) != BOOTSTRAP or group.get(f"{rate}_low") is None:
        return Frequency(wrong, wrong + right)
    return Frequency(wrong, wrong + right, 1 - group[f"{rate}_high"], 1 - group[f"{rate}_low"])


# ---- another threshold


@dataclass(frozen=True)
class ThresholdCurve:
    """The error rates of a study type by threshold: columns of summary.curves."""

    columns: Mapping[str, Any]
    study_type: str
    test_set: str
    caveat: str

    @classmethod
    def from_card(cls, card: Card, study_type: str) -> "ThresholdCurve | None":
        """Return the curve of a study type, or None where the card's metrics have none."""
        columns = card.metrics.get("curves", {}).get(study_type) if has_matching_metrics(card) else None
        return cls(columns, study_type, _in(card), caveat(card)) if columns else None

    def sentences(self, threshold: float) -> list[str]:
        """Return sentences on missed and falsely flagged studies at the nearest measured threshold."""
        thresholds = self.columns["threshold"]
        index = min(range(len(thresholds)), key=lambda number: abs(thresholds[number] - threshold))
        abnormal = self.columns["num_abnormal"]
        rates = {"sensitivity": ("abnormal", "missed", abnormal)}
        type_name = display_name(self.study_type).lower()
        rates["specificity"] = ("normal", "flagged", self.columns["num_studies"] - abnormal)
        return [
            f"{self._frequency(rate, index, total).sentence(f'{kind} {type_name} studies {self.test_set}', verb)}."
            for rate, (kind, verb, total) in rates.items()
        ]

    def _frequency(self, rate: str, index: int, total: int) -> Frequency:
        value, low, high = (self.columns[f"{rate}{end}"][index] for end in ("", "_low", "_high"))
        wrong = round((1 - value) * total)
        kinds = self.columns.get(f"{rate}_interval")
        if low is None or high is None or (kinds is not None and kinds[index] != BOOTSTRAP):
            return Frequency(wrong, total)
        return Frequency(wrong, total, 1 - high, 1 - low)
