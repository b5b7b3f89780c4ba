"""The report of an evaluation: pictures and one page of HTML that needs nothing else. It holds no radiograph.

    metrics.json's content, the table of studies, what is known of the run -> out/report.html, out/pictures/*.svg
    metrics.jsonl's lines -> curves.png

The page says first what was measured on what, and what it does not show. What it was not told, it says it was not told.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import __version__, atomic, mura
from .html import (
    NEGATIVE_COLOUR,
    POSITIVE_COLOUR,
    Html,
    banner,
    element,
    facts,
    figure,
    join,
    page,
    section,
    table,
    tile,
)
from .measure import METRICS, absences, groups, number, with_interval
from .metrics import CELLS, roc

INK = "#1b1f24"  # stands for the page's own ink in inline pictures
FEW_STUDIES, FEW_OF_A_CLASS = 50, 10
TITLES = {"kappa": "Kappa", "auroc": "AUROC", "sensitivity": "Sensitivity", "specificity": "Specificity"}
NOT_GIVEN = element("p", "Not given to this report.", class_="soft")

_STYLE = {
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "svg.fonttype": "none",  # letters stay letters: the page's own font, found by a search, read aloud
    "svg.hashsalt": "mura_dist",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "grid.alpha": 0.25,
}


@dataclass(frozen=True)
class Picture:
    """A figure as SVG. `alt` says what it shows to those who cannot see it; at `width_px` its letters suit the page."""

    name: str
    svg: str
    width_px: int
    alt: str
    caption: str = ""


def write(out: Path, *, metrics: dict[str, Any], studies: pd.DataFrame, context: dict[str, Any]) -> Path:
    """Write `out`/report.html and `out`/pictures; returns the page's path.

    metrics: as metrics.measure gives it, or metrics.json holds it; studies: as metrics.study_table gives it. context,
    all of it optional: title, split, selected_on, checkpoint, trained_on and measured_on ("phantoms" or "radiographs"),
    threshold, history (metrics.jsonl's lines), roles (split -> sentence), conversion, settings, environment,
    manifest_sha256, same_data, seconds, terms, licence.
    """
    with matplotlib.rc_context(_STYLE):
        pictures = list(_pictures(metrics, studies, context))
    for picture in pictures:
        atomic.write_text(out / "pictures" / f"{picture.name}.svg", picture.svg)
    inline = {picture.name: figure(_inline(picture), picture.caption) for picture in pictures}
    body = (*_head(metrics, context), *_results(metrics, context, inline), *_origins(context, inline), _footer(context))
    path = out / "report.html"
    atomic.write_text(path, page(context.get("title") or "Report", *body))
    return path


def curves(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the training curves of metrics.jsonl's lines into a PNG file; a panel without data says so."""
    with matplotlib.rc_context(_STYLE):
        drawing = Figure(figsize=(11, 6), layout="constrained")
        for axes, (title, lines, scale) in zip(drawing.subplots(2, 3).flat, _panels(history), strict=True):
            _draw_panel(axes, title, lines, scale)
        data = io.BytesIO()
        drawing.savefig(data, format="png", dpi=130, metadata={"Software": None})
    atomic.write_bytes(path, data.getvalue())


# ---- words


def _head(metrics: dict[str, Any], context: dict[str, Any]) -> Iterator[Html]:
    overall, split = metrics["overall"], context.get("split")
    yield element("h1", context.get("title") or "Report")
    known = {"Split": split, "Checkpoint": context.get("checkpoint"), "Trained on": context.get("trained_on")}
    yield element("p", " · ".join(f"{key}: {value or 'not given'}" for key, value in known.items()), class_="soft")
    yield from map(banner, _warnings(context))
    tiles = [tile(TITLES[name], number(overall[name]), _interval_words(overall, name)) for name in METRICS]
    yield element("div", *tiles, class_="tiles")
    yield element("p", _summary(overall, split, context.get("threshold")))
    if overall["confusion"] is not None:
        yield element("p", f"Intervals: {overall['interval_method']}. {_INTERVAL_MEANS}")
    for text in absences(overall):
        yield element("p", f"Missing: {text}.", class_="soft")


_INTERVAL_MEANS = (
    "They cover which patients happened to be in the data; they do not cover another training run, another hospital, "
    "or wrong labels."
)


def _warnings(context: dict[str, Any]) -> Iterator[str]:
    split, trained_on = context.get("split"), context.get("trained_on")
    measured_on = context.get("measured_on") or trained_on
    if trained_on == measured_on == "phantoms":
        yield "trained and measured on drawings: says nothing about radiographs"
    elif trained_on == "phantoms":
        yield "trained on drawings: the model has never seen a radiograph"
    elif measured_on == "phantoms":
        yield "measured on drawings: says nothing about radiographs"
    if split is not None and split == context.get("selected_on"):
        yield f"optimistic: this split chose the model ({split} drove the learning rate and picked the checkpoint)"
    if split == "train":
        yield "optimistic: this split fitted the weights; it says nothing about studies the model has not seen"
    if context.get("same_data") is False:
        yield "these are not the shards the run was trained on; if a patient is in both, the numbers are optimistic"


def _summary(group: dict[str, Any], split: str | None, threshold: float | None) -> str:
    patients = "unknown patients" if group["num_patients"] is None else _count(group["num_patients"], "patient")
    text = (
        f"Measured on {_count(group['num_studies'], 'study')} of {patients}{f', the split {split}' if split else ''}. "
    )
    cut = "its threshold (not given)" if threshold is None else f"{threshold:g}"
    text += f"A study is called abnormal where the mean probability over its views is above {cut}. "
    cells = group["confusion"]
    if cells is None:
        return text + "Nothing could be measured."
    abnormal, normal = cells["tp"] + cells["fn"], cells["tn"] + cells["fp"]
    return (
        f"{text}Of {_count(abnormal, 'abnormal study')}, {cells['tp']:,} were called abnormal; "
        f"of {_count(normal, 'normal study')}, {cells['tn']:,} were called normal."
    )


def _count(num: int, noun: str) -> str:
    return f"{num:,} {noun if num == 1 else noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def _interval_words(group: dict[str, Any], name: str) -> str:
    low, high = group[f"{name}_low"], group[f"{name}_high"]
    return "no interval" if low is None or high is None else f"95 %: {number(low)} to {number(high)}"


def _few(metrics: dict[str, Any]) -> list[str]:
    """Groups too small to say much about."""
    found = []
    for name, group in groups(metrics).items():
        cells = group["confusion"] or dict.fromkeys(CELLS, 0)
        rarer = min(cells["tp"] + cells["fn"], cells["tn"] + cells["fp"])
        if group["num_studies"] < FEW_STUDIES or rarer < FEW_OF_A_CLASS:
            found.append(f"{name} ({_count(group['num_studies'], 'study')}, {rarer} of the rarer label)")
    return found


# ---- sections


def _results(metrics: dict[str, Any], context: dict[str, Any], inline: Mapping[str, Html]) -> Iterator[Html]:
    few = _few(metrics)
    small = f"Few studies: {'; '.join(few)}. Their intervals are wide where there are any; rank no study types by them."
    yield section(
        "By study type",
        _metrics_table(metrics),
        *([element("p", small)] if few else []),
        *_missing(metrics),
        element("div", *(inline[name] for name in ("kappa", "auroc") if name in inline), class_="wide pictures"),
        _other_intervals(metrics),
    )
    yield section("Calls against labels, overall", *_confusion(metrics["overall"]))
    yield _gallery("ROC curves", "roc", metrics, inline, "A curve needs studies of both labels.")
    yield _gallery("Probabilities by label", "scores", metrics, inline, "No studies to draw.")
    yield section("How to read this", element("ul", *(element("li", line) for line in _reading(context))))


def _metrics_table(metrics: dict[str, Any]) -> Html:
    rows = []
    for name, group in groups(metrics).items():
        cells = group["confusion"] or dict.fromkeys(CELLS, "-")
        patients = "-" if group["num_patients"] is None else f"{group['num_patients']:,}"
        values = [_stacked(group, key) for key in METRICS]
        rows.append((name, f"{group['num_studies']:,}", patients, *values, *(cells[key] for key in CELLS)))
    header = ("", "Studies", "Patients", *(TITLES[key] for key in METRICS), *(key.upper() for key in CELLS))
    caption = "Per study. In small print the 95 % interval; TN, FP, FN, TP count studies, positive means abnormal."
    return table(header, rows, caption)


def _stacked(group: dict[str, Any], name: str) -> Html:
    value, _, interval = with_interval(group, name).partition(" ")
    return join((value, *([element("small", interval.strip("[]").replace(", ", " to "))] if interval else [])))


def _missing(metrics: dict[str, Any]) -> list[Html]:
    lines = [f"{name}: {text}." for name, group in metrics["by_study_type"].items() for text in absences(group)]
    if not lines:
        return []
    return [element("h3", "What is missing above, and why"), element("ul", *(element("li", line) for line in lines))]


def _other_intervals(metrics: dict[str, Any]) -> Html:
    rows = []
    for name, group in groups(metrics).items():
        kinds = [(group[f"{kind}_low"], group[f"{kind}_high"]) for kind in ("kappa", "kappa_fce", "kappa_official")]
        cells = ["-" if None in ends else f"{number(ends[0])} to {number(ends[1])}" for ends in kinds]
        rows.append((name, number(group["kappa"]), *cells))
    return element(
        "details",
        element("summary", "Kappa's interval, computed in three ways"),
        element(
            "p",
            "This page uses the bootstrap over patients. Fleiss, Cohen and Everitt's formula takes studies as "
            "independent. The official scorer's puts a variance where a standard error belongs and is many times too "
            "narrow: it is here to be compared with published numbers, and for nothing else.",
        ),
        table(("", "Kappa", "Bootstrap over patients", "Fleiss-Cohen-Everitt", "Official scorer (too narrow)"), rows),
    )


def _confusion(group: dict[str, Any]) -> list[Html]:
    cells = group["confusion"]
    if cells is None:
        return [element("p", f"None: {group['reasons']['confusion']}.")]
    lines = (("Normal", cells["tn"], cells["fp"]), ("Abnormal", cells["fn"], cells["tp"]))
    rows = [(f"Label: {name.lower()}", *(_share(cell, sum(pair)) for cell in pair)) for name, *pair in lines]
    return [table(("", "Called normal", "Called abnormal"), rows, "Studies, and their share of those with this label.")]


def _share(num: int, of: int) -> Html:
    return join((f"{num:,}", element("small", f"{num / of:.1%}" if of else "-")))


def _gallery(title: str, kind: str, metrics: dict[str, Any], inline: Mapping[str, Html], otherwise: str) -> Html:
    found = [inline[f"{kind}-{name}"] for name in groups(metrics) if f"{kind}-{name}" in inline]
    absent = [name for name in groups(metrics) if f"{kind}-{name}" not in inline]
    note = [element("p", f"Not drawn: {', '.join(absent)}. {otherwise}", class_="soft")] if absent else []
    return section(title, element("div", *found, class_="pictures"), *note)


def _reading(context: dict[str, Any]) -> Iterator[str]:
    yield "Kappa is the agreement of calls with labels beyond chance: 0 is chance, 1 is perfect."
    yield (
        "AUROC is the chance that an abnormal study gets a higher probability than a normal one. It does not depend on "
        "the threshold, the other numbers do."
    )
    yield "A probability is the network's output; how often studies of that probability are abnormal was not measured."
    if "radiographs" in (context.get("trained_on"), context.get("measured_on")):
        yield (
            "Where these are MURA's: its labels are noisy, and about half of its positives show hardware or plaster, "
            "so part of what is learned is to see metal. The paper's kappa of 0.705 is of other studies with another "
            "gold standard: do not compare it with the numbers on this page."
        )


def _origins(context: dict[str, Any], inline: Mapping[str, Html]) -> Iterator[Html]:
    drawn = [inline[name] for name in inline if name.startswith("curve-")]
    yield section("Training", element("div", *drawn, class_="pictures") if drawn else NOT_GIVEN)
    yield section("What each split did", _facts_or_not(context.get("roles")))
    yield section("The data", _facts_or_not(_data(context)))
    yield section("Settings", _facts_or_not(context.get("settings")))
    yield section("Made with", _facts_or_not({"mura-dist": __version__} | dict(context.get("environment") or {})))


def _data(context: dict[str, Any]) -> dict[str, Any]:
    conversion = dict(context.get("conversion") or {})
    found: dict[str, Any] = {}
    if context.get("manifest_sha256"):
        found["manifest.csv, SHA-256"] = context["manifest_sha256"]
    for split, part in dict(conversion.pop("splits", {})).items():
        found[f"split {split}"] = f"{part['num_studies']:,} studies, {part['num_radiographs']:,} readable radiographs"
    defects = dict(conversion.pop("defects", {}))
    unreadable = conversion.pop("unreadable", [])
    found |= {str(key).replace("_", " "): value for key, value in conversion.items()}
    found["unreadable files"] = len(unreadable) if isinstance(unreadable, list) else unreadable
    found |= {f"defect: {name}": len(seen) if isinstance(seen, list) else seen for name, seen in defects.items()}
    return found if conversion or defects or len(found) > 1 else {}


def _facts_or_not(values: Mapping[str, Any] | None) -> Html:
    return facts({key: _plain(value) for key, value in values.items()}) if values else NOT_GIVEN


def _plain(value: Any) -> str:
    """A setting as a person reads it; nested ones as JSON."""
    if value is None or value == "":
        return "-"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _footer(context: dict[str, Any]) -> Html:
    seconds = context.get("seconds")
    took = f"Evaluated in {seconds:.1f} s. " if isinstance(seconds, int | float) else ""
    terms, licence = context.get("terms") or mura.TERMS, context.get("licence") or mura.LICENCE
    lines = (
        f"{took}This page holds no radiograph and loads nothing.",
        f"Terms: {terms}.",
        f"MURA's licence: {licence}.",
    )
    return element("footer", *(element("p", line) for line in lines))


# ---- pictures


def _pictures(metrics: dict[str, Any], studies: pd.DataFrame, context: dict[str, Any]) -> Iterator[Picture]:
    for name in ("kappa", "auroc"):
        yield _forest(metrics, name)
    threshold = context.get("threshold")
    labelled = studies[studies["label"].notna() & np.isfinite(studies["probability"].astype(float))]
    for name in groups(metrics):
        part = labelled if name == "overall" else labelled[labelled["study_type"] == name]
        label, probability = part["label"].to_numpy(dtype=np.int64), part["probability"].to_numpy(dtype=np.float64)
        if len(part):
            yield _scores(name, label, probability, threshold)
        if len(set(label.tolist())) == 2:
            yield _roc(name, label, probability, metrics)
    for place, (title, lines, scale) in enumerate(_panels(context.get("history") or [])):
        if lines:
            drawing, axes = _drawing(3.4, 2.3)
            _draw_panel(axes, title, lines, scale)
            ends = "; ".join(f"{label} from {y[0]:.4g} to {y[-1]:.4g}" for label, (_, y) in lines.items())
            yield _picture(f"curve-{place}", drawing, f"{title} over training steps: {ends}")


def _drawing(width: float, height: float) -> tuple[Figure, Any]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    return drawing, drawing.subplots()


def _forest(metrics: dict[str, Any], metric: str) -> Picture:
    named = groups(metrics)
    drawing, axes = _drawing(4.6, 0.7 + 0.28 * len(named))
    chance = {"kappa": 0.0, "auroc": 0.5}[metric]
    axes.axvline(chance, color=INK, linewidth=0.8, linestyle=":")
    for place, group in enumerate(named.values()):
        value, low, high = (group[key] for key in (metric, f"{metric}_low", f"{metric}_high"))
        colour = INK if place == 0 else NEGATIVE_COLOUR
        if value is None:
            axes.text(chance + 0.02, place, "none", va="center", fontstyle="italic")
            continue
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=colour, linewidth=1.8)
        axes.plot(value, place, "s" if place == 0 else "o", color=colour, markersize=5.5)
    axes.set_yticks(range(len(named)), [f"{name} ({group['num_studies']:,})" for name, group in named.items()])
    axes.set_ylim(len(named) - 0.5, -0.5)
    low, high = axes.get_xlim()
    axes.set_xlim(max(-1.0, min(low, chance - 0.05)), 1.02)
    axes.set_xlabel(f"{TITLES[metric]} with its 95 % interval; dotted: chance")
    axes.grid(axis="x")
    said = "; ".join(f"{name} {with_interval(group, metric)}" for name, group in named.items())
    return _picture(metric, drawing, f"{TITLES[metric]} with 95 % intervals: {said}")


