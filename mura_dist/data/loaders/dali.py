"""Load batches with NVIDIA DALI: decoding and geometry on the GPU, or on the CPU without one.

    thread pool: samples in order -> one thread, on its own stream: external_source (pixels or bytes, angles, flips)
        -> decoders.image | raw pixels -> rotate -> flip -> torch -> event -> the consumer's stream

The consumer's stream only waits for the event. `fn.external_source` keeps the order, where DALI's WebDataset reader shuffles
within a buffer and depends on the number of shards that it reads at once. Only this file and a benchmark import DALI.
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
from mura_dist.data.loaders.samples import MicroBatchImages, read_samples
from mura_dist.data.loaders.transfer import send
from mura_dist.data.shards.codec import encode
from mura_dist.data.shards.reader import CorruptSampleError, Shards

_MAX_DEPTH = 8  # micro-batches in DALI, each on the device
_READY = 2  # finished micro-batches that wait for the consumer


def load_images(
    shards: Shards, micro_batches: Iterable[MicroBatch], *, workers: int, device: torch.device, prefetch: int
) -> Iterator[MicroBatchImages]:
    """Yield the images of each of `micro_batches` (all of one B), in order, on `device`, for the current stream."""
    index = None
    if device.type == "cuda":  # here, because the current device is per thread
        index = device.index if device.index is not None else torch.cuda.current_device()
    source = _run(shards, iter(micro_batches), workers, index, min(max(2, prefetch), _MAX_DEPTH))
    with contextlib.closing(prefetch_in_thread(source, ahead=_READY)) as ready:
        for result, event in ready:
            if event is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(event)
                result.pixels.record_stream(stream)  # allocated on the other stream
            yield result


def _run(
    shards: Shards, micro_batches: Iterator[MicroBatch], workers: int, index: int | None, depth: int
) -> Generator[tuple[MicroBatchImages, torch.cuda.Event | None], None, None]:
    """Run a graph over `micro_batches` on GPU `index` (None: CPU). Yield images, and the event after which pixels are valid."""
    if (first := next(micro_batches, None)) is None:
        return
    size, batch = shards.size, len(first.rows)
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool, contextlib.ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        tasks = (pool.submit(_read, shards, micro_batch) for micro_batch in itertools.chain([first], micro_batches))
        feed = _Feed(prefetch_ordered(tasks, ahead=workers))
        key = (shards.encoding == "raw", batch, workers, index, depth)
        graph = _graphs.pop(key, None)
        if graph is None:
            graph = _Graph(feed, *key)
        else:
            graph.start(feed)
        if graph.stream is not None:
            stack.enter_context(torch.cuda.stream(graph.stream))
        while not feed.is_finished():
            # On the same stream as the copy, so that DALI does not reuse memory before it.
            (pixels,) = graph.pipe.run(graph.stream) if graph.stream is not None else graph.pipe.run()
            image = torch.empty((batch, size, size, 1), dtype=torch.uint8, device=device)
            feed_ndarray(pixels.as_tensor(), image, cuda_stream=graph.stream)
            micro_batch = feed.in_flight.popleft()
            if not micro_batch.mask.all():  # a GPU decoder may round encoded black
                image *= send(micro_batch.mask, device).view(batch, 1, 1, 1)
            event = graph.stream.record_event() if graph.stream is not None else None
            if feed.is_finished():  # before the last yield, after which the consumer may not resume this generator
                _graphs[key] = graph
            yield (
                MicroBatchImages(
                    image.view(batch, 1, size, size), micro_batch.rows, micro_batch.mask, micro_batch.corrupt
                ),
                event,
            )


@dataclass(frozen=True)
class _Samples:
    """A micro-batch as read from the shards."""

    data: list[np.ndarray]  # B of pixels uint8 (S, S, 1), or of encoded radiographs, uint8 (bytes,)
    angles: np.ndarray  # (B,) float32
    flips: np.ndarray  # (B,) int32
    rows: np.ndarray  # (B,) int64
    mask: np.ndarray  # (B,) bool
    corrupt: tuple[CorruptSampleError, ...]


def _read(shards: Shards, micro_batch: MicroBatch) -> _Samples:
    size, encoding = shards.size, shards.encoding
    samples, mask, corrupt = read_samples(shards, micro_batch, encoded=encoding != "raw")
    raw, black = encoding == "raw", np.zeros((size, size), np.uint8)
    blank: Any = black if raw or mask.all() else encode(black, encoding)
    present = [blank if sample is None else sample for sample in samples]
    data = [sample[..., None] if raw else np.frombuffer(sample, np.uint8) for sample in present]
    return _Samples(data, micro_batch.angles, micro_batch.flips.astype(np.int32), micro_batch.rows, mask, corrupt)


class _Feed:
    """Source of external_source: data, angles and flips of each micro-batch."""

    def __init__(self, samples: Iterator[_Samples]) -> None:
        self._samples = samples
        self.in_flight: deque[_Samples] = deque()  # in DALI
        self.is_exhausted = False

    def is_finished(self) -> bool:
        return self.is_exhausted and not self.in_flight

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
        for samples in self._samples:
            self.in_flight.append(samples)
            yield samples.data, samples.angles, samples.flips
        self.is_exhausted = True


class _Graph:
    """A DALI pipeline that is reused by later epochs, because rebuilding it leaks memory."""

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
        """Reuse the pipeline for a new feed, after all results of the last one."""
        with contextlib.suppress(StopIteration):
            self.pipe.run()
        self.feed = feed
        self.pipe.reset()

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the current feed, which is looked up at the start because DALI requests the iterator early."""
        yield from self.feed


_graphs: dict[tuple[Any, ...], _Graph] = {}  # idle graphs; those of an unfinished epoch are dropped


@pipeline_def  # type: ignore[untyped-decorator]
def _pipeline(feed: Iterable[Any], *, raw: bool, on_gpu: bool) -> Any:
    layout = ["HWC", "", ""] if raw else None
    data, angle, flip = fn.external_source(source=feed, num_outputs=3, batch=True, layout=layout, cycle="raise")
    if raw:
        pixels = data.gpu() if on_gpu else data
    else:
        pixels = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", output_type=types.GRAY)
    # DALI rotates about S/2 with pixel centers at 1/2, which is OpenCV's (S-1)/2.
    rotated = fn.rotate(pixels, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
    return fn.flip(rotated, horizontal=flip)
