"""Compute and draw the plots of a report. Nothing here depends on metrics.json or on a page.

    labels, probabilities (n,) -> curve, bins, counts (report.json stores them) -> Picture

Blue is normal, orange is abnormal, the text color is a measurement. Labels: 1 positive (abnormal), 0 negative (normal).
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
    ellipsize,
    filled_histogram,
    format_tick,
    frame,
    line,
    rect,
    reference_line,
    square,
    text_label,
    ticks,
)
from mura_dist.reports.training_curves import COLORS, Series

WIDTH, HEIGHT = 320, 316
SQUARE = Axes(left_px=48, top_px=12, width_px=262, height_px=258)
FOREST_WIDTH = 400
MAX_POINTS = 500  # of a curve; more than the plot is wide in pixels
SCORE_BINS = 20


# ---- numbers


def roc_points(label: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """Return the vertices of the ROC curve, without those on a straight segment. Both labels must occur.

    Args:
        label: (n,) integers, 0 or 1.
        probability: (n,) floats.
    """
    false_rate, true_rate = compute_roc_curve(label, probability)
    x_steps, y_steps = np.diff(false_rate), np.diff(true_rate)
    turns = np.flatnonzero(np.abs(x_steps[:-1] * y_steps[1:] - x_steps[1:] * y_steps[:-1]) > 1e-15) + 1
    vertices = _subsample(np.concatenate([[0], turns, [len(false_rate) - 1]]))
    return {
        "false_positive_rate": false_rate[vertices].tolist(),
        "true_positive_rate": true_rate[vertices].tolist(),
    }


def pr_points(label: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """Return points of the precision-recall curve: `recall` and `precision`. See roc_points."""
    recall, precision = compute_pr_curve(label, probability)
    indices = _subsample(np.arange(len(recall)))
    return {"recall": recall[indices].tolist(), "precision": precision[indices].tolist()}


def _subsample(indices: np.ndarray) -> np.ndarray:
    """Return at most MAX_POINTS of the indices at even distances, with the first and the last."""
    return indices[np.unique(np.linspace(0, len(indices) - 1, MAX_POINTS).round().astype(int))]


def reliability_bins(label: np.ndarray, probability: np.ndarray) -> list[dict[str, Any]]:
    """Return the share of abnormal studies by probability, in the bins of the calibration error.

    `low` and `high` are the Wilson interval of the share. It assumes independent studies.
    """
    bins = []
    for mean, share, num in zip(*(column.tolist() for column in bin_by_quantile(label, probability)), strict=True):
        low, high = compute_wilson_interval(share * num, num)
        bins.append({"num_studies": round(num), "probability": mean, "share_abnormal": share, "low": low, "high": high})
    return bins


def score_histogram(label: np.ndarray, probability: np.ndarray) -> dict[str, Any]:
    """Return the number of studies in SCORE_BINS bins of equal width, and the median probability, for each label."""
    edges = np.linspace(0, 1, SCORE_BINS + 1)
    histogram: dict[str, Any] = {"edges": edges.round(12).tolist()}
    for value, name in enumerate(("normal", "abnormal")):
        scores = probability[label == value]
        histogram[name] = np.histogram(scores, edges)[0].tolist()
        histogram[f"{name}_median"] = float(np.median(scores)) if len(scores) else None
    return histogram


# ---- forests


@dataclass(frozen=True)
class ForestRow:
    """A row of a forest plot. `mark`: circle, square (pooled) or diamond (a mean). `reference`: a published value."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = "circle"
    reference: float | None = None


