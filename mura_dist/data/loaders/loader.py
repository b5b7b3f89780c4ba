"""Load batches from shards, by one of three backends with the same pixels.

    MicroBatch (rows, angles, flips, mask) -> MicroBatchImages of a backend -> Batch on the device

`dali` (for GPUs), `cpu` (OpenCV) and `resident` (radiographs stay on the device; experimental) rotate counter-clockwise about
the center (bilinear, fill 0, same canvas), then flip left-right. Without rotation and flip, pixels are the stored ones.

A corrupt sample is reported once on stderr and masked like padding. With `strict` it is an error.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mura_dist.core.config import Settings
from mura_dist.core.errors import RunError
from mura_dist.data.class_weights import LossWeights, compute_class_weights
from mura_dist.data.loaders import resident
from mura_dist.data.loaders.backend import choose_backend
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.loaders.samples import MicroBatchImages
from mura_dist.data.loaders.transfer import DeviceTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import environment
from mura_dist.distributed.processes import num_processors
from mura_dist.distributed.watchdog import Watchdog

# Pixels that a rank prefetches by default: seconds of training.
_PREFETCHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Batch:
    """Micro-batch on the device. Where mask is False: image, label and weight 0, and row -1 unless the sample is corrupt."""

    image: Tensor  # (B, 1, S, S) uint8
    label: Tensor  # (B,) float32, 0 or 1
    weight: Tensor  # (B,) float32, of the loss
    row: Tensor  # (B,) int64
    mask: Tensor  # (B,) bool
    num_corrupt: int = 0  # number of corrupt samples, where mask is False


@dataclass(frozen=True)
class RowTargets:
    """Label and loss weight of every row of the manifest, float32 (num_rows,) each."""

    label: np.ndarray
    weight: np.ndarray

    @classmethod
    def from_shards(cls, shards: Shards, loss_weights: LossWeights = "none") -> "RowTargets":
        """Look up all labels, and weigh them by the label counts of the train split (class_weights)."""
        frame = shards.manifest.frame
        label, study_type = frame["label"].to_numpy(), frame["study_type"].to_numpy()
        weight = np.ones(len(frame), np.float32)
        if loss_weights != "none":
            train = shards.rows("train")
            pairs = compute_class_weights(loss_weights, study_type[train], label[train], set(study_type))
            weight[:] = [pairs[name][positive] for name, positive in zip(study_type, label, strict=True)]
        return cls(label.astype(np.float32), weight)


@dataclass(frozen=True)
class BatchLoader:
    """Loader of one rank's batches."""

    shards: Shards
    targets: RowTargets
    device: torch.device
    backend: str  # dali, cpu or resident
    micro_batch: int  # B in training; load() takes other sizes too
    workers: int  # threads
    prefetch: int = 0  # micro-batches of that size to prefetch; 0: two per thread
    strict: bool = False  # RunError at the first corrupt sample
    timeout_s: float = math.inf  # with several ranks, exit after waiting this long for a batch
    note: str = ""  # reason for a fallback backend

    @classmethod
    def from_settings(
        cls, settings: Settings, shards: Shards, targets: RowTargets, device: torch.device
    ) -> "BatchLoader":
        """Create the loader of a run; see `for_machine`."""
        return cls.for_machine(
            shards,
            targets,
            device,
            settings.micro_batch,
            pipeline=settings.pipeline,
            workers=settings.workers,
            prefetch=settings.prefetch,
            strict=settings.strict,
            timeout_s=settings.collective_timeout_s,
        )

    @classmethod
    def for_machine(
        cls,
        shards: Shards,
        targets: RowTargets,
        device: torch.device,
        micro_batch: int,
        *,
        pipeline: str = "auto",
        workers: int = 0,
        prefetch: int = 0,
        strict: bool = False,
        timeout_s: float = math.inf,
    ) -> "BatchLoader":
        """Create a loader, and choose by the machine what is left open.

        `auto` is DALI on CUDA where it is installed, else OpenCV. 0 workers are this rank's share of the processors, at most
        four (eight with a GPU). 0 prefetched micro-batches are 64 MiB of them, between two and sixteen per thread.

        Raises:
            UserError: pipeline=dali, but DALI cannot be imported.
        """
        backend, note = choose_backend(pipeline, device)
        most = 8 if device.type == "cuda" else 4
        workers = workers or min(most, max(1, num_processors() // environment.local_world_size()))
        fitting = _PREFETCHED_BYTES // (micro_batch * shards.size**2)
        prefetch = prefetch or int(np.clip(fitting, 2 * workers, 16 * workers))
        return cls(shards, targets, device, backend, micro_batch, workers, prefetch, strict, timeout_s, note)

    def load(self, micro_batches: Iterable[MicroBatch]) -> Generator[Batch, None, None]:
        """Yield a Batch for each of `micro_batches`, in order. Closing the iterator ends its threads.

        Raises:
            RunError: The shards cannot be read (ShardReadError), or a sample is corrupt and `strict` is set.
        """
        for images in _with_timeout(self._images(micro_batches), self.shards, self.timeout_s):
            for corrupt in images.corrupt:
                if self.strict:
                    raise RunError(
                        f"{corrupt} (strict=true). Make its shard again (`mura-dist verify` lists all), then rerun."
                    )
                if self.shards.record_corrupt(corrupt):
                    print(f"{corrupt}. It is skipped (strict=true makes it an error).", file=sys.stderr)  # noqa: T201
            yield self._batch(images)

    def _images(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatchImages]:
        remaining = iter(micro_batches)
        if (first := next(remaining, None)) is None:
            return iter(())
        micro_batches, ahead = itertools.chain([first], remaining), self._num_ahead(len(first.rows))
        if self.backend == "dali":
            from mura_dist.data.loaders import dali

            return dali.load_images(
                self.shards, micro_batches, workers=self.workers, device=self.device, prefetch=ahead
            )
        if self.backend == "resident":
            return resident.load_images(self._store, micro_batches, workers=self.workers, prefetch=ahead)
        from mura_dist.data.loaders import opencv

        pinned = self.device.type == "cuda"
        return opencv.load_images(self.shards, micro_batches, workers=self.workers, prefetch=ahead, pinned=pinned)

    def _num_ahead(self, batch: int) -> int:
        """Return how many micro-batches of `batch` radiographs to prefetch: the memory of training's, at least two per thread."""
        ahead = self.prefetch or 2 * self.workers
        return min(ahead, max(2 * self.workers, ahead * self.micro_batch // batch))

    def _batch(self, images: MicroBatchImages) -> Batch:
        rows, mask, num_corrupt = images.rows, images.mask, len(images.corrupt)
        if self.device.type == "cpu":  # faster than DeviceTargets on a CPU
            label = np.where(mask, self.targets.label[rows], 0).astype(np.float32)
            weight = np.where(mask, self.targets.weight[rows], 0).astype(np.float32)
            arrays = [torch.from_numpy(array) for array in (label, weight, rows, mask)]
            return Batch(images.pixels, arrays[0], arrays[1], arrays[2], arrays[3], num_corrupt)
        image = images.pixels.to(self.device, non_blocking=True)
        return Batch(image, *self._device_targets.look_up(rows, mask), num_corrupt=num_corrupt)

    @cached_property
    def _store(self) -> resident.Store:
        return resident.Store(self.shards, self.device)

    @cached_property
    def _device_targets(self) -> DeviceTargets:
        return DeviceTargets(self.targets.label, self.targets.weight, self.device)

    def __str__(self) -> str:
        threads = f"{self.workers} threads per rank, {self.prefetch} micro-batches ahead"
        note = f" ({self.note})" if self.note else ""
        return f"batches by {self.backend}{note} from {self.shards.encoding} shards, {threads}"


def _with_timeout(
    batches: Iterator[MicroBatchImages], shards: Shards, timeout_s: float
) -> Generator[MicroBatchImages, None, None]:
    """Yield `batches`. One of several ranks that waits longer than `timeout_s` for one exits."""
    env = environment.launch_env()
    if env.world_size == 1 or math.isinf(timeout_s):
        yield from batches
        return
    line = (
        f"rank {env.rank} waited {timeout_s:g} s (collective_timeout_s) for radiographs from {shards.folder}: the disk is slow "
        "or gone. Fix it, or give mirror=FOLDER on a local disk. The same command resumes from the last checkpoint."
    )
    with contextlib.closing(Watchdog(timeout_s, line)) as watchdog:
        while True:
            with watchdog.waiting():
                images = next(batches, None)
            if images is None:
                return
            yield images
