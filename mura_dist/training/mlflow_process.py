"""Run mlflow_reader.py as a background process of rank 0 during a training.

    Run -> start: options on the process's stdin -> READY, then its lines to `log` -> end: the outcome on its stdin
        -> at most START_S from its start until it is ready, then at most END_S, or it is killed

The training never waits for the server. It only writes metrics.jsonl. If the process fails or hangs, a line says so.
"""

import contextlib
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from mura_dist.core import config
from mura_dist.core.errors import MASK, StopRequestedError, mask_url
from mura_dist.data.folder_kind import RECIPE
from mura_dist.distributed import environment
from mura_dist.training.mlflow_options import READY, MlflowOptions
from mura_dist.training.run import Run

# Limit for loading MLflow's client. START_S + END_S is shorter than the 30 s between a launcher's SIGTERM and SIGKILL.
START_S = 20.0
END_S = 5.0  # how long the end of a training waits for the server
REMAINING_S = 20.0  # how long `send_remaining` waits for the server
_OUTCOMES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # by the state in status.json


def check_installed(settings: config.Settings) -> None:
    """Check on rank 0, which sends, that MLflow's client is installed if the recipe names a server.

    Raises:
        ModuleNotFoundError: the client is not installed.
    """
    if environment.is_first() and settings.mlflow and find_spec("mlflow") is None:
        raise ModuleNotFoundError("mlflow=... needs the MLflow client", name="mlflow")


@contextlib.contextmanager
def sender(run: Run, log: Callable[[str], None], *, enabled: bool, end_s: float = END_S) -> Iterator[None]:
    """Send the run to its MLflow server during the block, then its outcome. Does nothing without a server."""
    if not (enabled and run.settings.mlflow):
        yield
        return
    process, outcome = _Process(run, log, is_training=True), "FAILED"
    try:
        yield
        outcome = "FINISHED"
    except (StopRequestedError, KeyboardInterrupt):
        outcome = "KILLED"
        raise
    finally:
        process.end(outcome, end_s)


def send_remaining(folder: Path, log: Callable[[str], None], server: str = "") -> None:
    """Send what a server does not have yet of a run that is not training: metrics and its evaluation.

    Args:
        folder: The run's folder.
        log: Called with lines for the user.
        server: URL of the server with its password. If it is empty, the recipe's URL is used, which is stored without a password.
            MLflow then reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
    """
    run = Run.load(folder)
    server = server or run.settings.mlflow
    outcome = _OUTCOMES.get(run.status().get("state", ""))
    if server and outcome and find_spec("mlflow") is not None:
        run = Run(folder, run.settings.model_copy(update={"mlflow": server}))
        _Process(run, log, is_training=False).end(outcome, REMAINING_S)


class _Process:
    """The background process, in a session of its own that Ctrl-C and a launcher's signals do not reach."""

    def __init__(self, run: Run, log: Callable[[str], None], *, is_training: bool) -> None:
        settings = config.shareable(run.settings)
        self._options = MlflowOptions(
            # A stored recipe has no user and password. MLflow reads them from its environment variables.
            server=run.settings.mlflow.replace(f"{MASK}@", ""),
            folder=run.folder.resolve(),
            name=run.folder.resolve().name,
            settings=settings,
            recipe=config.toml_text(settings),
            is_training=is_training,
            command=f"mura-dist train {shlex.quote(str(run.folder / RECIPE))}",
        )
        self._log, self._num_lines, self._is_ready = log, 0, threading.Event()
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mura_dist.training.mlflow_reader"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._write(self._options.model_dump_json())
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def end(self, outcome: str, end_s: float) -> None:
        """Send the outcome of the training to the process, and wait up to `end_s` seconds once it is ready."""
        self._write(outcome)
        with contextlib.suppress(OSError):
            self._stdin.close()
        is_ready = self._is_ready.wait(max(0.0, self._started + START_S - time.monotonic()))
        try:
            status = self._process.wait(end_s if is_ready else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = None
        self._listener.join(1.0)
        if status == 0 or self._num_lines:
            return
        if status is not None:
            reason = f"received nothing: the MLflow process failed (exit status {status})"
        elif is_ready:
            reason = f"did not answer within {end_s:g} s"
        else:
            reason = f"received nothing: the MLflow process did not start within {START_S:g} s"
        self._log(f"MLflow: {mask_url(self._options.server)} {reason}. {self._options.remedy}.")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it has exited
            self._stdin.write(f"{line}\n")
            self._stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                self._is_ready.set()
                continue
            self._num_lines += 1
            self._log(mask_url(line.rstrip("\n")))
        self._is_ready.set()  # or it has exited

    @property
    def _stdin(self):  # type: ignore[no-untyped-def]
        assert self._process.stdin is not None
        return self._process.stdin
