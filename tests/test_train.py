"""Training over one, two and three ranks, by every launcher: order, batch statistics, resume, stop, one writer."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import laws
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BIN, TINY, run, torchrun
from safetensors.torch import load_file

from mura_dist import checkpoint, journal
from mura_dist.engine import RunningStatistics
from mura_dist.model import build
from mura_dist.refusal import Refusal
from mura_dist.runs import Run
from mura_dist.shards import Shards


def train(ranks: int, shards: Path, folder: Path, *words: str):
    settings = (*TINY, f"shards={shards}", f"run={folder}", *words)
    return torchrun(ranks, "mura_dist.train", *settings, "--quiet")


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in journal.read(folder / "metrics.jsonl") if line["kind"] == "step"]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds, model and optimiser."""
    parts = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    found = {f"{path.name}:{key}": value for path in parts for key, value in load_file(path).items()}
    assert len(found) > 100, found.keys()
    return found


def steps_an_epoch(folder: Path) -> int:
    return next(
        line["step"]
        for line in journal.read(folder / "metrics.jsonl")
        if line.get("epoch") == 1 and line["kind"] == "epoch"
    )


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(shard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of these ranks and settings, two epochs, never interrupted."""

    @functools.cache
    def made(ranks: int, *words: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "whole"
        result = train(ranks, shard_folder, folder, *words)
        assert result.returncode == 0, result.stderr
        return folder

    return made


@pytest.fixture(scope="module")
def one(whole: Callable[..., Path]) -> Path:
    """The run of one rank."""
    return whole(1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_leaves_no_trace(whole: Callable[..., Path], one: Path, ranks: int) -> None:
    """Same rows, first step's loss within 1e-6, 8 steps on within 1e-3."""
    several = whole(ranks)
    ours, wanted = losses(several), losses(one)
    assert len(ours) == len(wanted) >= 10
    assert ours[0] == pytest.approx(wanted[0], rel=1e-6)
    assert ours[:9] == pytest.approx(wanted[:9], rel=1e-3)
    first, second = (tensors(folder, 0) for folder in (several, one))
    assert equal(first, second)  # the same weights to begin with
    statistics = [key for key in second if "running_" in key]
    assert len(statistics) == 2 * 17
    step = steps_an_epoch(one)
    ours_then, wanted_then = tensors(several, step), tensors(one, step)
    for key in statistics:
        torch.testing.assert_close(ours_then[key], wanted_then[key], rtol=1e-2, atol=1e-2)


def test_the_same_command_on_a_finished_run_does_nothing(shard_folder: Path, one: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*") if path.is_file()}
    result = train(1, shard_folder, one)
    assert result.returncode == 0
    assert "2 epochs" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*") if path.is_file()} == before


def test_a_run_says_what_it_was(one: Path, shard_folder: Path) -> None:
    loaded = Run.load(one)
    assert loaded.settings.shards == str(shard_folder)
    assert loaded.status()["state"] == "done"
    environment = json.loads((one / "environment.json").read_bytes())
    assert environment["world_size"] == 1
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (one / "curves.png").stat().st_size > 10_000
    assert not (one / "lock").exists()
    epochs = [line for line in journal.read(one / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    steps = [line["step"] for line in journal.read(one / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(("ranks", "words"), [(1, ()), (2, ()), (2, ("zero_stage=1",))])
def test_resumed_is_as_never_stopped(
    shard_folder: Path, tmp_path: Path, whole: Callable[..., Path], ranks: int, words: tuple[str, ...]
) -> None:
    """Law of resumption at an epoch's end: N + N epochs = 2N epochs, every tensor bit for bit; plateau, metrics too."""
    for epochs in ("epochs=1", "epochs=2"):
        result = train(ranks, shard_folder, tmp_path / "run", epochs, *words)
        assert result.returncode == 0, result.stderr
    never = whole(ranks, *words)
    last = 2 * steps_an_epoch(never)
    assert equal(tensors(never, last), tensors(tmp_path / "run", last))
    assert losses(never) == losses(tmp_path / "run")
    states = [checkpoint.select(folder / "checkpoints", "last").state for folder in (never, tmp_path / "run")]
    assert states[0] == states[1]
    assert states[0]["plateau"]["best"] is not None


def test_killed_it_goes_on_from_the_last_complete_checkpoint(shard_folder: Path, tmp_path: Path) -> None:
    """kill -9 of everything in mid-epoch; the same command ends with the bits of a run never interrupted."""
    words = (*TINY, f"shards={shard_folder}", "checkpoint_every=2", "epochs=4", "--quiet")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert run("mura-dist", "train", *words, f"run={whole}").returncode == 0
    command = [str(BIN / "mura-dist"), "train", *words, f"run={torn}"]
    process = subprocess.Popen(command)
    while not list((torn / "checkpoints").glob("step-0000001*")):  # in mid-epoch, past the first one
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (torn / "lock").exists()
    result = run(*command[:1], *command[1:])
    assert result.returncode == 0, result.stderr
    assert "stale lock" in result.stderr
    for folder in checkpoint.folders(
        whole / "checkpoints"
    ):  # a checkpoint of mid-epoch was not evaluated: it is never the best
        state = checkpoint.read(folder).state
        assert (state["select_loss"] is not None) == (state["evaluated_step"] == state["step"] > 0)
    assert checkpoint.select(whole / "checkpoints", "best").state["select_loss"] is not None
    last = checkpoint.select(whole / "checkpoints", "last").step
    assert equal(tensors(whole, last), tensors(torn, last))
    assert losses(whole) == losses(torn)


def test_asked_to_stop_it_saves_and_says_so(shard_folder: Path, tmp_path: Path, one: Path) -> None:
    words = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=500", "--quiet")
    process = subprocess.Popen([str(BIN / "mura-dist"), "train", *words], stderr=subprocess.PIPE, text=True)
    while not losses(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the same command goes on" in stderr
    assert len(stderr.strip().splitlines()) == 1
    status = Run.load(tmp_path / "run").status()
    assert status["state"] == "stopped"
    step = checkpoint.select(tmp_path / "run" / "checkpoints", "last").step
    assert step == len(losses(tmp_path / "run"))  # the very step it was at
    per_epoch = steps_an_epoch(one)
    assert run("mura-dist", "train", *words, f"epochs={step // per_epoch + 1}").returncode == 0
    assert len(losses(tmp_path / "run")) == per_epoch * (step // per_epoch + 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_sample_is_counted_and_the_run_goes_on(shard_folder: Path, tmp_path: Path, ranks: int) -> None:
    """Named once a rank at most, counted once over all ranks in metrics.jsonl; strict=true ends the run and names it."""
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    opened = Shards.open(shards)
    bad = [int(opened.rows("train")[5]), int(opened.rows("tune")[1])]
    for row in bad:
        laws.damage(opened, row)
    result = train(ranks, shards, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    epochs = [line for line in journal.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["damaged_samples"] for line in epochs] == [1, 2, 2], "tune's is found first, before training"
    named = [line for line in result.stderr.splitlines() if "damaged sample: row" in line]
    assert {int(line.split("row ")[1].split()[0]) for line in named} == set(bad)
    assert len(named) <= 2 * ranks
    assert all(np.isfinite(losses(tmp_path / "run")))
    strict = train(ranks, shards, tmp_path / "strict", "strict=true")
    assert strict.returncode == 1
    assert f"mura-dist: damaged sample: row {bad[1]}" in strict.stderr
    done = run("mura-dist", "evaluate", tmp_path / "run", shards, "--split", "tune", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert f"damaged sample: row {bad[1]}" in done.stderr
    assert json.loads((tmp_path / "report" / "metrics.json").read_bytes())["num_damaged"] == 1
    predictions = pd.read_csv(tmp_path / "report" / "predictions.csv")
    assert len(predictions) == len(opened.rows("tune")) - 1


def test_a_missing_or_shortened_tar_is_refused_before_anything_is_written(
    shard_folder: Path, tmp_path: Path, capsys
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    words = ["train", *TINY, f"shards={shards}", f"run={tmp_path / 'run'}"]
    os.truncate(shards / "tune-000000.tar", 1000)
    laws.refusal(
        capsys, words, "tune-000000.tar has 1,000 bytes, index.json says", "delete tune-000000.json and index.json"
    )
    (shards / "train-000000.tar").unlink()
    laws.refusal(capsys, words, "train-000000.tar is missing", "run the same `mura-dist shards` command again")
    assert not (tmp_path / "run").exists()


def test_a_run_says_where_its_time_goes(one: Path, shard_folder: Path, tmp_path: Path) -> None:
    epochs = [line for line in journal.read(one / "metrics.jsonl") if line["kind"] == "epoch"]
    assert "limited_by" not in epochs[0], "nothing was trained before the first"
    for line in epochs[1:]:
        assert 0 <= line["data_wait_share"] <= 1
        assert line["limited_by"] == ("data" if line["data_wait_share"] > 0.05 else "compute")
    words = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=1")
    told = run("mura-dist", "train", *words).stderr
    assert re.search(r"batches by cpu from raw shards, \d threads a rank, \d+ micro-batches ahead", told)
    assert re.search(r"epoch 1 .*data wait \d+\.\d%: (compute|data) limits", told)


@pytest.mark.slow
def test_deepspeed_and_plain_run_the_same_page(shard_folder: Path, tmp_path: Path, one: Path) -> None:
    words = (*TINY, f"shards={shard_folder}")
    launched = run(
        "deepspeed",
        "--num_accelerators",
        2,
        "--module",
        "mura_dist.train",
        *words,
        f"run={tmp_path / 'a'}",
        cwd=tmp_path,
    )
    assert launched.returncode == 0, launched.stderr
    assert run("mura-dist", "train", *words, f"run={tmp_path / 'b'}").returncode == 0
    assert losses(tmp_path / "a")[0] == pytest.approx(losses(one)[0], rel=1e-6)
    assert losses(tmp_path / "b") == losses(one)


@pytest.mark.parametrize("words", [("precision=bf16",), ("pipeline=dali",), ("optimiser=adamw", "weight_decay=0.1")])
def test_other_settings_learn_too(shard_folder: Path, tmp_path: Path, one: Path, words: tuple[str, ...]) -> None:
    result = train(1, shard_folder, tmp_path / "run", *words, "epochs=1")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(one)[0], rel=0.02)
    assert losses(tmp_path / "run") != losses(one)[: steps_an_epoch(one)]  # the setting did something


def test_a_machine_without_a_compiler_trains(shard_folder: Path, tmp_path: Path) -> None:
    """DeepSpeed would build C++ operators when first used; it is told to build none."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    nothing = {"TORCH_EXTENSIONS_DIR": str(extensions), "PATH": str(BIN), "CC": "no-compiler", "CXX": "no-compiler"}
    words = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=1", "--quiet")
    result = run("mura-dist", "train", *words, env=nothing)
    assert result.returncode == 0, result.stderr
    assert list(extensions.iterdir()) == []


def test_only_one_writes(shard_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    owner = {"host": os.uname().nodename, "process": os.getpid()}
    (folder / "lock").write_text(json.dumps(owner))
    words = (*TINY, f"shards={shard_folder}", f"run={folder}", "epochs=0", "--quiet")
    result = run("mura-dist", "train", *words)
    assert result.returncode == 2
    assert f"being written by process {os.getpid()}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["lock"]
    os.utime(folder / "lock", (0, 0))  # a process of that number lives, but its heart has not beaten since 1970
    result = run("mura-dist", "train", *words)
    assert result.returncode == 0, result.stderr
    assert "stale lock" in result.stderr


def test_what_may_not_change_is_refused(shard_folder: Path, one: Path, tmp_path: Path, capsys) -> None:
    words = ["train", *TINY, f"shards={shard_folder}", f"run={one}"]
    said = laws.refusal(capsys, [*words, "learning_rate=2e-3"], "learning_rate=0.001", "learning_rate=0.002", "run=NEW")
    assert str(one) in said
    laws.refusal(capsys, [*words, "seed=5"], "seed=0", "seed=5")
    other = tmp_path / "other"
    from mura_dist.convert import convert
    from mura_dist.phantoms import draw

    draw(tmp_path / "drawn", studies=60, size=96, seed=9)
    convert(tmp_path / "drawn", other, size=64, workers=1)
    laws.refusal(capsys, ["train", *TINY, f"shards={other}", f"run={one}"], "manifest_sha256", "run=NEW")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    laws.refusal(capsys, ["train", *TINY, f"shards={other}", f"run={tmp_path / 'mine'}"], "is no run")


def test_sizes_that_do_not_go_together_are_refused(shard_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}"]
    laws.refusal(capsys, [*words, "global_batch=13"], "global_batch=13", "micro_batch 2", "nearest is global_batch=12")
    laws.refusal(capsys, [*words, "global_batch=600"], "global_batch=600", "has only")
    laws.refusal(capsys, [*words, "shards=nowhere"], "nowhere", "mura-dist shards")
    monkeypatch.setenv("WORLD_SIZE", "100")  # what a launcher of 100 ranks says
    laws.refusal(capsys, words, "100 ranks x micro_batch 2 = 200", "fewer ranks")
    monkeypatch.setenv("WORLD_SIZE", "5")
    laws.refusal(capsys, words, "5 ranks = 10", "nearest is global_batch=10")
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_passed_over(one: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(one / "checkpoints", folder)
    newest = checkpoint.folders(folder)[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    (checkpoint.folders(folder)[0] / "state.json").write_text("{")  # an old one, that nobody takes
    assert (
        checkpoint.best(checkpoint.folders(folder)).name
        == checkpoint.best(checkpoint.folders(one / "checkpoints")).name
    )
    said: list[str] = []
    found = checkpoint.latest(folder, said.append)
    assert found is not None
    assert found.folder == checkpoint.folders(folder)[-2]
    assert "model.safetensors is damaged" in said[0]
    present = checkpoint.folders(folder)
    (found.folder / checkpoint.MARK).unlink()
    assert checkpoint.folders(folder) == [other for other in present if other != found.folder]
    with pytest.raises(Refusal, match="none of the 2 checkpoints"):
        checkpoint.latest(folder)


def test_the_best_and_the_newest_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([None, 0.5, 0.2, 0.4, 0.3, None]):
        state = {"step": step, "select_loss": loss, "zero_stage": 0}
        checkpoint.save(tmp_path, state, {"w": torch.ones(1)}, {}, rank=0, shares=1, barrier=lambda: None)
    (tmp_path / ".step-00000009.partial").mkdir()
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004", "step-00000005"]
    assert checkpoint.select(tmp_path, "best").step == 2
    assert checkpoint.select(tmp_path, "last").step == 5


def test_running_statistics_move_once_a_step_by_the_mean() -> None:
    """Against the definition: the mean over the step's micro-batches of their mean and unbiased variance, momentum 0.1."""
    model = build("tiny").train()
    norm = model.features.norm0
    statistics = RunningStatistics(model)
    before = statistics.values.clone()
    images = torch.randint(0, 256, (3, 4, 1, 32, 32), dtype=torch.uint8)
    means, variances = [], []
    norm.register_forward_pre_hook(
        lambda _, given: (means.append(given[0].mean((0, 2, 3))), variances.append(given[0].var((0, 2, 3))), None)[-1]
    )
    for image in images:
        model(image)
        statistics.collect()
    statistics.move(statistics.sum.clone(), 3)
    statistics.expose(steps=1)
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.stack(means).mean(0).detach())
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * torch.stack(variances).mean(0).detach())
    assert not torch.equal(before, statistics.values)
    assert norm.num_batches_tracked == 1
