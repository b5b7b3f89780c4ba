"""A picture of what was measured: horizontal bars of the medians, whiskers from least to most, numbers beside.

measured -> panels (rates, ratios, start, memory, encodings: those that are there) -> one PNG
"""

import io
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mura_dist.core import files
from mura_dist.core.errors import UserError

_OURS, _THEIRS = "#1f6f8b", "#b8b8b8"
_LINE_INCHES, _HEAD_INCHES, _LINE_CHARACTERS = 0.21, 0.8, 64
_STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class Bar(NamedTuple):
    name: str
    value: dict[str, float]  # median, min, max
    ours: bool


class Panel(NamedTuple):
    title: str
    bars: list[Bar]
    one: bool = False  # a line at 1: as fast as


def check(path: Path) -> None:
    """Before minutes of measuring: raises UserError for what cannot be written, ModuleNotFoundError without matplotlib."""
    import matplotlib  # noqa: F401

    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: the plot is a PNG; give a name that ends in .png")
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UserError(f"--plot {path}: {what}; give a file in a folder that is there")


def draw(measured: dict[str, Any], path: Path) -> None:
    """Draw what `runner.run` returned into a PNG file."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(panels(measured))
    heights = [
        _HEAD_INCHES + _LINE_INCHES * sum(1 + _name(bar).count("\n") + 0.6 for bar in panel.bars) for panel in parts
    ]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, sum(heights) + 0.8), layout="constrained")
        grid = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], parts, strict=True):
            _draw(axes, panel)
        figure.suptitle(_title(measured), fontsize=10)
        data = io.BytesIO()
        FigureCanvasAgg(figure).print_png(data, metadata={"Software": None})
    files.write_bytes(path, data.getvalue())


def panels(measured: dict[str, Any]) -> Iterator[Panel]:
    """In the order in which they are read; ratios over one peer stand together."""
    if "encodings" in measured:
        yield from _of_encodings(measured["encodings"])
        return
    bars = [Bar(_with_workers(one), one["images_per_s"], one["ours"]) for one in measured["contenders"]]
    yield Panel("images/s", bars)
    ratios = [Bar(name, value, True) for name, value in measured["ratios"].items()]
    yield Panel("times as fast, within a round", ratios, one=True)
    starts = measured.get("start", [])
    titles = {
        "first_batch_s": "seconds from the start of the process to the first batch",
        "private_mib": "private memory beyond the imports after one epoch, MiB",
    }
    for key, title in titles.items() if starts else ():
        yield Panel(title, [Bar(one["name"], one[key], one["ours"]) for one in starts])


def _with_workers(one: dict[str, Any]) -> str:
    workers = f"{one['workers']} worker{'s' if one['workers'] > 1 else ''}"
    return f"{one['name']} ({workers})" if one["tried"] else one["name"]


def _of_encodings(encodings: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    titles = {
        "conversion_radiographs_per_s": "conversion, radiographs/s",
        "loading_images_per_s": "loading and augmenting on the CPU, images/s",
        "loading_gpu_images_per_s": "the same on the GPU, images/s",
    }
    sizes = [Bar(one["encoding"], _exactly(one["bytes_per_radiograph"]), True) for one in encodings]
    yield Panel("bytes a radiograph", sizes)
    for key, title in titles.items():
        if all(one[key] is not None for one in encodings):
            yield Panel(title, [Bar(one["encoding"], one[key], True) for one in encodings])
    if all(one["probability_change"] is not None for one in encodings):
        for which in ("largest", "mean"):
            bars = [Bar(one["encoding"], _exactly(one["probability_change"][which]), True) for one in encodings]
            yield Panel(f"{which} change of the probability against png", bars)


def _exactly(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


def _draw(axes: Any, panel: Panel) -> None:
    places, middle = range(len(panel.bars)), [bar.value["median"] for bar in panel.bars]
    below = [bar.value["median"] - bar.value["min"] for bar in panel.bars]
    above = [bar.value["max"] - bar.value["median"] for bar in panel.bars]
    axes.barh(places, middle, color=[_OURS if bar.ours else _THEIRS for bar in panel.bars], height=0.62)
    axes.errorbar(middle, places, xerr=[below, above], fmt="none", ecolor="#333333", elinewidth=1, capsize=3)
    most = max(bar.value["max"] for bar in panel.bars) or 1.0
    for place, bar in enumerate(panel.bars):
        axes.text(bar.value["max"] + 0.012 * most, place, _words(bar.value, times=panel.one), va="center")
    if panel.one:
        axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, [_name(bar) for bar in panel.bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(min(0, *(bar.value["min"] for bar in panel.bars)), most * 1.4)
    axes.set_title(panel.title, loc="left", fontsize=10)


def _name(bar: Bar) -> str:
    """In lines: a ratio's peer stands below ours."""
    parts = bar.name.replace(" / ", "\nover ").split("\n")
    return "\n".join(line for part in parts for line in textwrap.wrap(part, _LINE_CHARACTERS))


def _words(value: dict[str, float], *, times: bool) -> str:
    """`18.2 x (16 to 20)`: the median, and how far it was from least to most."""
    numbers = {key: f"{each:,.0f}" if abs(each) >= 1000 else f"{each:.3g}" for key, each in value.items()}
    spread = f" ({numbers['min']} to {numbers['max']})" if value["min"] < value["max"] else ""
    return f"{numbers['median']}{' x' if times else ''}{spread}"


def _title(measured: dict[str, Any]) -> str:
    hardware, load = measured["hardware"], measured["workload"]
    where = f"{hardware['processor']}, {hardware['processors']} processors, {hardware['device']}"
    return (
        f"mura-dist bench {measured['what']}: {load['radiographs']} radiographs of {load['size_px']} px, batches of "
        f"{load['batch']}, {measured['rounds']} rounds\n{where}, load {hardware['load_before']} before"
    )
