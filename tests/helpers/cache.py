"""Files made once in a session for all workers of pytest-xdist, beside their temporary folders and under a file lock.

This is the recipe in pytest-xdist's documentation ("Making session-scoped fixtures execute only once").
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Cache:
    """Files and folders that several tests read. A test that changes one copies it first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the path of `name`. The first caller of the session writes it with `make(path)`; the others wait."""
        path, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                if path.is_dir():
                    shutil.rmtree(path)  # left by a failed call
                make(path)
                done.touch()
        return path
