"""What only a GPU can show. Skips itself elsewhere; nothing else in the suite needs one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import TINY, torchrun

from mura_dist.training import metrics_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


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