def forest(
    name: str, rows: Sequence[ForestRow], *, chance: float, label: str, alt: str, caption: str, top: float | None = 1.0
) -> Picture:
    """Draw values with their intervals, one row each.

    Args:
        name: The picture's name.
        rows: From top to bottom.
        chance: Position of the dotted line.
        label: Label of the x axis.
        alt: Text for screen readers.
        caption: Text below the plot.
        top: Upper end of the x axis; None to fit the data.
    """
    longest = max(len(row.name) for row in rows)
    names_above = longest > 20  # a long name is drawn above its line, a short one to its left
    left_px, row_px = (12.0, 36) if names_above else (longest * CHARACTER_PX + 14, 25)
    axes = Axes(left_px, 8, FOREST_WIDTH - left_px - 14, row_px * len(rows), x=_forest_range(rows, chance, top))
    axes = axes.with_range(y=(float(len(rows)), 0.0))
    parts = [frame(axes, label, grid="x", y_ticks=[]), reference_line(axes, x=chance)]
    for index, row in enumerate(rows):
        y = index + (0.72 if names_above else 0.5)
        row_name = ellipsize(row.name, 52)
        if names_above:
            parts.append(text_label(axes.left_px + 4, axes.py(index + 0.36), row_name, "start"))
        else:
            parts.append(text_label(left_px - 8, axes.py(y) + 4, row_name, "end"))
        parts += _forest_marks(axes, row, y, chance)
    return Picture(name, FOREST_WIDTH, round(axes.bottom_px + 42), join(parts), alt, caption)


def _forest_marks(axes: Axes, row: ForestRow, y: float, chance: float) -> list[Html]:
    color = NEGATIVE_COLOR if row.mark == "circle" else INK
    parts = []
    if row.reference is not None:
        parts.append(diamond(axes, row.reference, y, POSITIVE_COLOR, hollow=True))
    if row.value is None:
        return [*parts, text_label(axes.px(chance) + 6, axes.py(y) + 4, "none", "start", font_style="italic")]
    if row.low is not None and row.high is not None:
        parts.append(line(axes, (row.low, row.high), (y, y), color, 2))
    draw = {"circle": dot, "square": square, "diamond": diamond}[row.mark]
    return [*parts, draw(axes, row.value, y, color)]


def _forest_range(rows: Sequence[ForestRow], chance: float, top: float | None) -> tuple[float, float]:
    values = [value for row in rows for value in (row.value, row.low, row.high, row.reference) if value is not None]
    low, high = min([chance, *values]), max([chance, *values])
    pad = 0.04 * ((high if top is None else top) - low) or 0.1
    return max(-1.0, low - pad), high + pad if top is None else top + 0.01


# ---- one group of studies


def roc_picture(
    name: str, of: str, points: dict[str, list[float]], called: tuple[float, float] | None, area: str
) -> Picture:
    """Draw a ROC curve. `called`: false positive rate and sensitivity of the calls; `area`: the AUROC as text."""
    x, y = points["false_positive_rate"], points["true_positive_rate"]
    parts = [
        frame(SQUARE, "1 - specificity", "sensitivity"),
        line(SQUARE, (0, 1), (0, 1), width=1, dash="1.5 3"),
        line(SQUARE, x, y, NEGATIVE_COLOR, 2),
    ]
    alt = f"ROC curve of {of}: {area}"
    if called is not None:
        parts.append(dot(SQUARE, *called, POSITIVE_COLOR, 5))
        alt += f"; the calls have sensitivity {called[1]:.3f}, specificity {1 - called[0]:.3f}"
    caption = f"ROC. {area}." + (" Dot: the calls." if called is not None else "")
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, caption)


def pr_picture(
    name: str, of: str, points: dict[str, list[float]], called: tuple[float, float] | None, prevalence: float, area: str
) -> Picture:
    """Draw a precision-recall curve. `called`: sensitivity and PPV of the calls; `area`: the average precision as text."""
    recall, precision = [0.0, *points["recall"]], points["precision"]
    x, y = np.repeat(recall, 2)[1:-1], np.repeat(precision, 2)  # steps back to the recall before
    parts = [
        frame(SQUARE, "sensitivity (recall)", "PPV (precision)"),
        reference_line(SQUARE, y=prevalence),
        line(SQUARE, x, y, NEGATIVE_COLOR, 2),
    ]
    alt = f"Precision-recall curve of {of}: {area}; share abnormal {prevalence:.3f}"
    if called is not None:
        parts.append(dot(SQUARE, *called, POSITIVE_COLOR, 5))
        alt += f"; the calls have sensitivity {called[0]:.3f}, PPV {called[1]:.3f}"
    caption = f"Precision and recall. {area}. Dotted: the share abnormal, {prevalence:.3f}."
    caption += " Dot: the calls." if called is not None else ""
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, caption)


