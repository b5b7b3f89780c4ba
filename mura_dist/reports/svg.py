"""Draw plots as SVG: a frame with axes, lines, dots and text.

    Axes (data -> pixels) -> marks, each a piece of markup -> Picture -> inline in a page, or a file of its own

Only NumPy is needed, so every install can write a report. Text stays text: a browser can search it and read it aloud. The
default color is `currentColor`, so a plot follows the page's theme.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mura_dist.reports.html import Html, element, join

INK = "currentColor"
PAPER_INK = "#1b1f24"  # text color of an SVG file
LETTER_PX, CHARACTER_PX = 12.5, 7.4  # font size; mean width of a character, capitals included
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Picture:
    """A plot of `width` x `height` pixels. `alt` is its text for screen readers."""

    name: str
    width: int
    height: int
    marks: Html
    alt: str
    caption: str = ""

    def inline(self) -> Html:
        """Return the plot as part of a page. It fills its column, up to 1.1 times its own width."""
        style = f"max-width: {self.width * 1.1:.0f}px"
        return element("svg", self.marks, **self._box(), role="img", aria_label=self.alt, style=style)

    def file(self) -> str:
        """Return the content of an SVG file, on a white background."""
        style = f"background: white; color: {PAPER_INK}"
        named = {"xmlns": "http://www.w3.org/2000/svg", "width": self.width, "height": self.height, "style": style}
        title = element("title", self.alt)
        svg = element("svg", title, self.marks, **self._box(), **named, font_family="system-ui, sans-serif")
        return _NOT_XML.sub("?", svg) + "\n"

    def _box(self) -> dict[str, str]:
        return {"viewBox": f"0 0 {self.width} {self.height}", "font_size": f"{LETTER_PX:g}"}


@dataclass(frozen=True)
class Axes:
    """A mapping from data to pixels: the range `x` from left to right, the range `y` upwards from the bottom."""

    left_px: float
    top_px: float
    width_px: float
    height_px: float
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    log: bool = False  # the y axis

    @property
    def bottom_px(self) -> float:
        """The y pixel of the lower edge."""
        return self.top_px + self.height_px

    def px(self, x: float) -> float:
        """Return the x pixel of a value."""
        return self.left_px + self.width_px * (x - self.x[0]) / (self.x[1] - self.x[0])

    def py(self, y: float) -> float:
        """Return the y pixel of a value."""
        y, low, high = (math.log10(value) if self.log else value for value in (y, *self.y))
        return self.bottom_px - self.height_px * (y - low) / (high - low)

    def with_range(self, x: tuple[float, float] | None = None, y: tuple[float, float] | None = None) -> "Axes":
        """Return a copy with another range of x or y."""
        return replace(self, x=x or self.x, y=y or self.y)


def line(
    axes: Axes, x: Iterable[float], y: Iterable[float], color: str = INK, width: float = 1.8, dash: str = ""
) -> Html:
    """Return a line through the points. Consecutive points on the same pixel are drawn once."""
    pixels = (f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    points = (point for point, _ in itertools.groupby(pixels))
    more = {"stroke_dasharray": dash} if dash else {}
    return element(
        "polyline",
        points=" ".join(points),
        fill="none",
        stroke=color,
        stroke_width=width,
        stroke_linejoin="round",
        **more,
    )


def filled_histogram(axes: Axes, edges: Sequence[float], values: Sequence[float], color: str) -> Html:
    """Return a filled histogram, from 0 to `values` (n,) between `edges` (n + 1,)."""
    x = np.repeat(np.asarray(edges, float), 2)
    y = np.concatenate([[0.0], np.repeat(np.asarray(values, float), 2), [0.0]])
    points = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    return element("polygon", points=points, fill=color, fill_opacity=0.45, stroke=color, stroke_width=1.2)


def dot(axes: Axes, x: float, y: float, color: str = INK, radius: float = 4, hollow: bool = False) -> Html:
    """Return a circle at a data point."""
    fill = {"fill": "none", "stroke": color, "stroke_width": 1.8} if hollow else {"fill": color}
    return element("circle", cx=f"{axes.px(x):.1f}", cy=f"{axes.py(y):.1f}", r=radius, **fill)


def diamond(axes: Axes, x: float, y: float, color: str = INK, radius: float = 5, hollow: bool = False) -> Html:
    """Return a diamond at a data point."""
    a, b = axes.px(x), axes.py(y)
    points = f"{a - radius:.1f},{b:.1f} {a:.1f},{b - radius:.1f} {a + radius:.1f},{b:.1f} {a:.1f},{b + radius:.1f}"
    fill = {"fill": "none", "stroke": color, "stroke_width": 1.6} if hollow else {"fill": color}
    return element("polygon", points=points, **fill)


def square(axes: Axes, x: float, y: float, color: str = INK, radius: float = 4.5) -> Html:
    """Return a square at a data point."""
    return rect(axes.px(x) - radius, axes.py(y) - radius, 2 * radius, 2 * radius, color)


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> Html:
    """Return a rectangle, in pixels."""
    more = {} if opacity == 1 else {"fill_opacity": f"{opacity:.3g}"}
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", fill=fill, **more)


def reference_line(
    axes: Axes, *, x: float | None = None, y: float | None = None, dash: str = "1.5 3", opacity: float = 0.7
) -> Html:
    """Return a thin line across the frame, at `x` or at `y`."""
    if x is not None:
        ends = {"x1": axes.px(x), "x2": axes.px(x), "y1": axes.top_px, "y2": axes.bottom_px}
    else:
        assert y is not None
        ends = {"x1": axes.left_px, "x2": axes.left_px + axes.width_px, "y1": axes.py(y), "y2": axes.py(y)}
    more = {"stroke_dasharray": dash} if dash else {}
    coordinates = {key: f"{value:.1f}" for key, value in ends.items()}
    return element("line", **coordinates, stroke=INK, stroke_opacity=opacity, **more)


def text_label(x: float, y: float, text: str, anchor: str = "middle", **more: object) -> Html:
    """Return text at a pixel position."""
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=INK, **more)


def frame(
    axes: Axes,
    x_label: str = "",
    y_label: str = "",
    *,
    x_ticks: Sequence[float] | None = None,
    y_ticks: Sequence[float] | None = None,
    grid: str = "xy",
) -> Html:
    """Return the axes, their labels, ticks with numbers, and grid lines."""
    across = ticks(*axes.x) if x_ticks is None else x_ticks
    up = _y_ticks(axes) if y_ticks is None else y_ticks
    parts = [reference_line(axes, x=value, dash="", opacity=0.13) for value in across if "x" in grid]
    parts += [reference_line(axes, y=value, dash="", opacity=0.13) for value in up if "y" in grid]
    parts += [text_label(axes.px(value), axes.bottom_px + 15, format_tick(value)) for value in across]
    parts += [text_label(axes.left_px - 6, axes.py(value) + 4, format_tick(value), "end") for value in up]
    parts.append(element("path", d=_edge(axes), fill="none", stroke=INK, stroke_opacity=0.6))
    if x_label:
        parts.append(text_label(axes.left_px + axes.width_px / 2, axes.bottom_px + 33, x_label))
    if y_label:
        rotation = f"rotate(-90 12 {axes.top_px + axes.height_px / 2:.1f})"
        parts.append(text_label(12, axes.top_px + axes.height_px / 2, y_label, transform=rotation))
    return join(parts)


def _edge(axes: Axes) -> str:
    return f"M{axes.left_px:.1f} {axes.top_px:.1f}V{axes.bottom_px:.1f}H{axes.left_px + axes.width_px:.1f}"


def _y_ticks(axes: Axes) -> list[float]:
    if not axes.log:
        return ticks(*axes.y, about=4)
    powers = [10.0**power for power in range(math.ceil(math.log10(axes.y[0])), math.floor(math.log10(axes.y[1])) + 1)]
    return powers[:: -(-len(powers) // 5)] if powers else list(axes.y)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round numbers from `low` to `high`."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def format_tick(value: float) -> str:
    """Return the text of a tick: 0.25, 20, 1,500, 40k, 1e-4."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:,g}k"
    return f"{value:,g}"


def ellipsize(text: str, max_length: int) -> str:
    """Return a text with its middle shortened to `…`, since names often differ at their end."""
    return (
        text if len(text) <= max_length else f"{text[: max_length - max_length // 2 - 1]}…{text[-(max_length // 2) :]}"
    )
