"""Test validation.py: the batch size, and that it does not change the scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mura_dist.core import config
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training import validation

GIB = 1 << 30


@pytest.mark.parametrize(
    ("size", "free", "number"),
    [
        (320, 140 * GIB, 256),
        (320, 15 * GIB, 256),
        (320, 14 * GIB, 128),
        (320, GIB, 16),
        (320, 0, 1),
        (1024, 8 * GIB, 8),
    ],
)
def test_fitting_batch_uses_half_of_the_free_memory(size: int, free: int, number: int) -> None:
    assert validation.fitting_batch_size(size, free) == number


@pytest.mark.parametrize("number", [1, 5, 64])
def test_scores_do_not_depend_on_the_batch_size(
    alone: World, shard_folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    shards = Shards.open(shard_folder)
    chosen = config.check({"shards": str(shard_folder), "run": "", "micro_batch": 4}, "test")
    loading = BatchLoader.from_settings(chosen, shards, RowTargets.from_shards(shards), torch.device("cpu"))
    rows, model = shards.rows("tune"), build("tiny", seed=1).eval()
    assert len(rows) % number or number == 1, "the last batch is padded"
    by_four = validation.score_rows(model, rows, loading, alone)
    sizes: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    monkeypatch.setattr(validation, "_batch_size", lambda loading, world: number)
    done: list[int] = []
    scores = validation.score_rows(model, rows, loading, alone, progress=lambda count, total: done.append(count))
    assert set(sizes) == {number}
    assert done == [min(count + number, len(rows)) for count in range(0, len(rows), number)]
    assert np.array_equal(scores.rows, rows)
    np.testing.assert_allclose(scores.logit, by_four.logit, rtol=0, atol=1e-5)
