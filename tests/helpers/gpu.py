"""Code that the tests of tests/gpu share: their device, and a rehearsal of them on a CPU.

REHEARSE_GPU_TESTS=1 runs their code on a CPU at a small size. A comparison of devices then uses the same device twice.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CUDA or os.environ.get("REHEARSE_GPU_TESTS")), reason="no CUDA device"),
]


def python(*arguments: object, hide_gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a new process. No installed script is needed."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if hide_gpu else "0"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def host_waits(call: Callable[[], object]) -> list[str]:
    """Return a "file:line" for each time that the host waits for the GPU while `call` runs."""
    places: list[str] = []
    synchronize = torch.cuda.synchronize

    def counted(*arguments: object) -> None:
        places.append("torch.cuda.synchronize")
        synchronize(*arguments)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "synchronize", counted)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [line for line in caught if "called a synchronizing CUDA operation" in str(line.message)]
    return [*places, *(f"{Path(line.filename).name}:{line.lineno}" for line in waits)]
