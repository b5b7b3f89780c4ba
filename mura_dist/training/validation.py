"""Score rows with a network, over all ranks; of the scores the loss.

    rows -> micro-batches over ranks, padded by mask -> logits -> gathered *by row* -> Scores -> loss

Used by the training loop on the selecting split, and by evaluation on any.
"""

import contextlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mura_dist.core.errors import RunError
from mura_dist.data.loaders import sampler
from mura_dist.data.loaders.device_memory import free_bytes
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.distributed.process_group import World
from mura_dist.training.scores import Scores

# Radiographs of a rank between two questions whether to stop: a second or two. Each makes a GPU wait for its host.
_ASK_EVERY = {"cpu": 64, "cuda": 2048}
_MOST_AT_ONCE = 256  # on a GPU; beyond that its arithmetic is busy anyway
_BYTES_PER_PIXEL = 300  # of a radiograph under way in DenseNet-169, fp32, about


class InterruptedValidationError(Exception):
    """An evaluation that was asked to stop, on all ranks at the same place."""


def score_rows(
    model: torch.nn.Module,
    rows: np.ndarray,
    loading: BatchLoader,
    world: World,
    *,
    asked: Callable[[], bool] | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Scores:
    """The logit of each of `rows`, the same on every rank; fp32. Called by all ranks.

    Args:
        asked: says whether this rank was asked to stop. Every few micro-batches the ranks tell each other.
        progress: called with the number of rows done and that of all, by each rank of its own.

    Raises:
        InterruptedValidationError: a rank was asked to stop.
        CollectiveRunError: a rank cannot read its radiographs.
    """
    number = _batch_size(loading, world)
    micros = sampler.evaluation_micro_batches(rows, micro_batch=number, rank=world.rank, world_size=world.size)
    mine = torch.zeros(len(micros), number, device=world.device)
    sound = torch.zeros(len(micros), number, dtype=torch.bool, device=world.device)
    every = max(1, _ASK_EVERY[world.device.type] // number)
    reason, interrupted = "", False  # why this rank cannot read on; it takes part in the collectives all the same
    with torch.inference_mode(), contextlib.closing(loading.load(micros)) as stream:
        for place in range(len(micros)):
            if asked is not None and place % every == 0 and (interrupted := world.any(asked() or bool(reason))):
                break
            if reason:
                continue
            try:
                batch = next(stream)
            except RunError as error:
                reason = str(error)
                continue
            mine[place], sound[place] = model(batch.image)[0], batch.mask
            progress(min(len(rows), (place + 1) * number * world.size), len(rows))
    world.raise_failures(reason)
    if interrupted:
        raise InterruptedValidationError
    return gather_by_row(rows, micros, mine, sound, world)


def _batch_size(loading: BatchLoader, world: World) -> int:
    """Return how many radiographs a rank forwards at once, the same on every rank: on a CPU training's micro-batch."""
    if world.device.type == "cpu":
        return loading.micro_batch
    fitting = fitting_batch_size(loading.shards.size, free_bytes(world.device))
    return int(world.gather(np.array([fitting], np.int64)).min())


def fitting_batch_size(size: int, free_bytes: int) -> int:
    """Return a power of two, 256 at most, of radiographs of `size` px that half of a GPU's free memory holds."""
    fitting = free_bytes // 2 // (_BYTES_PER_PIXEL * size**2)
    return min(_MOST_AT_ONCE, 1 << max(0, int(fitting).bit_length() - 1))


def gather_by_row(rows: np.ndarray, micros: Sequence[MicroBatch], mine: Tensor, sound: Tensor, world: World) -> Scores:
    """Put each rank's results where their rows are: padding vanishes, nothing is counted twice."""
    places = world.gather(np.concatenate([micro.rows for micro in micros]))  # (ranks, n)
    values = world.gather(mine.flatten().cpu().numpy())  # (ranks, n)
    whole = world.gather(sound.flatten().to(torch.uint8).cpu().numpy())  # (ranks, n)
    real = places >= 0
    found, at = np.unique(places[real], return_index=True)
    assert np.array_equal(found, rows), "every row"
    assert real.sum() == len(rows), "once"
    return Scores.from_split(rows, values[real][at], whole[real][at] > 0)


def weighted_loss(found: Scores, targets: RowTargets) -> float:
    """Mean over radiographs of weight x BCE, in float64; NaN of none."""
    if not len(found.rows):
        return math.nan
    z, y = found.logit.astype(np.float64), targets.label[found.rows].astype(np.float64)
    with np.errstate(invalid="ignore"):  # of a network that diverged; the caller sees to a NaN
        return float((targets.weight[found.rows] * (np.logaddexp(0, z) - y * z)).mean())
