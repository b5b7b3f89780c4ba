"""evaluation.py and dataset.py: pages that say what they must, load nothing and stay well-formed."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.shards.convert import convert
from mura_dist.metrics import classification, comparison, intervals, summary
from mura_dist.metrics.entries import HEADLINE_METRICS
from mura_dist.reports import dataset, evaluation, figures, findings, html, plots, sections, training_curves
from mura_dist.reports import svg as plot

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Fails where tags do not nest; keeps the text, the ids, what is linked, and the labels of pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.markup = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.labels: list[str] = []
        self.feed(self.markup)
        self.close()
        assert self.open == [], self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "svg":
            self.labels.append(dict(attrs).get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def check_page(path: Path) -> Page:
    """What holds for every page."""
    found = Page(path)
    assert "http:" not in found.markup
    assert "https:" not in found.markup
    assert "<script" not in found.markup
    assert not re.search(r"\bnan\b", found.markup, flags=re.IGNORECASE)
    ids = [value for key, value in found.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    for key, value in found.attributes:
        assert key not in ("src", "srcset", "data")
        assert key != "href" or (value or "").removeprefix("#") in ids
    assert all(label.strip() for label in found.labels)
    assert mura.TERMS in found.text
    return found


def studies(num: int = 120, seed: int = 0) -> pd.DataFrame:
    """Two study types, and a third of one class only."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num)
    study_type = rng.choice(["XR_ELBOW", "XR_HAND"], num)
    study_type[:2], label[:2] = "XR_HIP", 1
    probability = 1 / (1 + np.exp(-(2 * label - 1 + rng.normal(0, 1, num))))
    frame = {"study": [f"s{i}" for i in range(num)], "patient": [f"p{i // 2}" for i in range(num)], "label": label}
    return pd.DataFrame(frame | {"study_type": study_type, "num_views": 2, "probability": probability})


HISTORY: list[dict[str, Any]] = [
    {
        "kind": "step",
        "step": 10,
        "epoch": 0,
        "loss": 0.9,
        "learning_rate": 1e-3,
        "images_per_s": 40,
        "data_wait_share": 0.1,
    },
    {
        "kind": "step",
        "step": 20,
        "epoch": 0,
        "loss": None,
        "learning_rate": 1e-3,
        "images_per_s": 41,
        "data_wait_share": 0.1,
    },
    {
        "kind": "epoch",
        "step": 20,
        "epoch": 0,
        "tune_loss": 0.71,
        "tune_auroc": None,
        "tune_kappa": 0.25,
        "learning_rate": 5.0,
    },
    {
        "kind": "step",
        "step": 20,
        "epoch": 0,
        "loss": 0.333,
        "learning_rate": 1e-4,
        "images_per_s": 42,
        "data_wait_share": 0.1,
    },
]
CONTEXT: dict[str, Any] = {
    "title": "demo <script>alert(1)</script>",
    "split": "valid",
    "selected_on": "tune",
    "checkpoint": "step-00000020",
    "trained_on": "radiographs",
    "measured_on": "radiographs",
    "threshold": 0.5,
    "history": HISTORY,
    "roles": {"train": "fits the weights", "tune": "chooses", "valid": "is only reported"},
    "settings": {"seed": 3, "pretrained": "", "flip": True},
    "environment": {"torch": "9.8.7", "ranks": ["a", "b"]},
    "manifest_sha256": "ab" * 32,
    "conversion": {
        "size": 320,
        "splits": {"valid": {"num_studies": 1234, "num_radiographs": 40}},
        "defects": {"not a radiograph": ["train/x", "train/y"]},
        "unreadable": [{"row": 1, "code": "too_large", "path": "valid/x"}],
    },
    "seconds": 12.34,
}


def fitted(table: pd.DataFrame) -> dict[str, Any]:
    """What calibration.py would say: hands fitted for XR_ELBOW and XR_HAND, nothing for XR_HIP."""
    rates = {"sensitivity": 0.95, "specificity": 0.5}
    one = {"num_normal": 60, "num_abnormal": 40, "pooled": True, "odds_shift": 0.3, "slope": 0.8, "intercept": -0.2}
    one |= {"operating_points": {"sensitivity=0.95": {"threshold": 0.2, **rates}}, "band": {"low": 0.2, "high": 0.7}}
    one["reasons"] = {"specificity=0.98": "no threshold from 0 to 1 reaches it"}
    whole = {
        "fitted_on": "tune",
        "method": "by hand",
        "num_studies": 100,
        "num_patients": 77,
        "notes": ["a note of the fit"],
    }
    names = ("XR_ELBOW", "XR_HAND")
    return {
        "calibration": whole | {"by_study_type": dict.fromkeys(names, one)},
        "operating_points": {
            "fitted_on": "tune",
            "left_out": {"XR_HIP": int((table["study_type"] == "XR_HIP").sum())},
            "overall": _costs(0.911, None),
            "by_study_type": {"XR_ELBOW": _costs(0.922, 0.2), "XR_HAND": _costs(0.933, 0.2)},
        },
    }


