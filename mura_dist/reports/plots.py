"""The report's pictures: plain numbers in, plots out. They know nothing of metrics.json or of pages.

    labels, probabilities (n,) -> curve, bins, counts: what report.json holds and what is drawn of them -> Picture

Colours mean one thing everywhere: blue is normal, orange is abnormal, ink is a measurement. Labels: 1 positive (abnormal), 0
negative (normal). Plots that stand side by side are of one size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mura_dist.metrics.classification import bin_by_quantile, compute_pr_curve, compute_roc_curve
from mura_dist.metrics.intervals import compute_wilson_interval
from mura_dist.reports.html import NEGATIVE_COLOR, POSITIVE_COLOR, Html, join
from mura_dist.reports.svg import (
    CHARACTER_PX,
    INK,
    Axes,
    Picture,
    diamond,
    dot,
    frame,
    line,
    plain,
    rect,
    rule,
    shortened,
    square,
    steps,
    ticks,
    words,
)
from mura_dist.reports.training_curves import COLOURS, Series

WIDTH, HEIGHT = 320, 316
SQUARE = Axes(left=48, top=12, width=262, height=258)
FOREST_WIDTH = 400
MOST_POINTS = 500  # of a curve: more than there are pixels across
SCORE_BINS = 20


# ---- numbers


def roc_points(label: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """The ROC curve's corners, without those in the midst of a straight part. Needs both labels."""
    false, true = compute_roc_curve(label, probability)
    along = np.diff(false), np.diff(true)
    turn = np.flatnonzero(np.abs(along[0][:-1] * along[1][1:] - along[0][1:] * along[1][:-1]) > 1e-15) + 1
    kept = _some(np.concatenate([[0], turn, [len(false) - 1]]))
    return {"false_positive_rate": false[kept].tolist(), "true_positive_rate": true[kept].tolist()}


