"""Score rows with a network over all ranks, and compute the loss of the scores.

    rows -> micro-batches over ranks, padded with a mask -> logits -> gathered by row -> Scores -> loss

The training loop uses it on the selecting split, `evaluate` on any split.
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

# Radiographs per rank between two exchanges of stop requests: one or two seconds. An exchange makes a GPU wait for its host.
_EXCHANGE_EVERY = {"cpu": 64, "cuda": 2048}
_MAX_BATCH = 256  # on a GPU, which a larger batch makes no faster
_BYTES_PER_PIXEL = 300  # memory of a radiograph in DenseNet-169, fp32, approximately


class InterruptedValidationError(Exception):
    """An evaluation was interrupted by a request to stop, on all ranks after the same micro-batch."""


def score_rows(
    model: torch.nn.Module,
    rows: np.ndarray,
    loading: BatchLoader,
    world: World,
    *,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Scores:
    """Return the logit of each row, the same on every rank. Called by all ranks.

    Args:
        model: The network in eval mode.
        rows: Rows to score, int64 (n,).
        loading: Loads the micro-batches.
        world: The ranks.
        should_stop: Returns whether this rank was asked to stop. The ranks exchange it every few micro-batches.
        progress: Called on each rank with the number of rows done and the number of rows.

    Returns:
        The logits of valid samples, float32, and the rows of corrupt samples.

    Raises:
        InterruptedValidationError: a rank was asked to stop.
        CollectiveRunError: a rank cannot read its radiographs.
    """
    batch_size = _batch_size(loading, world)
    micro_batches = sampler.evaluation_micro_batches(
        rows, micro_batch=batch_size, rank=world.rank, world_size=world.size
    )
    logits = torch.zeros(len(micro_batches), batch_size, device=world.device)
    valid = torch.zeros(len(micro_batches), batch_size, dtype=torch.bool, device=world.device)
    every = max(1, _EXCHANGE_EVERY[world.device.type] // batch_size)
    # After a read error this rank still takes part in the collectives.
    read_error, interrupted = "", False
    with torch.inference_mode(), contextlib.closing(loading.load(micro_batches)) as stream:
        for number in range(len(micro_batches)):
            if should_stop is not None and number % every == 0:
                interrupted = world.any(should_stop() or bool(read_error))
                if interrupted:
                    break
            if read_error:
                continue
            try:
                batch = next(stream)
            except RunError as error:
                read_error = str(error)
                continue
            logits[number], valid[number] = model(batch.image)[0], batch.mask
            progress(min(len(rows), (number + 1) * batch_size * world.size), len(rows))
    world.raise_failures(read_error)
    if interrupted:
        raise InterruptedValidationError
    return gather_by_row(rows, micro_batches, logits, valid, world)


def _batch_size(loading: BatchLoader, world: World) -> int:
    """Return the batch size of a forward, the same on every rank. On a CPU it is training's micro-batch."""
    if world.device.type == "cpu":
        return loading.micro_batch
    fitting = fitting_batch_size(loading.shards.size, free_bytes(world.device))
    return int(world.gather(np.array([fitting], np.int64)).min())


def fitting_batch_size(size: int, free_bytes: int) -> int:
    """Return the largest power of two, at most 256, of radiographs of `size` px that fit in half of a GPU's free memory."""
    fitting = free_bytes // 2 // (_BYTES_PER_PIXEL * size**2)
    return min(_MAX_BATCH, 1 << max(0, int(fitting).bit_length() - 1))


def gather_by_row(
    rows: np.ndarray, micro_batches: Sequence[MicroBatch], logits: Tensor, valid: Tensor, world: World
) -> Scores:
    """Gather the results of all ranks in the order of `rows`, without the padding.

    Args:
        rows: All rows, ascending, int64 (n,).
        micro_batches: This rank's micro-batches.
        logits: Their logits, float32 (micro-batches, batch).
        valid: Whether a sample was read, bool (micro-batches, batch).
        world: The ranks.
    """
    gathered_rows = world.gather(np.concatenate([micro.rows for micro in micro_batches]))  # (ranks, m)
    gathered_logits = world.gather(logits.flatten().cpu().numpy())  # (ranks, m)
    gathered_valid = world.gather(valid.flatten().to(torch.uint8).cpu().numpy())  # (ranks, m)
    is_row = gathered_rows >= 0  # padding has row -1
    unique_rows, index = np.unique(gathered_rows[is_row], return_index=True)
    assert np.array_equal(unique_rows, rows), "every row"
    assert is_row.sum() == len(rows), "once"
    return Scores.from_split(rows, gathered_logits[is_row][index], gathered_valid[is_row][index] > 0)


def weighted_loss(scores: Scores, targets: RowTargets) -> float:
    """Return the mean over radiographs of weight x BCE, in float64. It is NaN without radiographs."""
    if not len(scores.rows):
        return math.nan
    z, y = scores.logit.astype(np.float64), targets.label[scores.rows].astype(np.float64)
    with np.errstate(invalid="ignore"):  # logits of a diverged network; the caller handles NaN
        return float((targets.weight[scores.rows] * (np.logaddexp(0, z) - y * z)).mean())