def _costs(value: float, threshold: float | None) -> dict[str, Any]:
    numbers = {
        key + end: value + change
        for key in ("sensitivity", "specificity", "ppv", "npv", "share_uncertain", "accuracy_outside")
        for end, change in (("", 0.0), ("_low", -0.01), ("_high", 0.01))
    }
    facts_table = {"num_studies": 40, "num_without": 0, "reasons": {}}
    band = {"low": threshold, "high": None if threshold is None else 0.7, "num_uncertain": 12}
    return {
        "points": {"sensitivity=0.95": facts_table | numbers | {"threshold": threshold}},
        "band": facts_table | numbers | band,
    }


def full(table: pd.DataFrame, resamples: int = 60) -> dict[str, Any]:
    """metrics.json with everything in it."""
    rng = np.random.default_rng(1)
    other = table.assign(probability=np.clip(table["probability"] + rng.normal(0, 0.2, len(table)), 0, 1))
    return {
        **summary.compute_metrics(table, resamples=resamples, prevalence=0.05),
        **fitted(table),
        "subgroups": summary.compute_subgroup_metrics(table, resamples=resamples),
        "comparison": comparison.compare_predictions(table, other, resamples=resamples),
        "predictions": {"file": "ours.csv", "sha256": "ef" * 32},
        "against": {"file": "theirs.csv", "sha256": "fe" * 32},
        "num_damaged": 3,
    }


def whole_studies() -> pd.DataFrame:
    table = studies()
    exposure = np.random.default_rng(2).uniform(20, 90, len(table))
    calibrated = table["probability"] ** 0.9
    return table.assign(exposure=exposure, num_views=np.arange(len(table)) % 4 + 1, calibrated_probability=calibrated)


def written(out: Path, **changes: Any) -> Page:
    table = changes.pop("studies", None)
    table = studies() if table is None else table
    measured = changes.pop("metrics", None) or summary.compute_metrics(table, resamples=60)
    path = evaluation.write(out, metrics=measured, studies=table, context=CONTEXT | changes)
    assert path == out / "report.html"
    return check_page(path)


def said(out: Path) -> dict[str, Any]:
    """report.json, which is standard JSON."""

    def refuse(word: str) -> float:
        raise AssertionError(word)

    return json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A page with all sections, its folder beside it."""
    out, table = tmp_path_factory.mktemp("everything"), whole_studies()
    return out, written(out, studies=table, metrics=full(table))


@pytest.mark.filterwarnings("error")
def test_report_says_everything(tmp_path: Path) -> None:
    page = written(tmp_path)
    overall = summary.compute_metrics(studies(), resamples=60)["overall"]
    for name in HEADLINE_METRICS:
        assert f"{overall[name]:.3f}" in page.text
        assert f"95 %: {overall[f'{name}_low']:.3f} to {overall[f'{name}_high']:.3f}" in page.text
    for words in (
        "Measured on 120 studies of 60 patients (split valid, which is only reported).",
        "is above 0.5.",
        "60 resamples of 60 patients, the clusters",
        "The unweighted mean over 2 study types is",
        "Hip XR_HIP - a - a 1.000 0.342 to 1.000 b - a 2 1 0 0 0 2",
        "a One class only.",
        "Hip (2 studies, 0 of the rarer label)",
        "No curves: one class only.",
        "is only reported",
        "step-00000020",
        "1,234 studies",
        "ab" * 32,
        "9.8.7",
        "seconds of this evaluation, including startup 12.3",
        "radiographs per second in this evaluation 19.4",  # 240 in 12.34 s
        "unreadable: too_large 1",
        mura.LICENSE,
    ):
        assert words in page.text, words
    assert re.search(r"defect: not a radiograph 2 ", page.text)
    assert "optimistic" not in page.text
    assert "drawings" not in page.text
    assert "<script>alert" in page.text  # as text: check_page saw no element of that name


def test_no_radiograph_and_nobodys_name(everything: tuple[Path, Page]) -> None:
    """No picture but plots; no study, patient or file of the data set on the page or in the JSON."""
    out, page = everything
    assert not re.search(r"<(img|image|picture|canvas|object|iframe|video)\b|data:image|url\(", page.markup)
    text = page.markup + (out / "report.json").read_text()
    assert not re.search(r"\b(s|p)\d+\b", page.text)
    assert "train/x" not in text
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "report.html", "report.json"]


def test_the_official_interval_is_json_only(everything: tuple[Path, Page]) -> None:
    out, page = everything
    overall = said(out)["metrics"]["overall"]
    assert overall["kappa_official_low"] is not None
    assert f"{overall['kappa_official_low']:.3f} to {overall['kappa_official_high']:.3f}" not in page.text
    assert "fficial scorer" not in page.text


SECTIONS = {
    "operating_points": "The uncertain band",
    "calibration": "Fitted values by study type",
    "comparison": "Confirmatory",
    "subgroups": "many groups of the same data",
}


def test_sections_are_there_when_their_numbers_are(everything: tuple[Path, Page], tmp_path: Path) -> None:
    """Each section goes with its key; the page works without any of them."""
    _, page = everything
    format_value = written(tmp_path)
    for key, words in SECTIONS.items():
        assert words in page.text, key
        assert words not in format_value.text, key
    for number, left_out in enumerate(SECTIONS):
        measured = full(whole_studies(), resamples=0)
        del measured[left_out]
        text = written(tmp_path / str(number), studies=whole_studies(), metrics=measured).text
        assert SECTIONS[left_out] not in text
        assert all(words in text for key, words in SECTIONS.items() if key != left_out)


def test_words_beside_the_numbers(everything: tuple[Path, Page]) -> None:
    out, page = everything
    for words in (
        "The uncertain band contains 12 of 40 studies, a share of 0.911 (0.901 to 0.921).",
        "fitted on tune (100 studies of 77 patients), not on the reported split. Method: by hand.",
        "a note of the fit.",
        "Hand: specificity=0.98: no threshold from 0 to 1 reaches it.",
        "Excluded, because nothing was fitted for these study types: Hip (2 studies).",
        "A is ours.csv, B is theirs.csv. It compares two files of predictions on these studies, not two recipes",
        "PPV at 0.05",
        "corrupt samples in this split, skipped 3",
        "Raw probabilities. Brier score",
        "Dots: bins with equal numbers of studies. Bars: Wilson interval",
    ):
        assert words in page.text, words
    kappa = said(out)["metrics"]["comparison"]["overall"]["kappa"]
    sides = (
        f"{kappa['a']:.3f} (A) and {kappa['b']:.3f} (B). A minus B is {kappa['difference']:.3f} ({kappa['low']:.3f} to"
    )
    assert f"Confirmatory comparison: the overall kappa is {sides}" in page.text
    assert page.text.count("assumes independent studies") >= 2
    assert "McNemar's test and paired DeLong test (both assume independent studies)" in page.text


def footnotes(page: Page) -> dict[str, str]:
    """The letters of the page's footnotes, and what they say; each is referred to, and explained once."""
    notes = dict(re.findall(r'<li id="note-(\w+)"><sup>\w+</sup> ([^<]*)</li>', page.markup))
    used = re.findall(r'<sup class="mark"><a href="#note-(\w+)"', page.markup)
    assert list(dict.fromkeys(used)) == list(notes)
    assert len(set(notes.values())) == len(notes)
    return {letter: text.replace("&#x27;", "'") for letter, text in notes.items()}


