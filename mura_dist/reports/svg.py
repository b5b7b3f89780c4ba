"""Plots as SVG, drawn from numbers: a frame with axes, lines, dots and words on it. NumPy only.

    Axes (data -> pixels) -> marks, each a piece of markup -> Picture -> inline in a page, or a file of its own

A plot needs no drawing package, so every install can write a report, and hundreds of plots take a second. Letters stay
letters: the page's own font, found by a search, read aloud. Ink is `currentColor`: a plot follows the page's theme.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mura_dist.reports.html import Html, element, join

INK = "currentColor"
PAPER_INK = "#1b1f24"  # of a picture that stands alone
LETTER_PX, CHARACTER_PX = 12.5, 7.4  # height of the letters; about the width of one, capitals included
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Picture:
    """A plot of `width` x `height` pixels. `alt` says what it shows to those who cannot see it."""

    name: str
    width: int
    height: int
    marks: Html
    alt: str
    caption: str = ""

    def inline(self) -> Html:
        """As part of a page: fills its column, up to a tenth more than its own size."""
        style = f"max-width: {self.width * 1.1:.0f}px"
        return element("svg", self.marks, **self._box(), role="img", aria_label=self.alt, style=style)

    def file(self) -> str:
        """As a file: on white, whatever opens it."""
        style = f"background: white; color: {PAPER_INK}"
        named = {"xmlns": "http://www.w3.org/2000/svg", "width": self.width, "height": self.height, "style": style}
        title = element("title", self.alt)
        svg = element("svg", title, self.marks, **self._box(), **named, font_family="system-ui, sans-serif")
        return _NOT_XML.sub("?", svg) + "\n"

    def _box(self) -> dict[str, str]:
        return {"viewBox": f"0 0 {self.width} {self.height}", "font_size": f"{LETTER_PX:g}"}


@dataclass(frozen=True)
class Axes:
    """Where data lie on a picture: the range `x` from `left` over `width` pixels, the range `y` upwards from the bottom."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)
    log: bool = False  # the y axis

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def px(self, x: float) -> float:
        return self.left + self.width * (x - self.x[0]) / (self.x[1] - self.x[0])

    def py(self, y: float) -> float:
        y, low, high = (math.log10(value) if self.log else value for value in (y, *self.y))
        return self.bottom - self.height * (y - low) / (high - low)

    def ranged(self, x: tuple[float, float] | None = None, y: tuple[float, float] | None = None) -> "Axes":
        return replace(self, x=x or self.x, y=y or self.y)


