"""Scale values to 8-bit gray.

    values (H, W) of any depth -> find_extent, scale -> uint8 (H, W)

The limits and the error of all readers of radiographs are defined here.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image

Code = Literal["not_image", "out_of_scope", "unreadable", "too_large", "io_error"]
"""io_error is the fault of a disk or machine, not of the file. The same command reads the file again."""

MAX_PIXELS = 50_000_000  # a stitched whole-leg radiograph has about 30 million, a hand on the finest detector 15
MAX_BYTES = 4 * MAX_PIXELS
BLOCK_PIXELS = 1 << 20  # converted at a time: intermediate arrays take up to 24 times the memory of the result

_GRAY_MODES = ("1", "L", "LA", "La")
_SAMPLE_PX = 64  # side of `RadiographDetails.colors`


class UnreadableFileError(Exception):
    """A file that contains no readable radiograph. `reason` is one sentence without path, DICOM value or library text."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(code, reason)
        self.code: Code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.code}: {self.reason}"


def check_size(width: int, height: int) -> None:
    """Raise UnreadableFileError for a header of more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UnreadableFileError("too_large", f"its header has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def find_extent(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite value, or (0, 0) without any."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def scale(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map low..high to 0..255 linearly, rounded and clipped. Return uint8 of the same shape, 0 where high <= low."""
    if not high > low:
        return np.zeros(values.shape, np.uint8)

    def scaled(block: np.ndarray) -> np.ndarray:
        gray = np.subtract(block, low, dtype=np.float32 if values.dtype.itemsize < 4 else np.float64)
        gray *= 255 / (high - low)
        return np.nan_to_num(np.clip(np.rint(gray, out=gray), 0, 255, out=gray), copy=False)

    with np.errstate(all="ignore"):
        return map_blocks(scaled, values)


def map_blocks(to_gray: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """Apply `to_gray` to rows of BLOCK_PIXELS at a time. Return uint8 of the shape of `values`."""
    gray = np.empty(values.shape, np.uint8)
    rows = max(1, BLOCK_PIXELS * len(values) // max(1, values.size))
    for start in range(0, len(values), rows):
        gray[start : start + rows] = to_gray(values[start : start + rows])
    return gray


def sample_colors(image: Image.Image) -> np.ndarray | None:
    """Return the pixels of a coarse grid, uint8 (n, n, 3), or None for a gray mode. A color mode may still look gray."""
    if image.mode in _GRAY_MODES:
        return None
    side = min(_SAMPLE_PX, *image.size)
    return np.asarray(image.resize((side, side), Image.Resampling.NEAREST).convert("RGB"))