def test_what_a_table_lacks_is_a_footnote(tmp_path: Path) -> None:
    """Few studies, all of one type called abnormal: the macro mean, a slope, an NPV and an operating point lack something."""
    table = whole_studies().head(24)
    table.loc[table["study_type"] == "XR_ELBOW", "probability"] = 0.7
    measured = full(table)
    page = written(tmp_path, studies=table, metrics=measured)
    notes = footnotes(page)
    for group, key in (
        ("XR_ELBOW", "calibration_slope"),
        ("XR_ELBOW", "npv_at_prevalence"),
        ("XR_ELBOW", "auroc_low"),
        ("XR_HIP", "kappa"),
    ):
        part = measured["by_study_type"][group]
        assert part[key] is None
        reason = part["reasons"][key]
        assert f"{reason[:1].upper()}{reason[1:]}." in notes.values(), key
    assert measured["macro"]["specificity_low"] is None
    letter = next(letter for letter, text in notes.items() if text.startswith("Undefined in too many"))
    macro = f"{measured['macro']['specificity']:.3f} {letter} "
    assert macro in page.text[page.text.index("Macro mean") : page.text.index("Elbow XR_ELBOW")]
    assert any(text.startswith("Wilson interval, which assumes independent studies") for text in notes.values())
    assert len(notes) <= 9


def test_what_is_reported_is_not_said_to_be_kept_from_the_fit(tmp_path: Path) -> None:
    page = written(tmp_path, studies=whole_studies(), metrics=full(whole_studies(), resamples=0), split="tune")
    expected = "fitted on tune (100 studies of 77 patients), which this report measures: optimistic. Method: by hand."
    assert expected in page.text
    assert "not on the reported split" not in page.text


NUMBER = re.compile(r"(?<![\w.,#-])-?\d[\d,]*(?:\.\d+)?")


def numbers_of(value: Any) -> set[str]:
    """Every number of a JSON, in all the forms in which a page may show it; the digits of sentences too."""
    if isinstance(value, dict):
        return set().union(*(numbers_of(part) for pair in value.items() for part in pair), set())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), set())
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if isinstance(value, bool) or value is None:
        return set()
    return {f"{value:.3f}", f"{value:.1f}", f"{value:,.1f}", f"{value:g}", f"{value:,}", f"{value}"}


