"""Pictures of scaling: measured against predicted; efficiency and an epoch's time over 1 to 256 GPUs.

    trials.check -> checked -> PNG        epochs of several networks (scaling.epoch) -> foreseen -> PNG

Points are measured, lines predicted; no picture shows the one for the other.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling import Epoch

from mura_dist.core import files

_COLOURS = ("#1f6f8b", "#c8553d", "#5b8e3e", "#7a5195", "#b8860b", "#555555")
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def checked(found: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Left: seconds of a step over ranks, points with whiskers measured, lines predicted. Right: the error of each."""
    figure, (left, right) = _figure(1, 2, 4.2)
    networks = list(dict.fromkeys(one["network"] for one in found))
    for colour, name in zip(_COLOURS, networks, strict=False):
        rows = [one for one in found if one["network"] == name]
        ranks, middle = [one["ranks"] for one in rows], [one["step_s"]["median"] for one in rows]
        below = [one["step_s"]["median"] - one["step_s"]["min"] for one in rows]
        above = [one["step_s"]["max"] - one["step_s"]["median"] for one in rows]
        left.errorbar(
            ranks, middle, yerr=[below, above], fmt="o", color=colour, capsize=3, label=f"{_link(name)}, measured"
        )
        left.plot(ranks, [one["predicted_s"] for one in rows], "--", color=colour, label="predicted")
        right.plot(ranks, [100 * one["error"] for one in rows], "o-", color=colour, label=_link(name))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(
            sorted({one["ranks"] for one in found}), [str(n) for n in sorted({one["ranks"] for one in found})]
        )
        axes.set_xlabel("ranks, on one machine")
    left.set_ylim(0)
    left.set_title("seconds of a step: median, least to most", loc="left", fontsize=10)
    left.legend(fontsize=7, frameon=False)
    right.axhspan(-10, 10, color="#eeeeee", zorder=0)
    right.axhline(0, color="#333333", linewidth=0.8)
    far = max(30.0, *(110 * abs(one["error"]) for one in found))
    right.set_ylim(-far, far)
    right.set_title("predicted against measured, %; grey: within 10", loc="left", fontsize=10)
    _write(figure, title, path)


def foreseen(by_network: dict[str, Sequence[Epoch]], title: str, path: Path) -> None:
    """Left: efficiency; right: minutes of an epoch; over GPUs, a line a network."""
    figure, (left, right) = _figure(1, 2, 4.2)
    for colour, (name, epochs) in zip(_COLOURS, by_network.items(), strict=False):
        rows = [one for one in epochs if one.step is not None]
        ranks = [one.ranks for one in rows]
        left.plot(ranks, [100 * one.efficiency for one in rows], "o-", color=colour, markersize=4, label=_link(name))
        right.plot(ranks, [one.epoch_s for one in rows], "o-", color=colour, markersize=4, label=_link(name))
    for axes in (left, right):
        every = sorted({one.ranks for epochs in by_network.values() for one in epochs})
        axes.set_xscale("log", base=2)
        axes.set_xticks(every, [str(number) for number in every])
        axes.set_xlabel("GPUs")
    left.set_ylim(0, 105)
    left.set_title("efficiency, % of as many GPUs by themselves", loc="left", fontsize=10)
    left.legend(fontsize=8, frameon=False, loc="lower left", title="between nodes")
    right.set_yscale("log")
    right.set_title("seconds of an epoch, evaluation included", loc="left", fontsize=10)
    _write(figure, title, path)


def _link(name: str) -> str:
    """In words."""
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
