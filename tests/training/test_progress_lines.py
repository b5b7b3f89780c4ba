"""Test progress_lines.py: a line every 30 s on rank 0 if stderr is no terminal."""

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
from helpers.commands import NO_GPU, TINY, run, warm_python

from mura_dist.training import metrics_log
from mura_dist.training.progress_lines import LINE_EVERY_S, ProgressLines

LINE = re.compile(
    r"step (?P<step>\d+)/(?P<num_steps>\d+) \(epoch (?P<epoch>\d+) of (?P<num_epochs>\d+)\): loss (?P<loss>\d+\.\d{4}), "
    r"learning rate (?P<rate>[\d.e-]+), (?P<speed>\d+\.\d) images/s, (?P<left>\d+:\d\d:\d\d) left"
)
SCRIPT = """
import sys
from mura_dist.core import config
from mura_dist.training.loop import train
train(config.load(None, sys.argv[1:]), line_every_s=0.0)
"""


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def simulate(step_s: float, evaluation_s: float = 0.0, ask_s: float = 1.0) -> list[tuple[float, str]]:
    """Return the lines and their times of 300 steps in 3 epochs, with an evaluation before each epoch."""
    clock, timed_lines = Clock(), list[tuple[float, str]]()
    lines = ProgressLines(
        lambda text: timed_lines.append((clock.now, text)), start_step=0, num_steps=300, num_epochs=3, clock=clock
    )
    for step in range(300):
        if step % 100 == 0:
            lines.begin_evaluation()
            end = clock.now + evaluation_s
            while clock.now + ask_s <= end:
                clock.now += ask_s
                lines.evaluating(step, "tune")
            clock.now = end
            timed_lines.append((clock.now, "epoch"))  # the line of an evaluation
            lines.end_evaluation()
        clock.now += step_s
        lines.step(step + 1, epoch=step // 100, loss=0.5, learning_rate=1e-4, num_images=8)
    return timed_lines


@pytest.mark.parametrize("step_s", [0.01, 0.25, 7.0, 29.9, 30.0, 45.0])
@pytest.mark.parametrize("evaluation_s", [0.0, 20.0, 95.0])
def test_progress_line_every_30_s(step_s: float, evaluation_s: float) -> None:
    """Law: two lines are at least 30 s apart, and a line is logged at the first event after 30 s."""
    timed_lines = [(100.0, "start"), *simulate(step_s, evaluation_s)]
    assert LINE_EVERY_S == 30
    for (before, _), (at, text) in itertools.pairwise(timed_lines):
        assert text == "epoch" or at - before >= 30 - 1e-6
        assert at - before < 30 + max(step_s, 1.0) + 1e-6


@pytest.mark.parametrize("step_s", [0.25, 7.0, 45.0])
@pytest.mark.parametrize("evaluation_s", [0.0, 95.0])
def test_progress_line_contents(step_s: float, evaluation_s: float) -> None:
    for at, text in simulate(step_s, evaluation_s):
        if not (match := LINE.fullmatch(text)):
            assert text == "epoch" or re.fullmatch(r"step (0|100|200)/300: evaluating tune for 0:0[01]:\d\d", text)
            continue
        step = int(match["step"])
        assert (match["num_steps"], match["num_epochs"], match["loss"], match["rate"]) == (
            "300",
            "3",
            "0.5000",
            "0.0001",
        )
        assert int(match["epoch"]) == (step - 1) // 100 + 1
        assert float(match["speed"]) == pytest.approx(8 / step_s, abs=0.05), "evaluations are not counted"
        hours, minutes, seconds = map(int, match["left"].split(":"))
        left_s = (at - 100) / step * (300 - step)
        assert 3600 * hours + 60 * minutes + seconds == pytest.approx(left_s, abs=0.51)


def test_long_evaluation_logs_lines() -> None:
    texts = [text for _, text in simulate(1.0, evaluation_s=95.0) if "evaluating" in text]
    assert texts[:3] == [f"step 0/300: evaluating tune for 0:0{time}" for time in ("0:30", "1:00", "1:30")]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_training_without_terminal_logs_progress_lines(ranks: int, shard_folder: Path, tmp_path: Path) -> None:
    """With an interval of 0 each step has one line with the values of metrics.jsonl, for any number of ranks."""
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}")
    command = [tmp_path / "script.py", *arguments]
    if ranks == 1:
        environment = {**os.environ, **NO_GPU}
        done = subprocess.run([warm_python(), *command], capture_output=True, text=True, env=environment, check=False)
    else:
        done = run("torchrun", "--standalone", "--nproc-per-node", ranks, *command)
    assert done.returncode == 0, done.stderr
    matches = [match for line in done.stderr.splitlines() if (match := LINE.fullmatch(line))]
    lines = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert [int(match["step"]) for match in matches] == [line["step"] for line in lines] == list(range(1, 17))
    for match, line in zip(matches, lines, strict=True):
        assert (match["num_steps"], int(match["epoch"]), match["num_epochs"]) == ("16", line["epoch"] + 1, "2")
        assert match["loss"] == f"{line['loss']:.4f}"
        assert float(match["rate"]) == pytest.approx(line["learning_rate"], rel=1e-3)
        assert float(match["speed"]) > 0
    assert "evaluating tune for" in done.stderr
