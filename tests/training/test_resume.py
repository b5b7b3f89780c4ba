"""The law of resumption: stopped or killed anywhere, on as many ranks or others, a run ends with the bits of one left alone."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import TINY, run, train, warm_python, warm_script
from helpers.runs import equal, losses, steps_an_epoch, tensors, told

from mura_dist.training import checkpoint
from mura_dist.training.run import Run

RESUMED = [
    (2, ()),
    pytest.param(1, ("precision=bf16", "ema=0.9", "clip_norm=0.1", "label_smoothing=0.1"), marks=pytest.mark.slow),
    pytest.param(1, (), marks=pytest.mark.nightly(part="kills")),
    pytest.param(2, ("zero_stage=1",), marks=pytest.mark.nightly(part="kills")),
    pytest.param(2, ("zero_stage=1", "ema=0.9", "precision=fp16", "optimizer=sgd"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "words"), RESUMED)
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
    assert told(never) == told(tmp_path / "run")
    states = [checkpoint.select(folder / "checkpoints", "last").state for folder in (never, tmp_path / "run")]
    assert states[0] == states[1]
    assert states[0]["plateau"]["best"] is not None


@pytest.mark.slow
def test_killed_it_goes_on_from_the_last_complete_checkpoint(shard_folder: Path, tmp_path: Path) -> None:
    """kill -9 of everything in mid-epoch; the same command ends with the bits of a run never interrupted."""
    words = (*TINY, f"shards={shard_folder}", "checkpoint_every=2", "epochs=4", "--quiet")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert run("mura-dist", "train", *words, f"run={whole}").returncode == 0
    process = subprocess.Popen([*warm_script("mura-dist"), "train", *words, f"run={torn}"])
    while not list((torn / "checkpoints").glob("step-0000001*")):  # in mid-epoch, past the first one
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (torn / "lock").exists()
    result = run("mura-dist", "train", *words, f"run={torn}")
    assert result.returncode == 0, result.stderr
    assert "stale lock" in result.stderr
    for folder in checkpoint.list_folders(
        whole / "checkpoints"
    ):  # a checkpoint of mid-epoch was not evaluated: it is never the best
        state = checkpoint.read(folder).state
        assert (state["select_loss"] is not None) == (state["evaluated_step"] == state["step"] > 0)
    assert checkpoint.select(whole / "checkpoints", "best").state["select_loss"] is not None
    last = checkpoint.select(whole / "checkpoints", "last").step
    assert equal(tensors(whole, last), tensors(torn, last))
    assert told(whole) == told(torn)


def test_asked_to_stop_it_saves_and_says_so(shard_folder: Path, tmp_path: Path, one: Path) -> None:
    words = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=500", "--quiet")
    process = subprocess.Popen([*warm_script("mura-dist"), "train", *words], stderr=subprocess.PIPE, text=True)
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


ZERO = ("zero_stage=1", "ema=0.9")
OTHERS = [
    pytest.param(2, 1, ZERO, marks=pytest.mark.slow),
    pytest.param(2, 3, (), marks=pytest.mark.slow),
    *(
        pytest.param(*case, marks=pytest.mark.nightly(part="kills"))
        for case in [(2, 1, ()), (1, 2, ()), (1, 2, ZERO), (2, 3, ZERO)]
    ),
]


@pytest.mark.parametrize(("before", "after", "words"), OTHERS)
def test_resumed_on_another_number_of_ranks(
    shard_folder: Path,
    tmp_path: Path,
    whole: Callable[..., Path],
    before: int,
    after: int,
    words: tuple[str, ...],
) -> None:
    """Same rows; the first step's loss within 1e-6, its gradient within 1e-4, the loss 8 steps on within 1e-3 (fp32).

    SGD, so that its momentum tells the gradient: m' = 0.9 m + g. Steps 4 to 12, across an epoch's end.
    """
    common = ("optimizer=sgd", "checkpoint_every=1", "keep_checkpoints=20", "micro_batch=2", *words)
    same, other = whole(before, *common), tmp_path / "other"
    shutil.copytree(same, other)
    for folder in checkpoint.list_folders(other / "checkpoints"):
        if checkpoint.read(folder).step > 4:
            shutil.rmtree(folder)
    (other / "status.json").unlink()
    again = train(after, shard_folder, other, *common)
    assert again.returncode == 0, again.stderr
    wanted, ours = losses(same), losses(other)
    assert len(ours) == len(wanted) == 16
    assert ours[:4] == wanted[:4]
    assert ours[4] == pytest.approx(wanted[4], rel=1e-6)
    assert ours[5:12] == pytest.approx(wanted[5:12], rel=1e-3)
    gradients = []
    for folder in (same, other):
        at = [checkpoint.select(folder / "checkpoints", f"step-{step}").optimizer_state() for step in (4, 5)]
        was, became = (found["momentum_buffer"] for found in at)
        size = min(len(was), len(became))
        gradients.append(became[:size] - 0.9 * was[:size])
    size = min(map(len, gradients))  # ZeRO pads the vector to a multiple of the ranks
    difference = (gradients[0][:size] - gradients[1][:size]).norm() / gradients[0].norm()
    assert difference < 1e-4
    assert gradients[0].norm() > 0
    assert told(same)[: told(same).index(next(line for line in told(same) if line["step"] == 5))] == told(other)[:5]


@pytest.mark.slow
def test_a_stop_during_evaluation_saves_what_was_trained(
    shard_folder: Path, tmp_path: Path, whole: Callable[..., Path]
) -> None:
    """A wish to stop that comes as an epoch ends: saved unevaluated, and evaluated by the next start."""
    words = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=3", "--quiet")
    script = (
        "import signal, os, sys\n"
        "from mura_dist.training import loop\n"
        "original, calls = loop.score_rows, []\n"
        "def score_rows(*args, **options):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return original(*args, **options)\n"
        "loop.score_rows = score_rows\n"
        "from mura_dist.cli.main import entry\n"
        "entry(sys.argv[1:])\n"
    )
    stopped = run(warm_python(), "-c", script, "train", *words, "stop_signal=SIGUSR1")
    assert stopped.returncode == 3, stopped.stderr
    last = checkpoint.select(tmp_path / "run" / "checkpoints", "last").state
    assert last["step"] == 8
    assert last["evaluated_step"] == 0
    assert last["select_loss"] is None
    assert run("mura-dist", "train", *words).returncode == 0
    never = whole(1, "epochs=3")
    assert told(never) == told(tmp_path / "run")
    assert equal(tensors(never, 24), tensors(tmp_path / "run", 24))
