"""Draw class activation maps with one color scale for all radiographs, so that two maps can be compared.

    cells (h, w) logits -> interpolated to the radiograph -> color, opacity -> overlay; the color scale next to it

A map that is scaled to its own extremes would show something red on every radiograph. A map with fewer than MIN_CELLS cells a
side cannot locate anything; `drawable` is False for it.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

EDGES = (0.5, 1.0, 2.0, 4.0, 8.0)  # absolute logits that separate the steps
STEPS = range(-len(EDGES), len(EDGES) + 1)
OPACITY = (0.0, 0.22, 0.33, 0.44, 0.55, 0.66)  # at the middle of each step, interpolated between
AGAINST, FOR = (61, 155, 255), (255, 138, 31)  # blue and orange, distinct for every kind of color vision
SCALE_PX = 72  # height of what `draw_scale` draws
MIN_CELLS = 4  # per side


def drawable(cells: np.ndarray) -> bool:
    """Return whether a map (h, w) has enough cells to be drawn."""
    return min(cells.shape) >= MIN_CELLS


def edges() -> list[float]:
    """Return the negative and positive edges, ascending."""
    return [-edge for edge in reversed(EDGES)] + list(EDGES)


def step_color(step: int) -> tuple[tuple[int, int, int], float]:
    """Return the RGB color and the opacity of a step."""
    return (FOR if step > 0 else AGAINST), OPACITY[abs(step)]


def opacity(logit: np.ndarray) -> np.ndarray:
    """Return the opacity at logits of any shape: OPACITY at the middle of each step, linear between."""
    middles = [0.0, *(edge * 2**0.5 for edge in EDGES)]
    return np.interp(np.abs(logit), middles, OPACITY)


def overlay_heatmap(pixels: np.ndarray, cells: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Return a radiograph with its map on top, interpolated between the centers of the cells.

    Args:
        pixels: (H, W) uint8.
        cells: (h, w) logits. NaN is drawn as 0.
        strength: Factor on the opacity, 0 to 1.

    Returns:
        (H, W, 3) uint8.
    """
    return _blend(pixels, _interpolate(cells, pixels.shape), strength)


def render_layer(cells: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the map alone, interpolated to `shape`, as RGBA (H, W, 4) uint8. cells: (h, w) logits."""
    logit = _interpolate(cells, shape)
    colors = np.where(logit[..., None] > 0, FOR, AGAINST)
    return np.concatenate([colors, np.rint(255 * opacity(logit))[..., None]], axis=-1).astype(np.uint8)


def _interpolate(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the logits (h, w) at each pixel of `shape`."""
    limit = 4 * EDGES[-1]  # opacity is constant beyond, and interpolation needs finite values
    finite = np.clip(np.nan_to_num(cells.astype(np.float32), nan=0, posinf=limit, neginf=-limit), -limit, limit)
    height, width = shape
    return np.asarray(Image.fromarray(finite).resize((width, height), Image.Resampling.BILINEAR))


def _blend(pixels: np.ndarray, logit: np.ndarray, strength: float = 1.0) -> np.ndarray:
    share = strength * opacity(logit)[..., None]
    colors = np.where(logit[..., None] > 0, FOR, AGAINST)
    return np.rint(pixels[..., None] * (1 - share) + colors * share).astype(np.uint8)


def scale_logits(width: int) -> np.ndarray:
    """Return the logits (width,) along a color scale. Each of STEPS has the same width."""
    step = (np.arange(width) + 0.5) / width * len(STEPS) - len(STEPS) / 2
    return np.sign(step) * EDGES[0] * np.where(np.abs(step) > 0.5, 2.0 ** (np.abs(step) - 0.5), 2 * np.abs(step))


def scale_strip(width: int) -> np.ndarray:
    """Return a color scale over black and, below it, over white: (28, width, 3) uint8."""
    logits = np.tile(scale_logits(width), (28, 1))
    background = np.repeat([[0], [255]], 14, axis=0) * np.ones_like(logits)
    return _blend(background, logits)


def draw_scale(canvas: Image.Image, x: int, y: int, width: int, font: Any) -> None:
    """Draw the color scale with its labels at (x, y), SCALE_PX tall."""
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), "Logit of a cell: blue is negative, orange is positive, clear is near 0", "#1b1f24", font)
    canvas.paste(Image.fromarray(scale_strip(width)), (x, y + 22))
    draw.rectangle((x, y + 22, x + width, y + 50), outline="#8995a1")
    for index, edge in enumerate(edges(), start=1):
        draw.text((x + index * width / len(STEPS), y + 54), f"{edge:g}", "#1b1f24", font, anchor="ma")
