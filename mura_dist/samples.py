"""A radiograph on its way into a shard: read, resized, encoded. A worker process imports this and little else: it starts fast.

row (or the file's content) -> radiograph.read -> uint8 (S, S) -> encode -> Sample
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from . import radiograph

SUFFIX = {"raw": "npy", "png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95

Task = int | tuple[int, bytes | radiograph.Unreadable]
"""A row, or (row, its file's content) where only the main process reaches the source."""


class Sample(NamedTuple):
    """What a tar takes, or the reason there is nothing to take."""

    row: int
    data: bytes | None
    code: str
    reason: str


def encode(pixels: np.ndarray, encoding: str) -> bytes:
    """uint8 (S, S) -> the bytes of a sample's image member."""
    data = io.BytesIO()
    if encoding == "raw":
        np.lib.format.write_array(data, pixels, version=(1, 0), allow_pickle=False)
    elif encoding == "png":
        Image.fromarray(pixels).save(data, "PNG", compress_level=6)
    else:
        Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue()


def decode(data: bytes, encoding: str) -> np.ndarray:
    """The bytes of a sample's image member -> uint8 (S, S)."""
    if encoding == "raw":
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


@dataclass(frozen=True)
class Reader:
    """Does one task. `root`: where `paths` (by row) begin; None where the tasks bring the contents."""

    root: Path | None
    paths: Any
    size: int
    encoding: str

    def __call__(self, task: Task) -> Sample:
        row = task if isinstance(task, int) else task[0]
        try:
            pixels = radiograph.read(self._source(task), self.size)
        except radiograph.Unreadable as error:
            return Sample(row, None, error.code, error.reason)
        return Sample(row, encode(pixels, self.encoding), "", "")

    def _source(self, task: Task) -> Path | io.BytesIO:
        if isinstance(task, int):
            assert self.root is not None
            return self.root / self.paths[task]
        if isinstance(task[1], radiograph.Unreadable):
            raise task[1]
        return io.BytesIO(task[1])
