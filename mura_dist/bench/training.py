"""bench train: steps on pixels in memory. Our engine against the loop one would write first, and against the same settings bare.

one process    bench train: our default settings, and the other of bf16 and fp32; torchvision's DenseNet fp32 (the step most
               projects have), bf16 autocast + channels-last, and a bare loop around our network (what the engine costs)
memory         what is kept for the backward pass, by network, bytes of different storages
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench.clock import Contender, Work, process
from mura_dist.bench.streams import device
from mura_dist.bench.workload import Load, Options
from mura_dist.core import config


def contenders(load: Load) -> list[Contender]:
    from mura_dist.distributed import process_group

    default, other = ("bf16", "fp32") if process_group.supports_bf16() else ("fp32", "bf16")  # precision=auto
    return [
        Contender(f"mura-dist, default settings ({default})", partial(engine, default), ours=True),
        Contender(f"mura-dist, {other}", partial(engine, other), ours=True),
        Contender("torchvision, fp32, eager", partial(bare, "fp32", ours=False)),
        Contender("torchvision, bf16, channels-last", partial(bare, "bf16", ours=False)),
        Contender(f"bare loop, our network, {default}", partial(bare, default, ours=True)),
    ]


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """`activations`: MB a radiograph kept for the backward pass, under bf16 autocast."""
    networks = {
        "mura-dist": lambda: our_network(load.architecture),
        "torchvision": lambda: their_network(load.architecture),
        "torchvision, memory_efficient": lambda: their_network(load.architecture, memory_efficient=True),
    }
    return {
        "activations": [
            {"network": name, "mb_per_radiograph": kept_mb(build(), load)} for name, build in networks.items()
        ]
    }


def labels(number: int) -> Any:
    """Both classes, float32 (number,)."""
    import torch

    return torch.arange(number, device=device()) % 2.0


def settings_of(load: Load, precision: str, *, ranks: int = 1) -> config.Settings:
    values = {"shards": "", "run": "", "architecture": load.architecture, "precision": precision}
    return config.check(values | {"global_batch": load.batch * ranks, "micro_batch": load.batch}, "bench")


def batches(load: Load) -> Iterator[Any]:
    """The same again and again, on the device."""
    import torch

    from mura_dist.data.loaders.loader import Batch

    label, ones = labels(load.batch), torch.ones(load.batch, device=device())
    images = [torch.from_numpy(batch).to(device()) for batch in load.pixels()]
    return itertools.cycle([Batch(image, label, ones, ones.long(), ones.bool()) for image in images])


def engine(precision: str, load: Load) -> Work:
    from mura_dist.distributed import process_group
    from mura_dist.models import densenet
    from mura_dist.training.engine import Engine

    settings = settings_of(load, precision)
    ranks = process.enter_context(process_group.join(settings.collective_timeout_s))
    trained, stream = Engine(densenet.build(load.architecture), settings, ranks), batches(load)

    def work(out: Path) -> int:
        assert np.isfinite(trained.step([next(stream)], settings.learning_rate).loss)
        return load.batch

    return work


def our_network(architecture: str) -> Any:
    import torch

    from mura_dist.models import densenet

    return densenet.build(architecture).to(device(), memory_format=torch.channels_last)


def their_network(architecture: str, *, memory_efficient: bool = False) -> Any:
    """torchvision's own, with one logit, as a user would build it."""
    from torchvision.models.densenet import DenseNet

    from mura_dist.models.densenet import ARCHITECTURES

    return DenseNet(*ARCHITECTURES[architecture], num_classes=1, memory_efficient=memory_efficient).to(device())


def normalised(image: Any) -> Any:
    """uint8 (B, 1, S, S) -> what torchvision's network wants, float32 (B, 3, S, S)."""
    from torchvision.transforms.functional import normalize

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    return normalize(image.expand(-1, 3, -1, -1) / 255, IMAGENET_MEAN, IMAGENET_STD)


def bare(precision: str, load: Load, *, ours: bool) -> Work:
    """A loop in a few lines, around our network or torchvision's; bf16 with channels-last."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    network, images, logit_of = _network(load, ours=ours, channels_last=precision == "bf16")
    optimiser, stream, label = (
        torch.optim.Adam(network.parameters(), lr=1e-4),
        itertools.cycle(images),
        labels(load.batch),
    )
    place = device().type

    def work(out: Path) -> int:
        optimiser.zero_grad()
        with torch.autocast(place, torch.bfloat16, enabled=precision == "bf16"):
            logit = logit_of(network(next(stream)))
        loss = binary_cross_entropy_with_logits(logit.float(), label)
        loss.backward()
        optimiser.step()
        assert np.isfinite(loss.item())  # as one logs it; on a GPU it waits for the step
        return load.batch

    return work


def _network(load: Load, *, ours: bool, channels_last: bool) -> tuple[Any, Sequence[Any], Callable[[Any], Any]]:
    """(network in training mode, its batches, logits (B,) of what it returns)."""
    import torch

    pixels = [torch.from_numpy(batch).to(device()) for batch in load.pixels()]
    if ours:
        torch.set_flush_denormal(True)
        return our_network(load.architecture).train(), pixels, lambda found: found[0]
    network = their_network(load.architecture).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = [normalised(image).to(memory_format=layout) for image in pixels]
    return network.to(memory_format=layout), images, lambda found: found[:, 0]


def kept_mb(network: Any, load: Load) -> float:
    """For the backward pass of one micro-batch under bf16 autocast, a radiograph."""
    import torch

    image = torch.from_numpy(load.pixels()[0]).to(device())
    given = image if hasattr(network, "mean") else normalised(image).to(memory_format=torch.channels_last)
    with torch.autocast(device().type, torch.bfloat16):
        return kept_bytes(network.to(memory_format=torch.channels_last).train(), given) / load.batch / 1e6


def kept_bytes(network: Any, image: Any) -> int:
    """Return the bytes that `network(image)` keeps for the backward pass, without its parameters and buffers."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, Any] = {}  # holding it, so that no other storage comes to lie in its place

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image)
    return sum(storage.nbytes() for storage in kept.values())