def pr_points(label: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    recall, precision = compute_pr_curve(label, probability)
    kept = _some(np.arange(len(recall)))
    return {"recall": recall[kept].tolist(), "precision": precision[kept].tolist()}


def _some(places: np.ndarray) -> np.ndarray:
    """At most MOST_POINTS of them, evenly, both ends among them."""
    return places[np.unique(np.linspace(0, len(places) - 1, MOST_POINTS).round().astype(int))]


def reliability(label: np.ndarray, probability: np.ndarray) -> list[dict[str, Any]]:
    """How often studies are abnormal, by probability, in the bins of the calibration error.

    `low` and `high` are the Wilson interval of the share, as if studies were independent.
    """
    bins = bin_by_quantile(label, probability)
    found = []
    for mean, share, num in zip(*(part.tolist() for part in bins), strict=True):
        low, high = compute_wilson_interval(share * num, num)
        found.append(
            {"num_studies": round(num), "probability": mean, "share_abnormal": share, "low": low, "high": high}
        )
    return found


def score_counts(label: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Studies by probability, in SCORE_BINS bins of equal width, for each label; and the medians."""
    edges = np.linspace(0, 1, SCORE_BINS + 1)
    found: dict[str, Any] = {"edges": edges.round(12).tolist()}
    for value, word in enumerate(("normal", "abnormal")):
        chosen = probability[label == value]
        found[word] = np.histogram(chosen, edges)[0].tolist()
        found[f"{word}_median"] = float(np.median(chosen)) if len(chosen) else None
    return found


# ---- forests


@dataclass(frozen=True)
class Row:
    """A line of a forest plot. `mark`: circle, square (all pooled) or diamond (a mean). `other`: what it is held against."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = "circle"
    other: float | None = None


def forest(
    name: str, rows: Sequence[Row], *, chance: float, label: str, alt: str, caption: str, top: float | None = 1.0
) -> Picture:
    """Values with their intervals, one below the other. `chance`: the dotted line; `top`: the axis ends there at the latest."""
    longest = max(len(row.name) for row in rows)
    stacked = longest > 20  # long names stand above their line, short ones beside it
    left, each = (12.0, 36) if stacked else (longest * CHARACTER_PX + 14, 25)
    axes = Axes(left, 8, FOREST_WIDTH - left - 14, each * len(rows), x=_forest_range(rows, chance, top))
    axes = axes.ranged(y=(float(len(rows)), 0.0))
    parts = [frame(axes, label, grid="x", y_ticks=[]), rule(axes, x=chance)]
    for place, row in enumerate(rows):
        y = place + (0.72 if stacked else 0.5)
        shown = shortened(row.name, 52)
        at = (axes.left + 4, axes.py(place + 0.36), "start") if stacked else (left - 8, axes.py(y) + 4, "end")
        parts += [words(at[0], at[1], shown, at[2]), *_forest_marks(axes, row, y, chance)]
    return Picture(name, FOREST_WIDTH, round(axes.bottom + 42), join(parts), alt, caption)


def _forest_marks(axes: Axes, row: Row, y: float, chance: float) -> list[Html]:
    colour = NEGATIVE_COLOR if row.mark == "circle" else INK
    parts = []
    if row.other is not None:
        parts.append(diamond(axes, row.other, y, POSITIVE_COLOR, hollow=True))
    if row.value is None:
        return [*parts, words(axes.px(chance) + 6, axes.py(y) + 4, "none", "start", font_style="italic")]
    if row.low is not None and row.high is not None:
        parts.append(line(axes, (row.low, row.high), (y, y), colour, 2))
    draw = {"circle": dot, "square": square, "diamond": diamond}[row.mark]
    return [*parts, draw(axes, row.value, y, colour)]


def _forest_range(rows: Sequence[Row], chance: float, top: float | None) -> tuple[float, float]:
    known = [value for row in rows for value in (row.value, row.low, row.high, row.other) if value is not None]
    low, high = min([chance, *known]), max([chance, *known])
    pad = 0.04 * ((high if top is None else top) - low) or 0.1
    return max(-1.0, low - pad), high + pad if top is None else top + 0.01


# ---- one group of studies


def roc_picture(
    name: str, of: str, points: dict[str, list[float]], called: tuple[float, float] | None, area: str
) -> Picture:
    """`called`: false positive rate and sensitivity of the calls; `area`: AUROC in words."""
    x, y = points["false_positive_rate"], points["true_positive_rate"]
    parts = [
        frame(SQUARE, "1 - specificity", "sensitivity"),
        line(SQUARE, (0, 1), (0, 1), width=1, dash="1.5 3"),
        line(SQUARE, x, y, NEGATIVE_COLOR, 2),
    ]
    said = f"ROC curve of {of}: {area}"
    if called is not None:
        parts.append(dot(SQUARE, *called, POSITIVE_COLOR, 5))
        said += f"; the calls lie at sensitivity {called[1]:.3f}, specificity {1 - called[0]:.3f}"
    caption = f"ROC. {area}." + (" Dot: the calls." if called is not None else "")
    return Picture(name, WIDTH, HEIGHT, join(parts), said, caption)


def pr_picture(
    name: str, of: str, points: dict[str, list[float]], called: tuple[float, float] | None, prevalence: float, area: str
) -> Picture:
    """`called`: sensitivity and PPV of the calls."""
    recall, precision = [0.0, *points["recall"]], points["precision"]
    x, y = np.repeat(recall, 2)[1:-1], np.repeat(precision, 2)  # steps back to the recall before
    parts = [
        frame(SQUARE, "sensitivity (recall)", "PPV (precision)"),
        rule(SQUARE, y=prevalence),
        line(SQUARE, x, y, NEGATIVE_COLOR, 2),
    ]
    said = f"Precision-recall curve of {of}: {area}; share abnormal {prevalence:.3f}"
    if called is not None:
        parts.append(dot(SQUARE, *called, POSITIVE_COLOR, 5))
        said += f"; the calls lie at sensitivity {called[0]:.3f}, PPV {called[1]:.3f}"
    caption = f"Precision and recall. {area}. Dotted: the share abnormal, {prevalence:.3f}."
    caption += " Dot: the calls." if called is not None else ""
    return Picture(name, WIDTH, HEIGHT, join(parts), said, caption)


def confusion_picture(name: str, of: str, cells: dict[str, int]) -> Picture:
    """Labels down, calls across; the deeper a cell's colour, the greater its share of its row."""
    left, top, wide, tall = 84, 44, 113, 118
    heads = [("no abnormality", "flagged"), ("called", "abnormal")]
    parts = [
        words(left + wide * (x + 0.5), 16 + 16 * k, text) for x, pair in enumerate(heads) for k, text in enumerate(pair)
    ]
    said = []
    for y, (word, keys) in enumerate((("normal", ("tn", "fp")), ("abnormal", ("fn", "tp")))):
        total = sum(cells[key] for key in keys)
        middle = top + tall * (y + 0.5)
        parts += [words(left - 8, middle - 4, "labelled", "end"), words(left - 8, middle + 12, word, "end")]
        for x, (key, colour) in enumerate(zip(keys, (NEGATIVE_COLOR, POSITIVE_COLOR), strict=True)):
            share = cells[key] / total if total else 0.0
            parts.append(
                rect(left + wide * x + 1.5, top + tall * y + 1.5, wide - 3, tall - 3, colour, 0.07 + 0.5 * share)
            )
            centre = left + wide * (x + 0.5)
            parts.append(words(centre, middle + 2, f"{cells[key]:,}", font_size=24, font_weight=600))
            parts.append(words(centre, middle + 22, f"{share:.1%} of row" if total else "-"))
        said.append(f"of {total:,} labelled {word}, {cells[keys[1]]:,} called abnormal")
    alt = f"Confusion of {of}: {'; '.join(said)}"
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, "Calls against labels, in studies.")


def scores_picture(
    name: str, of: str, counts: dict[str, Any], threshold: float | None, band: tuple[float, float] | None
) -> Picture:
    """Abnormal studies upwards, normal ones downwards: neither hides the other. `band`: the uncertain one, shaded."""
    up, down = max(counts["abnormal"], default=0), max(counts["normal"], default=0)
    room = max(up, down, 1) * 0.06
    axes = Axes(SQUARE.left, 34, SQUARE.width, SQUARE.bottom - 34).ranged(y=(-down - room, up + room))
    marks = [tick for tick in ticks(-down, max(up, 1), about=5) if tick == int(tick)]
    parts = [frame(axes, "probability of a study", "studies", y_ticks=[], grid="x")]
    parts += [rule(axes, y=tick, dash="", opacity=0.13) for tick in marks]
    parts += [words(axes.left - 6, axes.py(tick) + 4, plain(abs(tick)), "end") for tick in marks]
    if band is not None:
        x, width = axes.px(band[0]), axes.px(band[1]) - axes.px(band[0])
        parts.append(rect(x, axes.top, width, axes.height, INK, 0.1))
    parts.append(steps(axes, counts["edges"], counts["abnormal"], POSITIVE_COLOR))
    parts.append(steps(axes, counts["edges"], [-value for value in counts["normal"]], NEGATIVE_COLOR))
    parts.append(rule(axes, y=0, dash="", opacity=0.7))
    if threshold is not None:
        parts.append(rule(axes, x=threshold, dash="5 3", opacity=0.9))
    said = []
    for place, (word, colour) in enumerate((("abnormal", POSITIVE_COLOR), ("normal", NEGATIVE_COLOR))):
        num, median = sum(counts[word]), counts[f"{word}_median"]
        x = axes.left + place * 142
        parts += [rect(x, 9, 11, 11, colour), words(x + 16, 19, f"{word} ({num:,})", "start")]
        said.append(f"median of {num:,} {word} studies {'none' if median is None else f'{median:.3f}'}")
    caption = "Probabilities by label: abnormal studies upwards, normal ones downwards."
    caption += f" Dashed: the threshold, {threshold:g}." if threshold is not None else ""
    caption += f" Shaded: the uncertain band, {band[0]:.3f} to {band[1]:.3f}." if band is not None else ""
    return Picture(name, WIDTH, HEIGHT, join(parts), f"Probabilities of {of} by label: {', '.join(said)}", caption)


def reliability_picture(
    name: str, of: str, bins: Sequence[dict[str, Any]], counts: dict[str, Any], when: str, caption: str
) -> Picture:
    """Share abnormal against probability, with Wilson bars; below it, how many studies have which probability."""
    axes = Axes(SQUARE.left, SQUARE.top, SQUARE.width, 212)
    parts = [frame(axes, y_label="share abnormal", x_ticks=[], y_ticks=ticks(0, 1)), _across(axes)]
    parts.append(line(axes, (0, 1), (0, 1), width=1, dash="1.5 3"))
    parts += [line(axes, (item["probability"],) * 2, (item["low"], item["high"]), INK, 1.4) for item in bins]
    parts += [dot(axes, item["probability"], item["share_abnormal"], INK, 3.6) for item in bins]
    together = [a + b for a, b in zip(counts["normal"], counts["abnormal"], strict=True)]
    below = Axes(
        axes.left, axes.bottom + 8, axes.width, SQUARE.bottom - axes.bottom - 8, y=(0.0, float(max(*together, 1)))
    )
    parts += [
        frame(below, f"probability, {when}", y_ticks=[], grid=""),
        steps(below, counts["edges"], together, COLOURS["step"]),
    ]
    said = "; ".join(
        f"{item['probability']:.2f}: {item['share_abnormal']:.2f} of {item['num_studies']:,}" for item in bins
    )
    alt = f"Reliability of {of}, {when}, share abnormal by mean probability of a bin: {said}"
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, caption)


