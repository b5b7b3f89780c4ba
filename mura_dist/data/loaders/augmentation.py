"""Draw the random numbers of an epoch: the keys of its order, and the angle and flip of each place in it.

    seed, epoch, places -> Philox, keyed by (seed, epoch and stream) -> keys uint64, angles float32, flips bool

Philox is a counter-based generator. Only its raw output is used, which NumPy promises not to change. Angles and flips are
drawn for a block of places at a time, by setting Philox's counter: those of a place depend on nothing before it.
"""

import functools
import threading
from typing import Any

import numpy as np

_ORDER, _ANGLE, _FLIP = 0, 1, 2
_STREAMS = 4
_WORDS = 4  # uint64 that Philox gives for a step of its counter
_BLOCK = 256  # places whose angles and flips are drawn at once


def draw_order_keys(seed: int, epoch: int, count: int) -> np.ndarray:
    """Draw a random uint64 for each of `count` places: (count,), the caller's to write to."""
    return _philox.bits(seed, epoch, _ORDER, count=count)


def draw_augmentations(
    seed: int, epoch: int, start: int, size: int, *, rotate_deg: float, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw angles float32 (size,) in degrees and flips bool (size,) of the places start .. start + size."""
    first, last = start // _BLOCK, (start + max(size, 1) - 1) // _BLOCK
    blocks = [_block_turns(seed, epoch, block, rotate_deg, flip) for block in range(first, last + 1)]
    here = slice(start - first * _BLOCK, start - first * _BLOCK + size)
    angles, flips = (parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return angles[here], flips[here]


@functools.lru_cache(maxsize=4)  # of a KB each; a rank's micro-batches lie side by side, or far from each other
def _block_turns(seed: int, epoch: int, block: int, rotate_deg: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Angles float32 and flips bool of the places of a block, (_BLOCK,) each; nobody writes to them."""
    # The upper 24 bits as a fraction in [0, 1): exact in float32.
    fraction = (_philox.bits(seed, epoch, _ANGLE, block) >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
    flips = (_philox.bits(seed, epoch, _FLIP, block) & np.uint64(1)).astype(bool) & flip
    return (2 * fraction - 1) * np.float32(rotate_deg), flips


class _Philox(threading.local):
    """A generator a thread. To set key and counter takes 4 us, a new one 25: it asks the system for entropy, and uses none."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(key=0)
        self._state: Any = self._philox.state

    def bits(self, seed: int, epoch: int, stream: int, block: int = 0, count: int = _BLOCK) -> np.ndarray:
        """`count` of a stream's random uint64, from the start of a block on."""
        inner = self._state["state"]
        inner["key"][:] = seed, epoch * _STREAMS + stream
        inner["counter"][0] = block * (_BLOCK // _WORDS)
        self._philox.state = self._state
        return self._philox.random_raw(count)


_philox = _Philox()
