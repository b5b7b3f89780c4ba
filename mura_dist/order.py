"""Which radiographs, in which order, turned by how much: pure functions of (rows, seed, epoch, step), no state.

    rows of the split -> order of an epoch -> global batch of a step -> micro-batches -> those of one rank

The bits come from Philox, a counter-based generator keyed by (seed, epoch and stream); only its raw output is used, which
NumPy promises not to change. The order is a sort of keys that are all different (random upper bits, the place in the
lower ones), so that no sorting algorithm can give another one. Angles and flips belong to the places of that order and
are made for a block of them at a time, by setting Philox's counter. Nothing here knows threads, workers or what ran before;
the world size only decides who takes which micro-batch.
"""

import functools
from dataclasses import dataclass

import numpy as np

_ORDER, _ANGLE, _FLIP = 0, 1, 2
_STREAMS = 4
_WORDS = 4  # uint64 that Philox gives for a step of its counter
_BLOCK = 1024  # places whose angles and flips are drawn at once


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
    """One pass: rows int64 (n,) in order, and what decides the augmentation of the radiograph at each place."""

    rows: np.ndarray
    seed: int
    epoch: int
    rotate_deg: float
    flip: bool

    def micro(self, start: int, size: int) -> Micro:
        """The radiographs at places start .. start + size, and how they are turned."""
        first, last = start // _BLOCK, (start + max(size, 1) - 1) // _BLOCK
        blocks = [_turns(self.seed, self.epoch, block, self.rotate_deg, self.flip) for block in range(first, last + 1)]
        here = slice(start - first * _BLOCK, start - first * _BLOCK + size)
        angles, flips = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return Micro(self.rows[start : start + size], angles[here], flips[here], np.ones(size, bool))


@functools.lru_cache(maxsize=4)  # of a few KB each: setting Philox up costs more than what it gives for one micro-batch
def _turns(seed: int, epoch: int, block: int, rotate_deg: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Angles float32 and flips bool of the places of a block, (_BLOCK,) each; nobody writes to them."""
    # The upper 24 bits as a fraction in [0, 1): exact in float32.
    fraction = (_bits(seed, epoch, _ANGLE, block) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    flips = (_bits(seed, epoch, _FLIP, block) & np.uint64(1)).astype(bool) & flip
    return (2 * fraction - 1) * np.float32(rotate_deg), flips


def _bits(seed: int, epoch: int, stream: int, block: int = 0, count: int = _BLOCK) -> np.ndarray:
    """`count` of a stream's random uint64, from the start of a block on."""
    key = np.array([seed, epoch * _STREAMS + stream], dtype=np.uint64)
    return np.random.Philox(key=key, counter=block * (_BLOCK // _WORDS)).random_raw(count)


def epoch_order(rows: np.ndarray, seed: int, epoch: int, *, rotate_deg: float, flip: bool) -> Epoch:
    """The whole order of an epoch. Ten million rows take 0.3 s and 160 MB (docs/benchmarks.md)."""
    place_bits = np.uint64(max(1, len(rows) - 1).bit_length())
    keys = _bits(seed, epoch, _ORDER, count=len(rows))  # the only other array there is besides the result
    keys >>= place_bits
    keys <<= place_bits
    keys |= np.arange(len(rows), dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << place_bits) - np.uint64(1)
    return Epoch(rows[keys.view(np.int64)], seed, epoch, rotate_deg, flip)


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
    return [epoch.micro(step * global_batch + number * micro_batch, micro_batch) for number in mine]


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