def test_the_json_holds_every_number_of_the_page(everything: tuple[Path, Page]) -> None:
    """Tables, tiles, sentences and captions; what is drawn is of the same numbers."""
    out, page = everything
    found = said(out)
    markup = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", page.markup, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", markup)
    told = {key: value for key, value in found.items() if key != "plots"}  # the curves' points would hide what is wrong
    constants = {"95", "0.5", "0.001", "1", "0", "0.3", "0.705", "2"}  # of fixed sentences, and the counts of no misses
    unknown = set(NUMBER.findall(text)) - numbers_of(told) - constants
    assert not unknown
    assert len(set(NUMBER.findall(text))) > 300
    for sentence in found["summary"]:
        assert sentence in page.text
    assert set(found["pictures"]) == {path.stem for path in (out / "pictures").iterdir()}
    assert found["metrics"] == json.loads(json.dumps(full(whole_studies())))


def test_the_first_table_is_metrics_json(everything: tuple[Path, Page]) -> None:
    """Row by row, cell by cell; the macro mean has no studies of its own."""
    out, page = everything
    measured = said(out)["metrics"]
    table = page.markup.split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in table.split("</tr>")[:-1]]
    named = {"All studies": measured["overall"], "Macro mean of 2 study types, unweighted": measured["macro"]}
    named |= {f"{mura.display_name(name)} {name}": group for name, group in measured["by_study_type"].items()}
    letters = {text: letter for letter, text in footnotes(page).items()}
    wilson, one_class = (
        letters[next(text for text in letters if text.startswith(start))] for start in ("Wilson", "One class")
    )
    expected = []
    for name, group in named.items():
        numbers = [
            f"{group[key]:.3f} {group[f'{key}_low']:.3f} to {group[f'{key}_high']:.3f}"
            + (f" {wilson}" if group.get(f"{key}_interval") == "wilson" else "")
            if group[f"{key}_low"] is not None
            else f"- {one_class}"
            for key in HEADLINE_METRICS
        ]
        counts = [group["num_studies"], group["num_patients"]] if "num_studies" in group else []
        cells = [group["confusion"][key] for key in classification.CELLS] if "confusion" in group else []
        expected.append(f"{name} {' '.join(numbers)} {' '.join(map(str, counts + cells))}".split())
    assert rows == expected


def test_pictures_are_files_and_part_of_the_page(everything: tuple[Path, Page]) -> None:
    out, page = everything
    names = {path.stem for path in (out / "pictures").iterdir()}
    kinds = ("roc", "pr", "scores", "reliability", "reliability-calibrated", "confusion")
    assert names == {
        *("kappa", "auroc", "difference-kappa", "difference-auroc", "scores-XR_HIP", "confusion-XR_HIP"),
        *("curve-0", "curve-1", "curve-2", "curve-3", "curve-4"),
        *(f"{kind}-{name}" for kind in kinds for name in ("overall", "XR_ELBOW", "XR_HAND")),
    }
    assert len(page.labels) == len(names)
    for name in names:
        root = ElementTree.parse(out / "pictures" / f"{name}.svg").getroot()
        assert root.find("{http://www.w3.org/2000/svg}title") is not None
        width, height = (float(root.attrib[key]) for key in ("width", "height"))
        assert_inside(root, width, height)
    assert plot.PAPER_INK not in page.markup.split("</style>", 1)[1]  # a plot takes the page's ink, dark or light


def assert_inside(root: ElementTree.Element, width: float, height: float) -> None:
    """No mark, and no text by its length, leaves the picture."""
    for node in root.iter():
        if (points := node.attrib.get("points")) is not None:
            for x, y in (map(float, pair.split(",")) for pair in points.split()):
                assert 0 <= x <= width, (node.attrib, width)
                assert 0 <= y <= height, (node.attrib, height)
        if node.tag.endswith("}text") and "transform" not in node.attrib:
            x, length = float(node.attrib["x"]), len(node.text or "") * 5.5
            start = x - {"start": 0, "middle": length / 2, "end": length}[node.attrib["text-anchor"]]
            assert start >= -1, (node.text, start)
            assert start + length <= width + 1, (node.text, start + length, width)


def test_published_kappas_only_beside_the_official_test(tmp_path: Path) -> None:
    """The paper's numbers are of 207 studies: with one study less they are gone, and a sentence says why."""
    rows = [(name, label) for name, pair in mura.STUDIES_TEST.items() for label in (0, 1) for _ in range(pair[label])]
    table = pd.DataFrame(rows, columns=["study_type", "label"])
    rng = np.random.default_rng(0)
    table = table.assign(patient=None, study=range(len(table)), probability=rng.uniform(0, 1, len(table)))
    for number, (part, there) in enumerate(((table, True), (table.iloc[1:], False))):
        page = written(
            tmp_path / str(number), studies=part, split="test", metrics=summary.compute_metrics(part, resamples=0)
        )
        found = said(tmp_path / str(number))["published"]
        assert ("0.931" in page.text) is there
        assert ("The best radiologist of the paper reached a kappa of 0.778 overall" in page.text) is there
        assert (findings.NOT_COMPARABLE in page.text) is not there
        assert ("kappa" in found) is there


