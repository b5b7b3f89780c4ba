"""The report of an evaluation: one page of HTML that needs nothing else, and the same as JSON. It holds no radiograph.

    metrics.json's content, the table of studies, what is known of the run -> findings.py -> out/report.json
        findings -> figures.py -> out/pictures/*.svg           findings and pictures -> sections.py -> out/report.html

The page says first what was measured on what, and what it does not show; what is long is folded. What it was not told, it
says it was not told.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mura_dist.core import files
from mura_dist.metrics.entries import HEADLINE_METRICS
from mura_dist.metrics.summary import format_number
from mura_dist.reports import figures, findings, origins, sections, threshold_sections
from mura_dist.reports.cells import Found, Report, between, bullets
from mura_dist.reports.findings import TITLES
from mura_dist.reports.html import Html, banner, element, join, page, section, tile


def write(out: Path, *, metrics: dict[str, Any], studies: pd.DataFrame, context: dict[str, Any]) -> Path:
    """Write `out`/report.html, `out`/report.json and `out`/pictures; returns the page's path.

    metrics: as summary.compute_metrics gives it, or metrics.json holds it; studies: one line a study, as summary.compute_metrics takes it.
    context, all of it optional: title, history (metrics.jsonl's lines), roles (split -> sentence), conversion (of the shards'
    index), settings, environment, same_data, seconds, num_scored, licence; and, in place of what metrics.json says of them:
    split, threshold, operating_point, selected_on, checkpoint, members, trained_on and measured_on ("phantoms" or "radiographs"),
    manifest_sha256, num_damaged, note, terms.
    """
    found = findings.findings(metrics, studies, context)
    drawn = {picture.name: picture for picture in figures.figures(found)}
    for picture in drawn.values():
        files.write_text(out / "pictures" / f"{picture.name}.svg", picture.file())
    said = {name: {"alt": picture.alt, "caption": picture.caption} for name, picture in drawn.items()}
    files.write_json(out / "report.json", found | {"pictures": said})
    path = out / "report.html"
    files.write_text(path, page(found["title"], *_body(Report(found, drawn))))
    return path


def _body(report: Report) -> Iterator[Html]:
    head = [*_head(report)]
    whole = [
        (name, title, content)
        for name, title, content in (
            ("reading", "How to read this", [bullets(report.findings["how_to_read"], class_="columns")]),
            ("by-type", "By study type", [*sections.by_type(report)]),
            ("curves", "Curves and calls, all studies", [*sections.curves(report)]),
            ("calibration", "Probabilities and calibration", [*threshold_sections.calibration(report)]),
            ("operating-points", "Operating points", [*threshold_sections.operating(report)]),
            ("comparison", "Comparison", [*sections.comparison(report)]),
            ("subgroups", "Subgroups", [*sections.subgroups(report)]),
            ("each", "Each study type", [*sections.each(report)]),
            ("training", "Training", [*origins.training(report)]),
            ("data", "Data, settings, versions", [*origins.origins(report)]),
        )
        if content
    ]
    if footnotes := report.notes.listed():
        whole.append(("footnotes", "Footnotes", [footnotes]))
    yield from head
    links = (element("a", title, href=f"#{name}") for name, title, _ in whole)
    yield element("nav", *(join((" ", link)) for link in links), aria_label="Contents")
    for name, title, content in whole:
        yield section(title, *content, id=name)
    yield _footer(report.findings)


def _head(report: Report) -> Iterator[Html]:
    content, overall = report.findings, report.measured["overall"]
    yield element("h1", content["title"])
    yield element(
        "p", " · ".join(f"{key}: {value or 'not given'}" for key, value in content["about"].items()), class_="soft"
    )
    yield from map(banner, content["stamps"])
    tiles = [
        tile(TITLES[name], format_number(overall[name]), _interval_words(report, name)) for name in HEADLINE_METRICS
    ]
    yield element("div", *tiles, class_="tiles")
    for text in content["summary"]:
        yield element("p", text)
    for text in content["notes"]:
        yield element("p", f"Note: {text}.", class_="soft")


def _interval_words(report: Report, name: str) -> Html:
    overall = report.measured["overall"]
    if interval := between(overall, name):
        return join((f"95 %: {interval}", report.wilson_mark(overall, name)))
    return join(("no interval", report.absence(overall, name)))


def _footer(found: Found) -> Html:
    lines = (
        "This page holds no radiograph and loads nothing.",
        f"Terms: {found['terms']}.",
        f"MURA's licence: {found['licence']}.",
    )
    return element("footer", *(element("p", line) for line in lines))
