"""Handle memory errors, and find the largest micro-batch that fits.

`micro_batch="auto"` runs forward and backward of one micro-batch as a step executes it (precision, step, compile), without the
other ranks, from the largest candidate down. The smallest result of all ranks wins. On a CPU it tries nothing and is at most 8,
because Linux grants memory that it does not have and kills the process later.
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

_MAX_ON_CPU = 8


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device or the host is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)


def out_of_memory_message(ranks: Sequence[int], micro_batch: int) -> str:
    """Return the error text for ranks that are out of memory."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return (
        f"out of memory on {names} with micro_batch={micro_batch}. Free memory and run the same command to resume, or use a "
        "smaller micro_batch in a new run (run=NEW): it changes BatchNorm, so it cannot change within a run."
    )


def candidate_sizes(global_batch: int, world_size: int) -> list[int]:
    """Return the micro-batches of at least 2 that divide a global batch evenly over the ranks, largest first."""
    share = global_batch // world_size
    return [size for size in range(share, 1, -1) if share % size == 0] if share * world_size == global_batch else []


def find_micro_batch(settings: Settings, size: int, world: World, *, num_resident: int = 0) -> int:
    """Return the value of micro_batch=auto. Called by all ranks.

    On a GPU it is the largest candidate that fits on every rank. On a CPU it is the largest candidate up to 8, or else the
    smallest.

    Args:
        settings: The recipe.
        size: Side of a radiograph in pixels.
        world: The ranks.
        num_resident: Number of radiographs that the loader keeps in the device's memory.

    Raises:
        UserError: the global batch cannot be divided over the ranks.
        CollectiveRunError: not even the smallest candidate fits.
    """
    sizes = candidate_sizes(settings.global_batch, world.size)
    if not sizes:
        unit = 2 * world.size
        nearest = max(1, round(settings.global_batch / unit)) * unit
        raise UserError(
            f"global_batch={settings.global_batch} cannot be divided into micro-batches of 2 or more over {world.size} ranks. "
            f"The nearest is global_batch={nearest}."
        )
    if world.device.type == "cpu":
        return max((candidate for candidate in sizes if candidate <= _MAX_ON_CPU), default=sizes[-1])
    return largest_fitting(settings, size, sizes, world, num_resident)


def largest_fitting(settings: Settings, size: int, sizes: Sequence[int], world: World, num_resident: int = 0) -> int:
    """Return the first of `sizes`, largest first, that fits on every rank. Called by all ranks.

    Raises:
        CollectiveRunError: none fits.
    """
    fitting = next((candidate for candidate in sizes if _fits(settings, size, candidate, world, num_resident)), 0)
    smallest = int(world.gather(np.array([fitting], np.int64)).min())
    if not smallest:
        raise CollectiveRunError(
            f"micro_batch=auto: a micro-batch of {sizes[-1]} radiographs of {size} px does not fit. Free memory, or convert "
            "smaller radiographs."
        )
    return smallest


def _fits(settings: Settings, size: int, micro_batch: int, world: World, num_resident: int) -> bool:
    """Run forward and backward of a micro-batch next to the memory that optimizer, loader and NCCL will use."""
    device = world.device
    try:
        model = build(settings.architecture).to(device).train()
        flat = FlatParameters(model, channels_last=settings.channels_last)
        moments = torch.zeros(
            3 * flat.weights.numel(), device=device
        )  # Adam's two, and a copy while a checkpoint is saved
        # A tenth of the device for NCCL, prefetched batches and fragmentation.
        margin = torch.cuda.mem_get_info(device)[1] // 10 if device.type == "cuda" else 0
        reserved = torch.zeros(margin + num_resident * size**2, dtype=torch.uint8, device=device)
        network = execution.build(model, flat, settings)
        # Random, because the gradient of zeros is not finite.
        image = torch.randint(0, 256, (micro_batch, 1, size, size), dtype=torch.uint8, device=device)
        weight = torch.ones(micro_batch, device=device)
        weighted_bce(network(image), weight, weight).backward()
        del model, flat, network, moments, reserved, image, weight
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
