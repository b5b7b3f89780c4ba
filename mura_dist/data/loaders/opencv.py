"""Batches by OpenCV, on the host's processors.

Rotation and flip are one affine warp from the stored pixels into the batch. A few threads stay some micro-batches ahead
(OpenCV, zlib and reading release the interpreter's lock); results come in the order asked for.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch

from mura_dist.data.loaders.prefetch import prefetch_ordered
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.loaders.samples import MicroBatchImages, stored
from mura_dist.data.shards.reader import Shards


def images(
    shards: Shards, micro_batches: Iterable[MicroBatch], *, workers: int, prefetch: int, pinned: bool = False
) -> Iterator[MicroBatchImages]:
    """Yield the Images of each of `micros`, in order, on the host; `pinned`: in memory that a GPU copies from by itself."""
    cv2.setNumThreads(1)  # our threads are the parallelism; OpenCV's own would fight them
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        yield from prefetch_ordered(
            (pool.submit(load, shards, micro, pinned) for micro in micro_batches), ahead=prefetch
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(shards: Shards, micro: MicroBatch, pinned: bool = False) -> MicroBatchImages:
    """Read and augment one micro-batch, straight into the memory it is sent from."""
    size = shards.size
    samples, mask, damaged = stored(shards, micro, encoded=False)
    shape = (len(samples), 1, size, size)
    # NumPy's memory is written to a twentieth faster than torch's, where it need not be pinned.
    image = (
        torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        if pinned
        else torch.from_numpy(np.empty(shape, np.uint8))
    )
    batch = image.numpy()
    for place, pixels in enumerate(samples):
        if pixels is None:
            batch[place] = 0
        else:
            augment(pixels, float(micro.angles[place]), bool(micro.flips[place]), batch[place, 0])
    return MicroBatchImages(image, micro.rows, mask, damaged)


def augment(source: np.ndarray, angle_deg: float, flip: bool, out: np.ndarray) -> None:
    """Rotate `source` uint8 (S, S) counter-clockwise about its center, then flip left-right, into `out` uint8 (S, S)."""
    if angle_deg == 0:
        np.copyto(out, source[:, ::-1] if flip else source)
        return
    size = len(source)
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle_deg, 1.0)  # (2, 3)
    if flip:
        matrix[0] = [-matrix[0, 0], -matrix[0, 1], size - 1 - matrix[0, 2]]
    cv2.warpAffine(source, matrix, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
