"""How a class activation map is drawn, wherever it is drawn: one scale of logits for all maps of all pictures.

    cells (h, w) logits -> step of each cell -> colour, opacity -> painted over the radiograph; the scale beside it

So that two maps may be compared. A map stretched to its own extremes would show something red on every radiograph. Cells
are drawn as what they are: no smoothing, no outline.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

EDGES = (0.5, 1.0, 2.0, 4.0, 8.0)  # logits of a cell, on either side of 0: where one colour ends and the next begins
STEPS = range(-len(EDGES), len(EDGES) + 1)
OPACITY = (0.0, 0.22, 0.33, 0.44, 0.55, 0.66)
AGAINST, FOR = (61, 155, 255), (255, 138, 31)  # blue and orange: apart for every kind of colour vision
SCALE_PX = 72  # how tall `draw_scale` draws


def edges() -> list[float]:
    """Both sides' edges, ascending."""
    return [-edge for edge in reversed(EDGES)] + list(EDGES)


def steps(cells: np.ndarray) -> np.ndarray:
    """(h, w) logits -> int (h, w): 0 within the first edge, up to len(EDGES) beyond the last; the sign is the logit's.

    A cell that is no number, of a model that has diverged, stays clear.
    """
    cells = np.where(np.isnan(cells), 0, cells)
    return np.sign(cells).astype(int) * np.digitize(np.abs(cells), EDGES)


def colour(step: int) -> tuple[tuple[int, int, int], float]:
    """What a cell of that step is painted with, and how opaque."""
    return (FOR if step > 0 else AGAINST), OPACITY[abs(step)]


def painted(pixels: np.ndarray, cells: np.ndarray, strength: float = 1.0) -> np.ndarray:
    """pixels (H, W) uint8 with the map over them, a line between its cells: uint8 (H, W, 3). strength: of the opacity, 0 to 1."""
    step = steps(cells)
    ours = np.array([colour(one)[0] for one in step.flat], np.float64).reshape(*step.shape, 3)
    opacity = strength * np.array([colour(one)[1] for one in step.flat]).reshape(step.shape)
    # The cell over each pixel.
    y, x = (np.arange(size) * num // size for size, num in zip(pixels.shape, step.shape, strict=True))
    opacity = opacity[y][:, x, None]
    opacity[np.diff(y, append=-1) != 0] = 0
    opacity[:, np.diff(x, append=-1) != 0] = 0
    return np.rint(pixels[..., None] * (1 - opacity) + ours[y][:, x] * opacity).astype(np.uint8)


def draw_scale(canvas: Image.Image, x: int, y: int, width: int, font: Any) -> None:
    """The colours over black and over white, for that is what they lie on."""
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), "A cell's logit: blue lowers it, orange raises it, clear is near 0", "#1b1f24", font)
    slot = width / len(STEPS)
    for place, step in enumerate(STEPS):
        for half, grey in enumerate((0, 255)):
            rgb, opacity = colour(step)
            mixed = tuple(round(grey * (1 - opacity) + part * opacity) for part in rgb)
            left, upper = x + place * slot, y + 22 + 14 * half
            draw.rectangle((left, upper, left + slot, upper + 14), fill=mixed)
    draw.rectangle((x, y + 22, x + width, y + 50), outline="#8995a1")
    for place, edge in enumerate(edges(), start=1):
        draw.text((x + place * slot, y + 54), f"{edge:g}", "#1b1f24", font, anchor="ma")