def test_published_kappas_follow_from_the_papers_confusion() -> None:
    """FIELD.md: TN 102 FP 13 FN 17 TP 75."""
    assert findings.PUBLISHED["kappa"]["overall"] == round(
        float(classification.compute_kappa(np.array([102, 13, 17, 75]))), 3
    )
    assert {*findings.PUBLISHED["kappa"]} == {"overall", *mura.STUDY_TYPES}


def test_calls_only(tmp_path: Path) -> None:
    table = studies().assign(call=lambda frame: (frame["probability"] > 0.5).astype(int)).drop(columns="probability")
    page = written(tmp_path, studies=table)
    assert "The predictions hold a call, 0 or 1, for each study and no probability." in page.text
    assert "AUROC - no interval a" in page.text
    assert footnotes(page)["a"] == "Calls only: no probabilities were given."
    assert "No curves: no probabilities." in page.text
    names = {path.stem.partition("-")[0] for path in (tmp_path / "pictures").iterdir()}
    assert names == {"kappa", "confusion", "curve"}


LONG = "Klinikum <Süd>, Röntgen / ../Handgelenk & Unterarm \x0c rechts"


@pytest.mark.filterwarnings("error")
def test_forty_study_types_of_long_names(tmp_path: Path) -> None:
    """Names that are no file names, and only at their ends differ: a file each, inside the folder, whole in the page's text."""
    parts = [studies(24, seed).assign(study_type=f"{LONG} {seed:02d}") for seed in range(40)]
    table = pd.concat(parts).assign(patient=None)
    page = written(tmp_path, studies=table, metrics=summary.compute_metrics(table, resamples=0))
    pictures_there = list((tmp_path / "pictures").iterdir())
    assert sum(path.name.startswith("roc-") for path in pictures_there) == 41
    assert all(path.is_file() and path.suffix == ".svg" for path in pictures_there)
    for path in pictures_there:
        root = ElementTree.parse(path).getroot()
        assert_inside(root, float(root.attrib["width"]), float(root.attrib["height"]))
    assert "Handgelenk & Unterarm rechts 39" in page.text
    assert "clustering unknown" in page.text


def test_history_of_a_resumed_run(tmp_path: Path) -> None:
    """Of a step logged twice the later line counts; what is null is left out; the epoch's learning rate is not a step's."""
    labels = "\n".join(written(tmp_path).labels)
    assert "Loss over training steps: step from 0.9 to 0.333; tune from 0.71 to 0.71" in labels
    assert "Learning rate over training steps: step from 0.001 to 0.0001" in labels
    assert "Kappa over training steps: tune from 0.25 to 0.25" in labels


