"""Test the report in Chromium: its length on a desktop, no clipped text at any width, all details visible in print."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import layout

from mura_dist.data import mura
from mura_dist.metrics import calibration, summary
from mura_dist.reports import evaluation, html

MAX_PX = 4500  # below the first screen, at 1280 px, for seven study types


def studies(num: int, seed: int) -> pd.DataFrame:
    """Return studies of MURA's seven study types. All abnormal humerus studies are called abnormal."""
    rng = np.random.default_rng(seed)
    study_type = np.array(mura.STUDY_TYPES)[np.arange(num) % len(mura.STUDY_TYPES)]
    label = rng.integers(0, 2, num)
    logit = 2.0 * label - 1 + rng.normal(0, 2, num)
    is_separable = (study_type == "XR_HUMERUS") & (label == 1)
    logit[is_separable] = np.abs(logit[is_separable]) + 0.01
    frame = {
        "study": [f"s{index}" for index in range(num)],
        "patient": [f"p{seed}-{index // 2}" for index in range(num)],
    }
    frame |= {"study_type": study_type, "label": label, "probability": 1 / (1 + np.exp(-logit))}
    return pd.DataFrame(frame | {"num_views": np.arange(num) % 4 + 1, "exposure": rng.uniform(20, 90, num)})


def write_report(out: Path, tune: int = 100) -> Path:
    """Write the report of a run as evaluate does, with thresholds fitted to the tune studies."""
    points = calibration.fit(studies(tune, 1), {}, mura.STUDY_TYPES)
    table = calibration.apply(points, studies(280, 0))
    table = table.assign(call=(table["probability"] > 0.5).astype(int))
    metrics = summary.compute_metrics(table, resamples=200, prevalence=0.05) | {
        "subgroups": summary.compute_subgroup_metrics(table, resamples=200),
        "calibration": points.model_dump(mode="json"),
        "operating_points": calibration.compute_operating_points(points, table, resamples=200),
        "split": "valid",
        "threshold": 0.5,
        "checkpoint": "step-00000132",
        "trained_on": "phantoms",
        "measured_on": "phantoms",
    }
    steps = [
        {
            "kind": "step",
            "step": step,
            "loss": 1 / step,
            "learning_rate": 1e-3,
            "images_per_s": 40,
            "data_wait_share": 0.1,
        }
        for step in range(1, 60)
    ]
    epochs = [
        {"kind": "epoch", "step": step, "tune_loss": 0.5, "tune_auroc": 0.8, "tune_kappa": 0.5} for step in (20, 40)
    ]
    context = {
        "title": "demo: step-00000132 on valid",
        "history": steps + epochs,
        "roles": {"train": "fits the weights", "valid": "is only reported"},
        "settings": {
            f"setting_{index}": value for index, value in enumerate([3, True, "", 1e-4, ["a", "b"], {"c": 1}] * 8)
        },
        "environment": {"torch": "9.8.7", "ranks": [{"host": "h", "gpu": None}], "sources": "ab" * 32},
        "conversion": {"size": 320, "splits": {"valid": {"num_studies": 280, "num_radiographs": 700}}},
        "manifest_sha256": "ab" * 32,
        "seconds": 12.0,
    }
    return evaluation.write(out, metrics=metrics, studies=table, context=context)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with layout.browser() as started:
        yield started


def test_report_is_short_on_desktop(chromium: Any, report: Path) -> None:
    with layout.opened(chromium, report, layout.DESKTOP) as page:
        first = page.locator("section").first
        assert first.locator("h2").inner_text() == "How to read this"
        top = first.bounding_box()["y"]
        assert top < 900  # the first screen
        assert layout.height(page) - top <= MAX_PX


@pytest.mark.parametrize("width", [layout.DESKTOP, layout.PHONE])
@pytest.mark.parametrize("unfolded", [False, True])
def test_no_text_is_clipped(chromium: Any, report: Path, width: int, unfolded: bool) -> None:
    with layout.opened(chromium, report, width) as page:
        if unfolded:
            layout.unfold(page)
        assert layout.cut_text(page) == []


def test_details_open_without_script_and_in_print(chromium: Any, report: Path) -> None:
    with layout.opened(chromium, report, layout.DESKTOP) as page:
        table = page.locator("details:has(summary:text-is('By number of views')) table")
        assert not table.is_visible()
        page.locator("summary", has_text="By number of views").click()
        assert table.is_visible()
    with layout.opened(chromium, report, layout.DESKTOP) as page:
        page.emulate_media(media="print")
        assert page.locator("details[open]").count() == 0
        for table in page.locator("details table").all():
            assert table.bounding_box()["height"] > 20


def test_footnote_letter_links_to_footnote(chromium: Any, report: Path) -> None:
    with layout.opened(chromium, report, layout.DESKTOP) as page:
        row = page.locator("tr", has_text="XR_HUMERUS").first
        assert "Humerus" in row.locator("th").inner_text()
        row.locator("sup a").first.click()
        note = page.locator("li:target")
        assert note.inner_text().startswith("a Wilson interval, which assumes independent studies")
        assert note.evaluate("one => one.getBoundingClientRect().bottom <= innerHeight")


@pytest.mark.parametrize(("tune", "wide"), [(60, True), (1500, False)])
def test_wide_band_of_few_tune_studies_has_note(tune: int, wide: bool, tmp_path: Path) -> None:
    path = write_report(tmp_path, tune)
    content = json.loads((tmp_path / "report.json").read_bytes())
    band = content["metrics"]["operating_points"]["overall"]["band"]
    assert band["share_uncertain"] > 0.25  # also with many tune studies, where the model is the reason
    if not wide:
        assert content["wide_band"] is None
        return
    share, num = round(100 * band["share_uncertain"]), content["metrics"]["calibration"]["num_studies"]
    assert num == 60
    assert content["wide_band"].startswith(
        f"The band is wide: it contains {share} % of the studies. It was fitted on only 60 tune studies ("
    )
    assert content["wide_band"] in path.read_text()


def test_study_types_have_display_names_and_no_json_syntax(report: Path) -> None:
    text = report.read_text()
    assert not re.search(r"[{[]&quot;|[>: ](true|false|null)[<,;]", text.split("</style>")[1])
    for code in mura.STUDY_TYPES:
        assert f"{mura.display_name(code)}<small>{code}</small>" in text
        assert f">{code}<" not in text.replace(f"<small>{code}</small>", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("", "-"),
        (True, "yes"),
        (False, "no"),
        (0.001, "0.001"),
        ([], "none"),
        ([1, "a", True], "1, a, yes"),
        ({"host": "h", "gpu": None}, "host: h; gpu: -"),
    ],
)
def test_format_value(value: Any, text: str) -> None:
    assert html.format_value(value) == text
