"""Run a command of this environment, in a warm or a new process, on one rank or several."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mura_dist.data.mura import TERMS

ROOT = Path(__file__).resolve().parents[2]


BIN = Path(sys.executable).parent


Command = Callable[..., subprocess.CompletedProcess[str]]


def free_port() -> int:
    """Return an unused port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def deepspeed(ranks: int) -> list[str]:
    """Return the command of DeepSpeed's launcher for this number of ranks, with a free port."""
    meeting = ("--master_port", free_port(), "--num_accelerators", ranks)
    return ["deepspeed", *map(str, meeting), "--module", "mura_dist.train"]


NO_GPU = {
    "CUDA_VISIBLE_DEVICES": ""
}  # ranks outnumber GPUs, and only the CPU is exact bit for bit; tests/gpu overrides it


def stderr_lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of a command's stderr without the terms of use at its end."""
    return [line for line in result.stderr.splitlines() if TERMS not in line]


def warm_python() -> str:
    """Return the executable of the session's warm server (warm.py), which conftest.py starts."""
    return os.environ["MURA_DIST_WARM_PYTHON"]


def warm_script(name: str) -> list[str]:
    """Return the start of a command line that runs a script of this environment warm."""
    return [warm_python(), str(BIN / name)]


def run(
    *arguments: object,
    cwd: Path | None = None,
    timeout_s: float = 240,
    env: dict[str, str] | None = None,
    cold: bool = False,
):
    """Run a command of this environment and return its output as text.

    mura-dist, the launchers and their ranks are forks of a process that has imported torch (warm.py). `cold` starts a new
    process, as a user does. It is needed where a library reads the environment when it is loaded.
    """
    name, *rest = (str(word) for word in arguments)
    warmed = not cold and name in ("mura-dist", "torchrun", "deepspeed")
    command = [*(warm_script(name) if warmed else [str(BIN / name)]), *rest]
    environment = {**os.environ, **NO_GPU, **(env or {})}
    if warmed:
        environment["PYTHON_EXEC"] = warm_python()  # starts the ranks
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, env=environment, check=False
    )


def torchrun(
    ranks: int, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, cold: bool = False
):
    """Run a module under `torchrun` on this machine with a free port."""
    return run("torchrun", "--standalone", "--nproc-per-node", ranks, "-m", *arguments, cwd=cwd, env=env, cold=cold)


def processes_of(path: Path) -> list[int]:
    """Return the ids of the processes with `path` as an argument."""
    pids = []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process exited meanwhile
            if str(path).encode() in command.read_bytes().split(b"\0"):
                pids.append(int(command.parent.name))
    return pids


def killed_when(
    is_ready: Callable[[], bool], names: Path, *arguments: object, launcher_alone: bool = False
) -> list[int]:
    """Start a command and kill -9 it and its children once `is_ready` returns True.

    The children are the processes with the path `names` as an argument. `launcher_alone` kills only the command. Returns the
    ids of all these processes.
    """
    command = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not is_ready():
        assert process.poll() is None, "the command exited too early"
        time.sleep(0.01)
    processes = processes_of(names)
    for pid in [process.pid] if launcher_alone else processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return processes


TINY = (
    "architecture=tiny",
    "global_batch=12",
    "micro_batch=6",  # for at most two ranks; three need micro_batch=2 or 4
    "learning_rate=1e-3",
    "epochs=2",
    "log_every=1",
    "tensorboard=false",
    "precision=fp32",
)
"""Settings of a run that takes seconds: a small DenseNet of the same class, in the precision of the exact comparisons."""


SHORT = ("epochs=1", "micro_batch=4")
"""Settings of a shorter run, of one rank or three, for tests that need any trained run."""


def train(ranks: int, shards: Path, folder: Path, *arguments: str):
    """Train a TINY run with these settings, under torchrun for several ranks and without a launcher for one."""
    settings = (*TINY, f"shards={shards}", f"run={folder}", *arguments, "--quiet")
    return run("mura-dist", "train", *settings) if ranks == 1 else torchrun(ranks, "mura_dist.train", *settings)
