"""Read, resize and encode radiographs for shards, and decode samples. Imports little, so that worker processes start fast.

path or content of a row -> radiograph.read -> uint8 (S, S) -> encode -> Sample
"""

import functools
import io
import math
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from mura_dist.data import radiograph

SUFFIX = {"raw": "npy", "png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95
MAX_SIZE_PX = 2048  # largest side of a sample

Task = tuple[int, str | bytes | radiograph.UnreadableFileError]
"""A row with its file's path, its content, or the reason why the main process could not fetch it."""


Buffer = bytes | memoryview | pickle.PickleBuffer


class Sample(NamedTuple):
    """An encoded image of a row, or the code and reason why there is none."""

    row: int
    data: Buffer | None
    code: str
    reason: str


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """Encode pixels, uint8 (S, S), as the image member of a sample: raw (.npy), png or jpeg."""
    if encoding == "raw":
        return b"".join((npy_header(pixels.shape), np.ascontiguousarray(pixels).data))
    data = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(data, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


@functools.cache
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the .npy header of uint8 pixels of `shape` in C order."""
    data = io.BytesIO()
    np.lib.format.write_array(data, np.zeros(shape, np.uint8), version=(1, 0), allow_pickle=False)
    return data.getvalue()[: -math.prod(shape)]


def decode(data: bytes, encoding: str) -> np.ndarray:
    """Decode the image member of a sample to uint8 (S, S). Raises ValueError for corrupt data, or S above MAX_SIZE_PX."""
    file = io.BytesIO(data)
    try:
        if encoding == "raw":
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("unknown version of .npy")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8:
                raise ValueError(f"{dtype}, not uint8")
            return np.frombuffer(data, np.uint8, offset=file.tell()).reshape(shape)
        with Image.open(file) as image:
            if max(image.size) > MAX_SIZE_PX:
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels (at most {MAX_SIZE_PX} per side)")
            return np.asarray(image)
    except Exception as error:  # Pillow and NumPy raise many types for corrupt data
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


@dataclass(frozen=True)
class SampleEncoder:
    """Callable that turns a Task into a Sample."""

    size: int
    encoding: str

    def __call__(self, task: Task) -> Sample:
        """Read and encode one radiograph. Unreadable files give a Sample with code and reason."""
        row, source = task
        try:
            if isinstance(source, radiograph.UnreadableFileError):
                raise source
            pixels = radiograph.read(io.BytesIO(source) if isinstance(source, bytes) else source, self.size)
        except radiograph.UnreadableFileError as error:
            return Sample(row, None, error.code, error.reason)
        return Sample(row, pickle.PickleBuffer(encode(pixels, self.encoding)), "", "")
