"""Make files once in a session, for all workers of pytest-xdist: in a folder beside their temporary ones, under a file lock.

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
        """Return the path of `name`, which `make(path)` has written; only the first caller of the session waits for that."""
        path, done = self.root / name, self.root / f"{name}.done"
        with FileLock(self.root / f"{name}.lock"):
            if not done.exists():
                if path.is_dir():
                    shutil.rmtree(path)  # of a maker that failed
                make(path)
                done.touch()
        return path
