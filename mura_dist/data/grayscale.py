"""Gray values of 8 bits, and the limits and the error that all readers of radiographs share.

    values (H, W) of any depth -> find_extent, scale -> uint8 (H, W)

A file that gives no radiograph raises UnreadableFileError with one of five codes.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

Code = Literal["not_image", "out_of_scope", "unreadable", "too_large", "io_error"]
"""The last is the disk's or the machine's fault, not the file's: the same command reads the file again."""

MAX_PIXELS = 50_000_000  # a stitched whole-leg radiograph has about 30 million, a hand on the finest detector 15
MAX_BYTES = 4 * MAX_PIXELS
BLOCK_PIXELS = 1 << 20  # turned into gray at a time: what lies between is up to 24 times as large as the gray

_GRAY_MODES = ("1", "L", "LA", "La")
_SAMPLE_PX = 64  # of a side of `RadiographDetails.colors`


class UnreadableFileError(Exception):
    """This file gives no radiograph. `reason` is one plain sentence: no path, no DICOM value, no library's words."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code: Code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def check_size(width: int, height: int) -> None:
    """Raise UnreadableFileError where a header promises more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UnreadableFileError(
            "too_large", f"its header promises {width} x {height} pixels, more than {MAX_PIXELS:,}"
        )


def find_extent(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value; (0, 0) where there is none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255, linear, rounded, clipped; uint8 of the same shape. All 0 where there is no range."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)

    def scaled(block: np.ndarray) -> np.ndarray:
        gray = np.subtract(block, low, dtype=np.float32 if values.dtype.itemsize < 4 else np.float64)
        gray *= 255 / (high - low)
        return np.nan_to_num(np.clip(np.rint(gray, out=gray), 0, 255, out=gray), copy=False)

    with np.errstate(all="ignore"):
        return map_blocks(scaled, values)


def map_blocks(gray_of: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """Apply `gray_of` to BLOCK_PIXELS at a time, in whole rows; uint8 of the shape of `values`."""
    gray = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK_PIXELS * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        gray[start : start + rows] = gray_of(values[start : start + rows])
    return gray


def sample_colors(image: Image.Image) -> np.ndarray | None:
    """Return the pixels of a coarse grid, (n, n, 3) uint8; None of a gray image. A file in color may be gray for all that."""
    if image.mode in _GRAY_MODES:
        return None
    side = min(_SAMPLE_PX, *image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))
