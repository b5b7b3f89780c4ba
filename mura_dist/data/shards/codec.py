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
MAX_SIZE_PX = 2048  # of a side

Task = tuple[int, str | bytes | radiograph.UnreadableFileError]
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
    """The bytes of a sample's image member -> uint8 (S, S). Raises ValueError where they are none; S is at most `MAX_SIZE_PX`."""
    file = io.BytesIO(data)
    try:
        if encoding == "raw":
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("another version of .npy")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8:
                raise ValueError(f"{dtype}, not uint8")
            return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape)
        with Image.open(file) as image:
            if max(image.size) > MAX_SIZE_PX:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, at most {MAX_SIZE_PX} of a side are read")
            return np.asarray(image)
    except Exception as error:  # Pillow and NumPy have many kinds, of damage that nobody foresaw too
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


@dataclass(frozen=True)
class SampleEncoder:
    """Does one task."""

    size: int
    encoding: str

    def __call__(self, task: Task) -> Sample:
        row, source = task
        try:
            if isinstance(source, radiograph.UnreadableFileError):
                raise source
            pixels = radiograph.read(io.BytesIO(source) if isinstance(source, bytes) else source, self.size)
        except radiograph.UnreadableFileError as error:
            return Sample(row, None, error.code, error.reason)
        return Sample(row, encode(pixels, self.encoding), "", "")
