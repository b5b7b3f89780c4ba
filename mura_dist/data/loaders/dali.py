"""Batches by NVIDIA DALI: decoding and geometry on the GPU, or on the CPU where there is none. Only this file and a
benchmark's peer import DALI.

    external_source (bytes in our order, angles, flips) -> decoders.image | raw pixels -> rotate -> flip -> torch

`fn.external_source` keeps the order ours: DALI's own WebDataset reader shuffles within a buffer and ties its order to the
number of shards it reads at once.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from mura_dist.data.loaders.sampler import Micro
from mura_dist.data.loaders.samples import Images, stored
from mura_dist.data.loaders.transfer import send
from mura_dist.data.shards.codec import encode
from mura_dist.data.shards.reader import Damaged, Shards

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
    key = (shards.encoding == "raw", batch, workers, index, min(max(2, prefetch), _DEEPEST))
    feed = _Feed(shards, itertools.chain([first], coming))
    graph = _graphs.pop(key, None)
    if graph is None:
        graph = _Graph(feed, *key)
    else:
        graph.start(feed)
    while not feed.all_out():
        (pixels,) = graph.pipe.run()
        image = torch.empty((batch, size, size, 1), dtype=torch.uint8, device=device)
        feed_ndarray(pixels.as_tensor(), image, cuda_stream=torch.cuda.current_stream(device) if on_gpu else None)
        rows, mask, damaged = feed.given.popleft()
        if not mask.all():
            image *= send(mask, device).view(batch, 1, 1, 1)
        if feed.all_out():  # before the last one is given out: whoever takes it may never ask for another
            _graphs[key] = graph
        yield Images(image.view(batch, 1, size, size), rows, mask, damaged)


class _Feed:
    """What external_source is given: for each micro-batch samples, angles float32 (B,), flips int32 (B,)."""

    def __init__(self, shards: Shards, micros: Iterable[Micro]) -> None:
        self.shards, self.micros = shards, micros
        self.given: deque[tuple[np.ndarray, np.ndarray, tuple[Damaged, ...]]] = (
            deque()
        )  # what DALI has, and has not given back
        self.ended = False

    def all_out(self) -> bool:
        return self.ended and not self.given

    def __iter__(self) -> Iterator[tuple[list[np.ndarray], np.ndarray, np.ndarray]]:
        size, encoding = self.shards.size, self.shards.encoding
        raw, black = encoding == "raw", np.zeros((size, size), np.uint8)
        blank = black[..., None] if raw else np.frombuffer(encode(black, encoding), np.uint8)
        for micro in self.micros:
            samples, mask, damaged = stored(self.shards, micro, encoded=not raw)
            self.given.append((micro.rows, mask, damaged))
            given = [
                blank if one is None else one[..., None] if raw else np.frombuffer(one, np.uint8) for one in samples
            ]
            yield given, micro.angles, micro.flips.astype(np.int32)
        self.ended = True


class _Graph:
    """A DALI pipeline, kept from one epoch to the next: built anew each time, its memory grew by 2 MiB an epoch."""

    def __init__(self, feed: Iterable[Any], raw: bool, batch: int, workers: int, index: int | None, depth: int) -> None:
        self.feed = feed
        self.pipe = _pipeline(
            self,
            raw=raw,
            on_gpu=index is not None,
            batch_size=batch,
            num_threads=workers,
            device_id=index,
            prefetch_queue_depth=depth,
        )
        self.pipe.build()

    def start(self, feed: Iterable[Any]) -> None:
        """Once more, after everything of the last feed came out."""
        with contextlib.suppress(StopIteration):
            self.pipe.run()
        self.feed = feed
        self.pipe.reset()

    def __iter__(self) -> Iterator[Any]:
        """DALI asks for the next epoch's iterator at the end of the one before: what it goes over is looked up when it starts."""
        yield from self.feed


_graphs: dict[tuple[Any, ...], _Graph] = {}  # idle ones; one in use, or left in mid-epoch, is not in here


@pipeline_def  # type: ignore[untyped-decorator]
def _pipeline(feed: Iterable[Any], *, raw: bool, on_gpu: bool) -> Any:
    layout = ["HWC", "", ""] if raw else None
    data, angle, flip = fn.external_source(source=feed, num_outputs=3, batch=True, layout=layout, cycle="raise")
    if raw:
        pixels = data.gpu() if on_gpu else data
    else:
        pixels = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
    # DALI turns about S/2 in coordinates whose pixel centres lie at 1/2: OpenCV's (S-1)/2.
    turned = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
    return fn.flip(turned, horizontal=flip)
