"""Load batches from radiographs that stay in the device's memory (pipeline=resident; experimental, not measured on a GPU).

    rows that are not stored yet -> threads: read, decode, into pinned memory -> Store: uint8 (n, S, S) on the device
    slot, angle and flip of each radiograph -> one pinned transfer -> warp.py -> uint8 (B, 1, S, S)

A row is read when a micro-batch first needs it: train's in the first epoch, tune's in the first evaluation. After that, a batch
costs the host one small transfer and one kernel launch.
"""

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mura_dist.core.errors import RankLocalUserError
from mura_dist.data.loaders.device_memory import free_bytes
from mura_dist.data.loaders.prefetch import prefetch_ordered
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.loaders.samples import MicroBatchImages
from mura_dist.data.loaders.transfer import send
from mura_dist.data.loaders.warp import inverse_maps, select_warp
from mura_dist.data.shards.reader import CorruptSampleError, Shards

_SHARE = 0.5  # of the device's free memory
_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
_UNREAD, _CORRUPT = -1, -2  # slots of rows that are not stored


def load_images(
    store: "Store", micro_batches: Iterable[MicroBatch], *, workers: int, prefetch: int
) -> Iterator[MicroBatchImages]:
    """Yield the images of each of `micro_batches`, in order, on the device, reading up to `prefetch` micro-batches ahead.

    Raises:
        RankLocalUserError: The store would exceed its share of the device's memory.
    """
    is_scheduled = np.zeros(store.num_rows, bool)  # rows that an earlier micro-batch reads

    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:

        def schedule(micro_batch: MicroBatch) -> Future[_Block]:
            rows = np.unique(micro_batch.rows[micro_batch.mask])
            missing = rows[store.is_unread(rows) & ~is_scheduled[rows]]
            if not len(missing):
                task: Future[_Block] = Future()
                task.set_result(_Block(micro_batch, missing, _NO_PIXELS, ()))
                return task
            is_scheduled[missing] = True
            store.reserve(missing)
            return pool.submit(store.read, micro_batch, missing)

        try:
            for block in prefetch_ordered(map(schedule, micro_batches), ahead=prefetch):
                store.add(block)
                yield store.warp_images(block.micro_batch)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Block:
    """The radiographs that a micro-batch needs and the store did not have."""

    micro_batch: MicroBatch
    rows: np.ndarray  # (k,)
    pixels: Tensor  # (k, S, S), pinned where the store is on a GPU
    corrupt: tuple[CorruptSampleError, ...]


class Store:
    """Radiographs on the device, with memory for all of each requested split. Only `read` may be called by other threads."""

    def __init__(self, shards: Shards, device: torch.device) -> None:
        """Create an empty store."""
        self._shards, self._device = shards, device
        self._split_of = shards.manifest.frame["split"].to_numpy()
        self._slots = np.full(self.num_rows, _UNREAD, np.int32)  # of each row, in `pixels`
        self._corrupt: dict[int, CorruptSampleError] = {}
        self._splits: set[str] = set()
        self._num_stored = 0
        self._pixels = torch.empty(
            (1, shards.size, shards.size), dtype=torch.uint8, device=device
        )  # not empty, because a kernel may run before any radiograph is stored
        self._warp = select_warp(device)
        self._stream: torch.cuda.Stream | None = None  # the last one that used `pixels`

    @property
    def num_rows(self) -> int:
        """Number of rows of the manifest."""
        return len(self._shards.manifest.frame)

    def is_unread(self, rows: np.ndarray) -> np.ndarray:
        """Return which of `rows` were not read yet, bool (n,)."""
        return self._slots[rows] == _UNREAD

    def reserve(self, rows: np.ndarray) -> None:
        """Allocate memory for all radiographs of the splits of `rows`.

        Raises:
            RankLocalUserError: They exceed the store's share of the free memory.
        """
        splits = self._splits.union(self._split_of[rows])
        if splits == self._splits:
            return
        size = self._shards.size
        count = sum(len(self._shards.rows(split)) for split in splits)
        replaced = self._pixels.numel() if self._splits else 0  # bytes
        num_bytes, limit = count * size**2, int(_SHARE * (free_bytes(self._device) + replaced))
        if num_bytes > limit:
            raise RankLocalUserError(
                f"pipeline=resident: the {count} radiographs of {', '.join(sorted(splits))} take {num_bytes:,} bytes, the limit "
                f"on {self._device} is {limit:,} ({_SHARE:.0%} of the free memory). Give pipeline=dali or pipeline=cpu."
            )
        self._follow_stream()
        old_pixels = self._pixels
        self._pixels = torch.empty((count, size, size), dtype=torch.uint8, device=self._device)
        self._pixels[: self._num_stored].copy_(old_pixels[: self._num_stored])
        if self._stream is not None:
            old_pixels.record_stream(self._stream)
        self._splits = splits

    def read(self, micro_batch: MicroBatch, rows: np.ndarray) -> _Block:
        """Read and decode `rows` into memory for transfers to the device (pinned for a GPU)."""
        size = self._shards.size
        pixels = torch.empty((len(rows), size, size), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        array, corrupt = pixels.numpy(), []
        readable: list[int] = []
        for row in rows.tolist():
            try:
                array[len(readable)] = self._shards.read_pixels(row)
                readable.append(row)
            except CorruptSampleError as error:
                corrupt.append(error)
        return _Block(micro_batch, np.array(readable, np.int64), pixels[: len(readable)], tuple(corrupt))

    def add(self, block: _Block) -> None:
        """Store the radiographs of a block, unless another iterator has stored them."""
        self._follow_stream()
        for number in np.flatnonzero(self.is_unread(block.rows)).tolist():
            self._pixels[self._num_stored].copy_(block.pixels[number], non_blocking=True)
            self._slots[block.rows[number]] = self._num_stored
            self._num_stored += 1
        for corrupt in block.corrupt:
            self._slots[corrupt.row] = _CORRUPT
            self._corrupt[corrupt.row] = corrupt

    def warp_images(self, micro_batch: MicroBatch) -> MicroBatchImages:
        """Return the images of a micro-batch whose rows were all read."""
        slots = np.where(micro_batch.mask, self._slots[micro_batch.rows], _UNREAD)
        mask = slots >= 0
        packet = np.empty((len(slots), 7), np.float32)  # slot (int32), map
        packet.view(np.int32)[:, 0] = np.where(mask, slots, -1)
        packet[:, 1:] = inverse_maps(micro_batch.angles, micro_batch.flips, self._shards.size)
        on_device = send(packet, self._device)
        self._follow_stream()
        pixels = self._warp(self._pixels, on_device.view(torch.int32)[:, 0], on_device[:, 1:])
        corrupt = micro_batch.rows[slots == _CORRUPT].tolist()
        return MicroBatchImages(pixels, micro_batch.rows, mask, tuple(copy.copy(self._corrupt[row]) for row in corrupt))

    def _follow_stream(self) -> None:
        """Let the current stream wait for the last one that used `pixels`."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream
