"""Write the report of an evaluation: a self-contained HTML page, and its content as JSON. It holds no radiograph.

content of metrics.json, the table of studies, the run's context -> findings.py -> out/report.json
findings -> figures.py -> out/pictures/*.svg
findings and pictures -> sections.py, threshold_sections.py, origins.py -> out/report.html
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mura_dist.core import files
from mura_dist.metrics.entries import HEADLINE_METRICS
from mura_dist.metrics.summary import format_number
from mura_dist.reports import figures, findings, origins, sections, threshold_sections
from mura_dist.reports.cells import Report, bullet_list, format_interval
from mura_dist.reports.findings import TITLES, JsonObject
from mura_dist.reports.html import Html, banner, element, join, page, section, tile


def write(out: Path, *, metrics: dict[str, Any], studies: pd.DataFrame, context: dict[str, Any]) -> Path:
    """Write report.html, report.json and a folder of pictures into `out`.

    Args:
        out: The output folder.
        metrics: The result of summary.compute_metrics, or the content of metrics.json.
        studies: One row a study, as summary.compute_metrics takes it.
        context: Optional entries: title, history (the lines of metrics.jsonl), roles (split -> sentence), conversion (from the
            shards' index), settings, environment, same_data, seconds, num_scored, licence. These override an entry of
            metrics.json: split, threshold, operating_point, selected_on, checkpoint, members, trained_on and measured_on
            ("phantoms" or "radiographs"), manifest_sha256, num_damaged, note, terms.

    Returns:
        The path of report.html.
    """
    content = findings.build_findings(metrics, studies, context)
    pictures = {picture.name: picture for picture in figures.draw_figures(content)}
    for picture in pictures.values():
        files.write_text(out / "pictures" / f"{picture.name}.svg", picture.file())
    captions = {name: {"alt": picture.alt, "caption": picture.caption} for name, picture in pictures.items()}
    files.write_json(out / "report.json", content | {"pictures": captions})
    path = out / "report.html"
    files.write_text(path, page(content["title"], *_body(Report(content, pictures))))
    return path


def _body(report: Report) -> Iterator[Html]:
    head = [*_head(report)]
    chapters = [
        (name, title, content)
        for name, title, content in (
            ("reading", "How to read this", [bullet_list(report.findings["how_to_read"], class_="columns")]),
            ("by-type", "By study type", [*sections.by_type(report)]),
            ("curves", "Curves and calls, all studies", [*sections.curves(report)]),
            ("calibration", "Probabilities and calibration", [*threshold_sections.calibration(report)]),
            ("operating-points", "Operating points", [*threshold_sections.operating_points(report)]),
            ("comparison", "Comparison", [*sections.comparison(report)]),
            ("subgroups", "Subgroups", [*sections.subgroups(report)]),
            ("each", "Each study type", [*sections.study_type_details(report)]),
            ("training", "Training", [*origins.training(report)]),
            ("data", "Data, settings, versions", [*origins.origins(report)]),
        )
        if content
    ]
    if footnotes := report.notes.as_list():
        chapters.append(("footnotes", "Footnotes", [footnotes]))
    yield from head
    links = (element("a", title, href=f"#{name}") for name, title, _ in chapters)
    yield element("nav", *(join((" ", link)) for link in links), aria_label="Contents")
    for name, title, content in chapters:
        yield section(title, *content, id=name)
    yield _footer(report.findings)


def _head(report: Report) -> Iterator[Html]:
    content, overall = report.findings, report.measured["overall"]
    yield element("h1", content["title"])
    yield element(
        "p", " · ".join(f"{key}: {value or 'not available'}" for key, value in content["about"].items()), class_="soft"
    )
    yield from map(banner, content["stamps"])
    tiles = [
        tile(TITLES[name], format_number(overall[name]), _interval_text(report, name)) for name in HEADLINE_METRICS
    ]
    yield element("div", *tiles, class_="tiles")
    for text in content["summary"]:
        yield element("p", text)
    for text in content["notes"]:
        yield element("p", f"Note: {text}.", class_="soft")


def _interval_text(report: Report, name: str) -> Html:
    overall = report.measured["overall"]
    if interval := format_interval(overall, name):
        return join((f"95 %: {interval}", report.wilson_mark(overall, name)))
    return join(("no interval", report.missing_mark(overall, name)))


def _footer(findings: JsonObject) -> Html:
    lines = (
        "This page holds no radiograph and loads nothing from the network.",
        f"Terms: {findings['terms']}.",
        f"MURA's license: {findings['licence']}.",
    )
    return element("footer", *(element("p", line) for line in lines))
