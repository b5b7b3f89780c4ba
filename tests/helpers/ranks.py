"""Start ranks of a command as launchers do."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.commands import warm_python

DIFFERS = ("conversion.json",)


def start_rank(
    script: Path, environment: dict[str, Any], *arguments: object, cold: bool = False
) -> subprocess.Popen[str]:
    """Start a rank. `cold` starts a new process, for tests that look at its process id or children (warm.py)."""
    variables = {name: str(value) for name, value in environment.items()}
    command = [sys.executable if cold else warm_python(), str(script), *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        command, env=inherited | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


LAUNCHERS = {
    "torchrun": lambda rank, size: {"RANK": rank, "WORLD_SIZE": size},
    "Slurm": lambda rank, size: {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": size, "SLURM_NTASKS": size},
}
