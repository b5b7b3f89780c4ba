"""Test metrics_log.py: the bar on a terminal, lines without one, TensorBoard's files."""

import contextlib
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import NO_GPU, TINY, run, warm_python

from mura_dist.data import mura
from mura_dist.training import metrics_log
from mura_dist.training.metrics_log import MetricsLogger, Stopwatch

TRAIN_DRAWING_EACH_UPDATE = """
import functools, sys
from rich.progress import Progress
Progress.update = functools.partialmethod(Progress.update, refresh=True)
from mura_dist.cli.main import entry
entry(["train", *sys.argv[1:]])
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def settings(shards: Path, folder: Path, *arguments: str) -> tuple[str, ...]:
    return (*TINY, f"shards={shards}", f"run={folder}", *arguments)


def on_a_terminal(*command: str) -> str:
    """Return what a command writes to stderr on a terminal of 150 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, **NO_GPU, "TERM": "xterm", "COLUMNS": "150"}
    output = b""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env=environment) as process:
        os.close(slave)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if not select.select([master], [], [], 0.1)[0]:
                continue
            try:
                output += os.read(master, 1 << 16)
            except OSError:  # the other end is closed: the command is done
                break
        else:
            process.kill()
    os.close(master)
    assert process.returncode == 0, output.decode(errors="replace")
    return output.decode()


@pytest.mark.slow
def test_terminal_shows_a_progress_bar(shard_folder: Path, tmp_path: Path) -> None:
    """It has loss, images/s, data wait and remaining time. Each epoch's line is printed above it once."""
    arguments = settings(shard_folder, tmp_path / "run")
    output = CONTROL.sub("", on_a_terminal(warm_python(), "-c", TRAIN_DRAWING_EACH_UPDATE, *arguments)).replace(
        "\r", "\n"
    )
    bars = re.findall(
        r"epoch 1 .*step (\d+)/16 +loss (\d\.\d{4}) +(\d+\.\d) images/s +data wait \d+\.\d% +(\d+:\d\d:\d\d) left",
        output,
    )
    assert bars, output[-2000:]
    lines = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    for step, loss, speed, _ in bars:
        line = lines[int(step) - 1]
        assert (f"{line['loss']:.4f}", line["images_per_s"]) == (loss, pytest.approx(float(speed), abs=0.06))
    evaluations = {tuple(map(int, each)) for each in re.findall(r"evaluating tune .* (\d+)/(\d+) radiographs", output)}
    [num_radiographs] = {total for _, total in evaluations}
    assert {(0, num_radiographs), (6, num_radiographs), (num_radiographs, num_radiographs)} <= evaluations
    assert "loss nan" not in output
    for epoch in range(3):
        assert len(re.findall(rf"^epoch {epoch} \(step {8 * epoch}\): .*tune_loss", output, re.MULTILINE)) == 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the captured stderr a terminal."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "150"}.items():
        monkeypatch.setenv(name, value)


