"""Test the law of resumption: a run that is stopped or killed anywhere ends bit-identical to an uninterrupted run."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.commands import TINY, run, train, warm_python, warm_script
from helpers.runs import equal, logged_metrics, losses, steps_an_epoch, tensors

from mura_dist.training import checkpoint
from mura_dist.training.run import Run

RESUMED = [
    (2, ()),
    pytest.param(1, ("precision=bf16", "ema=0.9", "clip_norm=0.1", "label_smoothing=0.1"), marks=pytest.mark.slow),
    pytest.param(1, (), marks=pytest.mark.nightly(part="kills")),
    pytest.param(2, ("zero_stage=1",), marks=pytest.mark.nightly(part="kills")),
    pytest.param(2, ("zero_stage=1", "ema=0.9", "precision=fp16", "optimizer=sgd"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "arguments"), RESUMED)
def test_resumed_run_is_bit_identical(
    shard_folder: Path, tmp_path: Path, reference_run: Callable[..., Path], ranks: int, arguments: tuple[str, ...]
) -> None:
    """N + N epochs equal 2N epochs: all tensors are bit-identical, plateau and metrics equal."""
    for epochs in ("epochs=1", "epochs=2"):
        result = train(ranks, shard_folder, tmp_path / "run", epochs, *arguments)
        assert result.returncode == 0, result.stderr
    never = reference_run(ranks, *arguments)
    last = 2 * steps_an_epoch(never)
    assert equal(tensors(never, last), tensors(tmp_path / "run", last))
    assert logged_metrics(never) == logged_metrics(tmp_path / "run")
    states = [checkpoint.select(folder / "checkpoints", "last").state for folder in (never, tmp_path / "run")]
    assert states[0] == states[1]
    assert states[0]["plateau"]["best"] is not None


@pytest.mark.slow
def test_killed_run_resumes_from_the_last_complete_checkpoint(shard_folder: Path, tmp_path: Path) -> None:
    """After kill -9 in mid-epoch the same command ends bit-identical to an uninterrupted run."""
    arguments = (*TINY, f"shards={shard_folder}", "checkpoint_every=2", "epochs=4", "--quiet")
    uninterrupted, torn = tmp_path / "uninterrupted", tmp_path / "torn"
    assert run("mura-dist", "train", *arguments, f"run={uninterrupted}").returncode == 0
    process = subprocess.Popen([*warm_script("mura-dist"), "train", *arguments, f"run={torn}"])
    while not list((torn / "checkpoints").glob("step-0000001*")):  # in mid-epoch, past the first one
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert (torn / "lock").exists()
    result = run("mura-dist", "train", *arguments, f"run={torn}")
    assert result.returncode == 0, result.stderr
    assert "stale lock" in result.stderr
    for folder in checkpoint.list_folders(
        uninterrupted / "checkpoints"
    ):  # a checkpoint of mid-epoch was not evaluated: it is never the best
        state = checkpoint.read(folder).state
        assert (state["select_loss"] is not None) == (state["evaluated_step"] == state["step"] > 0)
    assert checkpoint.select(uninterrupted / "checkpoints", "best").state["select_loss"] is not None
    last = checkpoint.select(uninterrupted / "checkpoints", "last").step
    assert equal(tensors(uninterrupted, last), tensors(torn, last))
    assert logged_metrics(uninterrupted) == logged_metrics(torn)


def test_stop_request_saves_and_exits_3(shard_folder: Path, tmp_path: Path, single_rank_run: Path) -> None:
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=500", "--quiet")
    process = subprocess.Popen([*warm_script("mura-dist"), "train", *arguments], stderr=subprocess.PIPE, text=True)
    while not losses(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "The same command resumes" in stderr
    assert len(stderr.strip().splitlines()) == 1
    status = Run.load(tmp_path / "run").status()
    assert status["state"] == "stopped"
    step = checkpoint.select(tmp_path / "run" / "checkpoints", "last").step
    assert step == len(losses(tmp_path / "run"))  # the very step it was at
    per_epoch = steps_an_epoch(single_rank_run)
    assert run("mura-dist", "train", *arguments, f"epochs={step // per_epoch + 1}").returncode == 0
    assert len(losses(tmp_path / "run")) == per_epoch * (step // per_epoch + 1)


ZERO = ("zero_stage=1", "ema=0.9")
RANK_CHANGES = [
    pytest.param(2, 1, ZERO, marks=pytest.mark.slow),
    pytest.param(2, 3, (), marks=pytest.mark.slow),
    *(
        pytest.param(*case, marks=pytest.mark.nightly(part="kills"))
        for case in [(2, 1, ()), (1, 2, ()), (1, 2, ZERO), (2, 3, ZERO)]
    ),
]


@pytest.mark.parametrize(("before", "after", "arguments"), RANK_CHANGES)
def test_resume_on_another_number_of_ranks(
    shard_folder: Path,
    tmp_path: Path,
    reference_run: Callable[..., Path],
    before: int,
    after: int,
    arguments: tuple[str, ...],
) -> None:
    """The first step's loss is equal within 1e-6, its gradient within 1e-4, the next 8 losses within 1e-3 (fp32).

    SGD's momentum gives the gradient: m' = 0.9 m + g. Steps 4 to 12 cross an epoch's end.
    """
    common = ("optimizer=sgd", "checkpoint_every=1", "keep_checkpoints=20", "micro_batch=2", *arguments)
    same, resumed = reference_run(before, *common), tmp_path / "other"
    shutil.copytree(same, resumed)
    for folder in checkpoint.list_folders(resumed / "checkpoints"):
        if checkpoint.read(folder).step > 4:
            shutil.rmtree(folder)
    (resumed / "status.json").unlink()
    again = train(after, shard_folder, resumed, *common)
    assert again.returncode == 0, again.stderr
    expected, actual = losses(same), losses(resumed)
    assert len(actual) == len(expected) == 16
    assert actual[:4] == expected[:4]
    assert actual[4] == pytest.approx(expected[4], rel=1e-6)
    assert actual[5:12] == pytest.approx(expected[5:12], rel=1e-3)
    gradients = []
    for folder in (same, resumed):
        at = [checkpoint.select(folder / "checkpoints", f"step-{step}").optimizer_state() for step in (4, 5)]
        was, became = (state_at["momentum_buffer"] for state_at in at)
        size = min(len(was), len(became))
        gradients.append(became[:size] - 0.9 * was[:size])
    size = min(map(len, gradients))  # ZeRO pads the vector to a multiple of the ranks
    difference = (gradients[0][:size] - gradients[1][:size]).norm() / gradients[0].norm()
    assert difference < 1e-4
    assert gradients[0].norm() > 0
    assert (
        logged_metrics(same)[
            : logged_metrics(same).index(next(line for line in logged_metrics(same) if line["step"] == 5))
        ]
        == logged_metrics(resumed)[:5]
    )


@pytest.mark.slow
def test_stop_during_evaluation_saves_an_unevaluated_checkpoint(
    shard_folder: Path, tmp_path: Path, reference_run: Callable[..., Path]
) -> None:
    """The checkpoint is saved unevaluated, and the next start evaluates it."""
    arguments = (*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "epochs=3", "--quiet")
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
    stopped = run(warm_python(), "-c", script, "train", *arguments, "stop_signal=SIGUSR1")
    assert stopped.returncode == 3, stopped.stderr
    last = checkpoint.select(tmp_path / "run" / "checkpoints", "last").state
    assert last["step"] == 8
    assert last["evaluated_step"] == 0
    assert last["select_loss"] is None
    assert run("mura-dist", "train", *arguments).returncode == 0
    never = reference_run(1, "epochs=3")
    assert logged_metrics(never) == logged_metrics(tmp_path / "run")
    assert equal(tensors(never, 24), tensors(tmp_path / "run", 24))
