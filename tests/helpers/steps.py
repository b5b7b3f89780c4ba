"""Settings and batches for an engine's step of a fraction of a second."""

import torch

from mura_dist.core import config
from mura_dist.data.loaders.loader import Batch

NUM_MICROS, SIZE = 3, 4  # micro-batches of a step, radiographs of one


def settings(**values: object) -> config.Settings:
    """Return settings for a short step. `values` override the defaults."""
    defaults = {"shards": "", "run": "", "architecture": "tiny", "precision": "fp32", "global_batch": NUM_MICROS * SIZE}
    return config.check({**defaults, "micro_batch": SIZE, "learning_rate": 1e-2, **values}, "test")


def batches(seed: int) -> list[Batch]:
    """Draw the micro-batches of a step: noise of 64 px, random labels and weights."""
    random = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (NUM_MICROS, SIZE, 1, 64, 64), dtype=torch.uint8, generator=random)
    label = torch.randint(0, 2, (NUM_MICROS, SIZE), generator=random).float()
    weight = torch.rand(NUM_MICROS, SIZE, generator=random)
    unit = torch.ones(SIZE)
    return [Batch(image[i], label[i], weight[i], unit.long(), unit.bool()) for i in range(NUM_MICROS)]
