"""Test the pages of evaluate and describe: their content, no external resources, valid markup."""

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
from mura_dist.reports import svg as svg_tools

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A parsed page: its text, attributes and picture labels. Raises AssertionError where tags do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.markup = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.labels: list[str] = []
        self.feed(self.markup)
        self.close()
        assert self.open == [], self.open
        self.text = " ".join(" ".join(self.texts).split())

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
            self.texts.append(data)


def check_page(path: Path) -> Page:
    """Check the rules that hold for every page, and return it."""
    content = Page(path)
    assert "http:" not in content.markup
    assert "https:" not in content.markup
    assert "<script" not in content.markup
    assert not re.search(r"\bnan\b", content.markup, flags=re.IGNORECASE)
    ids = [value for key, value in content.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    for key, value in content.attributes:
        assert key not in ("src", "srcset", "data")
        assert key != "href" or (value or "").removeprefix("#") in ids
    assert all(label.strip() for label in content.labels)
    assert mura.TERMS in content.text
    return content


def studies(num: int = 120, seed: int = 0) -> pd.DataFrame:
    """Return studies of two study types, and of a third with one class only."""
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
    """Return calibration results for XR_ELBOW and XR_HAND, and none for XR_HIP."""
    rates = {"sensitivity": 0.95, "specificity": 0.5}
    entry = {"num_normal": 60, "num_abnormal": 40, "pooled": True, "odds_shift": 0.3, "slope": 0.8, "intercept": -0.2}
    entry |= {"operating_points": {"sensitivity=0.95": {"threshold": 0.2, **rates}}, "band": {"low": 0.2, "high": 0.7}}
    entry["reasons"] = {"specificity=0.98": "no threshold from 0 to 1 reaches it"}
    common = {
        "fitted_on": "tune",
        "method": "by hand",
        "num_studies": 100,
        "num_patients": 77,
        "notes": ["a note of the fit"],
    }
    names = ("XR_ELBOW", "XR_HAND")
    return {
        "calibration": common | {"by_study_type": dict.fromkeys(names, entry)},
        "operating_points": {
            "fitted_on": "tune",
            "left_out": {"XR_HIP": int((table["study_type"] == "XR_HIP").sum())},
            "overall": _operating_point(0.911, None),
            "by_study_type": {"XR_ELBOW": _operating_point(0.922, 0.2), "XR_HAND": _operating_point(0.933, 0.2)},
        },
    }


def _operating_point(value: float, threshold: float | None) -> dict[str, Any]:
    numbers = {
        key + end: value + change
        for key in ("sensitivity", "specificity", "ppv", "npv", "share_uncertain", "accuracy_outside")
        for end, change in (("", 0.0), ("_low", -0.01), ("_high", 0.01))
    }
    common_keys = {"num_studies": 40, "num_without": 0, "reasons": {}}
    band = {"low": threshold, "high": None if threshold is None else 0.7, "num_uncertain": 12}
    return {
        "points": {"sensitivity=0.95": common_keys | numbers | {"threshold": threshold}},
        "band": common_keys | numbers | band,
    }


def complete_metrics(table: pd.DataFrame, resamples: int = 60) -> dict[str, Any]:
    """Return metrics.json with every optional key."""
    rng = np.random.default_rng(1)
    noisy = table.assign(probability=np.clip(table["probability"] + rng.normal(0, 0.2, len(table)), 0, 1))
    return {
        **summary.compute_metrics(table, resamples=resamples, prevalence=0.05),
        **fitted(table),
        "subgroups": summary.compute_subgroup_metrics(table, resamples=resamples),
        "comparison": comparison.compare_predictions(table, noisy, resamples=resamples),
        "predictions": {"file": "ours.csv", "sha256": "ef" * 32},
        "against": {"file": "theirs.csv", "sha256": "fe" * 32},
        "num_damaged": 3,
    }


def complete_studies() -> pd.DataFrame:
    table = studies()
    exposure = np.random.default_rng(2).uniform(20, 90, len(table))
    calibrated = table["probability"] ** 0.9
    return table.assign(exposure=exposure, num_views=np.arange(len(table)) % 4 + 1, calibrated_probability=calibrated)


def write_report(out: Path, **changes: Any) -> Page:
    table = changes.pop("studies", None)
    table = studies() if table is None else table
    measured = changes.pop("metrics", None) or summary.compute_metrics(table, resamples=60)
    path = evaluation.write(out, metrics=measured, studies=table, context=CONTEXT | changes)
    assert path == out / "report.html"
    return check_page(path)


def read_report_json(out: Path) -> dict[str, Any]:
    """Read report.json. Raises AssertionError where it is not standard JSON."""

    def raise_on_constant(word: str) -> float:
        raise AssertionError(word)

    return json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=raise_on_constant)