def confusion_picture(name: str, of: str, cells: dict[str, int]) -> Picture:
    """Draw a confusion matrix: labels in rows, calls in columns. The opacity of a cell is its share of the row."""
    x0_px, y0_px, width_px, height_px = 84, 44, 113, 118
    column_names = [("no abnormality", "flagged"), ("called", "abnormal")]
    parts = [
        text_label(x0_px + width_px * (x + 0.5), 16 + 16 * k, text)
        for x, pair in enumerate(column_names)
        for k, text in enumerate(pair)
    ]
    descriptions = []
    for y, (word, keys) in enumerate((("normal", ("tn", "fp")), ("abnormal", ("fn", "tp")))):
        total = sum(cells[key] for key in keys)
        middle = y0_px + height_px * (y + 0.5)
        parts += [text_label(x0_px - 8, middle - 4, "labeled", "end"), text_label(x0_px - 8, middle + 12, word, "end")]
        for x, (key, color) in enumerate(zip(keys, (NEGATIVE_COLOR, POSITIVE_COLOR), strict=True)):
            share = cells[key] / total if total else 0.0
            parts.append(
                rect(
                    x0_px + width_px * x + 1.5,
                    y0_px + height_px * y + 1.5,
                    width_px - 3,
                    height_px - 3,
                    color,
                    0.07 + 0.5 * share,
                )
            )
            center = x0_px + width_px * (x + 0.5)
            parts.append(text_label(center, middle + 2, f"{cells[key]:,}", font_size=24, font_weight=600))
            parts.append(text_label(center, middle + 22, f"{share:.1%} of row" if total else "-"))
        descriptions.append(f"of {total:,} labeled {word}, {cells[keys[1]]:,} called abnormal")
    alt = f"Confusion matrix of {of}: {'; '.join(descriptions)}"
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, "Confusion matrix: number of studies by label and call.")


def scores_picture(
    name: str, of: str, counts: dict[str, Any], threshold: float | None, band: tuple[float, float] | None
) -> Picture:
    """Draw histograms of the probabilities: abnormal studies upwards, normal ones downwards. `band`: the uncertain band."""
    up, down = max(counts["abnormal"], default=0), max(counts["normal"], default=0)
    margin = max(up, down, 1) * 0.06
    axes = Axes(SQUARE.left_px, 34, SQUARE.width_px, SQUARE.bottom_px - 34).with_range(y=(-down - margin, up + margin))
    marks = [tick for tick in ticks(-down, max(up, 1), about=5) if tick == int(tick)]
    parts = [frame(axes, "probability of a study", "studies", y_ticks=[], grid="x")]
    parts += [reference_line(axes, y=tick, dash="", opacity=0.13) for tick in marks]
    parts += [text_label(axes.left_px - 6, axes.py(tick) + 4, format_tick(abs(tick)), "end") for tick in marks]
    if band is not None:
        x, width = axes.px(band[0]), axes.px(band[1]) - axes.px(band[0])
        parts.append(rect(x, axes.top_px, width, axes.height_px, INK, 0.1))
    parts.append(filled_histogram(axes, counts["edges"], counts["abnormal"], POSITIVE_COLOR))
    parts.append(filled_histogram(axes, counts["edges"], [-value for value in counts["normal"]], NEGATIVE_COLOR))
    parts.append(reference_line(axes, y=0, dash="", opacity=0.7))
    if threshold is not None:
        parts.append(reference_line(axes, x=threshold, dash="5 3", opacity=0.9))
    medians = []
    for index, (word, color) in enumerate((("abnormal", POSITIVE_COLOR), ("normal", NEGATIVE_COLOR))):
        num, median = sum(counts[word]), counts[f"{word}_median"]
        x = axes.left_px + index * 142
        parts += [rect(x, 9, 11, 11, color), text_label(x + 16, 19, f"{word} ({num:,})", "start")]
        medians.append(f"median of {num:,} {word} studies {'none' if median is None else f'{median:.3f}'}")
    caption = "Probabilities by label: abnormal studies upwards, normal studies downwards."
    caption += f" Dashed: the threshold, {threshold:g}." if threshold is not None else ""
    caption += f" Shaded: the uncertain band, {band[0]:.3f} to {band[1]:.3f}." if band is not None else ""
    return Picture(name, WIDTH, HEIGHT, join(parts), f"Probabilities of {of} by label: {', '.join(medians)}", caption)