def _roc(name: str, label: np.ndarray, probability: np.ndarray, metrics: dict[str, Any]) -> Picture:
    group = groups(metrics)[name]
    drawing, axes = _drawing(2.9, 2.9)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.plot(*roc(label, probability), color=NEGATIVE_COLOUR, linewidth=1.8)
    called = ""
    if group["sensitivity"] is not None and group["specificity"] is not None:
        axes.plot(1 - group["specificity"], group["sensitivity"], "o", color=POSITIVE_COLOUR, markersize=6)
        called = (
            f"; the calls lie at sensitivity {number(group['sensitivity'])}, specificity {number(group['specificity'])}"
        )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title=name)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    area = f"AUROC {with_interval(group, 'auroc')}"
    return _picture(f"roc-{name}", drawing, f"ROC curve of {name}: {area}{called}", f"{area}. Dot: the calls.")


def _scores(name: str, label: np.ndarray, probability: np.ndarray, threshold: float | None) -> Picture:
    drawing, axes = _drawing(2.9, 2.2)
    edges = np.linspace(0, 1, 21)
    for value, colour, word in ((0, NEGATIVE_COLOUR, "normal"), (1, POSITIVE_COLOUR, "abnormal")):
        chosen = probability[label == value]
        counts = np.histogram(chosen, edges)[0]
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
        axes.stairs(counts, edges, color=colour, linewidth=1.5, label=f"{word} ({len(chosen):,})")
    if threshold is not None:
        axes.axvline(threshold, color=INK, linewidth=0.8, linestyle="--")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, handlelength=1, columnspacing=1)
    axes.set(xlim=(0, 1), xlabel=f"{name}: mean probability", ylabel="studies")
    axes.yaxis.get_major_locator().set_params(integer=True)
    medians = [
        f"{np.median(probability[label == value]):.3f}" if (label == value).any() else "none" for value in (0, 1)
    ]
    alt = f"Probabilities of {name} by label: median of normal studies {medians[0]}, of abnormal studies {medians[1]}"
    return _picture(f"scores-{name}", drawing, alt)