def _across(axes: Axes) -> Html:
    return join(rule(axes, x=value, dash="", opacity=0.13) for value in ticks(*axes.x))


# ---- training


def curve_picture(name: str, title: str, lines: Series, scale: str, together: int) -> Picture:
    """A panel of training curves; `together`: so many logged steps to a point."""
    height = 214
    low, high, log = _span([value for _, values in lines.values() for value in values], scale)
    end = max(1.0, *(x[-1] for x, _ in lines.values()))
    axes = Axes(SQUARE.left, 32, SQUARE.width, height - 76, x=(0.0, end * 1.02), y=(low, high), log=log)
    parts = [frame(axes, "step", grid="y", x_ticks=ticks(0, end, 4)), words(2, 14, title, "start", font_weight=600)]
    right = float(WIDTH - 8)
    for label in reversed(lines) if lines.keys() != {"step"} else ():
        parts.append(words(right, 14, label, "end"))
        right -= len(label) * CHARACTER_PX + 6
        parts.append(rect(right - 10, 5, 10, 10, COLOURS[label]))
        right -= 24
    for label, (x, values) in lines.items():
        parts.append(line(axes, x, values, COLOURS[label], 1.1 if label == "step" else 1.8))
        few = len(x) == 1 or (label != "step" and len(x) <= 40)
        parts += [dot(axes, a, b, COLOURS[label], 2.6) for a, b in zip(x, values, strict=True) if few]
    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, (_, values) in lines.items())
    caption = f"Grey: means over {together} logged steps." if together > 1 and "step" in lines else ""
    return Picture(name, WIDTH, height, join(parts), f"{title} over training steps: {ends}", caption)


def _span(values: Sequence[float], scale: str) -> tuple[float, float, bool]:
    """A y axis for them: from, to, whether logarithmic (then by whole powers of ten)."""
    low, high = min(values), max(values)
    if scale == "log" and low > 0:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        return 0.7 * 10.0**first, 1.4 * 10.0 ** max(last, first + 1), True
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if scale == "zero" and low >= 0 else low - pad), high + pad, False
