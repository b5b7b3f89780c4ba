"""Batches without a GPU: OpenCV over raw shards.

Rotation and flip are one affine warp from the stored pixels into the batch. A few threads stay some micro-batches ahead
(OpenCV, zlib and reading release the interpreter's lock); results come in the order asked for.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np

from mura_dist.data.loaders.sampler import Micro
from mura_dist.data.loaders.samples import Images, stored
from mura_dist.data.shards.reader import Shards


def images(shards: Shards, micros: Iterable[Micro], *, workers: int, prefetch: int) -> Iterator[Images]:
    """pixels: a NumPy array; for each of `micros`, in order."""
    cv2.setNumThreads(1)  # our threads are the parallelism; OpenCV's own would fight them
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    ahead: deque[Future[Images]] = deque()
    try:
        for micro in micros:
            ahead.append(pool.submit(load, shards, micro))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(shards: Shards, micro: Micro) -> Images:
    size = shards.size
    samples, mask, damaged = stored(shards, micro, encoded=False)
    batch = np.empty((len(samples), 1, size, size), np.uint8)
    for place, pixels in enumerate(samples):
        if pixels is None:
            batch[place] = 0
        else:
            augment(pixels, float(micro.angles[place]), bool(micro.flips[place]), batch[place, 0])
    return Images(batch, micro.rows, mask, damaged)


def augment(source: np.ndarray, angle_deg: float, flip: bool, out: np.ndarray) -> None:
    """Rotate `source` uint8 (S, S) counter-clockwise about its centre, then flip left-right, into `out` uint8 (S, S)."""
    if angle_deg == 0:
        np.copyto(out, source[:, ::-1] if flip else source)
        return
    size = len(source)
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), angle_deg, 1.0)  # (2, 3)
    if flip:
        matrix[0] = [-matrix[0, 0], -matrix[0, 1], size - 1 - matrix[0, 2]]
    cv2.warpAffine(source, matrix, (size, size), dst=out, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
