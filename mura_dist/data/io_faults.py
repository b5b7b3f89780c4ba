"""Stop a command when reading fails for many consecutive files, or when the source disappears.

failure codes of the files, in order -> IoFaults -> RunError

A single fault does not stop it. The file is listed with code io_error, and the same command reads it again.
"""

import os
from pathlib import Path

from mura_dist.core import storage
from mura_dist.core.errors import RunError
from mura_dist.core.storage import StoragePath
from mura_dist.data.grayscale import Code

MAX_CONSECUTIVE = 20
IO_ERROR: Code = "io_error"
_SUSPECT = (IO_ERROR, "unreadable")  # an unmounted folder's files do not exist


class IoFaults:
    """Counter of consecutive faults among the files of a source."""

    def __init__(self, source: StoragePath) -> None:
        self._source, self._num_consecutive = source, 0

    def check(self, code: str, reason: str) -> None:
        """Count the failure code of the next file, "" for a file that was read.

        Raises:
            RunError: The source is gone, or MAX_CONSECUTIVE files failed.
        """
        self._num_consecutive = self._num_consecutive + 1 if code == IO_ERROR else 0
        if code in _SUSPECT and _is_gone(self._source):
            raise RunError(f"{self._source} is gone or empty. Restore it. The same command resumes.")
        if self._num_consecutive >= MAX_CONSECUTIVE:
            raise RunError(
                f"{MAX_CONSECUTIVE} consecutive files of {self._source} could not be read (last: {reason}). Fix the disk or the "
                "network. The same command resumes."
            )


def _is_gone(source: StoragePath) -> bool:
    """Return whether a local folder is missing or empty, as a mount point without its disk is."""
    if storage.is_remote(source):
        return False
    try:
        with os.scandir(Path(source)) as entries:
            return next(entries, None) is None
    except OSError:
        return True