def reliability_picture(
    name: str, of: str, bins: Sequence[dict[str, Any]], counts: dict[str, Any], when: str, caption: str
) -> Picture:
    """Draw the share of abnormal studies by probability with Wilson intervals, above a histogram of the probabilities."""
    axes = Axes(SQUARE.left_px, SQUARE.top_px, SQUARE.width_px, 212)
    parts = [frame(axes, y_label="share abnormal", x_ticks=[], y_ticks=ticks(0, 1)), _vertical_grid(axes)]
    parts.append(line(axes, (0, 1), (0, 1), width=1, dash="1.5 3"))
    parts += [line(axes, (item["probability"],) * 2, (item["low"], item["high"]), INK, 1.4) for item in bins]
    parts += [dot(axes, item["probability"], item["share_abnormal"], INK, 3.6) for item in bins]
    totals = [a + b for a, b in zip(counts["normal"], counts["abnormal"], strict=True)]
    below = Axes(
        axes.left_px,
        axes.bottom_px + 8,
        axes.width_px,
        SQUARE.bottom_px - axes.bottom_px - 8,
        y=(0.0, float(max(*totals, 1))),
    )
    parts += [
        frame(below, f"probability, {when}", y_ticks=[], grid=""),
        filled_histogram(below, counts["edges"], totals, COLORS["step"]),
    ]
    shares = "; ".join(
        f"{item['probability']:.2f}: {item['share_abnormal']:.2f} of {item['num_studies']:,}" for item in bins
    )
    alt = f"Reliability of {of}, {when}, share abnormal by mean probability of a bin: {shares}"
    return Picture(name, WIDTH, HEIGHT, join(parts), alt, caption)


def _vertical_grid(axes: Axes) -> Html:
    return join(reference_line(axes, x=value, dash="", opacity=0.13) for value in ticks(*axes.x))


# ---- training


def curve_picture(name: str, title: str, lines: Series, scale: str, steps_per_point: int) -> Picture:
    """Draw a panel of training curves. Each point is a mean over `steps_per_point` logged steps."""
    height = 214
    low, high, log = _span([value for _, values in lines.values() for value in values], scale)
    end = max(1.0, *(x[-1] for x, _ in lines.values()))
    axes = Axes(SQUARE.left_px, 32, SQUARE.width_px, height - 76, x=(0.0, end * 1.02), y=(low, high), log=log)
    parts = [
        frame(axes, "step", grid="y", x_ticks=ticks(0, end, 4)),
        text_label(2, 14, title, "start", font_weight=600),
    ]
    right = float(WIDTH - 8)
    for label in reversed(lines) if lines.keys() != {"step"} else ():
        parts.append(text_label(right, 14, label, "end"))
        right -= len(label) * CHARACTER_PX + 6
        parts.append(rect(right - 10, 5, 10, 10, COLORS[label]))
        right -= 24
    for label, (x, values) in lines.items():
        parts.append(line(axes, x, values, COLORS[label], 1.1 if label == "step" else 1.8))
        few = len(x) == 1 or (label != "step" and len(x) <= 40)
        parts += [dot(axes, a, b, COLORS[label], 2.6) for a, b in zip(x, values, strict=True) if few]
    ends = "; ".join(f"{label} from {values[0]:.4g} to {values[-1]:.4g}" for label, (_, values) in lines.items())
    caption = f"Gray: means over {steps_per_point} logged steps." if steps_per_point > 1 and "step" in lines else ""
    return Picture(name, WIDTH, height, join(parts), f"{title} over training steps: {ends}", caption)


def _span(values: Sequence[float], scale: str) -> tuple[float, float, bool]:
    """Return the range of a y axis, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if scale == "log" and low > 0:
        first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        return 0.7 * 10.0**first, 1.4 * 10.0 ** max(last, first + 1), True
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if scale == "zero" and low >= 0 else low - pad), high + pad, False
