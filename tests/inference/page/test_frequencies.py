"""Test the sentences about frequencies: percentages only of many studies, no rounding to 0 or 100 %, named intervals."""

import itertools
import re

import pytest

from mura_dist.inference.page import wording
from mura_dist.inference.page.frequencies import MIN_FOR_SHARE, TOO_FEW, WILSON, Frequency
from mura_dist.metrics.intervals import compute_wilson_interval
from mura_dist.models.card import Card, TrainedOn

TOTALS = (0, 1, 4, 29, 30, 31, 500)
SHARES = ("none", "one", "half", "all but one", "all")


def count(share: str, total: int) -> int:
    """Return the number out of `total` that `share` names."""
    return min(total, {"none": 0, "one": 1, "half": total // 2, "all but one": max(0, total - 1), "all": total}[share])


@pytest.mark.parametrize(("share", "total"), list(itertools.product(SHARES, TOTALS)))
@pytest.mark.parametrize("bootstrap", [None, (0.01, 0.42)])
def test_percentage_only_from_min_for_share(share: str, total: int, bootstrap: tuple[float, float] | None) -> None:
    num = count(share, total)
    text = Frequency(num, total, *(bootstrap or ())).sentence("normal hand studies in the test set", "flagged")
    assert ("%" in text) == (total >= MIN_FOR_SHARE)
    assert (TOO_FEW in text) == (0 < total < MIN_FOR_SHARE)
    assert "of 100" not in text
    if total == 0:
        assert text == "How many normal hand studies in the test set are flagged is unknown: there are none"
        return
    noun = "study" if total == 1 else "studies"
    assert text.startswith(f"Of {total} normal hand {noun} in the test set, ")
    match = re.match(r".*?, (none|all \d+|\d+) (was|were) flagged", text)
    assert match is not None
    assert {"none": 0, f"all {total}": total}.get(match[1]) in (num, None)
    assert match[1] in ("none", f"all {total}") or int(match[1]) == num
    if total >= MIN_FOR_SHARE:
        assert (WILSON in text) == (bootstrap is None)
        percent = re.search(r"flagged: (under 1|over 99|\d+) % ", text)
        assert percent is not None
        assert (percent[1] == "0") == (num == 0)
        assert (percent[1] == "100") == (num == total)


@pytest.mark.parametrize(
    ("num", "total", "text"),
    [
        (4, 4, "Of 4 normal hand studies in the test set, all 4 were flagged (too few studies for a percentage)"),
        (0, 4, "Of 4 normal hand studies in the test set, none were flagged (too few studies for a percentage)"),
        (1, 1, "Of 1 normal hand study in the test set, 1 was flagged (too few studies for a percentage)"),
        (3, 22, "Of 22 normal hand studies in the test set, 3 were flagged (too few studies for a percentage)"),
        (
            0,
            30,
            "Of 30 normal hand studies in the test set, none were flagged: 0 % (95 % Wilson interval 0 % to 11 %, "
            "which assumes independent studies)",
        ),
        (
            1,
            500,
            "Of 500 normal hand studies in the test set, 1 was flagged: under 1 % (95 % Wilson interval under 1 % to "
            "1 %, which assumes independent studies)",
        ),
    ],
)
def test_frequency_sentence(num: int, total: int, text: str) -> None:
    assert Frequency(num, total).sentence("normal hand studies in the test set", "flagged") == text


def test_bootstrap_interval_is_quoted() -> None:
    assert Frequency(18, 97, 0.12, 0.263).sentence("abnormal wrist studies in the test set", "missed") == (
        "Of 97 abnormal wrist studies in the test set, 18 were missed: 19 % (95 % interval 12 % to 26 %)"
    )


# ---- frequencies of a card


def card_with(wrong: dict[str, int], right: dict[str, int], *, kinds: bool) -> Card:
    """Return a card with these counts of wrong and right calls per label, and `kinds` as its named intervals."""
    group: dict[str, object] = {"num_studies": 9, "reasons": {}}
    group["confusion"] = {
        "fn": wrong["abnormal"],
        "tp": right["abnormal"],
        "fp": wrong["normal"],
        "tn": right["normal"],
    }
    columns: dict[str, object] = {
        "threshold": [0.5],
        "num_studies": sum(wrong.values()) + sum(right.values()),
        "num_abnormal": wrong["abnormal"] + right["abnormal"],
    }
    for rate, label in (("sensitivity", "abnormal"), ("specificity", "normal")):
        total = wrong[label] + right[label]
        value = right[label] / total if total else 0.0
        degenerate = value in (0, 1)
        low, high = (value - 0.1, value + 0.05) if not degenerate else (None, None)
        if kinds and degenerate:
            low, high = compute_wilson_interval(right[label], total)
        group |= {rate: value, f"{rate}_low": low, f"{rate}_high": high}
        columns |= {rate: [value], f"{rate}_low": [low], f"{rate}_high": [high]}
        if kinds:
            kind = "wilson" if degenerate else "bootstrap"
            group[f"{rate}_interval"], columns[f"{rate}_interval"] = kind, [kind]
    return Card(
        size=64,
        study_types=["XR_HAND"],
        thresholds={"XR_HAND": 0.5},
        metrics={
            "by_study_type": {"XR_HAND": group},
            "curves": {"XR_HAND": columns},
            "thresholds": {"XR_HAND": 0.5},
            "split": "valid",
            "measured_on": "radiographs",
        },
        trained_on=TrainedOn(kind="radiographs", manifest_sha256="0" * 64, num_radiographs=9),
        selected_on="tune",
        recipe={},
        checkpoint="step-1",
    )


@pytest.mark.parametrize("total", [1, 4, 29, 30, 31, 500])
@pytest.mark.parametrize("share", ["none", "half", "all"])
def test_result_and_slider_agree_for_old_and_new_cards(total: int, share: str) -> None:
    wrong = {"abnormal": count(share, total), "normal": count("half", total)}
    right = {label: total - num for label, num in wrong.items()}
    lines_of_cards = []
    for kinds in (False, True):
        card = card_with(wrong, right, kinds=kinds)
        lines = wording.error_rate_lines("uncertain", "XR_HAND", card)
        curve = wording.ThresholdCurve.from_card(card, "XR_HAND")
        assert curve is not None
        assert curve.sentences(0.5) == lines[:2]
        assert ("%" in " ".join(lines)) == (total >= MIN_FOR_SHARE)
        assert (WILSON in lines[0]) == (total >= MIN_FOR_SHARE and share != "half")
        assert lines[-1] == "The test set is not from your hospital."
        lines_of_cards.append(lines)
    assert lines_of_cards[0] == lines_of_cards[1]


@pytest.mark.parametrize("change", [{"confusion": None}, {"confusion": {}}])
def test_card_without_counts_has_no_error_rates(change: dict[str, object]) -> None:
    card = card_with({"abnormal": 3, "normal": 3}, {"abnormal": 3, "normal": 3}, kinds=True)
    metrics = card.metrics | {"by_study_type": {"XR_HAND": card.metrics["by_study_type"]["XR_HAND"] | change}}
    lines = wording.error_rate_lines("flagged", "XR_HAND", card.model_copy(update={"metrics": metrics}))
    assert lines == ["How often the model is wrong on hand studies was not measured."]


@pytest.mark.parametrize(("split", "set_name"), [("valid", "test set"), ("test", "test set"), ("tune", "tuning set")])
def test_split_names_on_the_page(split: str, set_name: str) -> None:
    card = card_with({"abnormal": 3, "normal": 3}, {"abnormal": 3, "normal": 3}, kinds=True)
    card = card.model_copy(update={"metrics": card.metrics | {"split": split}})
    assert f"in the {set_name}, 3 were" in wording.error_rate_lines("flagged", "XR_HAND", card)[0]


@pytest.mark.parametrize(("shapes", "has_map"), [([(4, 4)], True), ([(10, 10)] * 3, True), ([(2, 2)], False)])
def test_map_unavailable_reason(shapes: list[tuple[int, int]], has_map: bool) -> None:
    text = wording.map_unavailable_reason(shapes)
    assert (text == "") == has_map
    assert has_map or text.startswith("No activation map: the map of this model has 2 x 2 cells, which is too coarse.")
