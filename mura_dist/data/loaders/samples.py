"""The images of a micro-batch, which each backend produces, and the reading of its samples."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.shards.reader import CorruptSampleError, Shards


@dataclass(frozen=True)
class MicroBatchImages:
    """The images of a micro-batch. Where mask is False (padding or a corrupt sample), pixels are 0."""

    pixels: Tensor  # (B, 1, S, S) uint8, on the host or on the device
    rows: np.ndarray  # (B,) int64
    mask: np.ndarray  # (B,) bool
    corrupt: tuple[CorruptSampleError, ...]


def read_samples(
    shards: Shards, micro_batch: MicroBatch, *, encoded: bool
) -> tuple[list[Any], np.ndarray, tuple[CorruptSampleError, ...]]:
    """Read the samples of a micro-batch.

    Args:
        shards: Where to read.
        micro_batch: Rows to read.
        encoded: Return encoded samples, bytes, instead of pixels, uint8 (S, S).

    Returns:
        A list of B samples, None where there is none; their mask, bool (B,); the errors of corrupt samples.
    """
    read = shards.read_encoded if encoded else shards.read_pixels
    samples: list[Any] = [None] * len(micro_batch.rows)
    mask, corrupt = micro_batch.mask.copy(), []
    for position in np.flatnonzero(micro_batch.mask).tolist():
        try:
            samples[position] = read(int(micro_batch.rows[position]))
        except CorruptSampleError as error:
            mask[position] = False
            corrupt.append(error)
    return samples, mask, tuple(corrupt)
