"""What the page says, word for word: an outcome, how often this model was wrong before, and for whom that holds.

    Answer, Card -> outcome, headline        Card, study type -> missed, falsely flagged        a threshold -> rates

"No abnormality flagged" is never "normal": the model may have missed it, and the sentence beside it says how often it did.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mura_dist.inference.page.study import Answer
from mura_dist.metrics.summary import CURVE, RATES
from mura_dist.models.card import Card

Outcome = Literal["none_flagged", "flagged", "uncertain", "no_call"]

HEADLINES: dict[Outcome, str] = {
    "none_flagged": "No abnormality flagged",
    "flagged": "Flagged",
    "uncertain": "Uncertain",
    "no_call": "No call",
}
DRAWINGS = "Trained on drawings: results on radiographs are meaningless"
ELSEWHERE = "not your hospital"
ENDS = (CURVE[0], CURVE[-1])  # of the thresholds to look at
MAP_CAVEAT = "A map shows what moved this model, not where a lesion is."


def drawings(card: Card) -> bool:
    return card.trained_on.kind == "phantoms"


def noun(study_type: str) -> str:
    """XR_WRIST -> wrist"""
    return study_type.removeprefix("XR_").replace("_", " ").lower()


def outcome(answer: Answer, card: Card) -> Outcome:
    """What to say first. The uncertain band comes before the call: a call out of it is a coin nobody should trust."""
    call, band = answer.cell("call"), answer.cell("band")
    if drawings(card) or (call is None and band is None):
        return "no_call"
    if band == "uncertain":
        return "uncertain"
    if call is None:
        return "flagged" if band == "positive" else "none_flagged"
    return "flagged" if call else "none_flagged"


def explained(answer: Answer, card: Card) -> list[str]:
    """The sentences under the headline."""
    study_type, said = noun(answer.study_type), outcome(answer, card)
    num = len(answer.predictions)
    lines = [f"Probability {answer.probability:.2f}, the mean over {num} view{'s' if num > 1 else ''}."]
    if said == "no_call":
        lines.append(f"{DRAWINGS}." if drawings(card) else f"No threshold was evaluated for {study_type} studies.")
        return lines
    if (calibrated := answer.cell("calibrated_probability")) is not None:
        lines[0] += f" Calibrated: {calibrated:.2f}."
    call, threshold, band = answer.cell("call"), answer.cell("threshold"), answer.cell("band")
    if call is not None:
        side = "above" if call else "not above"
        lines.append(
            f"The model's own call: {'flagged' if call else 'not flagged'} ({side} its threshold {threshold:.2f})."
        )
    ends = card.calibration.bands.get(answer.study_type)
    if band is not None and ends is not None:
        place = {"uncertain": "inside", "negative": "below", "positive": "above"}[str(band)]
        lines.append(f"It lies {place} the uncertain band, {ends.low:.2f} to {ends.high:.2f}.")
    return lines + experience(said, answer.study_type, card)


def experience(said: Outcome, study_type: str, card: Card) -> list[str]:
    """How often it was wrong where it was measured: misses before anything else, unless something was flagged."""
    if not measured(card):
        return ["How often it is wrong was not measured on radiographs."]
    group = card.metrics["by_study_type"].get(study_type)
    if group is None or not group.get("num_studies"):
        return [f"How often it is wrong on {noun(study_type)} studies was not measured."]
    if card.metrics.get("thresholds", {}).get(study_type) != card.thresholds.get(study_type):
        return [f"How often it is wrong on {noun(study_type)} studies at this threshold was not measured."]
    where = f"In {group['num_studies']} {noun(study_type)} studies of {_of(card)}, "
    missed = f"{where}{_wrong(group, 'sensitivity', 'abnormal ones were missed')}"
    alarms = f"{where}{_wrong(group, 'specificity', 'normal ones were flagged')}"
    order = {"none_flagged": [missed], "flagged": [alarms], "uncertain": [missed, alarms], "no_call": []}[said]
    return [f"{line}; {'; '.join(_reserve(card))}." for line in order]


def _reserve(card: Card) -> list[str]:
    """For whom a number of the card's metrics holds, and of what."""
    reserve, change = [ELSEWHERE], card.change
    if note := card.metrics.get("note"):
        reserve.append(str(note))
    if card.precision != "fp32":
        reserve.append("measured in fp32")
        if change is not None:
            reserve.append(f"{card.precision} changed {change.num_changed_calls} of {change.num_studies} calls")
    return reserve


def measured(card: Card) -> bool:
    """Whether the card's metrics say something about radiographs."""
    return bool(card.metrics) and card.metrics.get("measured_on") == "radiographs" and not drawings(card)


def _of(card: Card) -> str:
    return f"the split {card.metrics.get('split', 'valid')}"


def _wrong(group: Mapping[str, Any], rate: str, what: str) -> str:
    """`18 of 100 abnormal ones were missed [12 to 26]`: the rest of a rate."""
    value, low, high = (group.get(f"{rate}{end}") for end in ("", "_low", "_high"))
    if value is None:
        return f"how many {what} is unknown ({group.get('reasons', {}).get(rate, 'not measured')})"
    if low is None or high is None:
        why = group.get("reasons", {}).get(f"{rate}_low", "not measured")
        return f"{_hundredths(1 - value)} of 100 {what} [no interval: {why}]"
    return f"{_hundredths(1 - value)} of 100 {what} [{_hundredths(1 - high)} to {_hundredths(1 - low)}]"


def _hundredths(share: float) -> str:
    """Never "0" of something that did happen."""
    return "fewer than 1" if 0 < share < 0.005 else f"{100 * abs(share):.0f}"


# ---- another threshold


@dataclass(frozen=True)
class Curve:
    """The columns that summary.curves made of a study type, and where."""

    columns: Mapping[str, Any]
    study_type: str
    where: str
    reserve: str

    @classmethod
    def of(cls, card: Card, study_type: str) -> "Curve | None":
        """None where the card's metrics cannot say what another threshold would do."""
        columns = card.metrics.get("curves", {}).get(study_type) if measured(card) else None
        return cls(columns, study_type, _of(card), "; ".join(_reserve(card))) if columns else None

    def rates(self, threshold: float) -> list[str]:
        """Sensitivity and specificity at the nearest threshold that was measured."""
        thresholds = self.columns["threshold"]
        place = min(range(len(thresholds)), key=lambda one: abs(thresholds[one] - threshold))
        lines = []
        for name in RATES:
            value, low, high = (self.columns[f"{name}{end}"][place] for end in ("", "_low", "_high"))
            interval = "no interval" if low is None or high is None else f"{low:.2f} to {high:.2f}"
            lines.append(f"{name} {value:.2f} [{interval}]")
        return lines

    @property
    def people(self) -> str:
        num, abnormal = self.columns["num_studies"], self.columns["num_abnormal"]
        return f"{num} {noun(self.study_type)} studies of {self.where}, {abnormal} of them abnormal; {self.reserve}"
