"""What only a GPU can show. Skips itself elsewhere; nothing else in the suite needs one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import TINY, torchrun

from mura_dist.data.loaders import sampler
from mura_dist.data.loaders.loader import BatchLoader, Targets
from mura_dist.data.shards.reader import Shards
from mura_dist.training import metrics_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("backend", ["dali", "cpu"])
def test_batches_on_the_gpu_are_those_of_the_cpu(shard_folder: Path, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali.fn")
    shards = Shards.open(shard_folder)
    targets = Targets.of(shards, "study_type")
    epoch = sampler.epoch_order(shards.rows("train"), 0, 0, rotate_deg=30.0, flip=True)
    sizes = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world_size": 1}
    micros = [sampler.step_micros(epoch, step, **sizes)[0] for step in range(4)]
    host = list(BatchLoader(shards, targets, torch.device("cpu"), "cpu", 8, workers=2).load(micros))
    device = list(BatchLoader(shards, targets, torch.device("cuda", 0), backend, 8, workers=2).load(micros))
    for ours, theirs in zip(device, host, strict=True):
        assert ours.image.is_cuda
        difference = np.abs(ours.image.cpu().numpy().astype(int) - theirs.image.numpy())
        assert (difference <= 2).mean() >= 0.999
        for name in ("label", "weight", "row", "mask"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))


WAYS = [
    "precision=fp32",
    "precision=bf16",
    "precision=fp16",
    "ema=0.9",
    "zero_stage=1",
    "compile=default",
    "micro_batch=auto",
]


def has_dali() -> bool:
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("word", WAYS)
def test_training_on_the_gpu(shard_folder: Path, tmp_path: Path, word: str) -> None:
    """It trains, and goes on from where it was stopped."""
    words = [*TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", word]
    words += [] if has_dali() else ["pipeline=cpu"]  # auto is DALI on CUDA
    for epochs in (1, 2):
        result = torchrun(
            1, "mura_dist.train", *words, f"epochs={epochs}", env={"CUDA_VISIBLE_DEVICES": "0"}, cold=True
        )
        assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in metrics_log.read(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "step"]
    assert np.isfinite(losses).all()
    assert len(losses) == 16
