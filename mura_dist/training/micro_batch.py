"""Out of memory: how it is told from other errors, what is said of it, and the largest micro-batch that fits.

`micro_batch="auto"` tries forward and backward of one micro-batch, alone and without the other ranks, from the largest
candidate down; the least of what fits on any rank wins. On a GPU the allocator says no. A CPU's never does: Linux promises
memory it does not have and then kills; so there a small micro-batch is measured and the larger ones are reckoned from it.
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mura_dist.core.config import Settings
from mura_dist.core.errors import CommonFailure, Refusal
from mura_dist.distributed import environment
from mura_dist.distributed.process_group import World
from mura_dist.models.densenet import build
from mura_dist.training.loss import weighted_bce

_SHARE = 0.8  # of a machine's free memory that its ranks may take together
_WORKSPACE = (
    2.0  # of what is kept for the backward pass: a CPU's step needs gradients on their way and convolutions' copies too
)


_SAID = (
    *("can't allocate memory", "CUDA error: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def is_exhausted(error: BaseException) -> bool:
    """Whether it says that there was no memory left; a CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _SAID)


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


def fitting_micro_batch(settings: Settings, size: int, world: World) -> int:
    """The largest micro-batch of radiographs of `size` px that fits on every rank. Called by all ranks.

    Raises Refusal where the global batch cannot be shared out, CommonFailure where not even the smallest fits.
    """
    sizes = candidates(settings.global_batch, world.size)
    if not sizes:
        unit = 2 * world.size
        near = max(1, round(settings.global_batch / unit)) * unit
        raise Refusal(
            f"global_batch={settings.global_batch} cannot be cut into micro-batches of 2 or more over {world.size} ranks; "
            f"the nearest is global_batch={near}"
        )
    plausible = _plausible(settings, size, sizes, world)
    mine = next((number for number in plausible if _fits(settings, size, number, world)), 0)
    found = int(world.gather(np.array([mine], np.int64)).min())
    if not found:
        raise CommonFailure(
            f"micro_batch=auto: not even {sizes[-1]} radiographs of {size} px fit; free memory, or convert smaller ones"
        )
    return found


def _plausible(settings: Settings, size: int, sizes: list[int], world: World) -> list[int]:
    """On a CPU, those of `sizes` that a measured small micro-batch says will fit; on a GPU all."""
    if world.device.type != "cpu":
        return sizes
    network = build(settings.architecture).train()
    image = torch.zeros(2, 1, size, size, dtype=torch.uint8)
    with _autocast(settings, world.device):
        each = kept_bytes(network, image) / len(image)
    free = _free_bytes() * _SHARE / environment.ranks_here()
    return [number for number in sizes if number * each * _WORKSPACE <= free]


def kept_bytes(network: nn.Module, image: Tensor) -> int:
    """What `network(image)` keeps for the backward pass: bytes of different storages, its parameters and buffers not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holding it, so that no other storage comes to lie in its place

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(image)
    return sum(storage.nbytes() for storage in kept.values())


def _autocast(settings: Settings, device: torch.device) -> torch.autocast:
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=settings.precision != "fp32")


def _fits(settings: Settings, size: int, number: int, world: World) -> bool:
    """Forward and backward of one micro-batch, beside what an optimiser will hold."""
    device = world.device
    try:
        network = build(settings.architecture).to(device).train()
        weights = sum(parameter.numel() for parameter in network.parameters())
        beside = torch.zeros(4 * weights, device=device)  # flat gradient, Adam's two moments, a copy while one saves
        margin = (
            torch.cuda.mem_get_info(device)[1] // 10 if device.type == "cuda" else 0
        )  # nccl's, and of batches on their way
        others = torch.zeros(margin, dtype=torch.uint8, device=device)
        image = torch.zeros(number, 1, size, size, dtype=torch.uint8, device=device)
        with _autocast(settings, device):
            logit, _ = network(image)
        ones = torch.ones(number, device=device)
        weighted_bce(logit, ones, ones).backward()
        del network, beside, others, image, logit, ones
    except (MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _free_bytes() -> int:
    """Memory that may be had without swapping; where the system does not tell, 8 GiB is assumed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    [line] = [line for line in lines if line.startswith("MemAvailable")]
    return min([int(line.split()[1]) << 10, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """What the limits of this process's control groups (version 2: a container's, a scheduler's) leave, bytes each."""
    with contextlib.suppress(OSError, StopIteration):
        known = Path("/proc/self/cgroup").read_text().splitlines()
        path = Path("/sys/fs/cgroup") / next(line for line in known if line.startswith("0::")).removeprefix("0::/")
        for group in (path, *path.parents):
            with contextlib.suppress(OSError, ValueError):  # no limit of its own: no file, or "max"
                yield int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