@pytest.fixture(scope="module")
def complete_report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """Return the folder of a report with all sections, and its page."""
    out, table = tmp_path_factory.mktemp("everything"), complete_studies()
    return out, write_report(out, studies=table, metrics=complete_metrics(table))


@pytest.mark.filterwarnings("error")
def test_report_contains_metrics_and_context(tmp_path: Path) -> None:
    page = write_report(tmp_path)
    overall = summary.compute_metrics(studies(), resamples=60)["overall"]
    for name in HEADLINE_METRICS:
        assert f"{overall[name]:.3f}" in page.text
        assert f"95 %: {overall[f'{name}_low']:.3f} to {overall[f'{name}_high']:.3f}" in page.text
    for texts in (
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
        assert texts in page.text, texts
    assert re.search(r"defect: not a radiograph 2 ", page.text)
    assert "optimistic" not in page.text
    assert "drawings" not in page.text
    assert "<script>alert" in page.text  # as text: check_page saw no element of that name


def test_report_contains_no_radiograph_and_no_names(complete_report: tuple[Path, Page]) -> None:
    """All pictures are plots. Page and JSON name no study, patient or file of the data set."""
    out, page = complete_report
    assert not re.search(r"<(img|image|picture|canvas|object|iframe|video)\b|data:image|url\(", page.markup)
    text = page.markup + (out / "report.json").read_text()
    assert not re.search(r"\b(s|p)\d+\b", page.text)
    assert "train/x" not in text
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "report.html", "report.json"]


def test_official_interval_is_in_json_only(complete_report: tuple[Path, Page]) -> None:
    out, page = complete_report
    overall = read_report_json(out)["metrics"]["overall"]
    assert overall["kappa_official_low"] is not None
    assert f"{overall['kappa_official_low']:.3f} to {overall['kappa_official_high']:.3f}" not in page.text
    assert "fficial scorer" not in page.text


SECTIONS = {
    "operating_points": "The uncertain band",
    "calibration": "Fitted values by study type",
    "comparison": "Confirmatory",
    "subgroups": "many groups of the same data",
}


def test_section_exists_only_with_its_key(complete_report: tuple[Path, Page], tmp_path: Path) -> None:
    """Each section depends on one key. The page works without any of them."""
    _, page = complete_report
    format_value = write_report(tmp_path)
    for key, texts in SECTIONS.items():
        assert texts in page.text, key
        assert texts not in format_value.text, key
    for number, left_out in enumerate(SECTIONS):
        measured = complete_metrics(complete_studies(), resamples=0)
        del measured[left_out]
        text = write_report(tmp_path / str(number), studies=complete_studies(), metrics=measured).text
        assert SECTIONS[left_out] not in text
        assert all(texts in text for key, texts in SECTIONS.items() if key != left_out)


