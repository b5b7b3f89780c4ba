"""Batches without a GPU: OpenCV over memory-mapped shards.

Raw samples are views into the mapped tar; rotation and flip are one affine warp into the batch. A few threads stay a few
micro-batches ahead (OpenCV and zlib release the interpreter's lock); results come in the order asked for.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np

from ..order import Micro
from ..shards import Shards

_AHEAD = 2  # micro-batches a thread may be ahead


def images(shards: Shards, micros: Sequence[Micro], *, workers: int) -> Iterator[np.ndarray]:
    """uint8 (B, 1, S, S) for each of `micros`, in order."""
    cv2.setNumThreads(1)  # our threads are the parallelism; OpenCV's own would fight them
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    ahead: deque[Future[np.ndarray]] = deque()
    try:
        for micro in micros:
            ahead.append(pool.submit(load, shards, micro))
            if len(ahead) > _AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def load(shards: Shards, micro: Micro) -> np.ndarray:
    """uint8 (B, 1, S, S)."""
    size = shards.size
    batch = np.zeros((len(micro.rows), 1, size, size), np.uint8)
    for place in np.flatnonzero(micro.mask):
        augment(shards.pixels(micro.rows[place]), float(micro.angles[place]), bool(micro.flips[place]), batch[place, 0])
    return batch


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
