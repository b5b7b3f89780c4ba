"""Batches of radiographs that stay in the device's memory (pipeline=resident; experimental, not measured on a GPU).

    rows that are not kept yet -> threads: read, decoded, into pinned memory -> Store: uint8 (n, S, S) on the device
    slot in the store, angle, flip of each radiograph -> one pinned transfer -> warp.py -> uint8 (B, 1, S, S)

A row is read when a micro-batch first asks for it: train's in the first epoch, tune's in the first evaluation. From then on
a batch costs the host one small transfer and the launch of one kernel.
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

_SHARE = 0.5  # of the free memory of the device, which the store may take; the rest is the training's
_NO_PIXELS = torch.empty(0, dtype=torch.uint8)
_UNREAD, _DAMAGED = -1, -2  # a row's slot, where it has none


def images(
    store: "Store", micro_batches: Iterable[MicroBatch], *, workers: int, prefetch: int
) -> Iterator[MicroBatchImages]:
    """Yield the Images of each of `micros`, in order, on the device, reading up to `prefetch` micro-batches ahead.

    Raises:
        RankLocalUserError: the store would outgrow its share of the device's memory.
    """
    is_claimed = np.zeros(store.num_rows, bool)  # rows that a micro-batch before this one reads

    with ThreadPoolExecutor(workers, thread_name_prefix="load") as pool:

        def claim(micro: MicroBatch) -> Future[_Block]:
            rows = np.unique(micro.rows[micro.mask])
            missing = rows[store.is_unread(rows) & ~is_claimed[rows]]
            if not len(missing):
                task: Future[_Block] = Future()
                task.set_result(_Block(micro, missing, _NO_PIXELS, ()))
                return task
            is_claimed[missing] = True
            store.reserve(missing)
            return pool.submit(store.read, micro, missing)

        try:
            for block in prefetch_ordered(map(claim, micro_batches), ahead=prefetch):
                store.add(block)
                yield store.images(block.micro)
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Block:
    """Radiographs read for a micro-batch: those that the store did not have."""

    micro: MicroBatch
    rows: np.ndarray  # (k,)
    pixels: Tensor  # (k, S, S), pinned where the store is on a GPU
    damaged: tuple[CorruptSampleError, ...]


class Store:
    """Radiographs on the device, with room for all of each split that was asked for. Used by one thread, but for `read`."""

    def __init__(self, shards: Shards, device: torch.device) -> None:
        """Keep nothing yet."""
        self._shards, self._device = shards, device
        self._split_of = shards.manifest.frame["split"].to_numpy()
        self._slots = np.full(self.num_rows, _UNREAD, np.int32)  # of each row, in `pixels`
        self._damaged: dict[int, CorruptSampleError] = {}
        self._splits: set[str] = set()
        self._num_kept = 0
        self._pixels = torch.empty(
            (1, shards.size, shards.size), dtype=torch.uint8, device=device
        )  # a kernel may have no radiograph to read, but no empty memory
        self._warp = select_warp(device)
        self._stream: torch.cuda.Stream | None = None  # the one that used `pixels` last

    @property
    def num_rows(self) -> int:
        return len(self._shards.manifest.frame)

    def is_unread(self, rows: np.ndarray) -> np.ndarray:
        """Return for each of `rows` whether it still has to be read, bool (n,)."""
        return self._slots[rows] == _UNREAD

    def reserve(self, rows: np.ndarray) -> None:
        """Make room for all of the splits that `rows` are of.

        Raises:
            RankLocalUserError: their pixels take more than the store's share of the memory that is free.
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
                f"on {self._device} is {limit:,} ({_SHARE:.0%} of what is free); give pipeline=dali or pipeline=cpu"
            )
        self._follow_stream()
        old_pixels = self._pixels
        self._pixels = torch.empty((count, size, size), dtype=torch.uint8, device=self._device)
        self._pixels[: self._num_kept].copy_(old_pixels[: self._num_kept])
        if self._stream is not None:
            old_pixels.record_stream(self._stream)
        self._splits = splits

    def read(self, micro: MicroBatch, rows: np.ndarray) -> _Block:
        """Read and decode `rows` into memory that a GPU copies from by itself; damaged ones are named, not kept."""
        size = self._shards.size
        pixels = torch.empty((len(rows), size, size), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        array, damaged = pixels.numpy(), []
        readable: list[int] = []
        for row in rows.tolist():
            try:
                array[len(readable)] = self._shards.read_pixels(row)
                readable.append(row)
            except CorruptSampleError as error:
                damaged.append(error)
        return _Block(micro, np.array(readable, np.int64), pixels[: len(readable)], tuple(damaged))

    def add(self, block: _Block) -> None:
        """Keep what was read; another stream of batches may have been faster for some of it."""
        self._follow_stream()
        for number in np.flatnonzero(self.is_unread(block.rows)).tolist():
            self._pixels[self._num_kept].copy_(block.pixels[number], non_blocking=True)
            self._slots[block.rows[number]] = self._num_kept
            self._num_kept += 1
        for damaged in block.damaged:
            self._slots[damaged.row] = _DAMAGED
            self._damaged[damaged.row] = damaged

    def images(self, micro: MicroBatch) -> MicroBatchImages:
        """Warp a micro-batch whose rows were all read."""
        slots = np.where(micro.mask, self._slots[micro.rows], _UNREAD)
        mask = slots >= 0
        packet = np.empty((len(slots), 7), np.float32)  # slot (int32), map
        packet.view(np.int32)[:, 0] = np.where(mask, slots, -1)
        packet[:, 1:] = inverse_maps(micro.angles, micro.flips, self._shards.size)
        on_device = send(packet, self._device)
        self._follow_stream()
        pixels = self._warp(self._pixels, on_device.view(torch.int32)[:, 0], on_device[:, 1:])
        damaged = micro.rows[slots == _DAMAGED].tolist()
        return MicroBatchImages(pixels, micro.rows, mask, tuple(copy.copy(self._damaged[row]) for row in damaged))

    def _follow_stream(self) -> None:
        """Let the current stream wait for the one that used `pixels` before, where it is another."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream
