"""Which radiographs, in which order, turned by how much: pure functions of (rows, seed, epoch, step), no state.

    rows of the split -> order of an epoch -> global batch of a step -> micro-batches -> those of one rank

The random numbers come from augmentation.py. The order is a sort of keys that are all different (random upper bits, the
place in the lower ones), so that no sorting algorithm can give another one. Angles and flips belong to the places of that
order. Nothing here knows threads, workers or what ran before; the world size only decides who takes which micro-batch.
"""

from dataclasses import dataclass

import numpy as np

from mura_dist.data.loaders.augmentation import draw_augmentations, draw_order_keys

_PART = 1 << 18  # of an order worked on at once


@dataclass(frozen=True)
class MicroBatch:
    """What one rank forwards at once. rows int64 (B,); angles float32 (B,) degrees, counter-clockwise; flips bool (B,);
    mask bool (B,), False where a place only fills the shape."""

    rows: np.ndarray
    angles: np.ndarray
    flips: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """One pass: rows int64 (n,) in order, and what decides the augmentation of the radiograph at each place."""

    rows: np.ndarray
    seed: int
    epoch: int
    rotate_deg: float
    flip: bool

    def micro_batch(self, start: int, size: int) -> MicroBatch:
        """The radiographs at places start .. start + size, and how they are turned."""
        angles, flips = draw_augmentations(
            self.seed, self.epoch, start, size, rotate_deg=self.rotate_deg, flip=self.flip
        )
        return MicroBatch(self.rows[start : start + size], angles, flips, np.ones(size, bool))


def epoch_permutation(rows: np.ndarray, seed: int, epoch: int, *, rotate_deg: float, flip: bool) -> Epoch:
    """The whole order of an epoch. Ten million rows (int64) take as much memory again as they do, 76 MiB (docs/benchmarks.md)."""
    place_bits = np.uint64(max(1, len(rows) - 1).bit_length())
    keys = draw_order_keys(seed, epoch, len(rows))  # the only array as long: at last the result
    keys >>= place_bits
    keys <<= place_bits
    for part in _parts(len(rows)):
        keys[part] |= np.arange(part.start, part.stop, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << place_bits) - np.uint64(1)
    places = keys.view(np.int64)
    for part in _parts(len(rows)):
        places[part] = rows[places[part]]
    return Epoch(places, seed, epoch, rotate_deg, flip)


def _parts(size: int) -> list[slice]:
    """What is done to a long array at a time, so that nothing beside it is as long."""
    return [slice(start, min(start + _PART, size)) for start in range(0, size, _PART)]


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Whole global batches; the remainder sits this epoch out (another one in the next, the order being another)."""
    return num_rows // global_batch


def step_micro_batches(
    epoch: Epoch, step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> list[MicroBatch]:
    """The micro-batches of `step` (0-based within the epoch) that `rank` takes: whole ones, in order."""
    num_micro_batches = global_batch // micro_batch
    assert num_micro_batches * micro_batch == global_batch, (global_batch, micro_batch)
    assert num_micro_batches % world_size == 0, (num_micro_batches, world_size)
    mine = range(rank * num_micro_batches // world_size, (rank + 1) * num_micro_batches // world_size)
    return [epoch.micro_batch(step * global_batch + number * micro_batch, micro_batch) for number in mine]


def evaluation_micro_batches(rows: np.ndarray, *, micro_batch: int, rank: int, world_size: int) -> list[MicroBatch]:
    """All of `rows` over all ranks, each exactly once, unaugmented; every rank gets as many micro-batches, padded by mask."""
    num_micro_batches = -(-len(rows) // (micro_batch * world_size))
    padded = np.full(num_micro_batches * micro_batch * world_size, -1, np.int64)
    padded[: len(rows)] = rows
    mine = padded.reshape(world_size, num_micro_batches, micro_batch)[rank]
    zeros, upright = np.zeros(micro_batch, np.float32), np.zeros(micro_batch, bool)
    return [MicroBatch(part, zeros, upright, part >= 0) for part in mine]


def nearest_global_batch(global_batch: int, unit: int) -> int:
    """The multiple of `unit` (micro-batch x ranks) nearest to `global_batch`, at least one unit."""
    return max(1, round(global_batch / unit)) * unit
