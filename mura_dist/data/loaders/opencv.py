"""Load batches with OpenCV, on the host's processors.

Rotation and flip are one affine warp from the stored pixels into the batch. Threads work some micro-batches ahead (OpenCV, zlib
and file reads release the GIL), and results come in order.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch

from mura_dist.data.loaders.prefetch import prefetch_ordered
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.loaders.samples import MicroBatchImages, read_samples
from mura_dist.data.shards.reader import Shards


def load_images(
    shards: Shards, micro_batches: Iterable[MicroBatch], *, workers: int, prefetch: int, pinned: bool = False
) -> Iterator[MicroBatchImages]:
    """Yield the images of each of `micro_batches`, in order, on the host, in pinned memory if `pinned`."""
    cv2.setNumThreads(1)  # the pool's threads are the parallelism
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        yield from prefetch_ordered(
            (pool.submit(load, shards, micro_batch, pinned) for micro_batch in micro_batches), ahead=prefetch
        )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(shards: Shards, micro_batch: MicroBatch, pinned: bool = False) -> MicroBatchImages:
    """Read and augment one micro-batch."""
    size = shards.size
    samples, mask, corrupt = read_samples(shards, micro_batch, encoded=False)
    shape = (len(samples), 1, size, size)
    # Unpinned memory of NumPy is written faster than torch's.
    image = (
        torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        if pinned
        else torch.from_numpy(np.empty(shape, np.uint8))
    )
    batch = image.numpy()
    for position, pixels in enumerate(samples):
        if pixels is None:
            batch[position] = 0
        else:
            augment(pixels, float(micro_batch.angles[position]), bool(micro_batch.flips[position]), batch[position, 0])
    return MicroBatchImages(image, micro_batch.rows, mask, corrupt)


def augment(source: np.ndarray, angle_deg: float, flip: bool, out: np.ndarray) -> None:
    """Rotate an image counter-clockwise about its center, then flip it left-right.

    Args:
        source: uint8 (S, S).
        angle_deg: Angle in degrees.
        flip: Whether to flip.
        out: Result, uint8 (S, S).
    """
    if angle_deg == 0:
        np.copyto(out, source[:, ::-1] if flip else source)
        return
    size = len(source)
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle_deg, 1.0)  # (2, 3)
    if flip:
        matrix[0] = [-matrix[0, 0], -matrix[0, 1], size - 1 - matrix[0, 2]]
    cv2.warpAffine(source, matrix, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