def test_a_long_training_is_thinned_and_it_is_said(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": step, "loss": float(step % 2)} for step in range(1, 1001)]
    page = written(tmp_path, history=lines)
    [panel] = said(tmp_path)["training"]["curves"]
    assert panel["lines_to_a_point"] == 4
    assert panel["series"]["step"]["value"] == [0.5] * 250
    assert panel["series"]["step"]["step"][:2] == [2.5, 6.5]
    assert "Gray: means over 4 logged steps." in page.text


def test_ledger_counts_what_was_logged() -> None:
    lines = [
        {"kind": "step", "step": 1, "images_per_s": 10.0, "data_wait_share": 0.5},
        {"kind": "step", "step": 2, "images_per_s": 30.0, "data_wait_share": None},
        {
            "kind": "epoch",
            "step": 2,
            "evaluation_s": 4.0,
            "overhead_share": 0.1,
            "limited_by": "data",
            "skipped_steps": 1,
        },
        {
            "kind": "epoch",
            "step": 3,
            "evaluation_s": 8.0,
            "overhead_share": 0.3,
            "limited_by": "compute",
            "skipped_steps": 2,
        },
    ]
    found = training_curves.ledger(lines)
    assert found == {
        "num_steps": 3,
        "num_evaluations": 2,
        "images_per_s_median": 20.0,
        "data_wait_share_median": 0.5,
        "overhead_share_median": pytest.approx(0.2),
        "evaluation_s_median": 6.0,
        "evaluation_s_total": 12.0,
        "limited_by": "compute",
        "skipped_steps": 2,
        "damaged_samples": None,
    }
    assert set(training_curves.ledger([]).values()) == {None, 0}


@pytest.mark.parametrize(
    ("changes", "stamp"),
    [
        (
            {"trained_on": "phantoms", "measured_on": "phantoms"},
            "trained and measured on computer drawings: the numbers do not hold for radiographs",
        ),
        (
            {"trained_on": "phantoms", "measured_on": None},
            "trained and measured on computer drawings: the numbers do not hold for radiographs",
        ),
        ({"trained_on": "phantoms"}, "trained on computer drawings: the model was never trained on a radiograph"),
        ({"measured_on": "phantoms"}, "measured on computer drawings: the numbers do not hold for radiographs"),
        ({"selected_on": "valid"}, "optimistic: this split chose the model"),
        ({"split": "tune"}, "optimistic: this split chose the model"),
        ({"split": "train"}, "optimistic: this split fitted the weights"),
        ({"same_data": False}, "measured on other shards than the run was trained on"),
    ],
)
def test_stamps(changes: dict[str, Any], stamp: str, tmp_path: Path) -> None:
    page = written(tmp_path, studies=studies(8), **changes)
    banners = re.findall(r'<p class="banner"[^>]*>([^<]*)', page.markup)
    assert len(banners) == 1
    assert stamp in banners[0]
    assert said(tmp_path)["stamps"] == banners


def test_metrics_json_alone_tells_the_context(tmp_path: Path) -> None:
    """What is not given twice is taken from metrics.json; a note that is a stamp already is not said again."""
    told = {"split": "tune", "selected_on": "tune", "threshold": None, "operating_point": "sensitivity=0.95"}
    told |= {"thresholds": {"XR_HAND": 0.31}, "note": "optimistic: this split chose the model", "terms": mura.TERMS}
    table = studies()
    evaluation.write(tmp_path, metrics=summary.compute_metrics(table, resamples=0) | told, studies=table, context={})
    page = check_page(tmp_path / "report.html")
    assert "Split: tune" in page.text
    assert "above the threshold of its study type (operating point sensitivity=0.95, fitted on tune)" in page.text
    assert "Dashed: the threshold, 0.31." in page.text
    assert "Note:" not in page.text
    evaluation.write(
        tmp_path, metrics=summary.compute_metrics(table, resamples=0) | {"note": "a: b"}, studies=table, context={}
    )
    assert "Note: a: b." in check_page(tmp_path / "report.html").text


@pytest.mark.filterwarnings("error")
def test_nothing_given_is_said(tmp_path: Path) -> None:
    empty = studies().iloc[:0]
    evaluation.write(tmp_path, metrics=summary.compute_metrics(empty), studies=empty, context={})
    page = check_page(tmp_path / "report.html")
    assert "Measured on 0 studies of 0 patients" in page.text
    assert "Nothing could be measured." in page.text
    assert set(footnotes(page)) == {"a"}
    assert page.text.count("Not available.") == 6
    assert "No curves: no labeled studies." in page.text
    assert "Split: not available" in page.text
    assert page.labels == []


@pytest.mark.filterwarnings("error")
def test_a_diverged_network_is_reported(tmp_path: Path) -> None:
    table = studies()
    table.loc[5, "probability"] = np.nan
    assert "1 of 120 studies have no finite probability" in written(tmp_path, studies=table).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("history", [[], HISTORY])
def test_curves_is_a_picture(history: list[dict[str, Any]], tmp_path: Path) -> None:
    training_curves.draw(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


# ---- plots


def test_curves_are_what_is_drawn() -> None:
    """A ROC curve without the inner points of straight parts has the same area; the steps below have the average precision."""
    table = studies(500)
    label, probability = table["label"].to_numpy(), table["probability"].round(2).to_numpy()
    points = plots.roc_points(label, probability)
    x, y = np.array(points["false_positive_rate"]), np.array(points["true_positive_rate"])
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(
        float(classification.compute_auroc(label, probability)), abs=1e-12
    )
    assert len(x) < len(classification.compute_roc_curve(label, probability)[0])
    points = plots.pr_points(label, probability)
    area = (np.diff([0.0, *points["recall"]]) * points["precision"]).sum()
    assert area == pytest.approx(float(classification.compute_average_precision(label, probability)), abs=1e-12)


def polyline(root: ElementTree.Element) -> list[tuple[float, float]]:
    """The corners of the curve, the last line that is drawn."""
    points = [node.attrib["points"] for node in root.iter() if node.tag.endswith("}polyline")][-1]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def on_paper(*points: tuple[float, float]) -> list[Any]:
    axes = plots.SQUARE
    return [pytest.approx((axes.px(x), axes.py(y)), abs=0.06) for x, y in points]


def test_curves_and_the_calls_on_paper() -> None:
    """Three studies by hand; the threshold lies between the second and the third: the calls' dot is a corner of both curves."""
    label, probability = np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1])
    group = {"confusion": {"tn": 0, "fp": 1, "fn": 1, "tp": 1}, "sensitivity": 0.5, "specificity": 0.0, "ppv": 0.5}
    absent = dict.fromkeys(("scores", "reliability", "reliability_calibrated", "band"))
    plot_data = {"roc": plots.roc_points(label, probability), "precision_recall": plots.pr_points(label, probability)}
    plot_data |= absent | {"scores": plots.score_histogram(label, probability)}
    drawn = {picture.name: picture for picture in figures._group_pictures("XR_HAND", "XR_HAND", group, plot_data, 0.3)}
    corners = {
        "roc": [(0, 0), (0, 0.5), (1, 0.5), (1, 1)],
        "pr": [(0, 1), (0.5, 1), (0.5, 0.5), (0.5, 2 / 3), (1, 2 / 3)],
    }
    dots = {"roc": (1, 0.5), "pr": (0.5, 0.5)}
    for kind, expected in corners.items():
        root = ElementTree.fromstring(drawn[f"{kind}-XR_HAND"].file())
        assert polyline(root) == on_paper(*expected), kind
        [dot] = [node.attrib for node in root.iter() if node.tag.endswith("}circle")]
        assert [(float(dot["cx"]), float(dot["cy"]))] == on_paper(dots[kind])


