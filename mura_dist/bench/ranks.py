"""bench ranks: a step of two ranks on this machine, compared with torch's DistributedDataParallel around the same network.

A contender's process is rank 0 and starts rank 1, which takes a step whenever rank 0 does. Both sides have the same network,
settings, batches, loss and collectives. DistributedDataParallel does not average BatchNorm's statistics, which is its default.
"""

import math
import multiprocessing
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mura_dist.bench.clock import Contender, Work, process
from mura_dist.bench.streams import device
from mura_dist.bench.training import batches, labels, own_densenet, settings_of
from mura_dist.bench.workload import Load
from mura_dist.core.errors import UserError

RANKS = 2
_TIMEOUT_S = 300.0

Step = Callable[[], None]


def contenders(load: Load) -> list[Contender]:
    """Return the contenders."""
    import torch

    check_devices(torch.cuda.device_count())
    kinds = {"mura-dist": "engine", "DistributedDataParallel": "ddp"}
    return [
        Contender(f"{name}, {precision}", partial(work, kind, precision), is_own=kind == "engine", family=precision)
        for precision in ("bf16", "fp32")
        for name, kind in kinds.items()
    ]


def check_devices(num_gpus: int) -> None:
    """Raise UserError on a machine with one GPU: NCCL needs one per rank."""
    if 0 < num_gpus < RANKS:
        raise UserError(
            f"bench ranks: {RANKS} ranks need a GPU each, and {num_gpus} is visible. Make more visible "
            '(CUDA_VISIBLE_DEVICES), or measure on the CPU: CUDA_VISIBLE_DEVICES="" mura-dist bench ranks'
        )


def work(kind: str, precision: str, load: Load) -> Work:
    """Return the work of rank 0. Start the other ranks, which exit with this process."""
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    for rank in range(1, RANKS):
        context.Process(target=_follow, args=(rank, port, kind, precision, load), daemon=True).start()
    step = _join(0, port, kind, precision, load)

    def lead(out: Path) -> int:
        _go()
        step()
        return load.batch * RANKS

    return lead


def _follow(rank: int, port: int, kind: str, precision: str, load: Load) -> None:
    from mura_dist.distributed.processes import end_with_parent

    end_with_parent()
    step = _join(rank, port, kind, precision, load)
    while True:
        _go()
        step()


def _go() -> None:
    """Start a step on all ranks. Rank 1 waits here between turns, on both sides of the comparison."""
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.zeros(1, device=device()), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(rank: int, port: int, kind: str, precision: str, load: Load) -> Step:
    import torch

    from mura_dist.distributed import process_group

    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(max(1, torch.get_num_threads() // RANKS))
    world = process.enter_context(process_group.join(_TIMEOUT_S))
    return (_engine if kind == "engine" else _ddp)(precision, load, world)


def _engine(precision: str, load: Load, world: Any) -> Step:
    from mura_dist.models import densenet
    from mura_dist.training.engine import Engine

    settings = settings_of(load, precision, ranks=RANKS)
    trained, stream = Engine(densenet.build(load.architecture), settings, world), batches(load)
    return lambda: _finite(trained.step([next(stream)], settings.learning_rate).loss)


def _ddp(precision: str, load: Load, world: Any) -> Step:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torch.nn.parallel import DistributedDataParallel

    torch.set_flush_denormal(True)
    network = DistributedDataParallel(
        own_densenet(load.architecture).train(), broadcast_buffers=False, gradient_as_bucket_view=True
    )
    optimizer, stream, label = torch.optim.Adam(network.parameters(), lr=1e-4), batches(load), labels(load.batch)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            logit, _ = network(next(stream).image)
        loss = binary_cross_entropy_with_logits(logit.float(), label)
        loss.backward()
        optimizer.step()
        _finite(loss.item())

    return step


def _finite(loss: float) -> None:
    assert math.isfinite(loss)
