"""Plot of measurements: horizontal bars of the medians with their numbers, and whiskers from minimum to maximum.

measured -> panels (rates, ratios, start, memory, encodings, as available) -> one PNG
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mura_dist.core import files
from mura_dist.core.errors import UserError

_OWN_COLOR, _PEER_COLOR = "#1f6f8b", "#b8b8b8"
_LINE_INCHES, _HEAD_INCHES, _LINE_CHARACTERS = 0.21, 0.8, 64
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class Bar(NamedTuple):
    """A bar of a panel."""

    name: str
    value: dict[str, float]  # median, min, max
    is_own: bool


class Panel(NamedTuple):
    """A group of bars with one axis."""

    title: str
    bars: list[Bar]
    is_ratio: bool = False  # draws a line at 1


def check(path: Path) -> None:
    """Check before the measurement that the plot can be written.

    Raises:
        UserError: not a PNG in an existing folder.
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: the plot is a PNG. Give a name that ends in .png.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        problem = "it is a folder" if path.is_dir() else f"the folder {path.parent} does not exist"
        raise UserError(f"--plot {path}: {problem}. Give a file in an existing folder.")


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw the result of `runner.run` into a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown_panels = list(panels(measured))
    heights = [
        _HEAD_INCHES + _LINE_INCHES * sum(1 + _name(bar).count("\n") + 0.6 for bar in panel.bars)
        for panel in shown_panels
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, sum(heights) + 0.8), layout="constrained")
        grid = figure.subplots(len(shown_panels), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], shown_panels, strict=True):
            _draw(axes, panel)
        figure.suptitle(_title(measured), fontsize=10)
        data = io.BytesIO()
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    files.write_bytes(path, data.getvalue())


def panels(measured: dict[str, Any]) -> Iterator[Panel]:
    """Yield the panels from top to bottom. Ratios to one peer are adjacent."""
    if "encodings" in measured:
        yield from _encoding_panels(measured["encodings"])
        return
    bars = [Bar(_with_workers(row), row["images_per_s"], row["ours"]) for row in measured["contenders"]]
    yield Panel("images/s", bars)
    ratios = [Bar(name, value, True) for name, value in measured["ratios"].items()]
    yield Panel("times as fast, within a round", ratios, is_ratio=True)
    starts = measured.get("start", [])
    titles = {
        "first_batch_s": "seconds from the start of the process to the first batch",
        "private_mib": "private memory beyond the imports after one epoch, MiB",
    }
    for key, title in titles.items() if starts else ():
        yield Panel(title, [Bar(row["name"], row[key], row["ours"]) for row in starts])


def _with_workers(row: dict[str, Any]) -> str:
    workers = f"{row['workers']} worker{'s' if row['workers'] > 1 else ''}"
    return f"{row['name']} ({workers})" if row["tried"] else row["name"]


def _encoding_panels(encodings: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    titles = {
        "conversion_radiographs_per_s": "conversion, radiographs/s",
        "loading_images_per_s": "loading and augmenting on the CPU, images/s",
        "loading_gpu_images_per_s": "the same on the GPU, images/s",
    }
    sizes = [Bar(row["encoding"], _exactly(row["bytes_per_radiograph"]), True) for row in encodings]
    yield Panel("bytes per radiograph", sizes)
    for key, title in titles.items():
        if all(row[key] is not None for row in encodings):
            yield Panel(title, [Bar(row["encoding"], row[key], True) for row in encodings])
    if all(row["probability_change"] is not None for row in encodings):
        for kind in ("largest", "mean"):
            bars = [Bar(row["encoding"], _exactly(row["probability_change"][kind]), True) for row in encodings]
            yield Panel(f"{kind} change of the probability against png", bars)


def _exactly(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


def _draw(axes: Any, panel: Panel) -> None:
    positions, medians = range(len(panel.bars)), [bar.value["median"] for bar in panel.bars]
    below = [bar.value["median"] - bar.value["min"] for bar in panel.bars]
    above = [bar.value["max"] - bar.value["median"] for bar in panel.bars]
    axes.barh(positions, medians, color=[_OWN_COLOR if bar.is_own else _PEER_COLOR for bar in panel.bars], height=0.62)
    axes.errorbar(medians, positions, xerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=3)
    largest = max(bar.value["max"] for bar in panel.bars) or 1.0
    for position, bar in enumerate(panel.bars):
        axes.text(
            bar.value["max"] + 0.012 * largest, position, _format_value(bar.value, times=panel.is_ratio), va="center"
        )
    if panel.is_ratio:
        axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(positions, [_name(bar) for bar in panel.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min(0, *(bar.value["min"] for bar in panel.bars)), largest * 1.4)
    axes.set_title(panel.title, loc="left", fontsize=10)


def _name(bar: Bar) -> str:
    """Return the name in lines. A ratio's peer has a line of its own."""
    lines = bar.name.replace(" / ", "\nover ").split("\n")
    return "\n".join(piece for line in lines for piece in textwrap.wrap(line, _LINE_CHARACTERS))


def _format_value(value: dict[str, float], *, times: bool) -> str:
    """Return median and range, as in `18.2 x (16 to 20)`."""
    numbers = {key: f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}" for key, number in value.items()}
    spread = f" ({numbers['min']} to {numbers['max']})" if value["min"] < value["max"] else ""
    return f"{numbers['median']}{' x' if times else ''}{spread}"


def _title(measured: dict[str, Any]) -> str:
    hardware, load = measured["hardware"], measured["workload"]
    machine = f"{hardware['processor']}, {hardware['processors']} processors, {hardware['device']}"
    return (
        f"mura-dist bench {measured['what']}: {load['radiographs']} radiographs of {load['size_px']} px, batches of "
        f"{load['batch']}, {measured['rounds']} rounds\n{machine}, load {hardware['load_before']} before"
    )
