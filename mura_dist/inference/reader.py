"""Reading one file for a prediction, in a worker process. Workers import this module, so it imports little.

path -> its bytes -> radiograph.read_details, radiograph.read_identity -> gate.classify -> ReadResult
"""

import io
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mura_dist.data import gate, radiograph


class ReadResult(NamedTuple):
    """Outcome of reading one file: an image, or a failure.

    Attributes:
        image: (S, S) uint8; None for a failure, and where it is no longer needed.
        identity: Identifiers of a DICOM file.
        failure: (code, reason); empty texts for an image.
        gate: One of gate.NAMES: whether the image looks like a bone radiograph.
        seconds: Wall-clock time of reading.
        notes: See radiograph.RadiographDetails.
    """

    image: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    failure: tuple[str, str]
    gate: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def is_radiograph(self) -> bool:
        """Tell whether the file was read."""
        return not self.failure[0]


@dataclass(frozen=True)
class RadiographReader:
    """A callable that reads one path. `size` is the side of the image in pixels."""

    size: int

    def __call__(self, path: str) -> ReadResult:
        """Read a file and measure the time it takes."""
        start = time.perf_counter()
        result = self._read(path)
        return result._replace(seconds=time.perf_counter() - start)

    def _read(self, path: str) -> ReadResult:
        try:
            # Read the bytes once: a second read could fail, and the DICOM's study would be lost without a message.
            file = io.BytesIO(radiograph.read_bytes(path))
            details = radiograph.read_details(file, self.size)
            verdict = gate.classify(details.image, details.colors)
            return ReadResult(details.image, radiograph.read_identity(file), ("", ""), verdict, notes=details.notes)
        except radiograph.UnreadableFileError as error:
            return failure_result(error.code, error.reason)


def failure_result(code: str, reason: str) -> ReadResult:
    """Return the result of a file that could not be read."""
    return ReadResult(None, None, (code, reason))
