"""Batches by NVIDIA DALI: decoding and geometry on the GPU, or on the CPU where there is none. Only this file and a
benchmark's peer import DALI.

    external_source (bytes in our order, angles, flips) -> decoders.image | raw pixels -> rotate -> flip -> torch

`fn.external_source` keeps the order ours: DALI's own WebDataset reader shuffles within a buffer and ties its order to the
number of shards it reads at once.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from ..order import Micro
from ..samples import encode
from ..shards import Shards
from .images import Images, stored

_DEEPEST = 8  # micro-batches DALI holds at once, each on the device


def images(
    shards: Shards, micros: Iterable[Micro], *, workers: int, device: torch.device, prefetch: int
) -> Iterator[Images]:
    """pixels: a tensor on `device`; for each of `micros` (all of one B), in order."""
    coming = iter(micros)
    if (first := next(coming, None)) is None:
        return
    on_gpu = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    size, batch = shards.size, len(first.rows)
    fed: deque[Images] = deque()  # what DALI was given, and has not given back
    pipe = _pipeline(
        _feed(shards, itertools.chain([first], coming), fed),
        raw=shards.encoding == "raw",
        on_gpu=on_gpu,
        batch_size=batch,
        num_threads=workers,
        device_id=index,
        prefetch_queue_depth=min(max(2, prefetch), _DEEPEST),
    )
    pipe.build()
    while True:
        try:
            (pixels,) = pipe.run()
        except StopIteration:
            return
        image = torch.empty((batch, size, size, 1), dtype=torch.uint8, device=device)
        feed_ndarray(pixels.as_tensor(), image, cuda_stream=torch.cuda.current_stream(device) if on_gpu else None)
        given = fed.popleft()
        if not given.mask.all():
            image[torch.from_numpy(~given.mask).to(device)] = 0
        yield Images(image.view(batch, 1, size, size), given.rows, given.mask, given.damaged)


def _feed(
    shards: Shards, micros: Iterable[Micro], fed: deque[Images]
) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """What external_source is given for each micro-batch: samples, angles float32 (B,), flips int32 (B,)."""
    raw = shards.encoding == "raw"
    black = np.zeros((shards.size, shards.size), np.uint8)
    blank = black[..., None] if raw else np.frombuffer(encode(black, shards.encoding), np.uint8)
    for micro in micros:
        samples, mask, damaged = stored(shards, micro, encoded=not raw)
        fed.append(Images(None, micro.rows, mask, damaged))
        given = [blank if one is None else one[..., None] if raw else np.frombuffer(one, np.uint8) for one in samples]
        yield given, micro.angles, micro.flips.astype(np.int32)


@pipeline_def  # type: ignore[untyped-decorator]
def _pipeline(feed: Iterator[Any], *, raw: bool, on_gpu: bool) -> Any:
    layout = ["HWC", "", ""] if raw else None
    data, angle, flip = fn.external_source(source=feed, num_outputs=3, batch=True, layout=layout)
    if raw:
        pixels = data.gpu() if on_gpu else data
    else:
        pixels = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
    # DALI turns about S/2 in coordinates whose pixel centres lie at 1/2: OpenCV's (S-1)/2.
    turned = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
    return fn.flip(turned, horizontal=flip)
