"""Draw the random numbers of an epoch: sort keys of its order, and angle and flip of each position.

    seed, epoch, positions -> Philox, keyed by (seed, epoch and stream) -> keys uint64, angles float32, flips bool

Philox is a counter-based generator. Only its raw output is used, which NumPy guarantees to be stable. Angles and flips are drawn
in blocks of positions by setting Philox's counter, so that those of a position do not depend on earlier ones.
"""

import functools
import threading
from typing import Any

import numpy as np

_ORDER, _ANGLE, _FLIP = 0, 1, 2
_STREAMS = 4
_WORDS_PER_COUNT = 4  # uint64 that Philox returns per step of its counter
_BLOCK = 256  # positions whose angles and flips are drawn at once


def draw_order_keys(seed: int, epoch: int, count: int) -> np.ndarray:
    """Draw sort keys of `count` positions, uint64 (count,), writable."""
    return _philox.bits(seed, epoch, _ORDER, count=count)


def draw_augmentations(
    seed: int, epoch: int, start: int, size: int, *, rotate_deg: float, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw angles, float32 (size,) in degrees, and flips, bool (size,), of the positions start .. start + size."""
    first, last = start // _BLOCK, (start + max(size, 1) - 1) // _BLOCK
    blocks = [_block_augmentations(seed, epoch, block, rotate_deg, flip) for block in range(first, last + 1)]
    within = slice(start - first * _BLOCK, start - first * _BLOCK + size)
    angles, flips = (arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    return angles[within], flips[within]


@functools.lru_cache(maxsize=4)  # 1 KB each; neighboring micro-batches of a rank share blocks
def _block_augmentations(
    seed: int, epoch: int, block: int, rotate_deg: float, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return angles, float32, and flips, bool, of a block, (_BLOCK,) each, not to be written to."""
    # The upper 24 bits as a fraction in [0, 1): exact in float32.
    fraction = (_philox.bits(seed, epoch, _ANGLE, block) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    flips = (_philox.bits(seed, epoch, _FLIP, block) & np.uint64(1)).astype(bool) & flip
    return (2 * fraction - 1) * np.float32(rotate_deg), flips


class _Philox(threading.local):
    """Generator of each thread, because setting key and counter is faster than creating a generator."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = self._philox.state

    def bits(self, seed: int, epoch: int, stream: int, block: int = 0, count: int = _BLOCK) -> np.ndarray:
        """Return `count` random uint64 of a stream, from the start of a block on."""
        inner = self._state["state"]
        inner["key"][:] = seed, epoch * _STREAMS + stream
        inner["counter"][0] = block * (_BLOCK // _WORDS_PER_COUNT)
        self._philox.state = self._state
        return self._philox.random_raw(count)


_philox = _Philox()
