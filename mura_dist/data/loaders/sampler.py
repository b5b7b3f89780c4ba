"""Choose the radiographs of each micro-batch, their order and augmentation, as pure functions of (rows, seed, epoch, step).

    rows of the split -> permutation of an epoch -> global batch of a step -> micro-batches -> those of one rank

augmentation.py draws the random numbers. The permutation sorts distinct keys (random upper bits, position in the lower bits), so
that it does not depend on the sorting algorithm. Angles and flips belong to positions of the permutation. Nothing depends on
threads, workers or history. The world size only decides which rank takes which micro-batch.
"""

from dataclasses import dataclass

import numpy as np

from mura_dist.data.loaders.augmentation import draw_augmentations, draw_order_keys

_CHUNK = 1 << 18  # positions processed at a time


@dataclass(frozen=True)
class MicroBatch:
    """The radiographs of one forward pass.

    rows: int64 (B,).
    angles: float32 (B,), degrees counter-clockwise.
    flips: bool (B,).
    mask: bool (B,), False for padding.
    """

    rows: np.ndarray
    angles: np.ndarray
    flips: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """Pass over a split: its rows in order, int64 (n,), and the parameters of the augmentation."""

    rows: np.ndarray
    seed: int
    epoch: int
    rotate_deg: float
    flip: bool

    def micro_batch(self, start: int, size: int) -> MicroBatch:
        """Return the micro-batch of the positions start .. start + size."""
        angles, flips = draw_augmentations(
            self.seed, self.epoch, start, size, rotate_deg=self.rotate_deg, flip=self.flip
        )
        return MicroBatch(self.rows[start : start + size], angles, flips, np.ones(size, bool))


def epoch_permutation(rows: np.ndarray, seed: int, epoch: int, *, rotate_deg: float, flip: bool) -> Epoch:
    """Permute rows, int64 (n,), for an epoch. Peak memory is that of one more array of n int64 (docs/benchmarks.md)."""
    position_bits = np.uint64(max(1, len(rows) - 1).bit_length())
    keys = draw_order_keys(seed, epoch, len(rows))  # becomes the result in place
    keys >>= position_bits
    keys <<= position_bits
    for chunk in _chunks(len(rows)):
        keys[chunk] |= np.arange(chunk.start, chunk.stop, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << position_bits) - np.uint64(1)
    positions = keys.view(np.int64)
    for chunk in _chunks(len(rows)):
        positions[chunk] = rows[positions[chunk]]
    return Epoch(positions, seed, epoch, rotate_deg, flip)


def _chunks(size: int) -> list[slice]:
    """Split a long array into slices, so that temporary arrays stay small."""
    return [slice(start, min(start + _CHUNK, size)) for start in range(0, size, _CHUNK)]


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Return the number of complete global batches. The remainder, which differs in each epoch, is skipped."""
    return num_rows // global_batch


def step_micro_batches(
    epoch: Epoch, step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> list[MicroBatch]:
    """Return the micro-batches of a rank in a step, counted from 0 within the epoch.

    Args:
        epoch: Result of epoch_permutation.
        step: Step within the epoch.
        global_batch: Radiographs per step, a multiple of micro_batch x world_size.
        micro_batch: Radiographs per micro-batch.
        rank: Rank.
        world_size: Number of ranks.
    """
    num_micro_batches = global_batch // micro_batch
    assert num_micro_batches * micro_batch == global_batch, (global_batch, micro_batch)
    assert num_micro_batches % world_size == 0, (num_micro_batches, world_size)
    numbers = range(rank * num_micro_batches // world_size, (rank + 1) * num_micro_batches // world_size)
    return [epoch.micro_batch(step * global_batch + number * micro_batch, micro_batch) for number in numbers]


def evaluation_micro_batches(rows: np.ndarray, *, micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Return a rank's micro-batches of an evaluation, in which each of `rows` occurs once over all ranks, not augmented.

    Every rank gets the same number of micro-batches, padded with row -1 and mask False.
    """
    num_micro_batches = -(-len(rows) // (micro_batch * world_size))
    padded = np.full(num_micro_batches * micro_batch * world_size, -1, np.int64)
    padded[: len(rows)] = rows
    of_rank = padded.reshape(world_size, num_micro_batches, micro_batch)[rank]
    zeros, unflipped = np.zeros(micro_batch, np.float32), np.zeros(micro_batch, bool)
    return [MicroBatch(batch, zeros, unflipped, batch >= 0) for batch in of_rank]


def nearest_global_batch(global_batch: int, unit: int) -> int:
    """Return the multiple of `unit` (micro-batch x ranks) nearest to `global_batch`, at least one unit."""
    return max(1, round(global_batch / unit)) * unit
