"""Plot measured against predicted steps, and efficiency and time of an epoch over 1 to 256 GPUs.

    trials.check -> checked -> PNG        epochs of several networks (scaling.epoch) -> foreseen -> PNG

Points are measured, lines are predicted.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling import Epoch

from mura_dist.core import files

_COLORS = ("#1f6f8b", "#c8553d", "#5b8e3e", "#7a5195", "#b8860b", "#555555")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def plot_check(runs: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Plot seconds of a step over ranks (left) and the error of each prediction (right).

    Points with whiskers are measured, lines are predicted.
    """
    figure, (left_axes, right_axes) = _figure(1, 2, 4.2)
    networks = list(dict.fromkeys(row["network"] for row in runs))
    for color, name in zip(_COLORS, networks, strict=False):
        rows = [row for row in runs if row["network"] == name]
        ranks, middle = [row["ranks"] for row in rows], [row["step_s"]["median"] for row in rows]
        below = [row["step_s"]["median"] - row["step_s"]["min"] for row in rows]
        above = [row["step_s"]["max"] - row["step_s"]["median"] for row in rows]
        left_axes.errorbar(
            ranks, middle, yerr=[below, above], fmt="o", color=color, capsize=3, label=f"{_link(name)}, measured"
        )
        left_axes.plot(ranks, [row["predicted_s"] for row in rows], "--", color=color, label="predicted")
        right_axes.plot(ranks, [100 * row["error"] for row in rows], "o-", color=color, label=_link(name))
    for axes in (left_axes, right_axes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            sorted({row["ranks"] for row in runs}), [str(n) for n in sorted({row["ranks"] for row in runs})]
        )
        axes.set_xlabel("ranks, on one machine")
    left_axes.set_ylim(0)
    left_axes.set_title("seconds of a step: median, least to most", loc="left", fontsize=10)
    left_axes.legend(fontsize=7, frameon=False)
    right_axes.axhspan(-10, 10, color="#eeeeee", zorder=0)
    right_axes.axhline(0, color="#333333", linewidth=0.8)
    far = max(30.0, *(110 * abs(row["error"]) for row in runs))
    right_axes.set_ylim(-far, far)
    right_axes.set_title("predicted against measured, %; grey: within 10", loc="left", fontsize=10)
    _write(figure, title, path)


def plot_prediction(by_network: dict[str, Sequence[Epoch]], title: str, path: Path) -> None:
    """Plot efficiency (left) and minutes of an epoch (right) over GPUs, a line per network."""
    figure, (left_axes, right_axes) = _figure(1, 2, 4.2)
    for color, (name, epochs) in zip(_COLORS, by_network.items(), strict=False):
        rows = [row for row in epochs if row.step is not None]
        ranks = [row.ranks for row in rows]
        left_axes.plot(
            ranks, [100 * row.efficiency for row in rows], "o-", color=color, markersize=4, label=_link(name)
        )
        right_axes.plot(ranks, [row.epoch_s for row in rows], "o-", color=color, markersize=4, label=_link(name))
    for axes in (left_axes, right_axes):
        every = sorted({row.ranks for epochs in by_network.values() for row in epochs})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(number) for number in every])
        axes.set_xlabel("GPUs")
    left_axes.set_ylim(0, 105)
    left_axes.set_title("efficiency, % of as many GPUs by themselves", loc="left", fontsize=10)
    left_axes.legend(fontsize=8, frameon=False, loc="lower left", title="between nodes")
    right_axes.set_yscale("log")
    right_axes.set_title("seconds of an epoch, evaluation included", loc="left", fontsize=10)
    _write(figure, title, path)


def _link(name: str) -> str:
    """Return the name of a network for a legend."""
    return "no limit" if name == "none" else name.replace(":", ", ")


def _figure(rows: int, columns: int, inches: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, inches + 0.7), layout="constrained")
        return figure, figure.subplots(rows, columns)


def _write(figure: Any, title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.suptitle(title, fontsize=10)
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    files.write_bytes(path, data.getvalue())
