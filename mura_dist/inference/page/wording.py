"""What the page says, word for word: an outcome, how often this model was wrong before, and for whom that holds.

    Answer, Card -> outcome, headline        Card, study type -> missed, falsely flagged        a threshold -> rates

"No abnormality flagged" is never "normal": the model may have missed it, and the sentence beside it says how often it did.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mura_dist.data.mura import display_name
from mura_dist.inference.page.frequencies import Frequency
from mura_dist.inference.page.study import StudyResult
from mura_dist.metrics.intervals import BOOTSTRAP
from mura_dist.metrics.summary import CURVE_THRESHOLDS
from mura_dist.models.card import Card
from mura_dist.reports.heatmap import MIN_CELLS

Outcome = Literal["none_flagged", "flagged", "uncertain", "no_call"]

TITLE = "Bone radiographs: one study, one answer"
PURPOSE = (
    "Upload the radiographs of one study to see how likely an abnormality is, and how often the model was wrong before."
)
HEADLINES: dict[Outcome, str] = {
    "none_flagged": "No abnormality flagged",
    "flagged": "Flagged",
    "uncertain": "Uncertain",
    "no_call": "No call",
}
DEMO_BANNER = "Demo on computer drawings: this is what an answer looks like"
WITHHELD = (
    "These files are not known to be drawings, and this model has seen nothing but computer drawings of bones: what it computes "
    "of a radiograph means nothing.",
    "Next step: train on radiographs: mura-dist shards MURA-v1.1 shards/mura, then mura-dist train launch/recipes/mura.toml, "
    "evaluate and export it, and open the page on that model.",
)
THRESHOLD_RANGE = (CURVE_THRESHOLDS[0], CURVE_THRESHOLDS[-1])  # of the thresholds to look at
MAP_CAVEAT = "A map shows what moved this model, not where a lesion is."
ERROR_RATES_BY_OUTCOME: dict[Outcome, list[str]] = {  # what was wrong before, beside each outcome
    "none_flagged": ["missed"],
    "flagged": ["alarms"],
    "uncertain": ["missed", "alarms"],
    "no_call": [],
}
SPLIT_NAMES = {"train": "training set", "tune": "tuning set", "valid": "test set", "test": "test set"}


def averaging_note(num: int) -> str:
    """Return the words for a probability that is the average of `num` pictures."""
    return "one picture" if num == 1 else f"average of {num} pictures"


def outcome(answer: StudyResult) -> Outcome:
    """Return the outcome of an answer. The uncertain band comes before the call: a call in it is not to be trusted."""
    call, band = answer.cell("call"), answer.cell("band")
    if answer.withheld or (call is None and band is None):
        return "no_call"
    if band == "uncertain":
        return "uncertain"
    if call is None:
        return "flagged" if band == "positive" else "none_flagged"
    return "flagged" if call else "none_flagged"


def lead_sentence(answer: StudyResult) -> str:
    """Return the sentence under the headline: the probability, where it means anything."""
    if answer.withheld:
        return WITHHELD[0]
    return f"Probability of an abnormality: {answer.probability:.2f} ({averaging_note(len(answer.predictions))})."


def explanation_lines(answer: StudyResult, card: Card) -> list[str]:
    """Return the sentences below: first how often the model was wrong, then how the outcome came about."""
    headline = outcome(answer)
    if answer.withheld:
        return [WITHHELD[1]]
    if headline == "no_call":
        return [f"No threshold was evaluated for {display_name(answer.study_type).lower()} studies."]
    lines = error_rate_lines(headline, answer.study_type, card)
    call, threshold, band = answer.cell("call"), answer.cell("threshold"), answer.cell("band")
    if call is not None:
        side = "above" if call else "not above"
        lines.append(
            f"The model's own call: {'flagged' if call else 'not flagged'} ({side} its threshold {threshold:.2f})."
        )
    ends = card.calibration.bands.get(answer.study_type)
    if band is not None and ends is not None:
        side_of_band = {"uncertain": "inside", "negative": "below", "positive": "above"}[str(band)]
        lines.append(f"It lies {side_of_band} the uncertain band, {ends.low:.2f} to {ends.high:.2f}.")
    if (calibrated := answer.cell("calibrated_probability")) is not None:
        lines.append(f"Calibrated, which corrects a model that is too sure or not sure enough: {calibrated:.2f}.")
    return lines


def map_unavailable_reason(shapes: Iterable[tuple[int, ...]]) -> str:
    """Return why there is no activation map, "" where there is one, by the cells of each picture's map."""
    height, width = min(shapes, key=min)
    if min(height, width) >= MIN_CELLS:
        return ""
    return (
        f"No activation map: this model sees a picture in {height} x {width} cells, too few to say where. A model of larger "
        f"pictures has one, from {MIN_CELLS} x {MIN_CELLS} cells on."
    )