def test_report_sentences(complete_report: tuple[Path, Page]) -> None:
    out, page = complete_report
    for texts in (
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
        assert texts in page.text, texts
    kappa = read_report_json(out)["metrics"]["comparison"]["overall"]["kappa"]
    sides = (
        f"{kappa['a']:.3f} (A) and {kappa['b']:.3f} (B). A minus B is {kappa['difference']:.3f} ({kappa['low']:.3f} to"
    )
    assert f"Confirmatory comparison: the overall kappa is {sides}" in page.text
    assert page.text.count("assumes independent studies") >= 2
    assert "McNemar's test and paired DeLong test (both assume independent studies)" in page.text


def footnotes(page: Page) -> dict[str, str]:
    """Return the page's footnotes by letter. Each is referenced, and explained once."""
    notes = dict(re.findall(r'<li id="note-(\w+)"><sup>\w+</sup> ([^<]*)</li>', page.markup))
    letters = re.findall(r'<sup class="mark"><a href="#note-(\w+)"', page.markup)
    assert list(dict.fromkeys(letters)) == list(notes)
    assert len(set(notes.values())) == len(notes)
    return {letter: text.replace("&#x27;", "'") for letter, text in notes.items()}


def test_missing_table_values_have_footnotes(tmp_path: Path) -> None:
    """Few studies, all of one type called abnormal: the macro mean, a slope, an NPV and an operating point lack something."""
    table = complete_studies().head(24)
    table.loc[table["study_type"] == "XR_ELBOW", "probability"] = 0.7
    measured = complete_metrics(table)
    page = write_report(tmp_path, studies=table, metrics=measured)
    notes = footnotes(page)
    for group, key in (
        ("XR_ELBOW", "calibration_slope"),
        ("XR_ELBOW", "npv_at_prevalence"),
        ("XR_ELBOW", "auroc_low"),
        ("XR_HIP", "kappa"),
    ):
        group_metrics = measured["by_study_type"][group]
        assert group_metrics[key] is None
        reason = group_metrics["reasons"][key]
        assert f"{reason[:1].upper()}{reason[1:]}." in notes.values(), key
    assert measured["macro"]["specificity_low"] is None
    letter = next(letter for letter, text in notes.items() if text.startswith("Undefined in too many"))
    macro = f"{measured['macro']['specificity']:.3f} {letter} "
    assert macro in page.text[page.text.index("Macro mean") : page.text.index("Elbow XR_ELBOW")]
    assert any(text.startswith("Wilson interval, which assumes independent studies") for text in notes.values())
    assert len(notes) <= 9


def test_report_on_tune_is_marked_as_fitted(tmp_path: Path) -> None:
    page = write_report(
        tmp_path, studies=complete_studies(), metrics=complete_metrics(complete_studies(), resamples=0), split="tune"
    )
    expected = "fitted on tune (100 studies of 77 patients), which this report measures: optimistic. Method: by hand."
    assert expected in page.text
    assert "not on the reported split" not in page.text


NUMBER = re.compile(r"(?<![\w.,#-])-?\d[\d,]*(?:\.\d+)?")


def numbers_of(value: Any) -> set[str]:
    """Return every number of a JSON value in all formats of the page, including those within strings."""
    if isinstance(value, dict):
        return set().union(*(numbers_of(group_metrics) for pair in value.items() for group_metrics in pair), set())
    if isinstance(value, list):
        return set().union(*map(numbers_of, value), set())
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    if isinstance(value, bool) or value is None:
        return set()
    return {f"{value:.3f}", f"{value:.1f}", f"{value:,.1f}", f"{value:g}", f"{value:,}", f"{value}"}


def test_report_json_contains_every_number_of_page(complete_report: tuple[Path, Page]) -> None:
    """This covers tables, tiles, sentences and captions."""
    out, page = complete_report
    content = read_report_json(out)
    markup = re.sub(r"<svg.*?</svg>|<style>.*?</style>", " ", page.markup, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", " ", markup)
    facts = {
        key: value for key, value in content.items() if key != "plots"
    }  # without the curves' points, which contain most numbers
    constants = {"95", "0.5", "0.001", "1", "0", "0.3", "0.705", "2"}  # numbers of fixed sentences
    unknown = set(NUMBER.findall(text)) - numbers_of(facts) - constants
    assert not unknown
    assert len(set(NUMBER.findall(text))) > 300
    for sentence in content["summary"]:
        assert sentence in page.text
    assert set(content["pictures"]) == {path.stem for path in (out / "pictures").iterdir()}
    assert content["metrics"] == json.loads(json.dumps(complete_metrics(complete_studies())))


def test_first_table_equals_metrics_json(complete_report: tuple[Path, Page]) -> None:
    """Compare cell by cell. The macro mean has no counts."""
    out, page = complete_report
    measured = read_report_json(out)["metrics"]
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


def test_pictures_are_files_and_inline_svg(complete_report: tuple[Path, Page]) -> None:
    out, page = complete_report
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
    assert (
        svg_tools.PAPER_INK not in page.markup.split("</style>", 1)[1]
    )  # a plot has the page's text color, dark or light


def assert_inside(root: ElementTree.Element, width: float, height: float) -> None:
    """Assert that no mark and no text lies outside the picture."""
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


def test_published_kappas_only_for_official_test_set(tmp_path: Path) -> None:
    """The paper's numbers are of 207 studies. With one study less, a sentence replaces them."""
    rows = [(name, label) for name, pair in mura.STUDIES_TEST.items() for label in (0, 1) for _ in range(pair[label])]
    table = pd.DataFrame(rows, columns=["study_type", "label"])
    rng = np.random.default_rng(0)
    table = table.assign(patient=None, study=range(len(table)), probability=rng.uniform(0, 1, len(table)))
    for number, (group_metrics, is_official) in enumerate(((table, True), (table.iloc[1:], False))):
        page = write_report(
            tmp_path / str(number),
            studies=group_metrics,
            split="test",
            metrics=summary.compute_metrics(group_metrics, resamples=0),
        )
        content = read_report_json(tmp_path / str(number))["published"]
        assert ("0.931" in page.text) is is_official
        assert ("The best radiologist of the paper reached a kappa of 0.778 overall" in page.text) is is_official
        assert (findings.NOT_COMPARABLE in page.text) is not is_official
        assert ("kappa" in content) is is_official


def test_published_kappa_follows_from_paper_confusion() -> None:
    """FIELD.md: TN 102 FP 13 FN 17 TP 75."""
    assert findings.PUBLISHED["kappa"]["overall"] == round(
        float(classification.compute_kappa(np.array([102, 13, 17, 75]))), 3
    )
    assert {*findings.PUBLISHED["kappa"]} == {"overall", *mura.STUDY_TYPES}


def test_report_of_calls_without_probabilities(tmp_path: Path) -> None:
    table = studies().assign(call=lambda frame: (frame["probability"] > 0.5).astype(int)).drop(columns="probability")
    page = write_report(tmp_path, studies=table)
    assert "The predictions hold a call, 0 or 1, for each study and no probability." in page.text
    assert "AUROC - no interval a" in page.text
    assert footnotes(page)["a"] == "Calls only: no probabilities."
    assert "No curves: no probabilities." in page.text
    names = {path.stem.partition("-")[0] for path in (tmp_path / "pictures").iterdir()}
    assert names == {"kappa", "confusion", "curve"}


LONG = "Klinikum <Süd>, Röntgen / ../Handgelenk & Unterarm \x0c rechts"


@pytest.mark.filterwarnings("error")
def test_forty_study_types_with_long_names(tmp_path: Path) -> None:
    """Names that differ only at their end and are not valid file names get one file each, and stay complete in the page."""
    parts = [studies(24, seed).assign(study_type=f"{LONG} {seed:02d}") for seed in range(40)]
    table = pd.concat(parts).assign(patient=None)
    page = write_report(tmp_path, studies=table, metrics=summary.compute_metrics(table, resamples=0))
    pictures_there = list((tmp_path / "pictures").iterdir())
    assert sum(path.name.startswith("roc-") for path in pictures_there) == 41
    assert all(path.is_file() and path.suffix == ".svg" for path in pictures_there)
    for path in pictures_there:
        root = ElementTree.parse(path).getroot()
        assert_inside(root, float(root.attrib["width"]), float(root.attrib["height"]))
    assert "Handgelenk & Unterarm rechts 39" in page.text
    assert "clustering unknown" in page.text


def test_curves_of_resumed_run_use_later_line(tmp_path: Path) -> None:
    """The later line of a step counts, null is skipped, and an epoch's learning rate is not a step's."""
    labels = "\n".join(write_report(tmp_path).labels)
    assert "Loss over training steps: step from 0.9 to 0.333; tune from 0.71 to 0.71" in labels
    assert "Learning rate over training steps: step from 0.001 to 0.0001" in labels
    assert "Kappa over training steps: tune from 0.25 to 0.25" in labels


def test_long_training_curves_are_downsampled(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": step, "loss": float(step % 2)} for step in range(1, 1001)]
    page = write_report(tmp_path, history=lines)
    [panel] = read_report_json(tmp_path)["training"]["curves"]
    assert panel["lines_to_a_point"] == 4
    assert panel["series"]["step"]["value"] == [0.5] * 250
    assert panel["series"]["step"]["step"][:2] == [2.5, 6.5]
    assert "Gray: means over 4 logged steps." in page.text


def test_ledger_summarizes_logged_lines() -> None:
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
    content = training_curves.ledger(lines)
    assert content == {
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
    page = write_report(tmp_path, studies=studies(8), **changes)
    banners = re.findall(r'<p class="banner"[^>]*>([^<]*)', page.markup)
    assert len(banners) == 1
    assert stamp in banners[0]
    assert read_report_json(tmp_path)["stamps"] == banners


def test_context_defaults_to_metrics_json(tmp_path: Path) -> None:
    """Missing context comes from metrics.json. A note that is also a stamp appears once."""
    facts = {"split": "tune", "selected_on": "tune", "threshold": None, "operating_point": "sensitivity=0.95"}
    facts |= {"thresholds": {"XR_HAND": 0.31}, "note": "optimistic: this split chose the model", "terms": mura.TERMS}
    table = studies()
    evaluation.write(tmp_path, metrics=summary.compute_metrics(table, resamples=0) | facts, studies=table, context={})
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
def test_report_states_missing_information(tmp_path: Path) -> None:
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
def test_report_of_non_finite_probabilities(tmp_path: Path) -> None:
    table = studies()
    table.loc[5, "probability"] = np.nan
    assert "1 of 120 studies have no finite probability" in write_report(tmp_path, studies=table).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("history", [[], HISTORY])
def test_draw_writes_png(history: list[dict[str, Any]], tmp_path: Path) -> None:
    training_curves.draw(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


# ---- plots


def test_curve_points_have_exact_area() -> None:
    """A ROC curve without points on straight segments keeps its area. The steps of the PR curve sum to the average precision."""
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
    """Return the vertices of the last line of a picture."""
    points = [node.attrib["points"] for node in root.iter() if node.tag.endswith("}polyline")][-1]
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def to_pixels(*points: tuple[float, float]) -> list[Any]:
    axes = plots.SQUARE
    return [pytest.approx((axes.px(x), axes.py(y)), abs=0.06) for x, y in points]


def test_curves_and_calls_are_drawn_at_their_values() -> None:
    """Three studies with a threshold between the second and the third: the dot of the calls is a vertex of both curves."""
    label, probability = np.array([1, 0, 1]), np.array([0.9, 0.5, 0.1])
    group = {"confusion": {"tn": 0, "fp": 1, "fn": 1, "tp": 1}, "sensitivity": 0.5, "specificity": 0.0, "ppv": 0.5}
    missing = dict.fromkeys(("scores", "reliability", "reliability_calibrated", "band"))
    plot_data = {"roc": plots.roc_points(label, probability), "precision_recall": plots.pr_points(label, probability)}
    plot_data |= missing | {"scores": plots.score_histogram(label, probability)}
    pictures = {
        picture.name: picture for picture in figures._group_pictures("XR_HAND", "XR_HAND", group, plot_data, 0.3)
    }
    corners = {
        "roc": [(0, 0), (0, 0.5), (1, 0.5), (1, 1)],
        "pr": [(0, 1), (0.5, 1), (0.5, 0.5), (0.5, 2 / 3), (1, 2 / 3)],
    }
    dots = {"roc": (1, 0.5), "pr": (0.5, 0.5)}
    for kind, expected in corners.items():
        root = ElementTree.fromstring(pictures[f"{kind}-XR_HAND"].file())
        assert polyline(root) == to_pixels(*expected), kind
        [dot] = [node.attrib for node in root.iter() if node.tag.endswith("}circle")]
        assert [(float(dot["cx"]), float(dot["cy"]))] == to_pixels(dots[kind])


def test_pr_curve_is_drawn_as_steps() -> None:
    """Precision falls to 1/3 and rises to 1/2 at the same recall: the next segment is level at 1/2."""
    points = plots.pr_points(np.array([1, 0, 0, 1]), np.array([0.9, 0.7, 0.5, 0.1]))
    picture = plots.pr_picture("pr", "all studies", points, None, 0.5, "")
    corners = [(0, 1), (0.5, 1), (0.5, 0.5), (0.5, 1 / 3), (0.5, 0.5), (1, 0.5)]
    assert polyline(ElementTree.fromstring(picture.file())) == to_pixels(*corners)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "below 0.001"), (0.00099, "below 0.001"), (0.05, "0.050")]
)
def test_p_value_is_never_zero(value: float | None, text: str) -> None:
    assert sections._p_value(value) == text


def test_slugs_are_unique_and_safe() -> None:
    names = ["XR_HAND", "a/b", "a b", "a_b", "../b", "é", "è", "x" * 300, "x" * 300 + "y", ""]
    slugs = [figures.slug(name) for name in names]
    assert slugs[0] == "XR_HAND"
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,60}", slug) for slug in slugs)


def test_subsampled_curves_keep_their_ends() -> None:
    rng = np.random.default_rng(0)
    label, probability = rng.integers(0, 2, 5000), rng.uniform(0, 1, 5000)
    for points in (plots.roc_points(label, probability), plots.pr_points(label, probability)):
        for values in points.values():
            assert len(values) == plots.MAX_POINTS
            assert values[-1] in (1.0, label.mean())


def test_reliability_bins_match_calibration_error() -> None:
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


def test_score_histogram_counts_every_study() -> None:
    label = np.array([0, 0, 1, 1, 1])
    counts = plots.score_histogram(label, np.array([0.0, 0.05, 0.5, 1.0, 0.96]))
    assert sum(counts["normal"]) == 2
    assert (counts["abnormal"][10], counts["abnormal"][19]) == (1, 2)
    assert (counts["normal_median"], counts["abnormal_median"]) == (0.025, 0.96)
    assert plots.score_histogram(label[:2], np.array([0.1, 0.2]))["abnormal_median"] is None


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-0.3, 0.17), (0, 3), (12, 13.5), (0, 1e6), (0.2, 0.2001), (-1e-5, 1e-5), (0, 60_000)]
)
def test_ticks_are_few_evenly_spaced_and_inside(low: float, high: float) -> None:
    content = svg_tools.ticks(low, high)
    assert 2 <= len(content) <= 8
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in content)
    assert len(set(np.diff(content).round(9))) == 1
    assert all(len(svg_tools.format_tick(value)) <= 7 for value in content)


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
def test_format_tick(value: float, text: str) -> None:
    assert svg_tools.format_tick(value) == text