def test_a_curve_comes_back_to_a_precision_it_had() -> None:
    """Down to 1/3, up to 1/2 again at the same recall: drawn from there on level, not as a slope from 1/3."""
    points = plots.pr_points(np.array([1, 0, 0, 1]), np.array([0.9, 0.7, 0.5, 0.1]))
    picture = plots.pr_picture("pr", "all studies", points, None, 0.5, "")
    corners = [(0, 1), (0.5, 1), (0.5, 0.5), (0.5, 1 / 3), (0.5, 0.5), (1, 0.5)]
    assert polyline(ElementTree.fromstring(picture.file())) == on_paper(*corners)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "below 0.001"), (0.00099, "below 0.001"), (0.05, "0.050")]
)
def test_a_p_value_is_never_zero(value: float | None, text: str) -> None:
    assert sections._p_value(value) == text


def test_slugs_tell_names_apart() -> None:
    names = ["XR_HAND", "a/b", "a b", "a_b", "../b", "é", "è", "x" * 300, "x" * 300 + "y", ""]
    slugs = [figures.slug(name) for name in names]
    assert slugs[0] == "XR_HAND"
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,60}", slug) for slug in slugs)


def test_long_curves_keep_their_ends() -> None:
    rng = np.random.default_rng(0)
    label, probability = rng.integers(0, 2, 5000), rng.uniform(0, 1, 5000)
    for points in (plots.roc_points(label, probability), plots.pr_points(label, probability)):
        for values in points.values():
            assert len(values) == plots.MAX_POINTS
            assert values[-1] in (1.0, label.mean())


def test_reliability_bins_are_the_calibration_errors() -> None:
    table = studies(400)
    label, probability = table["label"].to_numpy(), table["probability"].to_numpy()
    bins = plots.reliability_bins(label, probability)
    assert sum(item["num_studies"] for item in bins) == 400
    error = sum(item["num_studies"] * abs(item["probability"] - item["share_abnormal"]) for item in bins) / 400
    assert error == pytest.approx(classification.compute_calibration_error(label, probability)[0], abs=1e-12)
    for item in bins:
        positives = round(item["share_abnormal"] * item["num_studies"])
        assert (item["low"], item["high"]) == pytest.approx(
            intervals.compute_wilson_interval(positives, item["num_studies"])
        )


def test_score_counts_hold_every_study() -> None:
    label = np.array([0, 0, 1, 1, 1])
    counts = plots.score_histogram(label, np.array([0.0, 0.05, 0.5, 1.0, 0.96]))
    assert sum(counts["normal"]) == 2
    assert (counts["abnormal"][10], counts["abnormal"][19]) == (1, 2)
    assert (counts["normal_median"], counts["abnormal_median"]) == (0.025, 0.96)
    assert plots.score_histogram(label[:2], np.array([0.1, 0.2]))["abnormal_median"] is None


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.3, 0.17), (0, 3), (12, 13.5), (0, 1e6), (0.2, 0.2001), (-1e-5, 1e-5), (0, 60_000)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = plot.ticks(low, high)
    assert 2 <= len(found) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in found)
    assert len(set(np.diff(found).round(9))) == 1
    assert all(len(plot.format_tick(value)) <= 7 for value in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-0.1, "-0.1"),
        (1500, "1,500"),
        (40_000, "40k"),
        (1e-4, "1e-4"),
        (1e-7, "1e-7"),
        (1, "1"),
    ],
)
def test_a_ticks_number(value: float, text: str) -> None:
    assert plot.format_tick(value) == text


def test_axes_put_data_where_they_belong() -> None:
    axes = plot.Axes(left_px=10, top_px=20, width_px=100, height_px=50, x=(0, 2), y=(-1, 1))
    assert (axes.px(0), axes.px(1), axes.px(2)) == (10, 60, 110)
    assert (axes.py(-1), axes.py(0), axes.py(1)) == (70, 45, 20)
    log = plot.Axes(left_px=0, top_px=0, width_px=10, height_px=30, y=(1e-3, 1.0), log=True)
    assert log.py(1e-2) == pytest.approx(20)
    marks = plot.line(axes, [0, 1, 1, 2], [0, 1, 1, 0])
    assert 'points="10.0,45.0 60.0,20.0 110.0,45.0"' in marks


