"""Turn the lines of metrics.jsonl into training curves and a breakdown of the training time.

    history (the lines of metrics.jsonl, see metrics_log.py) -> panels -> curves.png, and the report's plots
    history -> ledger -> the report

Null values are skipped. Where a resumed run logged a step twice, the later line counts.
"""

import io
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core import files
from mura_dist.reports.html import NEGATIVE_COLOR, POSITIVE_COLOR

History = list[dict[str, Any]]
Series = dict[str, tuple[list[float], list[float]]]  # label -> steps, values
COLORS = {"step": "#8995a1", "train": NEGATIVE_COLOR, "tune": POSITIVE_COLOR, "valid": POSITIVE_COLOR}
INK = "#1b1f24"
_SPLIT_METRIC = re.compile(r"(train|tune|valid)_(loss|kappa|auroc)$")


def panels(history: History) -> list[tuple[str, Series, str]]:
    """Return title, series and scale ("linear", "log", or "zero": linear from 0) of the six panels."""
    steps = [line for line in history if line.get("kind") == "step"]
    keys = sorted({key for line in history for key in line if _SPLIT_METRIC.fullmatch(key)})
    epochs = {
        kind: {key: key.split("_")[0] for key in keys if key.endswith(kind)} for kind in ("loss", "kappa", "auroc")
    }
    return [
        ("Loss", _series(steps, {"loss": "step"}) | _series(history, epochs["loss"]), "linear"),
        ("Kappa", _series(history, epochs["kappa"]), "linear"),
        ("AUROC", _series(history, epochs["auroc"]), "linear"),
        ("Learning rate", _series(steps, {"learning_rate": "step"}), "log"),
        ("Radiographs per second", _series(steps, {"images_per_s": "step"}), "zero"),
        ("Time spent waiting for data, %", _series(steps, {"data_wait_share": "step"}, 100), "zero"),
    ]


def _series(history: History, names: Mapping[str, str], factor: float = 1) -> Series:
    """Return the finite values of each key by step. names: key -> label."""
    series: Series = {}
    for key, label in names.items():
        points = {line["step"]: line[key] * factor for line in history if _finite(line.get(key)) and "step" in line}
        if points:
            steps = sorted(points)
            series[label] = (steps, [points[step] for step in steps])
    return series


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def downsample(series: Series, max_points: int) -> tuple[Series, int]:
    """Return series of at most `max_points` means over consecutive points, and the number of points per mean."""
    window = max((-(-len(steps) // max_points) for steps, _ in series.values()), default=1)
    if window == 1:
        return series, 1
    return {
        label: (_means(steps, window), _means(values, window)) if len(steps) > max_points else (steps, values)
        for label, (steps, values) in series.items()
    }, window


def _means(values: list[float], window: int) -> list[float]:
    return [float(np.mean(values[start : start + window])) for start in range(0, len(values), window)]


def ledger(history: History) -> dict[str, Any]:
    """Return throughput, waiting and evaluation times of a training. A value that was not logged is None.

    Medians are over lines. Each line covers the same number of steps.
    """
    steps = [line for line in history if line.get("kind") == "step"]
    epochs = [line for line in history if line.get("kind") == "epoch"]
    evaluations = _values(epochs, "evaluation_s")
    limits = [line["limited_by"] for line in epochs if line.get("limited_by")]
    return {
        "num_steps": max((line["step"] for line in history if "step" in line), default=None),
        "num_evaluations": len(epochs),
        "images_per_s_median": _median(_values(steps, "images_per_s")),
        "data_wait_share_median": _median(_values(steps, "data_wait_share")),
        "overhead_share_median": _median(_values(epochs, "overhead_share")),
        "evaluation_s_median": _median(evaluations),
        "evaluation_s_total": sum(evaluations) if evaluations else None,
        "limited_by": limits[-1] if limits else None,
        "skipped_steps": _last(epochs, "skipped_steps"),
        "damaged_samples": _last(epochs, "damaged_samples"),
    }


def _values(lines: Iterable[dict[str, Any]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if _finite(line.get(key))]


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _last(lines: History, key: str) -> int | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return values[-1] if values else None


def draw(history: History, path: Path) -> None:
    """Draw the training curves into a PNG file.

    Args:
        history: The lines of metrics.jsonl.
        path: The file to write.
    """
    import matplotlib  # imported late: the report needs the panels without matplotlib
    from matplotlib.figure import Figure

    color_keys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = {"font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9.5, "grid.alpha": 0.25}
    style |= dict.fromkeys(color_keys, INK)
    style |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(11, 6), layout="constrained")
        for axes, (title, lines, scale) in zip(drawing.subplots(2, 3).flat, panels(history), strict=True):
            _draw_panel(axes, title, lines, scale)
        data = io.BytesIO()
        drawing.savefig(data, format="png", dpi=130, metadata={"Software": None})
    files.write_bytes(path, data.getvalue())


def _draw_panel(axes: Any, title: str, lines: Series, scale: str) -> None:
    axes.set_title(title, loc="left")  # the legend is to its right, outside the axes
    axes.set_xlabel("step")
    if not lines:
        axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", fontstyle="italic")
        axes.set(xticks=[], yticks=[])
        return
    for label, (x, y) in lines.items():
        dots = {} if label == "step" else {"marker": "o", "markersize": 3.5, "linewidth": 1.6}
        axes.plot(x, y, color=COLORS[label], label=label, **dots)
    axes.set_xlim(0, 1.02 * max(1, *(x[-1] for x, _ in lines.values())))
    if scale == "log" and min(min(y) for _, y in lines.values()) > 0:
        axes.set_yscale("log")
    if scale == "zero":
        axes.set_ylim(bottom=0)
    if lines.keys() != {"step"}:
        style = {"ncols": len(lines), "fontsize": 8, "handlelength": 1.2, "columnspacing": 1}
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.3, **style)
    axes.grid(axis="y")