def test_axes_map_data_to_pixels() -> None:
    axes = svg_tools.Axes(left_px=10, top_px=20, width_px=100, height_px=50, x=(0, 2), y=(-1, 1))
    assert (axes.px(0), axes.px(1), axes.px(2)) == (10, 60, 110)
    assert (axes.py(-1), axes.py(0), axes.py(1)) == (70, 45, 20)
    log = svg_tools.Axes(left_px=0, top_px=0, width_px=10, height_px=30, y=(1e-3, 1.0), log=True)
    assert log.py(1e-2) == pytest.approx(20)
    marks = svg_tools.line(axes, [0, 1, 1, 2], [0, 1, 1, 0])
    assert 'points="10.0,45.0 60.0,20.0 110.0,45.0"' in marks


def test_forest_draws_intervals_at_their_values() -> None:
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


def test_ellipsize_keeps_both_ends() -> None:
    assert svg_tools.ellipsize("abcdefghij", 10) == "abcdefghij"
    assert svg_tools.ellipsize("abcdefghijk", 10) == "abcd…ghijk"


def test_html_escapes_text_and_attributes() -> None:
    content = html.element("td", 'a < "b" & c', html.Html("<b>d</b>"), class_="x", aria_label='e"f')
    assert content == '<td class="x" aria-label="e&quot;f">a &lt; &quot;b&quot; &amp; c<b>d</b></td>'
    assert "<td>&lt;i&gt;</td>" in html.table(["", "n"], [["a", "<i>"]])