Series = dict[str, tuple[list[float], list[float]]]  # label -> steps, values
_HELD_OUT = re.compile(r"(train|tune|valid)_(loss|kappa|auroc)$")


def _panels(history: list[dict[str, Any]]) -> list[tuple[str, Series, str]]:
    """Title, series and scale of the six panels of training curves; a series nobody logged is left out."""
    steps = [line for line in history if line.get("kind") == "step"]
    keys = sorted({key for line in history for key in line if _HELD_OUT.fullmatch(key)})
    epochs = {
        kind: {key: key.split("_")[0] for key in keys if key.endswith(kind)} for kind in ("loss", "kappa", "auroc")
    }
    return [
        ("Loss", _series(steps, {"loss": "step"}) | _series(history, epochs["loss"]), "linear"),
        ("Kappa", _series(history, epochs["kappa"]), "linear"),
        ("AUROC", _series(history, epochs["auroc"]), "linear"),
        ("Learning rate", _series(steps, {"learning_rate": "step"}), "log"),
        ("Radiographs a second", _series(steps, {"images_per_s": "step"}), "zero"),
        ("Time spent waiting for data, %", _series(steps, {"data_wait_share": "step"}, 100), "zero"),
    ]


def _series(history: list[dict[str, Any]], names: Mapping[str, str], factor: float = 1) -> Series:
    """key -> label: the finite values of each key by step; of a step logged twice (a resumed run) the later one."""
    found: Series = {}
    for key, label in names.items():
        points = {line["step"]: line[key] * factor for line in history if _finite(line.get(key)) and "step" in line}
        if points:
            steps = sorted(points)
            found[label] = (steps, [points[step] for step in steps])
    return found


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


