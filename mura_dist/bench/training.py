"""bench train: steps on pixels in memory, against the loop one would write first, with and without autocast."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import config
from .clock import Contender, Work, process
from .streams import device
from .workload import Load


def contenders(load: Load) -> list[Contender]:
    return [
        Contender("mura-dist Engine, fp32", partial(_engine, "fp32"), ours=True),
        Contender("bare torch loop, fp32", partial(_bare, "fp32")),
        Contender("mura-dist Engine, bf16", partial(_engine, "bf16"), ours=True),
        Contender("bare torch loop, bf16 autocast", partial(_bare, "bf16")),
    ]


def _labels(load: Load) -> Any:
    """Both classes, float32 (B,)."""
    import torch

    return torch.arange(load.batch, device=device()) % 2.0


def _engine(precision: str, load: Load) -> Work:
    import torch

    from .. import model, world
    from ..engine import Engine
    from ..pipeline import Batch

    values = {"shards": "", "run": "", "architecture": load.architecture, "precision": precision}
    settings = config.check(values | {"global_batch": load.batch, "micro_batch": load.batch}, "bench")
    ranks = process.enter_context(world.join(settings.timeout_s))
    engine, ones = Engine(model.build(load.architecture), settings, ranks), torch.ones(load.batch, device=device())
    images = [torch.from_numpy(batch).to(ranks.device) for batch in load.pixels()]
    batches = itertools.cycle([Batch(image, _labels(load), ones, ones.long(), ones.bool()) for image in images])

    def work(out: Path) -> int:
        assert np.isfinite(engine.step([next(batches)], settings.learning_rate).loss)
        return load.batch

    return work


def densenet(architecture: str) -> Any:
    """torchvision's own, with one logit, as a user would build it."""
    from torchvision.models.densenet import DenseNet

    from ..model import ARCHITECTURES

    return DenseNet(*ARCHITECTURES[architecture], num_classes=1).to(device())


def _bare(precision: str, load: Load) -> Work:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torchvision.transforms.functional import normalize

    from ..model import IMAGENET_DEVIATION, IMAGENET_MEAN

    network, place, label = densenet(load.architecture).train(), device(), _labels(load)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4)
    grey = [torch.from_numpy(batch).expand(-1, 3, -1, -1) / 255 for batch in load.pixels()]  # (B, 3, S, S) float32
    images = itertools.cycle([normalize(image, IMAGENET_MEAN, IMAGENET_DEVIATION).to(place) for image in grey])

    def work(out: Path) -> int:
        optimiser.zero_grad()
        with torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16"):
            logit = network(next(images))[:, 0]
        loss = binary_cross_entropy_with_logits(logit.float(), label)
        loss.backward()
        optimiser.step()
        assert np.isfinite(loss.item())  # as one logs it; on a GPU it waits for the step
        return load.batch

    return work