def test_bar_heights_are_proportional_to_values() -> None:
    svg = html.bars(["a", "b"], {"studies": [10, 5]}, "ten and five")
    heights = [float(value) for value in re.findall(r'height="([\d.]+)"', svg)]
    assert heights[1] == pytest.approx(2 * heights[2], abs=0.11)
    assert 'aria-label="ten and five"' in svg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in MURA's layout: four studies of three patients, one file that is no image, one AppleDouble file."""
    root = tmp_path / "data"
    for split, study_type, patient, study, gray in (
        ("train", "XR_WRIST", "patient00001", "study1_positive", 200),
        ("train", "XR_WRIST", "patient00001", "study2_negative", 40),
        ("train", "XR_HIP", "patient00002", "study1_negative", 40),
        ("valid", "XR_WRIST", "patient00003", "study1_positive", 200),
    ):
        study_folder = root / split / study_type / patient / study
        study_folder.mkdir(parents=True)
        Image.new("L", (60, 90), gray).save(study_folder / "image1.png")
        Image.new("RGB", (100, 80), (gray,) * 3).save(study_folder / "image2.png")
    (study_folder / "image3.png").write_bytes(b"no image")
    (study_folder / "._image1.png").write_bytes(b"\0\5\x16\7")
    return root


COPIES = {"duplicate across splits": 2, "duplicate within a split": 2}  # uniform gray images, equal in several studies