_COLOURS = {"step": "#8995a1", "train": NEGATIVE_COLOUR, "tune": POSITIVE_COLOUR, "valid": POSITIVE_COLOUR}


def _draw_panel(axes: Any, title: str, lines: Series, scale: str) -> None:
    axes.set_title(title, loc="left")  # the legend stands to its right, on no line
    axes.set_xlabel("step")
    if not lines:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", fontstyle="italic")
        axes.set(xticks=[], yticks=[])
        return
    for label, (x, y) in lines.items():
        dots = {} if label == "step" else {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
        axes.plot(x, y, color=_COLOURS[label], label=label, **dots)
    axes.set_xlim(0, 1.02 * max(1, *(x[-1] for x, _ in lines.values())))
    if scale == "log" and min(min(y) for _, y in lines.values()) > 0:
        axes.set_yscale("log")
    if scale == "zero":
        axes.set_ylim(bottom=0)
    if lines.keys() != {"step"}:
        style = {"ncols": len(lines), "fontsize": 8, "handlelength": 1.2, "columnspacing": 1}
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3, **style)
    axes.grid(axis="y")


def _picture(name: str, drawing: Figure, alt: str, caption: str = "") -> Picture:
    text = io.StringIO()
    drawing.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace("<svg ", '<svg style="background: white" ', 1)
    return Picture(name, svg, round(drawing.get_figwidth() * 110), alt, caption)


def _inline(picture: Picture) -> Html:
    """The figure as part of a page: ids of its own, the page's ink, no namespaces, no fixed size."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", picture.svg[picture.svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[0]}{picture.name}-", svg)
    opening = element("svg", role="img", aria_label=picture.alt, style=f"max-width: {picture.width_px}px")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    inside = svg[svg.index(">") + 1 :]
    return Html(opening.replace("></svg>", f" {view_box[0]}>{inside}"))
