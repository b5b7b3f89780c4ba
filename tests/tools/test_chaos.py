"""tools/robustness/chaos_train.py, short: that it would notice is tested first, on copies of a run that were tampered with."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.commands import run
from helpers.tools import tool
from safetensors.torch import load_file

from mura_dist.training import metrics_log

chaos = tool("robustness/chaos_train")


@pytest.fixture(scope="module")
def trained(reference_run: Callable[..., Path]) -> Path:
    """A run of three epochs, one rank."""
    return reference_run(1, "epochs=3")


def last(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def flip_a_bit(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


def change(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))


def drop_a_line(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change_a_loss(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[3]["loss"] += 1e-12
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


TAMPERINGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of a weight": (lambda run: flip_a_bit(last(run) / "model.safetensors", -1), "model.safetensors: .* differs"),
    "a bit of a moment": (lambda run: flip_a_bit(min(last(run).glob("optimiser*")), -1), "optimiser.*: .* differs"),
    "a file": (lambda run: (last(run) / "model.safetensors").unlink(), "model.safetensors is missing"),
    "a counter": (lambda run: change(last(run) / "state.json", "step", 5), "state.json: step differs"),
    "a key": (lambda run: change(last(run) / "state.json", "new", 5), "state.json: new differs"),
    "a loss": (lambda run: change_a_loss(run / "metrics.jsonl"), "metrics.jsonl:4: loss differs"),
    "a line": (lambda run: drop_a_line(run / "metrics.jsonl"), "metrics.jsonl has"),
    "the last checkpoint": (lambda run: shutil.rmtree(last(run)), "the last checkpoint is"),
    "the outcome": (lambda run: change(run / "status.json", "summary", {}), "the best checkpoint is"),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_each_difference_is_found(what: str, trained: Path, tmp_path: Path) -> None:
    tamper, expected = TAMPERINGS[what]
    copy = tmp_path / "other"
    shutil.copytree(trained, copy)
    assert chaos.differences(trained, copy) == []
    tamper(copy)
    differences = chaos.differences(trained, copy)
    assert any(re.search(expected, line) for line in differences), differences


def test_metrics_log_documents_the_wall_clock_fields() -> None:
    expected = (metrics_log.__doc__ or "").partition("Wall-clock fields:")[2].partition("All other fields")[0]
    assert set(re.findall(r"`([a-z_]+)`", expected)) - {"data", "compute"} == chaos.WALL_CLOCK


def test_only_the_wall_clock_may_differ(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    shutil.copytree(trained, copy)
    path = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"loss", "learning_rate", "tune_loss", "tune_auroc", "step"} <= set().union(*chaos._metrics(trained))
    for line in lines:
        line.update(dict.fromkeys(chaos.WALL_CLOCK & line.keys(), -1))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert chaos.differences(trained, copy) == []


def test_tensors_are_read_as_safetensors_reads_them(trained: Path) -> None:
    for path in last(trained).glob("*.safetensors"):
        tensors, reference = chaos.tensors(path), load_file(path)
        assert tensors.keys() == reference.keys()
        for name, (_, shape, data) in tensors.items():
            assert shape == tuple(reference[name].shape)
            assert data == reference[name].reshape(-1).view(torch.uint8).numpy().tobytes()


def test_moments_and_victims_are_drawn_from_the_seed(tmp_path: Path) -> None:
    reference_run = chaos.ReferenceRun(tmp_path, seconds=20.0, start_s=8.0, steps_per_epoch=8, epochs=12, writes=40)
    drawn = [[chaos.draw_aims(random.Random(seed), n, reference_run, 3) for n in range(60)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    aims = [
        aim for seed in range(40) for n in range(4) for aim in chaos.draw_aims(random.Random(seed), n, reference_run, 3)
    ]
    assert {aim.kind for aim in aims} == set(chaos.AIMS)
    assert {aim.victim for aim in aims} == {"rank 0", "rank 1", "rank 2", "torchrun", "all"}
    assert all(0 <= aim.after_s <= (8 if aim.kind == "start" else 20) for aim in aims)


def test_only_ranks_are_killed_where_only_ranks_are_wanted(tmp_path: Path) -> None:
    """Over eight stories each of two ranks is the first victim at each kind of moment."""
    reference_run = chaos.ReferenceRun(tmp_path, seconds=20.0, start_s=8.0, steps_per_epoch=8, epochs=12, writes=40)
    stories = [chaos.draw_aims(random.Random(n), n, reference_run, 2, only_ranks=True) for n in range(1, 9)]
    assert {aim.victim for aims in stories for aim in aims} == {"rank 0", "rank 1"}
    assert len({(aims[0].kind, aims[0].victim) for aims in stories}) == 8


def test_a_write_and_an_evaluation_are_seen_from_outside(tmp_path: Path) -> None:
    """The aims' moments, on a folder that passes through the states of a run; what an earlier kill left is no moment."""
    reference_run = chaos.ReferenceRun(tmp_path, seconds=20.0, start_s=8.0, steps_per_epoch=4, epochs=12, writes=40)
    checkpoints, metrics = tmp_path / "checkpoints", tmp_path / "metrics.jsonl"
    (checkpoints / ".step-00000003.partial").mkdir(parents=True)
    now = chaos.moment(chaos.Aim("write", 0, 1, "all"), tmp_path, reference_run)
    assert [now(), now()] == [False, False]
    (checkpoints / ".step-00000003.partial").rename(checkpoints / "step-00000003")
    assert not now()
    (checkpoints / ".step-00000006.partial").mkdir()
    assert [now(), now()] == [False, False], "one is let pass"
    (checkpoints / ".step-00000006.partial").rename(checkpoints / "step-00000006")
    (checkpoints / ".step-00000009.partial").mkdir()
    assert now()
    now = chaos.moment(chaos.Aim("evaluation", 0, 0, "all"), tmp_path, reference_run)
    answers = []
    for line in ({"kind": "step", "step": 3}, {"kind": "step", "step": 4}, {"kind": "epoch", "step": 4}):
        with open(metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        answers.append(now())
    assert answers == [False, True, True]


def test_a_process_that_outlives_its_run_is_named_and_ended(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)", f"run={tmp_path}"]
    with subprocess.Popen(sleeping) as process:
        begin = time.monotonic()
        assert chaos.survivors(tmp_path, 0.3) == "1 processes outlived their launcher by 0 s"
        assert process.wait() == -signal.SIGKILL
        assert time.monotonic() - begin < 20
    assert chaos.survivors(tmp_path, 0) == ""


@pytest.mark.nightly(part="kills")
def test_three_killed_trainings_end_as_the_one_that_nobody_killed(tmp_path: Path) -> None:
    result = run("python", chaos.__file__, "--kills", "3", "--seed", "7", "--keep", tmp_path / "kept", timeout_s=900)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].startswith("3 trainings (seed 7), killed ")
    assert lines[-1].endswith(": 3 the same bits, 0 not")
    assert sum(line.startswith("kill ") for line in lines) == 3
    for number in (1, 2, 3):  # each was hit at least once, and at work
        assert f"kill {number}: killed never" not in result.stdout
