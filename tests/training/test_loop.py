"""Test training on one, two and three ranks with every launcher: order, batch statistics, settings, one writer."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import laws
from helpers.commands import BIN, TINY, deepspeed, run, torchrun, train
from helpers.runs import equal, losses, steps_an_epoch, tensors

from mura_dist.data.shards.reader import Shards
from mura_dist.training import checkpoint, metrics_log
from mura_dist.training.run import Run


@pytest.mark.parametrize(("ranks", "arguments"), [(2, ()), pytest.param(3, ("micro_batch=2",), marks=pytest.mark.slow)])
def test_losses_and_statistics_match_across_world_sizes(
    reference_run: Callable[..., Path], ranks: int, arguments: tuple[str, ...]
) -> None:
    """The first step's loss is equal within 1e-6, the next 8 within 1e-3."""
    many_ranks, one_rank = reference_run(ranks, *arguments), reference_run(1, *arguments)
    actual, expected = losses(many_ranks), losses(one_rank)
    assert len(actual) == len(expected) >= 10
    assert actual[0] == pytest.approx(expected[0], rel=1e-6)
    assert actual[:9] == pytest.approx(expected[:9], rel=1e-3)
    first, second = (tensors(folder, 0) for folder in (many_ranks, one_rank))
    assert equal(first, second)  # the same weights to begin with
    statistics = [key for key in second if "running_" in key]
    assert len(statistics) == 2 * 17
    step = steps_an_epoch(one_rank)
    actual_state, expected_state = tensors(many_ranks, step), tensors(one_rank, step)
    for key in statistics:
        torch.testing.assert_close(actual_state[key], expected_state[key], rtol=1e-2, atol=1e-2)


