"""Batches by NVIDIA DALI: decoding and geometry on the GPU, or on the CPU where there is none. The only file that imports DALI.

    external_source (bytes in our order, angles, flips) -> decoders.image | raw pixels -> rotate -> flip -> torch

`fn.external_source` keeps the order ours: DALI's own WebDataset reader shuffles within a buffer and ties its order to the number
of shards it reads at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from torch import Tensor

from .. import shards as formats
from ..order import Micro
from ..shards import Shards

_PREFETCH = 2


def images(shards: Shards, micros: Sequence[Micro], *, workers: int, device: torch.device) -> Iterator[Tensor]:
    """uint8 (B, 1, S, S) on `device` for each of `micros` (all of one B), in order."""
    if not micros:
        return
    on_gpu = device.type == "cuda"
    index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
    size, batch = shards.size, len(micros[0].rows)
    pipe = _pipeline(
        _feed(shards, micros),
        raw=shards.encoding == "raw",
        on_gpu=on_gpu,
        batch_size=batch,
        num_threads=workers,
        device_id=index,
        prefetch_queue_depth=_PREFETCH,
    )
    pipe.build()
    for micro in micros:
        (pixels,) = pipe.run()
        image = torch.empty((batch, size, size, 1), dtype=torch.uint8, device=device)
        feed_ndarray(pixels.as_tensor(), image, cuda_stream=torch.cuda.current_stream(device) if on_gpu else None)
        if not micro.mask.all():
            image[torch.from_numpy(~micro.mask).to(device)] = 0
        yield image.view(batch, 1, size, size)


def _feed(shards: Shards, micros: Sequence[Micro]) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
    """What external_source is given for each micro-batch: samples, angles float32 (B,), flips int32 (B,)."""
    raw = shards.encoding == "raw"
    black = np.zeros((shards.size, shards.size), np.uint8)
    blank = black[..., None] if raw else np.frombuffer(formats.encode(black, shards.encoding), np.uint8)
    for micro in micros:
        samples = [
            blank if not real else shards.pixels(row)[..., None] if raw else np.asarray(shards.encoded(row))
            for row, real in zip(micro.rows, micro.mask, strict=True)
        ]
        yield samples, micro.angles, micro.flips.astype(np.int32)


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
