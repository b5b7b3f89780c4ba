"""How a class activation map is drawn, wherever it is drawn: one scale of logits for all maps of all pictures.

    cells (h, w) logits -> interpolated over the radiograph -> colour, opacity -> painted; the scale beside it

So that two maps may be compared. A map stretched to its own extremes would show something red on every radiograph. A map of
fewer than MIN_CELLS cells a side says nothing about a place: `drawable` is False of it.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

EDGES = (0.5, 1.0, 2.0, 4.0, 8.0)  # logits of a cell, on either side of 0: each twice the one before
STEPS = range(-len(EDGES), len(EDGES) + 1)
OPACITY = (0.0, 0.22, 0.33, 0.44, 0.55, 0.66)  # at the middle of each step; between two middles it is interpolated
AGAINST, FOR = (61, 155, 255), (255, 138, 31)  # blue and orange: apart for every kind of colour vision
SCALE_PX = 72  # how tall `draw_scale` draws
MIN_CELLS = 4  # of a side


def drawable(cells: np.ndarray) -> bool:
    """Return whether a map (h, w) has cells enough to be shown."""
    return min(cells.shape) >= MIN_CELLS


def edges() -> list[float]:
    """Both sides' edges, ascending."""
    return [-edge for edge in reversed(EDGES)] + list(EDGES)


def step_color(step: int) -> tuple[tuple[int, int, int], float]:
    """What a cell of that step is painted with, and how opaque."""
    return (FOR if step > 0 else AGAINST), OPACITY[abs(step)]


def opacity(logit: np.ndarray) -> np.ndarray:
    """Return how opaque a map is at these logits, of any shape: OPACITY at the middle of each step, without jumps between."""
    middles = [0.0, *(edge * 2**0.5 for edge in EDGES)]
    return np.interp(np.abs(logit), middles, OPACITY)


def overlay_heatmap(pixels: np.ndarray, cells: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """Return a radiograph under its map, interpolated between the middles of the cells.

    Args:
        pixels: (H, W) uint8.
        cells: (h, w) logits; one that is no number, of a model that has diverged, stays clear.
        strength: Of the opacity, 0 to 1.

    Returns:
        (H, W, 3) uint8.
    """
    return _blend(pixels, _interpolate(cells, pixels.shape), strength)


def render_layer(cells: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a map (h, w) alone, interpolated to `shape`, to be laid over a radiograph: colour and opacity, (H, W, 4) uint8."""
    logit = _interpolate(cells, shape)
    colors = np.where(logit[..., None] > 0, FOR, AGAINST)
    return np.concatenate([colors, np.rint(255 * opacity(logit))[..., None]], axis=-1).astype(np.uint8)


def _interpolate(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the logits (h, w) at each pixel of `shape`."""
    far = 4 * EDGES[-1]  # where opacity no longer grows, so that an infinite cell has neighbours too
    finite = np.clip(np.nan_to_num(cells.astype(np.float32), nan=0, posinf=far, neginf=-far), -far, far)
    height, width = shape
    return np.asarray(Image.fromarray(finite).resize((width, height), Image.Resampling.BILINEAR))


def _blend(pixels: np.ndarray, logit: np.ndarray, strength: float = 1.0) -> np.ndarray:
    share = strength * opacity(logit)[..., None]
    ours = np.where(logit[..., None] > 0, FOR, AGAINST)
    return np.rint(pixels[..., None] * (1 - share) + ours * share).astype(np.uint8)


def scale_logits(width: int) -> np.ndarray:
    """Return the logits along a scale `width` pixels wide, (width,): each of STEPS has the same share of it."""
    step = (np.arange(width) + 0.5) / width * len(STEPS) - len(STEPS) / 2
    return np.sign(step) * EDGES[0] * np.where(np.abs(step) > 0.5, 2.0 ** (np.abs(step) - 0.5), 2 * np.abs(step))


def scale_strip(width: int) -> np.ndarray:
    """Return the colours along a scale, over black and below over white: (28, width, 3) uint8."""
    logits = np.tile(scale_logits(width), (28, 1))
    ground = np.repeat([[0], [255]], 14, axis=0) * np.ones_like(logits)
    return _blend(ground, logits)


def draw_scale(canvas: Image.Image, x: int, y: int, width: int, font: Any) -> None:
    """The colours over black and over white, for that is what they lie on."""
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), "A cell's logit: blue lowers it, orange raises it, clear is near 0", "#1b1f24", font)
    canvas.paste(Image.fromarray(scale_strip(width)), (x, y + 22))
    draw.rectangle((x, y + 22, x + width, y + 50), outline="#8995a1")
    for place, edge in enumerate(edges(), start=1):
        draw.text((x + place * width / len(STEPS), y + 54), f"{edge:g}", "#1b1f24", font, anchor="ma")
