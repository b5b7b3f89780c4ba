"""Inject read errors into the processes that a test starts, by tools/robustness/read_faults.c under LD_PRELOAD."""

import contextlib
import errno
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.commands import ROOT

SOURCE = ROOT / "tools/robustness/read_faults.c"


@dataclass(frozen=True)
class ReadFaults:
    """Errors to inject, counted over all processes that have `environment`.

    path: a text in the path of a failing call; call: read, open or list (of a folder); skip: number of calls that succeed first;
    times: number of calls that fail then, None for all.
    """

    library: Path
    counter: Path
    path: str
    error: int = errno.EIO
    call: str = "read"
    skip: int = 0
    times: int | None = None

    @property
    def environment(self) -> dict[str, str]:
        values = {"PATH": self.path, "ERRNO": self.error, "CALL": self.call, "SKIP": self.skip, "COUNTER": self.counter}
        values |= {} if self.times is None else {"TIMES": self.times}
        return {"LD_PRELOAD": str(self.library)} | {f"READ_FAULTS_{name}": str(value) for name, value in values.items()}

    @contextlib.contextmanager
    def in_children(self) -> Iterator[None]:
        """Inject the errors into processes that start during the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            yield

    @property
    def num_calls(self) -> int:
        """Number of matching calls, failed or not."""
        return int.from_bytes(self.counter.read_bytes(), sys.byteorder)


def compile_library(path: Path) -> None:
    """Compile the library as `path`. Skip the test where that is impossible."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("errors of reading are injected on Linux, by a library that needs a C compiler (cc)")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", path, SOURCE, "-ldl"], check=True)