def line(
    axes: Axes, x: Iterable[float], y: Iterable[float], colour: str = INK, width: float = 1.8, dash: str = ""
) -> Html:
    """A line through the points; neighbours on the same pixel are drawn once, a place it comes back to is drawn again."""
    places = (f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    points = (place for place, _ in itertools.groupby(places))
    more = {"stroke_dasharray": dash} if dash else {}
    return element(
        "polyline",
        points=" ".join(points),
        fill="none",
        stroke=colour,
        stroke_width=width,
        stroke_linejoin="round",
        **more,
    )


def steps(axes: Axes, edges: Sequence[float], values: Sequence[float], colour: str) -> Html:
    """A histogram's outline, filled: from 0 to `values` (n,) between `edges` (n + 1,)."""
    x = np.repeat(np.asarray(edges, float), 2)
    y = np.concatenate([[0.0], np.repeat(np.asarray(values, float), 2), [0.0]])
    points = " ".join(f"{axes.px(a):.1f},{axes.py(b):.1f}" for a, b in zip(x, y, strict=True))
    return element("polygon", points=points, fill=colour, fill_opacity=0.45, stroke=colour, stroke_width=1.2)


def dot(axes: Axes, x: float, y: float, colour: str = INK, radius: float = 4, hollow: bool = False) -> Html:
    fill = {"fill": "none", "stroke": colour, "stroke_width": 1.8} if hollow else {"fill": colour}
    return element("circle", cx=f"{axes.px(x):.1f}", cy=f"{axes.py(y):.1f}", r=radius, **fill)


def diamond(axes: Axes, x: float, y: float, colour: str = INK, radius: float = 5, hollow: bool = False) -> Html:
    a, b = axes.px(x), axes.py(y)
    points = f"{a - radius:.1f},{b:.1f} {a:.1f},{b - radius:.1f} {a + radius:.1f},{b:.1f} {a:.1f},{b + radius:.1f}"
    fill = {"fill": "none", "stroke": colour, "stroke_width": 1.6} if hollow else {"fill": colour}
    return element("polygon", points=points, **fill)


def square(axes: Axes, x: float, y: float, colour: str = INK, radius: float = 4.5) -> Html:
    return rect(axes.px(x) - radius, axes.py(y) - radius, 2 * radius, 2 * radius, colour)


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> Html:
    more = {} if opacity == 1 else {"fill_opacity": f"{opacity:.3g}"}
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", fill=fill, **more)


def rule(
    axes: Axes, *, x: float | None = None, y: float | None = None, dash: str = "1.5 3", opacity: float = 0.7
) -> Html:
    """A thin line across the frame, at `x` or at `y`."""
    if x is not None:
        ends = {"x1": axes.px(x), "x2": axes.px(x), "y1": axes.top, "y2": axes.bottom}
    else:
        assert y is not None
        ends = {"x1": axes.left, "x2": axes.left + axes.width, "y1": axes.py(y), "y2": axes.py(y)}
    more = {"stroke_dasharray": dash} if dash else {}
    at = {key: f"{value:.1f}" for key, value in ends.items()}
    return element("line", **at, stroke=INK, stroke_opacity=opacity, **more)


def words(x: float, y: float, text: str, anchor: str = "middle", **more: object) -> Html:
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
    """Ticks with their numbers, pale lines across from them, and what the axes are."""
    across = ticks(*axes.x) if x_ticks is None else x_ticks
    up = _up(axes) if y_ticks is None else y_ticks
    parts = [rule(axes, x=value, dash="", opacity=0.13) for value in across if "x" in grid]
    parts += [rule(axes, y=value, dash="", opacity=0.13) for value in up if "y" in grid]
    parts += [words(axes.px(value), axes.bottom + 15, plain(value)) for value in across]
    parts += [words(axes.left - 6, axes.py(value) + 4, plain(value), "end") for value in up]
    parts.append(element("path", d=_edge(axes), fill="none", stroke=INK, stroke_opacity=0.6))
    if x_label:
        parts.append(words(axes.left + axes.width / 2, axes.bottom + 33, x_label))
    if y_label:
        turned = f"rotate(-90 12 {axes.top + axes.height / 2:.1f})"
        parts.append(words(12, axes.top + axes.height / 2, y_label, transform=turned))
    return join(parts)


def _edge(axes: Axes) -> str:
    return f"M{axes.left:.1f} {axes.top:.1f}V{axes.bottom:.1f}H{axes.left + axes.width:.1f}"


def _up(axes: Axes) -> list[float]:
    if not axes.log:
        return ticks(*axes.y, about=4)
    powers = [10.0**power for power in range(math.ceil(math.log10(axes.y[0])), math.floor(math.log10(axes.y[1])) + 1)]
    return powers[:: -(-len(powers) // 5)] if powers else list(axes.y)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """About so many round numbers from `low` to `high`."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def plain(value: float) -> str:
    """A tick's number: 0.25, 20, 1,500, 40k, 1e-4."""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:,g}k"
    return f"{value:,g}"


def shortened(text: str, most: int) -> str:
    """Both ends of a name too long: what tells names apart often stands last."""
    return text if len(text) <= most else f"{text[: most - most // 2 - 1]}…{text[-(most // 2) :]}"