def test_finished_run_is_left_unchanged(shard_folder: Path, single_rank_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(single_rank_run, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    result = train(1, shard_folder, copy)
    assert result.returncode == 0
    assert "2 epochs" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()} == before


def test_run_folder_describes_the_run(single_rank_run: Path, shard_folder: Path) -> None:
    loaded = Run.load(single_rank_run)
    assert loaded.settings.shards == str(shard_folder)
    assert loaded.status()["state"] == "done"
    environment = json.loads((single_rank_run / "environment.json").read_bytes())
    assert environment["world_size"] == 1
    assert environment["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (single_rank_run / "curves.png").stat().st_size > 10_000
    assert not (single_rank_run / "lock").exists()
    epochs = [line for line in metrics_log.read(single_rank_run / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    steps = [line["step"] for line in metrics_log.read(single_rank_run / "metrics.jsonl") if line["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.nightly(part="training"))])
def test_corrupt_sample_is_counted_and_training_continues(shard_folder: Path, tmp_path: Path, ranks: int) -> None:
    """Each rank logs it at most once, and metrics.jsonl counts it once. With strict=true the run fails and names it."""
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    opened = Shards.open(shards)
    bad = [int(opened.rows("train")[5]), int(opened.rows("tune")[1])]
    for row in bad:
        laws.damage(opened, row)
    result = train(ranks, shards, tmp_path / "run")
    assert result.returncode == 0, result.stderr
    epochs = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["damaged_samples"] for line in epochs] == [1, 2, 2], "tune's is found first, before training"
    named = [line for line in result.stderr.splitlines() if "corrupt sample: row" in line]
    assert {int(line.split("row ")[1].split()[0]) for line in named} == set(bad)
    assert len(named) <= 2 * ranks
    assert all(np.isfinite(losses(tmp_path / "run")))
    strict = train(ranks, shards, tmp_path / "strict", "strict=true")
    assert strict.returncode == 1
    [line] = [line for line in strict.stderr.splitlines() if line.startswith("mura-dist:")]
    assert re.search(rf"corrupt sample: row {bad[1]} .* \(strict=true\)", line)
    done = run("mura-dist", "evaluate", tmp_path / "run", shards, "--split", "tune", "--out", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert f"corrupt sample: row {bad[1]}" in done.stderr
    assert "1 radiographs of tune are not included: their samples are corrupt" in done.stdout
    assert json.loads((tmp_path / "report" / "metrics.json").read_bytes())["num_damaged"] == 1
    predictions = pd.read_csv(tmp_path / "report" / "predictions.csv")
    assert len(predictions) == len(opened.rows("tune")) - 1


def test_missing_or_truncated_tar_is_refused_before_anything_is_written(
    shard_folder: Path, tmp_path: Path, capsys
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(shard_folder, shards)
    arguments = ["train", *TINY, f"shards={shards}", f"run={tmp_path / 'run'}"]
    os.truncate(shards / "tune-000000.tar", 1000)
    laws.refusal(
        capsys, arguments, "tune-000000.tar has 1,000 bytes (index.json:", "Delete tune-000000.json and index.json"
    )
    (shards / "train-000000.tar").unlink()
    laws.refusal(capsys, arguments, "train-000000.tar is missing", "run the same `mura-dist shards` command again")
    assert not (tmp_path / "run").exists()


def test_run_logs_data_wait_and_limit(single_rank_run: Path, shard_folder: Path, tmp_path: Path) -> None:
    epochs = [line for line in metrics_log.read(single_rank_run / "metrics.jsonl") if line["kind"] == "epoch"]
    assert "limited_by" not in epochs[0], "nothing was trained before the first"
    for line in epochs[1:]:
        assert 0 <= line["data_wait_share"] <= 1
        assert line["limited_by"] == ("data" if line["data_wait_share"] > 0.05 else "compute")
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=1")
    stderr = run("mura-dist", "train", *arguments).stderr
    assert re.search(r"batches by cpu from raw shards, \d threads per rank, \d+ micro-batches ahead", stderr)
    assert re.search(r"epoch 1 .*data wait \d+\.\d%, limited by (compute|data)", stderr)


@pytest.mark.slow
def test_deepspeed_torchrun_and_plain_start_the_same_training(
    shard_folder: Path, tmp_path: Path, single_rank_run: Path
) -> None:
    arguments = (*TINY, f"shards={shard_folder}", "epochs=1")
    launched = run(*deepspeed(2), *arguments, f"run={tmp_path / 'a'}", cwd=tmp_path)
    assert launched.returncode == 0, launched.stderr
    assert torchrun(1, "mura_dist.train", *arguments, f"run={tmp_path / 'b'}").returncode == 0
    assert losses(tmp_path / "a")[0] == pytest.approx(losses(single_rank_run)[0], rel=1e-6)
    assert losses(tmp_path / "b") == losses(single_rank_run)[: steps_an_epoch(single_rank_run)]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(("precision=bf16",), marks=pytest.mark.slow),
        ("pipeline=dali",),
        pytest.param(
            ("optimizer=adamw", "weight_decay=0.1", "precision=fp16", "channels_last=false"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("lr_scaling=sqrt", "reference_batch=3", "clip_norm=1.0", "label_smoothing=0.01", "warmup_steps=5"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_other_settings_train(
    shard_folder: Path, tmp_path: Path, single_rank_run: Path, arguments: tuple[str, ...]
) -> None:
    result = train(1, shard_folder, tmp_path / "run", *arguments, "epochs=1")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run")[0] == pytest.approx(losses(single_rank_run)[0], rel=0.02)
    assert (
        losses(tmp_path / "run") != losses(single_rank_run)[: steps_an_epoch(single_rank_run)]
    )  # the setting did something


@pytest.mark.slow
def test_training_needs_no_compiler(shard_folder: Path, tmp_path: Path) -> None:
    """DeepSpeed would build C++ operators at first use."""
    extensions = tmp_path / "extensions"
    extensions.mkdir()
    nothing = {"TORCH_EXTENSIONS_DIR": str(extensions), "PATH": str(BIN), "CC": "no-compiler", "CXX": "no-compiler"}
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=1", "--quiet")
    result = run("mura-dist", "train", *arguments, env=nothing, cold=True)
    assert result.returncode == 0, result.stderr
    assert list(extensions.iterdir()) == []


def test_locked_run_is_refused(shard_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    owner = {"host": os.uname().nodename, "process": os.getpid()}
    (folder / "lock").write_text(json.dumps(owner))
    arguments = (*TINY, f"shards={shard_folder}", f"run={folder}", "epochs=0", "lock_wait_s=0", "--quiet")
    result = run("mura-dist", "train", *arguments)
    assert result.returncode == 2
    assert f"being written by process {os.getpid()}" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["lock"]
    os.utime(folder / "lock", (0, 0))  # a process of that number lives, but its heart has not beaten since 1970
    result = run("mura-dist", "train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "stale lock" in result.stderr


def test_changed_identity_settings_are_refused(
    shard_folder: Path, single_rank_run: Path, tmp_path: Path, capsys
) -> None:
    folder = Path(shutil.copytree(single_rank_run, tmp_path / "run"))
    arguments = ["train", *TINY, f"shards={shard_folder}", f"run={folder}"]
    line = laws.refusal(
        capsys, [*arguments, "learning_rate=2e-3"], "learning_rate=0.001", "learning_rate=0.002", "run=NEW"
    )
    assert str(folder) in line
    laws.refusal(capsys, [*arguments, "seed=5"], "seed=0", "seed=5")
    another_folder = tmp_path / "other"
    from mura_dist.data.phantoms import draw
    from mura_dist.data.shards.convert import convert

    draw(tmp_path / "drawn", studies=60, size=96, seed=9)
    convert(tmp_path / "drawn", another_folder, size=64, workers=1)
    laws.refusal(capsys, ["train", *TINY, f"shards={another_folder}", f"run={folder}"], "manifest_sha256", "run=NEW")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    laws.refusal(capsys, ["train", *TINY, f"shards={another_folder}", f"run={tmp_path / 'mine'}"], "is not a run")


def test_incompatible_batch_sizes_are_refused(shard_folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    arguments = ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "micro_batch=2"]
    laws.refusal(
        capsys, [*arguments, "global_batch=13"], "global_batch=13", "micro_batch 2", "nearest is global_batch=12"
    )
    laws.refusal(capsys, [*arguments, "global_batch=600"], "global_batch=600", "larger than the train split")
    laws.refusal(capsys, [*arguments, "shards=nowhere"], "nowhere", "mura-dist shards")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "100")  # what a launcher of 100 ranks says
    laws.refusal(capsys, arguments, "100 ranks x micro_batch 2 = 200", "fewer ranks")
    monkeypatch.setenv("WORLD_SIZE", "5")
    laws.refusal(capsys, arguments, "5 ranks = 10", "nearest is global_batch=10")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_early_stop_ends_the_run(shard_folder: Path, tmp_path: Path) -> None:
    arguments = (
        "learning_rate=1e-12",
        "epochs=9",
        "micro_batch=12",
        "early_stop=2",
        "plateau_patience=0",
        "plateau_threshold=0.5",
    )
    result = train(1, shard_folder, tmp_path / "run", *arguments)
    assert result.returncode == 0, result.stderr
    epochs = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3], "the first is the best, two are not better"
    assert "3 epochs" in result.stdout
    before = (tmp_path / "run" / "status.json").stat().st_mtime_ns
    assert train(1, shard_folder, tmp_path / "run", *arguments).returncode == 0
    assert (tmp_path / "run" / "status.json").stat().st_mtime_ns == before, "it is done"
    more = train(1, shard_folder, tmp_path / "run", *arguments, "early_stop=0", "epochs=5")
    assert more.returncode == 0, more.stderr
    assert "5 epochs" in more.stdout


@pytest.mark.slow
def test_keep_best_keeps_the_lowest_losses(shard_folder: Path, tmp_path: Path) -> None:
    result = train(1, shard_folder, tmp_path / "run", "epochs=6", "micro_batch=12", "keep_best=3", "keep_checkpoints=1")
    assert result.returncode == 0, result.stderr
    epochs = [line for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"][1:]
    best = sorted(epochs, key=lambda line: (line["tune_loss"], -line["step"]))[:3]
    expected = {f"step-{line['step']:08d}" for line in best} | {f"step-{epochs[-1]['step']:08d}"}
    assert {folder.name for folder in checkpoint.list_folders(tmp_path / "run" / "checkpoints")} == expected


@pytest.mark.slow
def test_resolved_micro_batch_is_written_to_the_recipe(shard_folder: Path, tmp_path: Path) -> None:
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "micro_batch=auto", "epochs=1")
    result = torchrun(2, "mura_dist.train", *arguments)
    assert result.returncode == 0, result.stderr
    assert "micro_batch=auto is 8 on a CPU" in result.stderr
    assert Run.load(tmp_path / "run").settings.micro_batch == 6, "12 on 2 ranks"
    again = train(1, shard_folder, tmp_path / "run", "micro_batch=auto", "epochs=2")
    assert again.returncode == 0, again.stderr
    assert Run.load(tmp_path / "run").settings.micro_batch == 6, "what the run began with"
    assert len(losses(tmp_path / "run")) == 16


def test_invalid_settings_are_refused(shard_folder: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}"]
    laws.refusal(capsys, [*arguments, "stop_signal=SIGUSR3"], "stop_signal='SIGUSR3'", "did you mean SIGUSR")
    laws.refusal(capsys, [*arguments, "stop_signal=SIGKILL"], "must be one of", "SIGUSR2")
    laws.refusal(capsys, [*arguments, "micro_batch=1"], "micro_batch=1", "at least 2")
    laws.refusal(
        capsys, [*arguments, "micro_batch=auto", "global_batch=1"], "global_batch=1", "nearest is global_batch=2"
    )
    assert not (tmp_path / "run" / "recipe.toml").exists()
