"""Send a run to an MLflow server: a process beside the training, which reads RUN/metrics.jsonl.

    python -m mura_dist.training.mlflow_reader     (mlflow_process.py starts it)
    stdin: a line of JSON (Options), then how the training ended; its end is the training's   stdout: READY, lines for the user
    metrics.jsonl -> lines the server has not -> log_batch        at the end: recipe.toml, curves.png, metrics.json, report.html

The server knows what was sent: each line's step is a metric too (`step/step`, `epoch/step`, `skip/step`), and before anything is
sent the reader asks for the latest of them. So a line is sent once, whatever was interrupted: the reader, the training, or
an answer. RUN/mlflow.json names the MLflow run, which a resumed training continues.

A server that does not answer is tried again with growing pauses. The first time a line says so.
"""

import contextlib
import fcntl
import hashlib
import os
import queue
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from mura_dist import __version__
from mura_dist.core import files
from mura_dist.core.errors import MASK, mask_url
from mura_dist.training import metrics_log
from mura_dist.training.mlflow_options import READY, Options

STATE, LOCK = "mlflow.json", "mlflow.lock"
ARTIFACTS = ("curves.png", "metrics.json", "report.html")  # none of them holds a radiograph, or a path of this machine
EXPERIMENT = "mura_dist"  # unless MLFLOW_EXPERIMENT_NAME names another
_KEY = "mura_dist.key"
_POLL_S, _MAX_PAUSE_S = 2.0, 60.0
_ORPHAN_S = 60  # that it outlives a training at most
_LINES, _CHUNK_BYTES = 50, 1 << 20  # at once: a request takes 1,000 metrics
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # meant for the training
# Nothing leaves the machine but to the server. The reader tries again itself.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class _State(BaseModel):
    """mlflow.json's content. `key`: a tag of the MLflow run; `artifacts`: SHA-256 of what was sent, by name."""

    server: str = ""
    key: str
    run_id: str = ""
    artifacts: dict[str, str] = {}


class Reader:
    """Sends one run. Everything raises whatever MLflow and requests raise."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.client = _client_class()(tracking_uri=options.server)
        self.state = self._read_state()
        self.last_steps: dict[str, int] = {}  # the last step on the server, by kind of line
        self.offset = -1  # of metrics.jsonl, up to which everything is on the server; -1: ask the server

    def send(self) -> None:
        """Send the lines that the server does not have."""
        if self.offset < 0:
            self._connect()
        with open(self.options.folder / "metrics.jsonl", "rb") as file:
            while chunk := self._chunk(file):
                self._send_lines(list(metrics_log.parse(chunk.decode(errors="replace"))))
                self.offset += len(chunk)

    def finish(self, outcome: str) -> None:
        """Send the artifacts that changed, and how the training ended."""
        contents = {"recipe.toml": self.options.recipe.encode()}
        contents |= {name: path.read_bytes() for name in ARTIFACTS if (path := self.options.folder / name).is_file()}
        for name, content in contents.items():
            digest = hashlib.sha256(content).hexdigest()
            if self.state.artifacts.get(name) == digest:
                continue
            if name == "recipe.toml":
                self.client.log_text(self.state.run_id, self.options.recipe, name)
            else:
                self.client.log_artifact(self.state.run_id, str(self.options.folder / name))
            self.state.artifacts[name] = digest
            self._write_state()
        self.client.set_terminated(self.state.run_id, outcome)

    def _connect(self) -> None:
        """Find the run on the server, or create it, and ask what it has."""
        run = self._find_run() or self.client.create_run(
            self._experiment(),
            run_name=self.options.name,
            tags={_KEY: self.state.key, "mura_dist.version": __version__},
        )
        if run.info.run_id != self.state.run_id:
            self.state.run_id, self.state.artifacts = run.info.run_id, {}
            self._write_state()
        if run.info.status != "RUNNING":
            self.client.update_run(self.state.run_id, "RUNNING")
        self._send_settings(run.data.params)
        self.last_steps = {
            name.removesuffix("/step"): int(value) for name, value in run.data.metrics.items() if name.endswith("/step")
        }
        self.offset = 0

    def _find_run(self) -> Any:
        """Return the run with our key. The key is on the disk before the run is created, so a lost answer makes no second run."""
        runs = self.client.search_runs([self._experiment()], f"tags.`{_KEY}` = '{self.state.key}'", max_results=1)
        return runs[0] if runs else None

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            with contextlib.suppress(MlflowException):  # another training has just created it
                return self.client.create_experiment(name)
            experiment = self.client.get_experiment_by_name(name)
        return experiment.experiment_id

    def _send_settings(self, parameters: dict[str, str]) -> None:
        """Send the settings as parameters, which never change on a server; one that a resumed run changes is a tag."""
        from mlflow.entities import Param, RunTag

        settings = {name: str(value) for name, value in self.options.settings.items()}
        new = [Param(name, value) for name, value in settings.items() if name not in parameters]
        changed = [
            RunTag(f"resumed.{name}", value) for name, value in settings.items() if parameters.get(name, value) != value
        ]
        self.client.log_batch(self.state.run_id, params=new, tags=changed)

    def _chunk(self, file: Any) -> bytes:
        """Return whole lines from `offset` on; a line that is being written is left for later."""
        file.seek(self.offset)
        chunk: bytes = file.read(_CHUNK_BYTES)
        return chunk[: chunk.rfind(b"\n") + 1]

    def _send_lines(self, lines: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        new = [line for line in lines if line["step"] > self.last_steps.get(line["kind"], -1)]
        for start in range(0, len(new), _LINES):
            batch, now_ms = new[start : start + _LINES], int(time.time() * 1000)
            metrics = [
                Metric(f"{line['kind']}/{name}", value, now_ms, line["step"])
                for line in batch
                for name, value in numbers(line)
            ]
            self.client.log_batch(self.state.run_id, metrics=metrics)
            self.last_steps |= {line["kind"]: line["step"] for line in batch}

    def _read_state(self) -> _State:
        """Return what an earlier start left. Of another server, or damaged: a new key, hence another run."""
        server = mask_url(self.options.server).replace(f"{MASK}@", "").rstrip("/")
        with contextlib.suppress(OSError, ValueError):
            state = _State.model_validate_json((self.options.folder / STATE).read_bytes())
            if state.server == server:
                return state
        self.state = _State(server=server, key=uuid.uuid4().hex)
        self._write_state()
        return self.state

    def _write_state(self) -> None:
        files.write_json(self.options.folder / STATE, self.state.model_dump())


def numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of each number of a line; its step last, which says that the line was sent."""
    for name, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, float(value)
    yield "step", float(line["step"])