def error_rate_lines(headline: Outcome, study_type: str, card: Card) -> list[str]:
    """Return how often the model was wrong where it was measured: what SAYS_HOW_OFTEN names for the outcome."""
    if not has_matching_metrics(card):
        return [f"How often it is wrong was not measured on {'drawings' if card.of_drawings else 'radiographs'}."]
    group, type_name = card.metrics["by_study_type"].get(study_type), display_name(study_type).lower()
    confusion = group.get("confusion") if group else None
    if not confusion:
        return [f"How often it is wrong on {type_name} studies was not measured."]
    if card.metrics.get("thresholds", {}).get(study_type) != card.thresholds.get(study_type):
        return [f"How often it is wrong on {type_name} studies at this threshold was not measured."]
    missed = _frequency(group, "sensitivity", confusion["fn"], confusion["tp"])
    alarms = _frequency(group, "specificity", confusion["fp"], confusion["tn"])
    lines = {
        "missed": f"{missed.sentence(f'abnormal {type_name} studies {_in(card)}', 'missed')}.",
        "alarms": f"{alarms.sentence(f'normal {type_name} studies {_in(card)}', 'flagged')}.",
    }
    return [*(lines[name] for name in ERROR_RATES_BY_OUTCOME[headline]), caveat(card)]


def caveat(card: Card) -> str:
    """Return the sentence on the studies, the split and the precision that the card's metrics were measured with."""
    parts = [
        "The test set is of computer drawings" if card.of_drawings else f"The {_set(card)} is not of your hospital"
    ]
    if note := card.metrics.get("note"):
        parts.append(str(note).replace("this split", "this set"))
    if card.precision != "fp32":
        parts.append("measured in fp32")
        if (change := card.change) is not None:
            parts.append(f"{card.precision} changed {change.num_changed_calls} of {change.num_studies} calls")
    return f"{'; '.join(parts)}."


def has_matching_metrics(card: Card) -> bool:
    """Return whether the card's metrics are of what the model was trained on: radiographs, or drawings."""
    return bool(card.metrics) and card.metrics.get("measured_on") == card.trained_on.kind


def _set(card: Card) -> str:
    return SPLIT_NAMES.get(card.metrics.get("split", "valid"), "test set")


def _in(card: Card) -> str:
    return f"in the {_set(card)}"


def _frequency(group: Mapping[str, Any], rate: str, wrong: int, right: int) -> Frequency:
    """Return the frequency of wrong calls, from the rate of right ones and its interval."""
    if group.get(f"{rate}_interval", BOOTSTRAP) != BOOTSTRAP or group.get(f"{rate}_low") is None:
        return Frequency(wrong, wrong + right)
    return Frequency(wrong, wrong + right, 1 - group[f"{rate}_high"], 1 - group[f"{rate}_low"])


# ---- another threshold


@dataclass(frozen=True)
class ThresholdCurve:
    """The columns that summary.curves made of a study type, and where."""

    columns: Mapping[str, Any]
    study_type: str
    where: str
    caveat: str

    @classmethod
    def from_card(cls, card: Card, study_type: str) -> "ThresholdCurve | None":
        """Return the curve of a study type; None where the card's metrics cannot say what another threshold would do."""
        columns = card.metrics.get("curves", {}).get(study_type) if has_matching_metrics(card) else None
        return cls(columns, study_type, _in(card), caveat(card)) if columns else None

    def sentences(self, threshold: float) -> list[str]:
        """Return the sentences on what would be missed and what flagged, at the nearest threshold that was measured."""
        thresholds = self.columns["threshold"]
        index = min(range(len(thresholds)), key=lambda each: abs(thresholds[each] - threshold))
        abnormal = self.columns["num_abnormal"]
        rates = {"sensitivity": ("abnormal", "missed", abnormal)}
        type_name = display_name(self.study_type).lower()
        rates["specificity"] = ("normal", "flagged", self.columns["num_studies"] - abnormal)
        return [
            f"{self._frequency(rate, index, total).sentence(f'{kind} {type_name} studies {self.where}', verb)}."
            for rate, (kind, verb, total) in rates.items()
        ]

    def _frequency(self, rate: str, index: int, total: int) -> Frequency:
        value, low, high = (self.columns[f"{rate}{end}"][index] for end in ("", "_low", "_high"))
        wrong = round((1 - value) * total)
        kinds = self.columns.get(f"{rate}_interval")
        if low is None or high is None or (kinds is not None and kinds[index] != BOOTSTRAP):
            return Frequency(wrong, total)
        return Frequency(wrong, total, 1 - high, 1 - low)
