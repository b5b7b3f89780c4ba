"""Batches by NVIDIA DALI: decoding and geometry on the GPU, or on the CPU where there is none. Only this file and a
benchmark's peer import DALI.

    threads of a pool: samples in our order -> one thread, on a stream of its own: external_source (pixels or bytes,
    angles, flips) -> decoders.image | raw pixels -> rotate -> flip -> torch -> an event -> the consumer's stream

The consumer runs none of this: its stream waits for the event. `fn.external_source` keeps the order ours: DALI's own
WebDataset reader shuffles within a buffer and ties its order to the number of shards it reads at once.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import feed_ndarray

from mura_dist.data.loaders.prefetch import prefetch_in_thread, prefetch_ordered
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.loaders.samples import MicroBatchImages, stored
from mura_dist.data.loaders.transfer import send
from mura_dist.data.shards.codec import encode
from mura_dist.data.shards.reader import CorruptSampleError, Shards

_DEEPEST = 8  # micro-batches DALI holds at once, each on the device
_READY = 2  # micro-batches that came out of DALI and wait for the consumer


def images(
    shards: Shards, micro_batches: Iterable[MicroBatch], *, workers: int, device: torch.device, prefetch: int
) -> Iterator[MicroBatchImages]:
    """Yield the Images of each of `micros` (all of one B), in order, on `device`, for use on the caller's current stream."""
    index = None
    if device.type == "cuda":  # looked up here: another thread's current device is another
        index = device.index if device.index is not None else torch.cuda.current_device()
    source = _run(shards, iter(micro_batches), workers, index, min(max(2, prefetch), _DEEPEST))
    with contextlib.closing(prefetch_in_thread(source, ahead=_READY)) as ready:
        for result, event in ready:
            if event is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(event)
                result.pixels.record_stream(stream)  # its memory is the other stream's
            yield result


def _run(
    shards: Shards, micro_batches: Iterator[MicroBatch], workers: int, index: int | None, depth: int
) -> Generator[tuple[MicroBatchImages, torch.cuda.Event | None], None, None]:
    """Run a graph over `micros` on GPU `index` (None: the CPU); each result with the event after which its pixels are there."""
    if (first := next(micro_batches, None)) is None:
        return
    size, batch = shards.size, len(first.rows)
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        tasks = (pool.submit(_read, shards, micro) for micro in itertools.chain([first], micro_batches))
        feed = _Feed(prefetch_ordered(tasks, ahead=workers))
        key = (shards.encoding == "raw", batch, workers, index, depth)
        graph = _graphs.pop(key, None)
        if graph is None:
            graph = _Graph(feed, *key)
        else:
            graph.start(feed)
        if graph.stream is not None:
            stack.enter_context(torch.cuda.stream(graph.stream))
        while not feed.all_out():
            # On our stream: DALI takes its memory back in that stream's order, not while the copy is still to come.
            (pixels,) = graph.pipe.run(graph.stream) if graph.stream is not None else graph.pipe.run()
            image = torch.empty((batch, size, size, 1), dtype=torch.uint8, device=device)
            feed_ndarray(pixels.as_tensor(), image, cuda_stream=graph.stream)
            micro = feed.inside.popleft()
            if not micro.mask.all():  # black as encoded; a decoder on a GPU is free to round
                image *= send(micro.mask, device).view(batch, 1, 1, 1)
            event = graph.stream.record_event() if graph.stream is not None else None
            if feed.all_out():  # before the last one is given out: whoever takes it may never ask for another
                _graphs[key] = graph
            yield MicroBatchImages(image.view(batch, 1, size, size), micro.rows, micro.mask, micro.damaged), event


@dataclass(frozen=True)
class _Samples:
    """A micro-batch as read."""

    data: list[np.ndarray]  # B of pixels uint8 (S, S, 1), or of encoded radiographs, uint8 (bytes,)
    angles: np.ndarray  # (B,) float32
    flips: np.ndarray  # (B,) int32
    rows: np.ndarray  # (B,) int64
    mask: np.ndarray  # (B,) bool
    damaged: tuple[CorruptSampleError, ...]


def _read(shards: Shards, micro: MicroBatch) -> _Samples:
    size, encoding = shards.size, shards.encoding
    samples, mask, damaged = stored(shards, micro, encoded=encoding != "raw")
    raw, black = encoding == "raw", np.zeros((size, size), np.uint8)
    blank: Any = black if raw or mask.all() else encode(black, encoding)
    present = [blank if sample is None else sample for sample in samples]
    data = [sample[..., None] if raw else np.frombuffer(sample, np.uint8) for sample in present]
    return _Samples(data, micro.angles, micro.flips.astype(np.int32), micro.rows, mask, damaged)


class _Feed:
    """The source of external_source: of each micro-batch the data, angles and flips."""

    def __init__(self, samples: Iterator[_Samples]) -> None:
        self._samples = samples
        self.inside: deque[_Samples] = deque()  # what DALI has, and has not given back
        self.ended = False

    def all_out(self) -> bool:
        return self.ended and not self.inside

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        for each in self._samples:
            self.inside.append(each)
            yield each.data, each.angles, each.flips
        self.ended = True


class _Graph:
    """A DALI pipeline, kept from one epoch to the next: built anew each time, its memory grew by 2 MiB an epoch."""

    def __init__(self, feed: Iterable[Any], raw: bool, batch: int, workers: int, index: int | None, depth: int) -> None:
        self.feed = feed
        self.stream = torch.cuda.Stream(index) if index is not None else None
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
    # DALI turns about S/2 in coordinates whose pixel centers lie at 1/2: OpenCV's (S-1)/2.
    turned = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
    return fn.flip(turned, horizontal=flip)