def test_a_forest_has_its_intervals_where_they_are() -> None:
    rows = [
        plots.ForestRow("a", 0.5, 0.25, 0.75, "square"),
        plots.ForestRow("b", None),
        plots.ForestRow("c", 0.5, reference=1.0),
    ]
    svg = plots.forest("x", rows, chance=0.0, label="l", alt="a", caption="c").file()
    root = ElementTree.fromstring(svg)
    assert_inside(root, 400, 200)
    ticks = {node.text: float(node.attrib["x"]) for node in root.iter() if node.tag.endswith("}text")}
    [bar] = [node.attrib["points"] for node in root.iter() if node.tag.endswith("}polyline")]
    ends = [float(pair.split(",")[0]) for pair in bar.split()]
    unit = ticks["0.75"] - ticks["0.25"]
    assert ends == pytest.approx([ticks["0.25"], ticks["0.25"] + unit], abs=0.11)
    assert "none" in ticks


def test_a_name_too_long_keeps_both_ends() -> None:
    assert plot.ellipsize("abcdefghij", 10) == "abcdefghij"
    assert plot.ellipsize("abcdefghijk", 10) == "abcd…ghijk"


def test_html_escapes_text_and_attributes() -> None:
    found = html.element("td", 'a < "b" & c', html.Html("<b>d</b>"), class_="x", aria_label='e"f')
    assert found == '<td class="x" aria-label="e&quot;f">a &lt; &quot;b&quot; &amp; c<b>d</b></td>'
    assert "<td>&lt;i&gt;</td>" in html.table(["", "n"], [["a", "<i>"]])


def test_bars_are_as_tall_as_their_values() -> None:
    svg = html.bars(["a", "b"], {"studies": [10, 5]}, "ten and five")
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.11)
    assert 'aria-label="ten and five"' in svg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four studies of three patients in MURA's layout; the wrists' positives are white; one file is no image, one is junk."""
    root = tmp_path / "data"
    for split, study_type, patient, study, gray in (
        ("train", "XR_WRIST", "patient00001", "study1_positive", 200),
        ("train", "XR_WRIST", "patient00001", "study2_negative", 40),
        ("train", "XR_HIP", "patient00002", "study1_negative", 40),
        ("valid", "XR_WRIST", "patient00003", "study1_positive", 200),
    ):
        place = root / split / study_type / patient / study
        place.mkdir(parents=True)
        Image.new("L", (60, 90), gray).save(place / "image1.png")
        Image.new("RGB", (100, 80), (gray,) * 3).save(place / "image2.png")
    (place / "image3.png").write_bytes(b"no image")
    (place / "._image1.png").write_bytes(b"\0\5\x16\7")
    return root


COPIES = {"duplicate across splits": 2, "duplicate within a split": 2}  # flat grey, the same in several studies


def check_counts(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [found[f"num_{unit}"] for unit in ("patients", "studies", "radiographs")] == [3, 4, 9]
    assert (found["normal_studies"], found["abnormal_radiographs"]) == (2, 5)
    [valid] = [line for line in found["by_study_type"] if line["split"] == "valid"]
    assert (valid["study_type"], valid["num_patients"], valid["num_radiographs"]) == ("XR_WRIST", 1, 3)
    assert found["views_per_study"] == {"2": 3, "3": 1}
    assert found["unknown_study_types"] == ["XR_HIP"]
    assert not found["is_mura_v1_1"]
    assert found["exposure"]["num_radiographs"] == 8
    assert found["exposure"]["study_type"]["XR_WRIST"]["abnormal_mean"] == pytest.approx(200, abs=1)
    assert found["exposure"]["study_type"]["XR_HIP"]["abnormal_mean"] is None


@pytest.mark.filterwarnings("error")
def test_describe_a_folder(folder: Path, tmp_path: Path) -> None:
    found = dataset.describe(folder, tmp_path / "page.html")
    check_counts(found)
    assert found["sizes"]["modes"] == {"L": 4, "RGB": 4}
    assert (found["sizes"]["num_told"], found["sizes"]["num_untold"]) == (8, 1)
    assert found["sizes"]["longest_px"] == {"min": 90, "median": 95, "max": 100}
    assert found["sizes"]["smallest"] == "60 x 90"
    assert sum(found["sizes"]["longest_histogram"]["counts"]) == 8
    assert found["defects"] == {**COPIES, "not a radiograph": 1, "not_image, among 9 sampled": 1}
    page = check_page(tmp_path / "page.html")
    assert "9 radiographs, 4 studies (2 normal, 2 abnormal), 3 patients" in page.text
    assert "Study types that MURA does not have: Hip (XR_HIP)." in page.text
    assert footnotes(page) == {"a": "The sample contains no radiograph with this label."}
    assert "not_image, among 9 sampled 1" in page.text
    assert dataset.summary_text(found).splitlines()[-1] == "  defect: not_image, among 9 sampled: 1"


def test_describe_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", size=32, workers=1, tune=0)
    found = dataset.describe(tmp_path / "shards", tmp_path / "page.html")
    check_counts(found)
    assert found["sizes"] == {"size_px": 32, "encoding": "raw"}
    assert found["defects"] == {**COPIES, "not a radiograph": 1, "not_image, not in the shards": 1}
    assert "Every radiograph is 32 x 32 pixels, stored as raw." in check_page(tmp_path / "page.html").text


def test_describe_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        dataset.describe(tmp_path / "nothing", tmp_path / "page.html")
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        dataset.describe(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
