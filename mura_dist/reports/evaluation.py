"""The report of an evaluation: one page of HTML that needs nothing else, and the same as JSON. It holds no radiograph.

    metrics.json's content, the table of studies, what is known of the run -> findings.py -> out/report.json
        findings -> figures.py -> out/pictures/*.svg           findings and pictures -> sections.py -> out/report.html

The page says first what was measured on what, and what it does not show; what is long is folded. What it was not told, it
says it was not told.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from mura_dist.core import files
from mura_dist.metrics.summary import METRICS, number
from mura_dist.reports import figures, findings, sections
from mura_dist.reports.findings import TITLES
from mura_dist.reports.html import Html, banner, element, facts, folded, join, page, section, table, tile
from mura_dist.reports.sections import NOT_GIVEN, Found, Pictures, between, bullets, shown

MOST_LINES = 20  # of a table that stands open


def write(out: Path, *, metrics: dict[str, Any], studies: pd.DataFrame, context: dict[str, Any]) -> Path:
    """Write `out`/report.html, `out`/report.json and `out`/pictures; returns the page's path.

    metrics: as summary.measure gives it, or metrics.json holds it; studies: one line a study, as summary.measure takes it.
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
    files.write_text(path, page(found["title"], *_body(found, drawn)))
    return path


def _body(found: Found, drawn: Pictures) -> Iterator[Html]:
    whole = [
        (name, title, content)
        for name, title, content in (
            ("by-type", "By study type", [*sections.by_type(found, drawn)]),
            ("curves", "Curves and calls, all studies", [*sections.curves(found, drawn)]),
            ("calibration", "Probabilities and calibration", [*sections.calibration(found, drawn)]),
            ("operating-points", "Operating points", [*sections.operating(found)]),
            ("comparison", "Comparison", [*sections.comparison(found, drawn)]),
            ("subgroups", "Subgroups", [*sections.subgroups(found)]),
            ("each", "Each study type", [*sections.each(found, drawn)]),
            ("reading", "How to read this", [bullets(found["how_to_read"])]),
            ("training", "Training", [*_training(found, drawn)]),
            ("data", "Data, settings, versions", [*_origins(found)]),
        )
        if content
    ]
    yield from _head(found)
    links = (element("a", title, href=f"#{name}") for name, title, _ in whole)
    yield element("nav", *(join((" ", link)) for link in links), aria_label="Contents")
    for name, title, content in whole:
        yield section(title, *content, id=name)
    yield _footer(found)


def _head(found: Found) -> Iterator[Html]:
    overall = found["metrics"]["overall"]
    yield element("h1", found["title"])
    yield element(
        "p", " · ".join(f"{key}: {value or 'not given'}" for key, value in found["about"].items()), class_="soft"
    )
    yield from map(banner, found["stamps"])
    tiles = [tile(TITLES[name], number(overall[name]), _interval_words(overall, name)) for name in METRICS]
    yield element("div", *tiles, class_="tiles")
    for text in found["summary"]:
        yield element("p", text)
    for text in found["notes"]:
        yield element("p", f"Note: {text}.", class_="soft")
    for text in found["missing"].get("overall", []):
        yield element("p", f"Missing: {text}.", class_="soft")


def _interval_words(group: Found, name: str) -> str:
    interval = between(group, name)
    return f"95 %: {interval}" if interval else "no interval"


# ---- origins


def _training(found: Found, drawn: Pictures) -> Iterator[Html]:
    training, evaluation = found["training"], found["evaluation"]
    yield from shown(drawn, [name for name in drawn if name.startswith("curve-")])
    if training["ledger"] is None:
        yield NOT_GIVEN
    lines = dict(_ledger(training["ledger"] or {}, evaluation or {}))
    if lines:
        yield element("h3", "Where the time went")
        yield facts(lines)


def _ledger(ledger: Found, evaluation: Found) -> Iterator[tuple[str, str]]:
    for key, name, form in (
        ("num_steps", "steps", "{:,}"),
        ("images_per_s_median", "radiographs a second in training, median", "{:.1f}"),
        ("data_wait_share_median", "share of the steps' time spent waiting for data, median", "{:.3f}"),
        ("overhead_share_median", "share of the time that was neither step nor evaluation, median", "{:.3f}"),
        ("evaluation_s_median", "seconds of an evaluation on the way, median", "{:.1f}"),
        ("evaluation_s_total", "seconds of all of them", "{:,.1f}"),
        ("limited_by", "what limited it, at the end", "{}"),
        ("skipped_steps", "steps left out", "{:,}"),
        ("damaged_samples", "damaged samples met", "{:,}"),
    ):
        if ledger.get(key) is not None:
            yield name, form.format(ledger[key])
    for key, name, form in (
        ("seconds", "seconds of this evaluation, start included", "{:,.1f}"),
        ("num_radiographs", "radiographs scored in it", "{:,}"),
        ("radiographs_per_s", "radiographs a second in it", "{:.1f}"),
    ):
        if evaluation.get(key) is not None:
            yield name, form.format(evaluation[key])


def _origins(found: Found) -> Iterator[Html]:
    for title, key in (
        ("What each split did", "roles"),
        ("The data, and what its check found", "data"),
        ("Settings", "settings"),
    ):
        content = facts({name: _plain(value) for name, value in found[key].items()}) if found[key] else NOT_GIVEN
        yield folded(title, content) if len(found[key]) > MOST_LINES else join((element("h3", title), content))
    if members := found["members"]:
        yield element("h3", "Members of the ensemble")
        keys = [key for key in ("run", "checkpoint", "architecture", "select_loss", "sha256") if key in members[0]]
        yield table(
            [key.replace("_", " ") for key in keys], [[_plain(member.get(key)) for key in keys] for member in members]
        )
    yield element("h3", "Made with")
    yield facts({name: _plain(value) for name, value in found["environment"].items()})


def _plain(value: Any) -> str:
    """A setting as a person reads it; nested ones as JSON."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _footer(found: Found) -> Html:
    lines = (
        "This page holds no radiograph and loads nothing.",
        f"Terms: {found['terms']}.",
        f"MURA's licence: {found['licence']}.",
    )
    return element("footer", *(element("p", line) for line in lines))