def bars(metrics_logger: MetricsLogger) -> list[str]:
    """Return the texts of the current bars."""
    with metrics_logger.console.capture() as capture:
        metrics_logger.console.print(metrics_logger.progress.get_renderable())
    text = CONTROL.sub("", capture.get())
    return [" ".join(re.sub(r"[━╸╺]+", "", line).split()) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("num_steps", [0, 500])
def test_progress_bar_contents(tmp_path: Path, num_steps: int, terminal: None) -> None:
    """It has no step if there are none and no loss before the first step. An evaluation has a second bar."""
    start = min(20, num_steps)
    metrics_logger = MetricsLogger(
        tmp_path,
        enabled=True,
        quiet=False,
        tensorboard=False,
        start_step=start,
        evaluated_step=start,
        num_steps=num_steps,
    )
    training = [f"training step {start}/{num_steps}"] if num_steps else []
    assert bars(metrics_logger) == training
    with contextlib.suppress(KeyboardInterrupt), metrics_logger.evaluation_bar("tune", 100) as update:
        assert bars(metrics_logger) == [*training, "evaluating tune 0/100 radiographs"]
        for done in (8, 64, 100):
            update(done, 100)
            assert bars(metrics_logger) == [*training, f"evaluating tune {done}/100 radiographs"]
        raise KeyboardInterrupt
    assert bars(metrics_logger) == training
    if num_steps:
        watch = Stopwatch()
        watch.seconds |= {"data": 1.0, "step": 9.0}
        metrics_logger.log_steps({"step": 30, "epoch": 2, "loss": 0.25}, num_images=80, watch=watch)
        [line] = bars(metrics_logger)
        assert re.fullmatch(r"epoch 2 step 30/500 loss 0\.2500 8\.0 images/s data wait 10\.0% \d:\d\d:\d\d left", line)


@pytest.mark.parametrize(("enabled", "quiet"), [(False, False), (True, True)])
def test_no_bar_on_other_ranks_or_with_quiet(tmp_path: Path, enabled: bool, quiet: bool, terminal: None) -> None:
    metrics_logger = MetricsLogger(
        tmp_path, enabled=enabled, quiet=quiet, tensorboard=False, start_step=0, evaluated_step=0, num_steps=9
    )
    stderr = sys.stderr
    with metrics_logger, metrics_logger.evaluation_bar("tune", 100) as update:
        update(1, 100)
        assert sys.stderr is stderr  # a bar redirects it, and a console that prints nothing would lose it


def test_without_terminal_one_line_per_epoch(shard_folder: Path, tmp_path: Path) -> None:
    result = run("mura-dist", "train", *settings(shard_folder, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    first, *epochs, terms = result.stderr.splitlines()
    assert terms == mura.TERMS
    assert "8 steps per epoch, 16 in total" in first
    assert [line.partition(":")[0] for line in epochs] == [f"epoch {n} (step {8 * n})" for n in range(3)]
    assert not CONTROL.search(result.stderr)
    assert "\r" not in result.stderr


@pytest.mark.parametrize("step_s", [0.1, 35.0])
def test_remaining_time_for_slow_steps(tmp_path: Path, step_s: float) -> None:
    options = {"enabled": True, "quiet": True, "tensorboard": False}
    metrics_logger = MetricsLogger(tmp_path, start_step=20, evaluated_step=20, num_steps=500, **options)
    for step in (30, 40):
        metrics_logger.started = time.perf_counter() - step_s * (step - 20)
        watch = Stopwatch()
        watch.seconds |= {"data": 0.0, "step": 10 * step_s}
        metrics_logger.log_steps({"step": step, "epoch": 0, "loss": 1.0}, num_images=80, watch=watch)
    hours, minutes, seconds = map(
        int, metrics_logger.progress.tasks[0].fields["remaining"].removesuffix(" left").split(":")
    )
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(460 * step_s, abs=1)


@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'tensorboard'"), TypeError("Descriptors\nof old")]
)
def test_missing_tensorboard_is_logged_once(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finder:
        """An import finder that fails as a missing or broken package does."""

        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith(("torch.utils.tensorboard", "tensorboard")):
                raise error

    for name in [name for name in sys.modules if name.startswith(("torch.utils.tensorboard", "tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    options = {"enabled": True, "quiet": False, "start_step": 0, "evaluated_step": -1, "num_steps": 2}
    with MetricsLogger(tmp_path, **options, tensorboard=True) as metrics_logger:
        watch = Stopwatch()
        for step in (1, 2):
            watch.seconds |= {"data": 0.0, "step": 1.0}
            metrics_logger.log_steps({"step": step, "epoch": 0, "loss": 1.0}, num_images=8, watch=watch)
    reason = str(error).partition("\n")[0]
    assert capsys.readouterr().err == f"no TensorBoard events are written: {reason}. metrics.jsonl has all values.\n"
    assert len(metrics_log.read(tmp_path / "metrics.jsonl")) == 2
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.slow
def test_tensorboard_has_each_step_once_after_resuming(shard_folder: Path, tmp_path: Path) -> None:
    """The last epoch runs twice as after a kill, and its first events are purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = settings(shard_folder, tmp_path / "run", "tensorboard=true")
    assert run("mura-dist", "train", *arguments, "--quiet").returncode == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000016")
    (tmp_path / "run" / "status.json").unlink()
    assert run("mura-dist", "train", *arguments, "--quiet").returncode == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = metrics_log.read(tmp_path / "run" / "metrics.jsonl")
    for kind, name, steps in (("step", "loss", range(1, 17)), ("epoch", "tune_loss", (0, 8, 16))):
        logged = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        assert [step for step, _ in logged] == list(steps)
        expected = [line[name] for line in lines if line["kind"] == kind]
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-6)
    for name in ("step/images_per_s", "step/learning_rate", "epoch/tune_kappa", "epoch/tune_auroc"):
        assert events.Scalars(name)
