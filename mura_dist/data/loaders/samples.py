"""What a backend makes of a micro-batch: pixels, and which places really hold a radiograph."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.shards.reader import CorruptSampleError, Shards


@dataclass(frozen=True)
class MicroBatchImages:
    """Where mask is False, pixels are 0: a place that only fills the shape, or one whose sample is damaged."""

    pixels: Tensor  # (B, 1, S, S) uint8, on the host or on the device
    rows: np.ndarray  # (B,) int64
    mask: np.ndarray  # (B,) bool
    damaged: tuple[CorruptSampleError, ...]


def stored(
    shards: Shards, micro: MicroBatch, *, encoded: bool
) -> tuple[list[Any], np.ndarray, tuple[CorruptSampleError, ...]]:
    """For each place its sample (encoded: bytes, else pixels uint8 (S, S)), None where there is none; the mask; the damage."""
    read = shards.read_encoded if encoded else shards.read_pixels
    samples: list[Any] = [None] * len(micro.rows)
    mask, damaged = micro.mask.copy(), []
    for place in np.flatnonzero(micro.mask).tolist():
        try:
            samples[place] = read(int(micro.rows[place]))
        except CorruptSampleError as one:
            mask[place] = False
            damaged.append(one)
    return samples, mask, tuple(damaged)
