"""A radiograph on its way to a prediction: read, and what a DICOM says of itself. A worker process imports this and little else.

path -> radiograph.read, radiograph.identity -> Reading
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from . import radiograph


class Reading(NamedTuple):
    """A file as it was read: an image (S, S) uint8 and what a DICOM says of itself; or (code, reason) why not."""

    image: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    failure: tuple[str, str]


@dataclass(frozen=True)
class Reader:
    """Reads one path; `size`: pixels of a side."""

    size: int

    def __call__(self, path: str) -> Reading:
        try:
            return Reading(radiograph.read(path, self.size), radiograph.identity(path), ("", ""))
        except radiograph.Unreadable as error:
            return failed(error.code, error.reason)


def failed(code: str, reason: str) -> Reading:
    return Reading(None, None, (code, reason))
