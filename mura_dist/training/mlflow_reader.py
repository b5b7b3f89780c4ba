"""Send a run to an MLflow server, in a background process that reads RUN/metrics.jsonl.

    python -m mura_dist.training.mlflow_reader     (mlflow_process.py starts it)
    stdin: a line of JSON (MlflowOptions), then the outcome of the training; its end means the training was killed
    stdout: READY, lines for the user
    metrics.jsonl -> lines that the server lacks -> log_batch        at the end: recipe.toml, artifacts

Each line's step is a metric too (`step/step`, `epoch/step`, `skip/step`). Before it sends anything, the process asks the server
for the latest of them. So each line is sent once, even if the process, the training or a response is interrupted.
RUN/mlflow.json names the MLflow run, which a resumed training continues.

Failed requests are repeated with growing pauses. The first failure is logged.
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
from mura_dist.training.mlflow_options import READY, MlflowOptions

STATE, LOCK = "mlflow.json", "mlflow.lock"
ARTIFACTS = ("curves.png", "metrics.json", "report.html")  # they hold no radiograph and no path of this machine
EXPERIMENT = "mura_dist"  # default of MLFLOW_EXPERIMENT_NAME
_KEY = "mura_dist.key"
_POLL_S, _MAX_PAUSE_S = 2.0, 60.0
_ORPHAN_S = 60  # how long it may outlive the training
_LINES, _CHUNK_BYTES = 50, 1 << 20  # per request, which accepts 1,000 metrics
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # meant for the training
# No telemetry. This process repeats failed requests itself.
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
    """The content of mlflow.json: a tag of the MLflow run (`key`) and the SHA-256 of each artifact on the server."""

    server: str = ""
    key: str
    run_id: str = ""
    artifacts: dict[str, str] = {}


class MlflowSender:
    """A sender of one run. Its methods raise whatever MLflow and requests raise."""

    def __init__(self, options: MlflowOptions) -> None:
        self.options = options
        self.client = _client_class()(tracking_uri=options.server)
        self.state = self._read_state()
        self.last_steps: dict[str, int] = {}  # the last step on the server, by kind of line
        self.offset = -1  # in metrics.jsonl; all bytes before are on the server; -1: unknown

    def send(self) -> None:
        """Send the lines that the server lacks."""
        if self.offset < 0:
            self._connect()
        with open(self.options.folder / "metrics.jsonl", "rb") as file:
            while chunk := self._chunk(file):
                self._send_lines(list(metrics_log.parse(chunk.decode(errors="replace"))))
                self.offset += len(chunk)

    def finish(self, outcome: str) -> None:
        """Send the artifacts that changed, and the outcome of the training."""
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
        """Find the run on the server, or create it, and read the last steps it has."""
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
        """Return the run with this key. The key is stored before the run is created, so a lost response creates no second run."""
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
        """Send the settings as parameters, and those that a resumed run changes as tags. A server's parameters never change."""
        from mlflow.entities import Param, RunTag

        settings = {name: str(value) for name, value in self.options.settings.items()}
        new = [Param(name, value) for name, value in settings.items() if name not in parameters]
        changed = [
            RunTag(f"resumed.{name}", value) for name, value in settings.items() if parameters.get(name, value) != value
        ]
        self.client.log_batch(self.state.run_id, params=new, tags=changed)

    def _chunk(self, file: Any) -> bytes:
        """Return complete lines from `offset` on."""
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
                for name, value in numeric_values(line)
            ]
            self.client.log_batch(self.state.run_id, metrics=metrics)
            self.last_steps |= {line["kind"]: line["step"] for line in batch}

    def _read_state(self) -> _State:
        """Return the state of an earlier start. If it is corrupt or of another server, start a new MLflow run with a new key."""
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


def numeric_values(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the name and value of each number of a line. Its step is last and marks the line as sent."""
    for name, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, float(value)
    yield "step", float(line["step"])


def failure_reason(error: BaseException) -> str:
    """Return in a few words why a request failed, without secrets."""
    cause: BaseException | None = error
    while cause is not None:  # requests and urllib3 wrap the system's error
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        wrapped = [item for item in (*cause.args, getattr(cause, "reason", None)) if isinstance(item, BaseException)]
        cause = cause.__cause__ or cause.__context__ or (wrapped[0] if wrapped else None)
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return mask_url(first_line)[:200]


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Wait until no other process sends this run. The process of a killed training may still do so.

    The lock is a file, because NFS locks no folders.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks, or a read-only folder
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, files.mode_of(path))
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def follow(options: MlflowOptions, outcomes: "queue.Queue[str]", log: Callable[[str], None]) -> None:
    """Send what the training writes until `outcomes` has its outcome, then what remains."""
    sender: MlflowSender | None = None
    outcome, pause_s, failed = "", 0.0, False
    while not outcome:
        with contextlib.suppress(queue.Empty):
            outcome = outcomes.get(timeout=pause_s)
        try:
            sender = sender or MlflowSender(options)
            sender.send()
            if outcome:
                sender.finish(outcome)
            pause_s = _POLL_S
        except Exception as error:  # the training does not depend on the server
            if sender is not None:
                sender.offset = -1
            if not failed:
                log(_failure_text(options, failure_reason(error), is_training=options.is_training and not outcome))
            failed, pause_s = True, min(max(pause_s, _POLL_S / 2) * 2, _MAX_PAUSE_S)


def _failure_text(options: MlflowOptions, cause: str, *, is_training: bool) -> str:
    remedy = options.remedy
    if is_training:
        remedy = f"The training continues, and the rest is sent once the server responds. After the training: {remedy}"
    return f"MLflow: {mask_url(options.server)}: {cause}. {remedy}."


def _client_class() -> Any:
    from mlflow import MlflowClient

    return MlflowClient


def main() -> None:
    """Read the options from stdin, and send the run until the training ends."""
    for name in _IGNORED:
        signal.signal(name, signal.SIG_IGN)
    os.environ.update(ENVIRONMENT)
    options = MlflowOptions.model_validate_json(sys.stdin.readline())
    outcomes: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        outcome = sys.stdin.readline().strip() or "FAILED"  # end of input: the training was killed
        signal.alarm(_ORPHAN_S)
        outcomes.put(outcome)

    def log(line: str) -> None:
        with contextlib.suppress(OSError):  # the training was killed
            print(line, flush=True)  # noqa: T201

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(Exception):  # if it cannot be loaded, follow() logs why
        _client_class()
    log(READY)
    with exclusive(options.folder):
        follow(options, outcomes, log)


if __name__ == "__main__":
    main()
