"""Run the MLflow reader (mlflow_reader.py) beside a training, as a process of the first rank.

    Run -> start: options on the reader's stdin -> READY, then its lines to `log` -> end: the outcome on its stdin
        -> START_S at most from its start until it is ready, then END_S at most, or killed

The training never waits for the server: it only writes metrics.jsonl. Where the reader fails or hangs, a line says so.
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
from mura_dist.training.mlflow_options import READY, Options
from mura_dist.training.run import Run

# From its own start until it has loaded MLflow's client. With END_S shorter than the 30 s from a launcher's SIGTERM to SIGKILL.
START_S = 20.0
END_S = 5.0  # that the end of a training waits for the server
REST_S = 20.0  # that a command waits which has nothing else to do
_OUTCOMES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}  # by the state in status.json


def check_installed(settings: config.Settings) -> None:
    """Raise ModuleNotFoundError on the first rank, the one that sends, where a server is named and its client not installed."""
    if environment.is_first() and settings.mlflow and find_spec("mlflow") is None:
        raise ModuleNotFoundError("mlflow=... needs the MLflow client", name="mlflow")


@contextlib.contextmanager
def sending(run: Run, log: Callable[[str], None], *, enabled: bool, end_s: float = END_S) -> Iterator[None]:
    """Send the run to its MLflow server while the block runs, then how it ended. Nothing where no server is named."""
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


def send_rest(folder: Path, log: Callable[[str], None], server: str = "") -> None:
    """Send what is new in a run that is not training: what its server missed, and its evaluation.

    Args:
        server: with its password. Empty: the recipe's, of which the disk has no password; MLflow reads user and password from
            MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD then.
    """
    run = Run.load(folder)
    server = server or run.settings.mlflow
    outcome = _OUTCOMES.get(run.status().get("state", ""))
    if server and outcome and find_spec("mlflow") is not None:
        run = Run(folder, run.settings.model_copy(update={"mlflow": server}))
        _Process(run, log, is_training=False).end(outcome, REST_S)


class _Process:
    """The reader of a run: a session of its own, which no terminal's Ctrl-C and no launcher's signal reaches."""

    def __init__(self, run: Run, log: Callable[[str], None], *, is_training: bool) -> None:
        settings = config.shareable(run.settings)
        self._options = Options(
            # A recipe on the disk has no user and password: MLflow takes them from its environment variables then.
            server=run.settings.mlflow.replace(f"{MASK}@", ""),
            folder=run.folder.resolve(),
            name=run.folder.resolve().name,
            settings=settings,
            recipe=config.toml_text(settings),
            is_training=is_training,
            command=f"mura-dist train {shlex.quote(str(run.folder / RECIPE))}",
        )
        self._say, self._num_lines, self._is_ready = log, 0, threading.Event()
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
        """Tell the reader how the training ended, and give it `end_s` seconds to send the rest, once it is ready."""
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
            reason = f"got nothing: the reader failed ({status})"
        elif is_ready:
            reason = f"did not answer within {end_s:g} s"
        else:
            reason = f"got nothing: the reader did not start within {START_S:g} s"
        self._say(f"MLflow: {mask_url(self._options.server)} {reason}; {self._options.remedy}")

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it is gone
            self._stdin.write(f"{line}\n")
            self._stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() == READY:
                self._is_ready.set()
                continue
            self._num_lines += 1
            self._say(mask_url(line.rstrip("\n")))
        self._is_ready.set()  # or it has exited

    @property
    def _stdin(self):  # type: ignore[no-untyped-def]
        assert self._process.stdin is not None
        return self._process.stdin
