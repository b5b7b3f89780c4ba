"""Which radiographs, in which order, turned by how much: pure functions of (rows, seed, epoch, step), no state.

    rows of the split -> order of an epoch -> global batch of a step -> micro-batches -> those of one rank

The bits come from Philox, a counter-based generator keyed by (seed, epoch and stream); only its raw output is used, which
NumPy promises not to change, and an argsort. Nothing here knows threads, workers or what ran before; the world size only
decides who takes which micro-batch.
"""

from dataclasses import dataclass

import numpy as np

_ORDER, _ANGLE, _FLIP = 0, 1, 2
_STREAMS = 4


@dataclass(frozen=True)
class Micro:
    """What one rank forwards at once. rows int64 (B,); angles float32 (B,) degrees, counter-clockwise; flips bool (B,);
    mask bool (B,), False where a place only fills the shape."""

    rows: np.ndarray
    angles: np.ndarray
    flips: np.ndarray
    mask: np.ndarray


@dataclass(frozen=True)
class Epoch:
    """One pass: rows (n,) in order, angles (n,), flips (n,) of the radiograph at each place."""

    rows: np.ndarray
    angles: np.ndarray
    flips: np.ndarray


def _bits(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """`count` random uint64."""
    return np.random.Philox(key=np.array([seed, epoch * _STREAMS + stream], dtype=np.uint64)).random_raw(count)


def epoch_order(rows: np.ndarray, seed: int, epoch: int, *, rotate_deg: float, flip: bool) -> Epoch:
    """The whole order of an epoch. A radiograph's angle and flip belong to it and the epoch, not to its place."""
    order = np.argsort(_bits(seed, epoch, _ORDER, len(rows)), kind="stable")
    # The upper 24 bits as a fraction in [0, 1): exact in float32.
    fraction = (_bits(seed, epoch, _ANGLE, len(rows)) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    angles = (2 * fraction - 1) * np.float32(rotate_deg)
    flips = (_bits(seed, epoch, _FLIP, len(rows)) & np.uint64(1)).astype(bool) & flip
    return Epoch(rows[order], angles[order], flips[order])


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    """Whole global batches; the remainder sits this epoch out (another one in the next, the order being another)."""
    return num_rows // global_batch


def step_micros(
    epoch: Epoch, step: int, *, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> list[Micro]:
    """The micro-batches of `step` (0-based within the epoch) that `rank` takes: whole ones, in order."""
    num_micros = global_batch // micro_batch
    assert num_micros * micro_batch == global_batch, (global_batch, micro_batch)
    assert num_micros % world_size == 0, (num_micros, world_size)
    mine = range(rank * num_micros // world_size, (rank + 1) * num_micros // world_size)
    starts = [step * global_batch + number * micro_batch for number in mine]
    return [_cut(epoch, start, micro_batch) for start in starts]


def _cut(epoch: Epoch, start: int, size: int) -> Micro:
    part = slice(start, start + size)
    return Micro(epoch.rows[part], epoch.angles[part], epoch.flips[part], np.ones(size, bool))


def evaluation_micros(rows: np.ndarray, *, micro_batch: int, rank: int, world_size: int) -> list[Micro]:
    """All of `rows` over all ranks, each exactly once, unaugmented; every rank gets as many micro-batches, padded by mask."""
    num_micros = -(-len(rows) // (micro_batch * world_size))
    padded = np.full(num_micros * micro_batch * world_size, -1, np.int64)
    padded[: len(rows)] = rows
    mine = padded.reshape(world_size, num_micros, micro_batch)[rank]
    zeros, upright = np.zeros(micro_batch, np.float32), np.zeros(micro_batch, bool)
    return [Micro(part, zeros, upright, part >= 0) for part in mine]


def nearest_global_batch(global_batch: int, unit: int) -> int:
    """The multiple of `unit` (micro-batch x ranks) nearest to `global_batch`, at least one unit."""
    return max(1, round(global_batch / unit)) * unit