def check_counts(content: dict[str, Any]) -> None:
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert [content[f"num_{unit}"] for unit in ("patients", "studies", "radiographs")] == [3, 4, 9]
    assert (content["normal_studies"], content["abnormal_radiographs"]) == (2, 5)
    [valid] = [line for line in content["by_study_type"] if line["split"] == "valid"]
    assert (valid["study_type"], valid["num_patients"], valid["num_radiographs"]) == ("XR_WRIST", 1, 3)
    assert content["views_per_study"] == {"2": 3, "3": 1}
    assert content["unknown_study_types"] == ["XR_HIP"]
    assert not content["is_mura_v1_1"]
    assert content["exposure"]["num_radiographs"] == 8
    assert content["exposure"]["study_type"]["XR_WRIST"]["abnormal_mean"] == pytest.approx(200, abs=1)
    assert content["exposure"]["study_type"]["XR_HIP"]["abnormal_mean"] is None


@pytest.mark.filterwarnings("error")
def test_describe_a_folder(folder: Path, tmp_path: Path) -> None:
    content = dataset.describe(folder, tmp_path / "page.html")
    check_counts(content)
    assert content["sizes"]["modes"] == {"L": 4, "RGB": 4}
    assert (content["sizes"]["num_told"], content["sizes"]["num_untold"]) == (8, 1)
    assert content["sizes"]["longest_px"] == {"min": 90, "median": 95, "max": 100}
    assert content["sizes"]["smallest"] == "60 x 90"
    assert sum(content["sizes"]["longest_histogram"]["counts"]) == 8
    assert content["defects"] == {**COPIES, "not a radiograph": 1, "not_image, among 9 sampled": 1}
    page = check_page(tmp_path / "page.html")
    assert "9 radiographs, 4 studies (2 normal, 2 abnormal), 3 patients" in page.text
    assert "Study types that MURA does not have: Hip (XR_HIP)." in page.text
    assert footnotes(page) == {"a": "The sample contains no radiograph with this label."}
    assert "not_image, among 9 sampled 1" in page.text
    assert dataset.summary_text(content).splitlines()[-1] == "  defect: not_image, among 9 sampled: 1"


def test_describe_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", size=32, workers=1, tune=0)
    content = dataset.describe(tmp_path / "shards", tmp_path / "page.html")
    check_counts(content)
    assert content["sizes"] == {"size_px": 32, "encoding": "raw"}
    assert content["defects"] == {**COPIES, "not a radiograph": 1, "not_image, not in the shards": 1}
    assert "Every radiograph is 32 x 32 pixels, stored as raw." in check_page(tmp_path / "page.html").text


def test_describe_rejects_missing_or_unfinished_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        dataset.describe(tmp_path / "nothing", tmp_path / "page.html")
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        dataset.describe(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
