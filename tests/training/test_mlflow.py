"""Test mlflow_reader.py and mlflow_process.py with a real MLflow server: each value is sent once, without delaying a training."""

import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import SHORT, TINY, free_port, killed_when, run, stderr_lines, train
from helpers.mlflow_server import Proxy, serve

from mura_dist.core import config
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.training import metrics_log, mlflow_process, mlflow_reader
from mura_dist.training.mlflow_options import READY, MlflowOptions
from mura_dist.training.mlflow_reader import ENVIRONMENT, numeric_values
from mura_dist.training.run import Run

pytest.importorskip("mlflow", reason="needs the extras mlflow and dev")
WALL_CLOCK = ("time_s", "images_per_s", "data_wait_share", "evaluation_s", "overhead_share")
COMMAND = "mura-dist train RUN/recipe.toml"
MISSING = f". Run `{COMMAND}` to send what is missing."
CONTINUES = ". The training continues, and the rest is sent once the server responds. After the training"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the process's environment. Each test has its own experiment."""
    for name, value in {**ENVIRONMENT, "MLFLOW_EXPERIMENT_NAME": tmp_path.name}.items():
        monkeypatch.setenv(name, value)


def lines(steps: range) -> list[dict[str, Any]]:
    """Return lines of a metrics.jsonl: one per step, one per epoch of eight steps, some with null."""
    rows: list[dict[str, Any]] = []
    for step in steps:
        loss = None if step % 5 == 0 else 1 / step
        rows.append({"kind": "step", "step": step, "epoch": step // 8, "loss": loss, "time_s": step * 0.5})
        if step % 8 == 0:
            rows.append({"kind": "epoch", "step": step, "split": "tune", "tune_loss": 2 / step, "skipped_steps": 0})
        if step % 11 == 0:
            rows.append({"kind": "skip", "step": step, "epoch": step // 8, "what": "loss", "rows": [1, 2]})
    return rows


def write_lines(folder: Path, steps: range) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines(steps)))


def options(folder: Path, server: str) -> MlflowOptions:
    settings = {"epochs": 3}
    return MlflowOptions(
        server=server,
        folder=folder,
        name="name",
        settings=settings,
        recipe="epochs = 3\n",
        is_training=True,
        command=COMMAND,
    )


def send(folder: Path, server: str, **changes: Any) -> list[str]:
    """Run the sender once for a finished training, and return its messages."""
    outcomes: queue.Queue[str] = queue.Queue()
    outcomes.put("FINISHED")
    messages: list[str] = []
    mlflow_reader.follow(options(folder, server).model_copy(update=changes), outcomes, messages.append)
    return messages


def runs_of(server: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(server)
    of_test = client.get_experiment_by_name(experiment)
    return list(client.search_runs([of_test.experiment_id])) if of_test else []


def has_each_number_once(server: str, run_id: str, expected: list[dict[str, Any]], *, redone: bool = False) -> None:
    """Assert the law. `redone`: for repeated steps the server has the first wall-clock times."""
    from mlflow import MlflowClient

    by_name: dict[str, list[tuple[int, float]]] = {}
    for line in expected:
        for name, value in numeric_values(line):
            by_name.setdefault(f"{line['kind']}/{name}", []).append((line["step"], value))
    client = MlflowClient(server)
    assert client.get_run(run_id).data.metrics.keys() == by_name.keys()
    for name, points in by_name.items():
        history = sorted((point.step, point.value) for point in client.get_metric_history(run_id, name))
        if redone and name.rpartition("/")[2] in WALL_CLOCK:
            history, points = ([(step, 0.0) for step, _ in each] for each in (history, points))
        assert history == points, name


def send_all(folder: Path) -> None:
    """Send what the end of a training had no time to send on a busy machine."""
    messages: list[str] = []
    for _ in range(5):
        messages.clear()
        mlflow_process.send_remaining(folder, messages.append)
        if not messages:
            return
    raise AssertionError(messages)


# ---- what a training sends


@pytest.mark.slow
def test_two_rank_training_sends_metrics_settings_and_reports(server: str, halved: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder, client = tmp_path / "a run", MlflowClient(server)
    arguments = ("epochs=1", f"mlflow={server}", "seed=3", "loss_weights=none")
    assert (done := train(2, halved, folder, *arguments)).returncode == 0, done.stderr
    assert stderr_lines(done) == []
    send_all(folder)
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert (mlflow_run.info.status, mlflow_run.info.run_name) == ("FINISHED", "a run")
    assert json.loads((folder / "mlflow.json").read_text())["run_id"] == mlflow_run.info.run_id
    has_each_number_once(server, mlflow_run.info.run_id, metrics_log.read(folder / "metrics.jsonl"))
    settings = config.load(folder / "recipe.toml")
    assert mlflow_run.data.params == {name: str(value) for name, value in config.shareable(settings).items()}

    assert (done := run("mura-dist", "evaluate", folder, halved, "--no-gallery")).returncode == 0, done.stderr
    assert (done := train(1, halved, folder, *arguments)).returncode == 0, done.stderr  # finished: it sends what is new
    send_all(folder)
    [again] = runs_of(server, tmp_path.name)
    assert (again.info.run_id, again.info.status) == (mlflow_run.info.run_id, "FINISHED")
    has_each_number_once(server, mlflow_run.info.run_id, metrics_log.read(folder / "metrics.jsonl"))
    local = Path(client.download_artifacts(mlflow_run.info.run_id, "", str(tmp_path)))
    names = {path.name for path in local.iterdir()} & {*mlflow_reader.ARTIFACTS, "recipe.toml"}
    assert names == {"recipe.toml", "curves.png", "metrics.json", "report.html"}
    for name in mlflow_reader.ARTIFACTS:
        assert (local / name).read_bytes() == (folder / name).read_bytes()
    assert "epochs = 1\n" in (local / "recipe.toml").read_text()
    folder_bytes = str(tmp_path).encode()
    assert not [name for name in names if folder_bytes in (local / name).read_bytes()]
    assert folder_bytes.decode() not in str((again.data.params, again.data.tags))
    assert again.data.tags.keys() == {"mlflow.runName", "mura_dist.key", "mura_dist.version"}


@pytest.mark.slow
def test_killed_training_continues_its_mlflow_run(server: str, shard_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = (*TINY, f"shards={shard_folder}", f"run={folder}", f"mlflow={server}", "--quiet")

    def begun() -> bool:
        """Return whether the server has some of the run's steps."""
        mlflow_runs = runs_of(server, tmp_path.name)
        return bool(mlflow_runs) and mlflow_runs[0].data.metrics.get("step/step", 0) > 4

    assert killed_when(begun, Path(f"run={folder}"), "mura-dist", "train", *settings, "epochs=2000")
    num_epochs = metrics_log.read(folder / "metrics.jsonl")[-1]["epoch"] + 2
    done = run("mura-dist", "train", *settings, f"epochs={num_epochs}")
    assert done.returncode == 0, done.stderr
    [line] = stderr_lines(done)
    assert line.startswith("taking over a stale lock of process ")
    send_all(folder)
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert mlflow_run.info.status == "FINISHED"
    has_each_number_once(server, mlflow_run.info.run_id, metrics_log.read(folder / "metrics.jsonl"), redone=True)


def test_connects_to_the_configured_server_only(server: str, tmp_path: Path) -> None:
    """Every address that the process connects to and every host that it looks up is the server's."""
    folder, record = tmp_path / "run", tmp_path / "addresses"
    write_lines(folder, range(1, 30))
    code = f"""
import runpy, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen", "os.exec"):
        place = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
        with open({str(record)!r}, "a") as file:
            print(repr(place), file=file)
sys.addaudithook(hook)
runpy.run_module("mura_dist.training.mlflow_reader", run_name="__main__")
"""
    plain = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    text = f"{options(folder, server).model_dump_json()}\nFINISHED\n"
    done = subprocess.run(
        [sys.executable, "-c", code], input=text, capture_output=True, text=True, check=False, env=plain, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"{READY}\n")
    port = int(server.rpartition(":")[2])
    allowed = [("127.0.0.1", port), ("127.0.0.1", str(port)), ("uname", ["uname", "-p"])]  # platform's
    assert set(record.read_text().splitlines()) <= {repr(each) for each in allowed}
    [mlflow_run] = runs_of(server, tmp_path.name)
    has_each_number_once(server, mlflow_run.info.run_id, lines(range(1, 30)))


# ---- a server that fails


@pytest.mark.parametrize("seed", range(4))
def test_each_value_is_sent_once_despite_failures(
    server: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts end at any request, before or after it is handled, and some responses are lost."""
    monkeypatch.setattr(mlflow_reader, "_LINES", 7)
    draws, folder, messages = random.Random(seed), tmp_path / "run", list[str]()
    kinds = ["ok"] * 6 + ["refuse", "lose", "500"]
    with Proxy(server, lambda: draws.choice(kinds)) as proxy:
        for last in range(20, 70, 10):
            write_lines(folder, range(1, last))
            messages += send(folder, proxy.address)
    assert messages
    assert all(line.startswith("MLflow: http://127.0.0.1:") and line.endswith(MISSING) for line in messages)
    state = json.loads((folder / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps(state | {"server": server}))  # the same server, without the proxy
    assert send(folder, server) == []
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert mlflow_run.info.status == "FINISHED"
    has_each_number_once(server, mlflow_run.info.run_id, lines(range(1, 60)))


def test_truncated_resumed_run_continues_the_same_mlflow_run(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for last in (20, 30):
        write_lines(folder, range(1, last))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"kind": "step", "step": 99')  # a kill cut it short
        send(folder, server)
        write_lines(folder, range(1, 17))  # what the training keeps as it resumes
        send(folder, server)
    [mlflow_run] = runs_of(server, tmp_path.name)
    has_each_number_once(server, mlflow_run.info.run_id, lines(range(1, 30)))


def test_changed_setting_of_a_resumed_run_is_a_tag(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_lines(folder, range(1, 3))
    send(folder, server)
    assert send(folder, server, settings={"epochs": 5, "ema": 0.5}) == []
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert mlflow_run.data.params == {"epochs": "3", "ema": "0.5"}
    assert mlflow_run.data.tags["resumed.epochs"] == "5"
    assert "resumed.ema" not in mlflow_run.data.tags


def test_password_reaches_only_the_server(server: str, tmp_path: Path) -> None:
    folder, kind = tmp_path / "run", ["ok"]
    write_lines(folder, range(1, 9))
    with Proxy(server, lambda: kind[0]) as proxy:
        address = proxy.address.replace("http://", "http://user:geheim@")
        assert send(folder, address) == []
        assert set(proxy.authorization) == {"Basic dXNlcjpnZWhlaW0="}
        assert send(folder, f"{proxy.address}/") == []  # as evaluate does, by the recipe: the same server
        assert len(runs_of(server, tmp_path.name)) == 1
        kind[0] = "500"
        [line] = send(folder, address)
    assert line.startswith("MLflow: http://***@127.0.0.1:")
    assert "geheim" not in line
    assert [path.name for path in folder.iterdir() if b"geheim" in path.read_bytes()] == []
    settings = Settings(shards="s", run="r", mlflow=address)
    assert "geheim" not in config.to_toml(settings)
    assert "mlflow" not in config.shareable(settings)


def test_recovered_server_receives_everything(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first failure is logged."""
    monkeypatch.setattr(mlflow_reader, "_POLL_S", 0.05)
    monkeypatch.setattr(mlflow_reader, "_MAX_PAUSE_S", 0.05)
    folder, num_requests, messages = tmp_path / "run", [0], list[str]()
    write_lines(folder, range(1, 30))

    class Outcomes(queue.Queue[str]):
        """A queue that returns the outcome once the server responds again."""

        def get(self, block: bool = True, timeout: float | None = None) -> str:
            if num_requests[0] > 12:
                return "KILLED"
            raise queue.Empty

    def fault() -> str:
        num_requests[0] += 1
        return "refuse" if num_requests[0] < 8 else "ok"

    with Proxy(server, fault) as proxy:
        mlflow_reader.follow(options(folder, proxy.address), Outcomes(), messages.append)
    [line] = messages
    assert line.endswith(f"{CONTINUES}:{MISSING[1:]}")
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert mlflow_run.info.status == "KILLED"
    has_each_number_once(server, mlflow_run.info.run_id, lines(range(1, 30)))


# ---- the training does not wait


def ended(folder: Path, server: str, begun: Callable[[list[str]], bool], end_s: float) -> tuple[list[str], float]:
    """Return the messages and the seconds that the end of a training takes once `begun` returns True."""
    write_lines(folder, range(1, 9))
    messages: list[str] = []
    of_folder = Run(folder, Settings(shards="s", run=str(folder), mlflow=server))
    with mlflow_process.sender(of_folder, messages.append, enabled=True, end_s=end_s):
        while not begun(messages):
            time.sleep(0.05)
        started = time.monotonic()
    return messages, time.monotonic() - started


def rest_by(folder: Path) -> str:
    return f". Run `mura-dist train {folder}/recipe.toml` to send what is missing."


BUSY_S = 30.0  # that a busy machine may take longer


def test_unreachable_server_is_reported_once(tmp_path: Path) -> None:
    address = f"http://user:geheim@127.0.0.1:{(port := free_port())}"
    messages, seconds = ended(tmp_path / "run", address, bool, mlflow_process.END_S)
    beginning, remedy = f"MLflow: http://***@127.0.0.1:{port}: connection refused", rest_by(tmp_path / "run")
    assert messages == [f"{beginning}{CONTINUES}:{remedy[1:]}"]
    assert seconds < mlflow_process.END_S + BUSY_S


@pytest.mark.slow
def test_short_training_waits_for_the_process_start(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`end_s` begins after the import of MLflow's client."""
    monkeypatch.setattr(mlflow_process, "START_S", 60.0)
    messages, _ = ended(tmp_path / "run", server, lambda _: True, 30.0)
    assert messages == []
    [mlflow_run] = runs_of(server, tmp_path.name)
    assert mlflow_run.info.status == "FINISHED"


def test_hanging_server_delays_the_end_briefly(server: str, tmp_path: Path) -> None:
    with Proxy(server, lambda: "hang") as proxy:
        messages, seconds = ended(tmp_path / "run", proxy.address, lambda _: bool(proxy.authorization), 1.0)
    assert messages == [f"MLflow: {proxy.address} did not answer within 1 s{rest_by(tmp_path / 'run')}"]
    assert 1 <= seconds < 1 + BUSY_S


def test_dead_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(7)\n")
    messages, _ = ended(tmp_path / "run", "http://127.0.0.1:9", lambda _: True, 60)
    remedy = rest_by(tmp_path / "run")
    assert messages == [
        f"MLflow: http://127.0.0.1:9 received nothing: the MLflow process failed (exit status 7){remedy}"
    ]


def test_process_that_does_not_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message differs from that of a silent server, and `end_s` is not added."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(mlflow_process, "START_S", 1.0)
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    messages, seconds = ended(tmp_path / "run", "http://127.0.0.1:9", lambda _: True, 300.0)
    what = "received nothing: the MLflow process did not start within 1 s"
    assert messages == [f"MLflow: http://127.0.0.1:9 {what}{rest_by(tmp_path / 'run')}"]
    assert seconds < 1 + BUSY_S


def test_message_outside_a_training_names_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This concerns `evaluate` and a finished `train`. The mask in a stored recipe is no user name."""
    folder = tmp_path / "a run"
    write_lines(folder, range(1, 9))
    address = f"http://user:geheim@127.0.0.1:{(port := free_port())}"
    Run(folder, Settings(shards="s", run=str(folder), mlflow=address)).write_status("done", summary={})
    (folder / "recipe.toml").write_text(config.to_toml(Settings(shards="s", run=str(folder), mlflow=address)))
    monkeypatch.setattr(mlflow_process, "START_S", 60.0)
    messages: list[str] = []
    mlflow_process.send_remaining(folder, messages.append)
    remedy = f"Run `mura-dist train '{folder}/recipe.toml'` to send what is missing."
    assert messages == [f"MLflow: http://127.0.0.1:{port}: connection refused. {remedy}"]


def test_stored_recipe_logs_in_by_environment_variables(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`train RUN/recipe.toml` has a mask in place of user and password."""
    monkeypatch.setattr(mlflow_process, "START_S", 60.0)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "geheim")
    with Proxy(server, lambda: "ok") as proxy:
        address = proxy.address.replace("http://", "http://***@")
        messages, _ = ended(tmp_path / "run", address, lambda _: bool(proxy.authorization), 30.0)
    assert messages == []
    assert set(proxy.authorization) == {"Basic dXNlcjpnZWhlaW0="}


def test_one_process_at_a_time_sends_a_run(tmp_path: Path) -> None:
    """The second waits for the first. The lock is a file, which NFS can lock."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom mura_dist.training.mlflow_reader import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n    print('alone', flush=True)\n"
    )
    with mlflow_reader.exclusive(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["mlflow.lock"]
        second = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            second.wait(3.0)
    assert second.communicate(timeout=60)[0] == "alone\n"


def test_training_succeeds_without_its_server(shard_folder: Path, tmp_path: Path) -> None:
    result = train(1, shard_folder, tmp_path / "run", *SHORT, f"mlflow=http://127.0.0.1:{free_port()}")
    assert (result.returncode, stderr_lines(result)) == (0, [])
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("address", ["ftp://host", "host:5000", "sqlite:///runs.db", "~/mlruns"])
def test_invalid_addresses_are_refused(address: str) -> None:
    with pytest.raises(UserError, match="must be the http:// or https:// address of an MLflow server, or empty"):
        config.load(None, ["shards=a", "run=b", f"mlflow={address}"])


def test_only_rank_0_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Callable[..., None]:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    of_folder = Run(tmp_path, Settings(shards="s", run=str(tmp_path), mlflow="http://127.0.0.1:9"))
    with mlflow_process.sender(of_folder, print, enabled=False):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_needs_the_client(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(mlflow_process, "find_spec", lambda name: None)
    settings = Settings(shards="s", run="r", mlflow="http://127.0.0.1:9")
    with pytest.raises(ModuleNotFoundError, match="mlflow") if rank == 0 else contextlib.nullcontext():
        mlflow_process.check_installed(settings)
