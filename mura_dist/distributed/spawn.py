"""Worker processes that do not run the user's script again.

Python's spawned processes import the main module of their parent first, so that a script without `if __name__ ==
"__main__"` starts itself anew in each. Workers of this package need their own modules only.
"""

import multiprocessing.spawn
import threading
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_PREFIX = "mura_dist-"
_MAIN_MODULE = ("init_main_from_name", "init_main_from_path")
_lock = threading.Lock()


class WorkerProcess(SpawnProcess):
    """A spawned process that leaves its parent's main module alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = f"{_PREFIX}{self.name}"

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        with _lock:
            original = multiprocessing.spawn.get_preparation_data

            def without_main(name: str) -> dict[str, Any]:
                data = original(name)
                return {key: data[key] for key in data if key not in _MAIN_MODULE or not name.startswith(_PREFIX)}

            multiprocessing.spawn.get_preparation_data = without_main
            try:
                return SpawnProcess._Popen(process_obj)
            finally:
                multiprocessing.spawn.get_preparation_data = original


class WorkerContext(SpawnContext):
    """The start method of all worker processes: spawn, since a fork of a process with threads may hang."""

    Process = WorkerProcess


CONTEXT = WorkerContext()
