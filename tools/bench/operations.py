"""Count on a CPU the kernels that a training step would launch on a GPU, and the bytes it would move.

    python tools/bench/operations.py [--size 320] [--batch 2] [--precision bf16] [--json FILE]

    network, engine -> one step under TorchDispatchMode -> calls that compute (a GPU launches a kernel or more for each),
        calls that create views (Python's time only), bytes read and written -> a line for mura-dist and for torchvision

Every BatchNorm gets one negative weight, so that the dense blocks run the code that they run on a GPU. The counts do not depend
on the machine. Bytes are the sizes of each call's operands. A cache may save some of them, and a convolution's workspace adds
some.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mura_dist.bench.training import own_densenet, torchvision_densenet
from mura_dist.core import config
from mura_dist.data.loaders.loader import Batch
from mura_dist.distributed import process_group
from mura_dist.models import densenet
from mura_dist.training.checked_network import CheckedNetwork
from mura_dist.training.engine import Engine
from mura_dist.training.graph import Recording

_NO_KERNEL = ("empty", "detach", "is_same_size", "_has_compatible_shallow_copy_type")


@dataclass
class Count:
    """Number of kernels and bytes of a computation. `views` counts calls without a kernel."""

    kernels: int = 0
    views: int = 0
    bytes: int = 0


class OperationCounter(TorchDispatchMode):
    """Count each aten call while the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.names = Count(), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(_NO_KERNEL):
            self.count.views += 1
            return result
        self.count.kernels += 1
        self.names[name] += 1
        operands = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        self.count.bytes += sum(leaf.numel() * leaf.element_size() for leaf in operands.values())
        return result


@contextmanager
def count_operations(counts: dict[str, Count], what: str) -> Iterator[None]:
    """Put the block's count into `counts`."""
    with OperationCounter() as counter:
        yield
    counts[what] = counter.count


def set_negative_weights(network: nn.Module) -> nn.Module:
    """Give each BatchNorm one negative weight."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] = -0.5
    return network


def count_network(
    network: nn.Module, image: Tensor, precision: str, logit_of: Callable[[Any], Tensor]
) -> dict[str, Count]:
    """Count forward and backward of a micro-batch."""
    counts: dict[str, Count] = {}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.bfloat16)
    with count_operations(counts, "forward"), torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32"):
        logit = logit_of(network(image))
    loss = nn.functional.binary_cross_entropy_with_logits(logit.float(), torch.ones(len(logit)))
    with count_operations(counts, "backward"):
        loss.backward()
    return counts


def count_engine(architecture: str, image: Tensor, precision: str) -> dict[str, Count]:
    """Count a step of the engine with one micro-batch, after the first step.

    The count "graph" is with step=graph, without the operations inside its two recordings.
    """
    number = len(image)
    values = {"shards": "", "run": "", "architecture": architecture, "precision": precision}
    counts: dict[str, Count] = {}
    with process_group.join(30.0) as world:
        for step, what in (("eager", "engine"), ("graph", "graph")):
            sizes = {"global_batch": number, "micro_batch": number, "step": step}
            settings = config.check(values | sizes, "operations")
            engine = Engine(set_negative_weights(densenet.build(architecture)), settings, world)
            all_ones = torch.ones(number)
            batch = Batch(image, all_ones, all_ones, all_ones.long(), all_ones.bool())
            engine.step([batch], 1e-6)
            for recording in engine.network.networks if isinstance(engine.network, CheckedNetwork) else []:
                assert isinstance(recording, Recording)
                recording.replay_forward = recording.replay_backward = lambda: None
            with count_operations(counts, what):
                engine.step([batch], 1e-6)
    return counts


def main() -> None:
    """Count both networks and the engine, and print or write the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", default="densenet169", choices=sorted(densenet.ARCHITECTURES))
    parser.add_argument("--size", type=int, default=320, help="pixels of a side (default 320)")
    parser.add_argument("--batch", type=int, default=2, help="radiographs of the micro-batch (default 2)")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--json", type=Path, help="write the counts into this file")
    options = parser.parse_args()
    image = torch.randint(0, 256, (options.batch, 1, options.size, options.size), dtype=torch.uint8)
    normalized = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=torch.channels_last)
    package_network = set_negative_weights(own_densenet(options.architecture)).train()
    torchvision_network = (
        set_negative_weights(torchvision_densenet(options.architecture)).to(memory_format=torch.channels_last).train()
    )
    results = {
        "mura-dist": count_network(package_network, image, options.precision, lambda outputs: outputs[0])
        | count_engine(options.architecture, image, options.precision),
        "torchvision": count_network(torchvision_network, normalized, options.precision, lambda outputs: outputs[:, 0]),
    }
    for name, counts in results.items():
        for what, count in counts.items():
            megabytes = count.bytes / options.batch / 1e6
            print(
                f"{name:12} {what:9} {count.kernels:6} kernels  {count.views:6} views  {megabytes:9.1f} MB a radiograph"
            )
    if options.json is not None:
        listing = {name: {what: asdict(count) for what, count in counts.items()} for name, counts in results.items()}
        options.json.write_text(
            json.dumps({"options": vars(options) | {"json": str(options.json)}, "counts": listing}, indent=1)
        )


if __name__ == "__main__":
    main()
