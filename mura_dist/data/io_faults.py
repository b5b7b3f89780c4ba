"""When faults of reading end a run early: many in a row, or a source that is gone.

the failures of a run's files, in order -> IoFaults -> RunError

One such fault ends nothing: the file is listed with code io_error, and the same command reads it again.
"""

import os
from pathlib import Path

from mura_dist.core import storage
from mura_dist.core.errors import RunError
from mura_dist.core.storage import StoragePath
from mura_dist.data.grayscale import Code

MAX_IN_ROW = 20
IO_ERROR: Code = "io_error"
_SUSPECT = (IO_ERROR, "unreadable")  # an unmounted folder's files do not exist


class IoFaults:
    """The faults in a row, of the files of `source` in the order in which they are taken."""

    def __init__(self, source: StoragePath) -> None:
        self._source, self._in_row = source, 0

    def check(self, code: str, reason: str) -> None:
        """Take note of a file's code, which is empty for a file that was read. Raises RunError where the run is to end."""
        self._in_row = self._in_row + 1 if code == IO_ERROR else 0
        if code in _SUSPECT and _is_gone(self._source):
            raise RunError(f"{self._source} is gone, or empty; bring it back, then the same command goes on")
        if self._in_row >= MAX_IN_ROW:
            raise RunError(
                f"{MAX_IN_ROW} files of {self._source} in a row could not be read, the last one {reason}; fix the disk or the "
                "network, then the same command goes on"
            )


def _is_gone(source: StoragePath) -> bool:
    """Return whether a local folder cannot be listed, or holds nothing, as a mount point without its disk."""
    if storage.is_remote(source):
        return False
    try:
        with os.scandir(Path(source)) as entries:
            return next(entries, None) is None
    except OSError:
        return True
