"""A radiograph on its way to a prediction: read, and what a DICOM says of itself. A worker process imports this and little else.

path -> its bytes, read once -> radiograph.read_details, radiograph.read_identity -> gate.classify -> Reading
"""

import io
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mura_dist.data import gate, radiograph


class ReadResult(NamedTuple):
    """A file as it was read: an image (S, S) uint8, what a DICOM says of itself and whether it looks like a bone radiograph
    (one of gate.NAMES); or (code, reason) why not. seconds: what reading it took. notes: radiograph.RadiographDetails's."""

    image: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    failure: tuple[str, str]
    gate: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RadiographReader:
    """Reads one path; `size`: pixels of a side."""

    size: int

    def __call__(self, path: str) -> ReadResult:
        started = time.perf_counter()
        reading = self._read(path)
        return reading._replace(seconds=time.perf_counter() - started)

    def _read(self, path: str) -> ReadResult:
        try:
            # Read once: a second reading could fail, and a DICOM would lose its study in silence.
            file = io.BytesIO(radiograph.read_bytes(path))
            found = radiograph.read_details(file, self.size)
            verdict = gate.classify(found.image, found.colors)
            return ReadResult(found.image, radiograph.read_identity(file), ("", ""), verdict, notes=found.notes)
        except radiograph.UnreadableFileError as error:
            return failure_result(error.code, error.reason)


def failure_result(code: str, reason: str) -> ReadResult:
    return ReadResult(None, None, (code, reason))
