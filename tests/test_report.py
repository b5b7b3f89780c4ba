"""report.py and describe.py: pages that say what they must, load nothing and stay well-formed."""

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

from mura_dist import describe, html, measure, mura, report
from mura_dist.convert import convert
from mura_dist.refusal import Refusal

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
        "unreadable": [{"row": 1}],
    },
    "seconds": 12.34,
}


def written(out: Path, **changes: Any) -> Page:
    table = changes.pop("studies", studies())
    measured = measure.measure(table, resamples=100)
    path = report.write(out, metrics=measured, studies=table, context=CONTEXT | changes)
    assert path == out / "report.html"
    return check_page(path)


@pytest.mark.filterwarnings("error")
def test_report_says_everything(tmp_path: Path) -> None:
    page = written(tmp_path)
    overall = measure.measure(studies(), resamples=100)["overall"]
    for name in measure.METRICS:
        assert f"{overall[name]:.3f}" in page.text
        assert f"95 %: {overall[f'{name}_low']:.3f} to {overall[f'{name}_high']:.3f}" in page.text
    for words in (
        "Measured on 120 studies of 60 patients",
        "100 resamples of 60 patients, the clusters",
        "XR_HIP: kappa, auroc, specificity: one class only.",
        "XR_HIP (2 studies, 0 of the rarer label)",
        "Not drawn: XR_HIP. A curve needs studies of both labels.",
        "is only reported",
        "step-00000020",
        "1,234 studies",
        "ab" * 32,
        "9.8.7",
        "Evaluated in 12.3 s.",
        "too narrow",
        mura.LICENCE,
    ):
        assert words in page.text, words
    assert re.search(r"defect: not a radiograph 2 ", page.text)
    assert "optimistic" not in page.text
    assert "drawings" not in page.text
    assert "<script>alert" in page.text  # as text: check_page saw no element of that name


def test_pictures_are_files_and_part_of_the_page(tmp_path: Path) -> None:
    page = written(tmp_path)
    names = {path.stem for path in (tmp_path / "pictures").iterdir()}
    types = ("overall", "XR_ELBOW", "XR_HAND")
    assert names == {
        *("kappa", "auroc", "scores-XR_HIP", "curve-0", "curve-1", "curve-3", "curve-4", "curve-5"),
        *(f"{kind}-{name}" for kind in ("roc", "scores") for name in types),
    }
    assert len(page.labels) == len(names)
    for name in names:
        ElementTree.parse(tmp_path / "pictures" / f"{name}.svg")
    assert report.INK not in page.markup.split("</style>", 1)[1]


def test_history_of_a_resumed_run(tmp_path: Path) -> None:
    """Of a step logged twice the later line counts; what is null is left out; the epoch's learning rate is not a step's."""
    labels = "\n".join(written(tmp_path).labels)
    assert "Loss over training steps: step from 0.9 to 0.333; tune from 0.71 to 0.71" in labels
    assert "Learning rate over training steps: step from 0.001 to 0.0001" in labels
    assert "Kappa over training steps: tune from 0.25 to 0.25" in labels


@pytest.mark.parametrize(
    ("changes", "stamp"),
    [
        (
            {"trained_on": "phantoms", "measured_on": "phantoms"},
            "trained and measured on drawings: says nothing about radiographs",
        ),
        (
            {"trained_on": "phantoms", "measured_on": None},
            "trained and measured on drawings: says nothing about radiographs",
        ),
        ({"trained_on": "phantoms"}, "trained on drawings: the model has never seen a radiograph"),
        ({"measured_on": "phantoms"}, "measured on drawings: says nothing about radiographs"),
        ({"selected_on": "valid"}, "optimistic: this split chose the model"),
        ({"split": "tune"}, "optimistic: this split chose the model"),
        ({"split": "train"}, "optimistic: this split fitted the weights"),
        ({"same_data": False}, "not the shards the run was trained on"),
    ],
)
def test_stamps(changes: dict[str, Any], stamp: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "_pictures", lambda *_: iter(()))  # drawn in the other tests
    page = written(tmp_path, **changes)
    banners = re.findall(r'<p class="banner"[^>]*>([^<]*)', page.markup)
    assert len(banners) == 1
    assert stamp in banners[0]


@pytest.mark.filterwarnings("error")
def test_nothing_given_is_said(tmp_path: Path) -> None:
    empty = studies().iloc[:0]
    report.write(tmp_path, metrics=measure.measure(empty), studies=empty, context={})
    page = check_page(tmp_path / "report.html")
    assert "Measured on 0 studies of 0 patients" in page.text
    assert "Nothing could be measured." in page.text
    assert "Missing: kappa, auroc, sensitivity, specificity: no labelled studies." in page.text
    assert page.text.count("Not given to this report.") == 4
    assert "Split: not given" in page.text


@pytest.mark.filterwarnings("error")
def test_a_diverged_network_is_reported(tmp_path: Path) -> None:
    table = studies()
    table.loc[5, "probability"] = np.nan
    assert "1 of 120 studies have no finite probability" in written(tmp_path, studies=table).text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("history", [[], HISTORY])
def test_curves_is_a_picture(history: list[dict[str, Any]], tmp_path: Path) -> None:
    report.curves(history, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size[0] > 1000
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


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
    for split, study_type, patient, study, grey in (
        ("train", "XR_WRIST", "patient00001", "study1_positive", 200),
        ("train", "XR_WRIST", "patient00001", "study2_negative", 40),
        ("train", "XR_HIP", "patient00002", "study1_negative", 40),
        ("valid", "XR_WRIST", "patient00003", "study1_positive", 200),
    ):
        place = root / split / study_type / patient / study
        place.mkdir(parents=True)
        Image.new("L", (60, 90), grey).save(place / "image1.png")
        Image.new("RGB", (100, 80), (grey,) * 3).save(place / "image2.png")
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
    found = describe.describe(folder, tmp_path / "page.html")
    check_counts(found)
    assert found["sizes"]["modes"] == {"L": 4, "RGB": 4}
    assert (found["sizes"]["num_told"], found["sizes"]["num_untold"]) == (8, 1)
    assert found["sizes"]["longest_px"] == {"min": 90, "median": 95, "max": 100}
    assert found["sizes"]["smallest"] == "60 x 90"
    assert sum(found["sizes"]["longest_histogram"]["counts"]) == 8
    assert found["defects"] == {**COPIES, "not a radiograph": 1, "not_image, among 9 that were read": 1}
    page = check_page(tmp_path / "page.html")
    assert "9 radiographs, 4 studies (2 normal, 2 abnormal), 3 patients" in page.text
    assert "Study types unknown to MURA: XR_HIP." in page.text
    assert "not_image, among 9 that were read 1" in page.text
    assert describe.summary_text(found).splitlines()[-1] == "  defect: not_image, among 9 that were read: 1"


def test_describe_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "shards", size=32, workers=1, tune=0)
    found = describe.describe(tmp_path / "shards", tmp_path / "page.html")
    check_counts(found)
    assert found["sizes"] == {"size_px": 32, "encoding": "raw"}
    assert found["defects"] == {**COPIES, "not a radiograph": 1, "not_image, left out of the shards": 1}
    assert "Every radiograph is 32 x 32 pixels, stored as raw." in check_page(tmp_path / "page.html").text


def test_describe_refuses(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such folder"):
        describe.describe(tmp_path / "nothing", tmp_path / "page.html")
    (tmp_path / "conversion.json").write_text("{}")
    with pytest.raises(Refusal, match="not finished"):
        describe.describe(tmp_path, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