def reason(error: BaseException) -> str:
    """Say in a few words why a request failed, without secrets."""
    cause: BaseException | None = error
    while cause is not None:  # requests and urllib3 wrap what the system says
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        wrapped = [each for each in (*cause.args, getattr(cause, "reason", None)) if isinstance(each, BaseException)]
        cause = cause.__cause__ or cause.__context__ or (wrapped[0] if wrapped else None)
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return mask_url(first_line)[:200]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other reader sends this run: one of a training that was killed may still do.

    NFS locks a file for one that may write it, and no folder.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, or a folder that is not ours to write
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, files.mode_of(path))
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def follow(options: Options, ends: "queue.Queue[str]", log: Callable[[str], None]) -> None:
    """Send what the training writes until `ends` says how it ended, then the rest."""
    reader: Reader | None = None
    outcome, pause_s, failed = "", 0.0, False
    while not outcome:
        with contextlib.suppress(queue.Empty):
            outcome = ends.get(timeout=pause_s)
        try:
            reader = reader or Reader(options)
            reader.send()
            if outcome:
                reader.finish(outcome)
            pause_s = _POLL_S
        except Exception as error:  # a server is no reason to end a training, whatever MLflow makes of it
            if reader is not None:
                reader.offset = -1
            if not failed:
                log(_failure_text(options, reason(error), is_training=options.is_training and not outcome))
            failed, pause_s = True, min(max(pause_s, _POLL_S / 2) * 2, _MAX_PAUSE_S)


def _failure_text(options: Options, cause: str, *, is_training: bool) -> str:
    remedy = options.remedy
    if is_training:
        remedy = f"the training continues, and sends what is missing once the server answers; after it, {remedy}"
    return f"MLflow: {mask_url(options.server)}: {cause}; {remedy}"


def _client_class() -> Any:
    from mlflow import MlflowClient

    return MlflowClient


def main() -> None:
    for name in _IGNORED:
        signal.signal(name, signal.SIG_IGN)
    os.environ.update(ENVIRONMENT)
    options = Options.model_validate_json(sys.stdin.readline())
    ends: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        outcome = sys.stdin.readline().strip() or "FAILED"  # no word: the training was killed
        signal.alarm(_ORPHAN_S)
        ends.put(outcome)

    def log(line: str) -> None:
        with contextlib.suppress(OSError):  # the training was killed
            print(line, flush=True)  # noqa: T201

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(Exception):  # where it cannot be loaded, follow() says why
        _client_class()
    log(READY)
    with alone(options.folder):
        follow(options, ends, log)


if __name__ == "__main__":
    main()
