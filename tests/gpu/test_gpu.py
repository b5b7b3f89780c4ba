"""What only a GPU can show. Skips itself elsewhere; nothing else in the suite needs one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mura_dist.data.loaders import sampler
from mura_dist.data.loaders.loader import BatchLoader, Targets
from mura_dist.data.shards.reader import Shards

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
