"""bench train: training steps on pixels in memory, compared with plain PyTorch loops.

contenders     the default settings, and the other of bf16 and fp32; torchvision's DenseNet in fp32, and in bf16 autocast with
               channels-last; a plain loop around this package's network, which shows the cost of the engine
activations    memory for the backward pass, by network
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
from mura_dist.distributed.host_memory import keep_freed_memory


def contenders(load: Load) -> list[Contender]:
    """Return the contenders."""
    from mura_dist.distributed import process_group

    default, alternative = ("bf16", "fp32") if process_group.supports_bf16() else ("fp32", "bf16")  # precision=auto
    return [
        Contender(f"mura-dist, default settings ({default})", partial(engine, default), is_own=True),
        Contender(f"mura-dist, {alternative}", partial(engine, alternative), is_own=True),
        Contender("torchvision, fp32, eager", partial(plain_loop, "fp32", is_own=False)),
        Contender("torchvision, bf16, channels-last", partial(plain_loop, "bf16", is_own=False)),
        Contender(f"plain loop, mura-dist's network, {default}", partial(plain_loop, default, is_own=True)),
    ]


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Return `activations`: MB per radiograph that the backward pass needs, under bf16 autocast."""
    networks = {
        "mura-dist": lambda: own_densenet(load.architecture),
        "torchvision": lambda: torchvision_densenet(load.architecture),
        "torchvision, memory_efficient": lambda: torchvision_densenet(load.architecture, memory_efficient=True),
    }
    return {
        "activations": [
            {"network": name, "mb_per_radiograph": activation_mb(build(), load)} for name, build in networks.items()
        ]
    }


def labels(number: int) -> Any:
    """Return alternating labels, float32 (number,)."""
    import torch

    return torch.arange(number, device=device()) % 2.0


def settings_of(load: Load, precision: str, *, ranks: int = 1) -> config.Settings:
    """Return settings with one micro-batch per rank."""
    values = {"shards": "", "run": "", "architecture": load.architecture, "precision": precision}
    return config.check(values | {"global_batch": load.batch * ranks, "micro_batch": load.batch}, "bench")


def batches(load: Load) -> Iterator[Any]:
    """Repeat the Load's batches without end, on the device."""
    import torch

    from mura_dist.data.loaders.loader import Batch

    label, weight = labels(load.batch), torch.ones(load.batch, device=device())
    images = [torch.from_numpy(batch).to(device()) for batch in load.pixels()]
    return itertools.cycle([Batch(image, label, weight, weight.long(), weight.bool()) for image in images])


def engine(precision: str, load: Load) -> Work:
    """Return the work of one step of the training engine."""
    from mura_dist.distributed import process_group
    from mura_dist.models import densenet
    from mura_dist.training.engine import Engine

    settings = settings_of(load, precision)
    world = process.enter_context(process_group.join(settings.collective_timeout_s))
    trained, stream = Engine(densenet.build(load.architecture), settings, world), batches(load)

    def work(out: Path) -> int:
        assert np.isfinite(trained.step([next(stream)], settings.learning_rate).loss)
        return load.batch

    return work


def own_densenet(architecture: str) -> Any:
    """Return this package's network in channels-last."""
    import torch

    from mura_dist.models import densenet

    return densenet.build(architecture).to(device(), memory_format=torch.channels_last)


def torchvision_densenet(architecture: str, *, memory_efficient: bool = False) -> Any:
    """Return torchvision's network with one logit, as a user would build it."""
    from torchvision.models.densenet import DenseNet

    from mura_dist.models.densenet import ARCHITECTURES

    return DenseNet(*ARCHITECTURES[architecture], num_classes=1, memory_efficient=memory_efficient).to(device())


def normalize_image(image: Any) -> Any:
    """Convert an image uint8 (B, 1, S, S) to the input of torchvision's network, float32 (B, 3, S, S)."""
    from torchvision.transforms.functional import normalize

    from mura_dist.models.densenet import IMAGENET_MEAN, IMAGENET_STD

    return normalize(image.expand(-1, 3, -1, -1) / 255, IMAGENET_MEAN, IMAGENET_STD)


def plain_loop(precision: str, load: Load, *, is_own: bool) -> Work:
    """Return the work of one step of a plain training loop around either network; bf16 with channels-last."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    network, images, logit_of = _network(load, is_own=is_own, channels_last=precision == "bf16")
    optimizer, stream, label = (
        torch.optim.Adam(network.parameters(), lr=1e-4),
        itertools.cycle(images),
        labels(load.batch),
    )
    device_type = device().type

    def work(out: Path) -> int:
        optimizer.zero_grad()
        with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
            logit = logit_of(network(next(stream)))
        loss = binary_cross_entropy_with_logits(logit.float(), label)
        loss.backward()
        optimizer.step()
        assert np.isfinite(loss.item())  # as for logging; on a GPU it waits for the step
        return load.batch

    return work


def _network(load: Load, *, is_own: bool, channels_last: bool) -> tuple[Any, Sequence[Any], Callable[[Any], Any]]:
    """Return the network in training mode, its batches, and a function from its output to logits (B,)."""
    import torch

    pixels = [torch.from_numpy(batch).to(device()) for batch in load.pixels()]
    if is_own:
        torch.set_flush_denormal(True)
        keep_freed_memory()
        return own_densenet(load.architecture).train(), pixels, lambda output: output[0]
    network = torchvision_densenet(load.architecture).train()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = [normalize_image(image).to(memory_format=layout) for image in pixels]
    return network.to(memory_format=layout), images, lambda output: output[:, 0]


def activation_mb(network: Any, load: Load) -> float:
    """Return MB per radiograph that the backward pass of a micro-batch needs, under bf16 autocast."""
    import torch

    image = torch.from_numpy(load.pixels()[0]).to(device())
    pixels = image if hasattr(network, "mean") else normalize_image(image).to(memory_format=torch.channels_last)
    with torch.autocast(device().type, torch.bfloat16):
        return activation_bytes(network.to(memory_format=torch.channels_last).train(), pixels) / load.batch / 1e6


def activation_bytes(network: Any, image: Any) -> int:
    """Return the bytes that `network(image)` saves for the backward pass, without parameters and buffers."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    storages: dict[int, Any] = {}  # referenced, so that no other storage gets its address

    def record(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        network(image)
    return sum(storage.nbytes() for storage in storages.values())
