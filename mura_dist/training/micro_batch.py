"""Out of memory: how it is told from other errors, what is said of it, and the largest micro-batch that fits.

`micro_batch="auto"` tries forward and backward of one micro-batch, executed as a step will be (precision, step, compile), alone
and without the other ranks, from the largest candidate down; the least of what fits on any rank wins. On a CPU it tries nothing
and is 8: Linux promises memory it does not have and then kills.
"""

import gc
from collections.abc import Sequence

import numpy as np
import torch

from mura_dist.core.config import Settings
from mura_dist.core.errors import CollectiveRunError, UserError, is_out_of_memory
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training import execution
from mura_dist.training.flat_parameters import FlatParameters
from mura_dist.training.loss import weighted_bce

_ON_CPU = 8  # micro_batch=auto there


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error says that there was no memory left, on the device or the host."""
    return isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)


def exhausted(ranks: Sequence[int], micro_batch: int) -> str:
    """What a run says that ends so."""
    who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return (
        f"out of memory on {who} with micro_batch={micro_batch}; free some and the same command goes on, or give a smaller "
        "micro_batch= and run=NEW (that changes BatchNorm, whose group it is, so it cannot go on with this run)"
    )


def candidates(global_batch: int, world_size: int) -> list[int]:
    """Micro-batches that cut a global batch evenly over the ranks, largest first; BatchNorm needs two radiographs."""
    share = global_batch // world_size
    return [size for size in range(share, 1, -1) if share % size == 0] if share * world_size == global_batch else []


def find_micro_batch(settings: Settings, size: int, world: World, *, num_resident: int = 0) -> int:
    """Return what micro_batch=auto is, for radiographs of `size` px. Called by all ranks.

    The largest that fits on every rank; on a CPU the largest candidate of at most 8, or the smallest of all.

    num_resident: radiographs that the loader will keep in the device's memory.

    Raises UserError where the global batch cannot be shared out, CollectiveRunError where not even the smallest fits.
    """
    sizes = candidates(settings.global_batch, world.size)
    if not sizes:
        unit = 2 * world.size
        near = max(1, round(settings.global_batch / unit)) * unit
        raise UserError(
            f"global_batch={settings.global_batch} cannot be cut into micro-batches of 2 or more over {world.size} ranks; "
            f"the nearest is global_batch={near}"
        )
    if world.device.type == "cpu":
        return max((number for number in sizes if number <= _ON_CPU), default=sizes[-1])
    return largest_fitting(settings, size, sizes, world, num_resident)


def largest_fitting(settings: Settings, size: int, sizes: Sequence[int], world: World, num_resident: int = 0) -> int:
    """Try `sizes`, largest first; return the one that fits on every rank. Raises CollectiveRunError where none does."""
    mine = next((number for number in sizes if _fits(settings, size, number, world, num_resident)), 0)
    found = int(world.gather(np.array([mine], np.int64)).min())
    if not found:
        raise CollectiveRunError(
            f"micro_batch=auto: not even {sizes[-1]} radiographs of {size} px fit; free memory, or convert smaller ones"
        )
    return found


def _fits(settings: Settings, size: int, number: int, world: World, num_resident: int) -> bool:
    """Forward and backward of one micro-batch, executed as a step will, beside what optimizer, loader and NCCL will hold."""
    device = world.device
    try:
        model = build(settings.architecture).to(device).train()
        flat = FlatParameters(model, channels_last=settings.channels_last)
        beside = torch.zeros(3 * flat.weights.numel(), device=device)  # Adam's two moments, a copy while one saves
        # A tenth of the device: of NCCL, of batches on their way, and because the allocator's blocks never fit exactly.
        margin = torch.cuda.mem_get_info(device)[1] // 10 if device.type == "cuda" else 0
        others = torch.zeros(margin + num_resident * size**2, dtype=torch.uint8, device=device)
        network = execution.build(model, flat, settings)
        image = torch.randint(
            0, 256, (number, 1, size, size), dtype=torch.uint8, device=device
        )  # of zeros, nothing learns
        ones = torch.ones(number, device=device)
        weighted_bce(network(image), ones, ones).backward()
        del model, flat, network, beside, others, image, ones
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
