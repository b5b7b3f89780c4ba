"""A radiograph on its way into a shard: read, resized, encoded. A worker process imports this and little else: it starts fast.

row (or the file's content) -> radiograph.read -> uint8 (S, S) -> encode -> Sample
"""

import functools
import io
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from mura_dist.data import radiograph

SUFFIX = {"raw": "npy", "png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95

Task = tuple[int, str | bytes | radiograph.Unreadable]
"""A row, and its file's path; or its content, or why there is none, where only the main process reaches the source."""


class Sample(NamedTuple):
    """What a tar takes, or the reason there is nothing to take."""

    row: int
    data: bytes | None
    code: str
    reason: str


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """uint8 (S, S) -> the bytes of a sample's image member."""
    if encoding == "raw":
        return npy_header(pixels.shape) + pixels.tobytes()
    data = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(data, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


@functools.cache
def npy_header(shape: tuple[int, ...]) -> bytes:
    """What NumPy writes before the pixels, uint8 of `shape` in C order."""
    data = io.BytesIO()
    np.lib.format.write_array(data, np.zeros(shape, np.uint8), version=(1, 0), allow_pickle=False)
    return data.getvalue()[: -math.prod(shape)]


def decode(data: bytes, encoding: str) -> np.ndarray:
    """The bytes of a sample's image member -> uint8 (S, S)."""
    if encoding == "raw":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@dataclass(frozen=True)
class Reader:
    """Does one task."""

    size: int
    encoding: str

    def __call__(self, task: Task) -> Sample:
        row, source = task
        try:
            if isinstance(source, radiograph.Unreadable):
                raise source
            pixels = radiograph.read(io.BytesIO(source) if isinstance(source, bytes) else source, self.size)
        except radiograph.Unreadable as error:
            return Sample(row, None, error.code, error.reason)
        return Sample(row, encode(pixels, self.encoding), "", "")
