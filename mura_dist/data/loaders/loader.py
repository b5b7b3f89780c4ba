"""From shards to batches: one contract, three backends with the same pixels.

    MicroBatch (rows, angles, flips, mask) -> Images of a backend -> Batch on the device

`dali` (made for the GPU), `cpu` (OpenCV) and `resident` (radiographs that stay on the device; experimental) rotate
counter-clockwise about the center, bilinear, fill 0, canvas kept, then flip left-right. Where there is neither rotation nor
flip, the pixels are the stored ones.

A damaged sample is named on stderr once, its place is masked like one that only fills the shape, and the work goes on;
with `strict` it ends.
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

# Of pixels a rank holds ready by default: seconds of training, a moment's hiccup of a disk.
_PREFETCHED_BYTES = 64 << 20


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device. Where mask is False: image 0, label 0, weight 0, and row -1 unless its sample is damaged."""

    image: Tensor  # (B, 1, S, S) uint8
    label: Tensor  # (B,) float32, 0 or 1
    weight: Tensor  # (B,) float32, the loss's
    row: Tensor  # (B,) int64
    mask: Tensor  # (B,) bool
    num_corrupt: int = 0  # places whose samples are corrupt: a subset of those where mask is False


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
            weight[:] = [pairs[name][one] for name, one in zip(study_type, label, strict=True)]
        return cls(label.astype(np.float32), weight)


@dataclass(frozen=True)
class BatchLoader:
    """What makes one rank's batches from its micro-batches."""

    shards: Shards
    targets: RowTargets
    device: torch.device
    backend: str  # dali, cpu or resident
    micro_batch: int  # B of training's micro-batches; load() takes others
    workers: int  # threads
    prefetch: int = 0  # micro-batches of that size ready ahead of the step; 0: two a thread
    strict: bool = False  # RunError at the first damaged sample
    timeout_s: float = math.inf  # one of several ranks that waits longer for a batch says so and ends
    note: str = ""  # why the backend is not what it should be

    @classmethod
    def from_settings(
        cls, settings: Settings, shards: Shards, targets: RowTargets, device: torch.device
    ) -> "BatchLoader":
        """Choose from the machine what the settings leave open.

        The backend is DALI on CUDA where it is installed, OpenCV elsewhere. The threads are this rank's share of the
        processors, four at most (eight beside a GPU, which needs none). As many micro-batches are ready ahead as 64 MiB hold,
        from two a thread to sixteen a thread.

        Raises:
            UserError: pipeline=dali where DALI cannot be imported.
        """
        cuda = device.type == "cuda"
        backend, note = choose_backend(settings.pipeline, device)
        workers = settings.workers or min(8 if cuda else 4, max(1, num_processors() // environment.local_world_size()))
        fitting = _PREFETCHED_BYTES // (settings.micro_batch * shards.size**2)
        prefetch = settings.prefetch or int(np.clip(fitting, 2 * workers, 16 * workers))
        return cls(
            shards,
            targets,
            device,
            backend,
            settings.micro_batch,
            workers,
            prefetch,
            settings.strict,
            settings.collective_timeout_s,
            note,
        )

    def load(self, micro_batches: Iterable[MicroBatch]) -> Generator[Batch, None, None]:
        """Yield a Batch for each of `micros`, in their order. Closing the iterator ends its threads.

        Raises:
            RunError: the shards cannot be read (ShardReadError), or a sample is damaged and `strict` is set.
        """
        for images in _in_time(self._images(micro_batches), self.shards, self.timeout_s):
            for damaged in images.damaged:
                if self.strict:
                    raise RunError(
                        f"{damaged}; strict=true ends here: mend it (`mura-dist verify` names all), then the same command"
                    )
                if self.shards.record_corrupt(damaged):
                    print(f"{damaged}; left out, the run goes on (strict=true would end it)", file=sys.stderr)  # noqa: T201
            yield self._batch(images)

    def _images(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatchImages]:
        coming = iter(micro_batches)
        if (first := next(coming, None)) is None:
            return iter(())
        micro_batches, ahead = itertools.chain([first], coming), self._num_ahead(len(first.rows))
        if self.backend == "dali":
            from mura_dist.data.loaders import dali

            return dali.images(self.shards, micro_batches, workers=self.workers, device=self.device, prefetch=ahead)
        if self.backend == "resident":
            return resident.images(self._store, micro_batches, workers=self.workers, prefetch=ahead)
        from mura_dist.data.loaders import opencv

        pinned = self.device.type == "cuda"
        return opencv.images(self.shards, micro_batches, workers=self.workers, prefetch=ahead, pinned=pinned)

    def _num_ahead(self, batch: int) -> int:
        """Micro-batches of `batch` radiographs to have ready: no more radiographs than of training's, down to two a thread."""
        ahead = self.prefetch or 2 * self.workers
        return min(ahead, max(2 * self.workers, ahead * self.micro_batch // batch))

    def _batch(self, images: MicroBatchImages) -> Batch:
        rows, mask, num_corrupt = images.rows, images.mask, len(images.damaged)
        if self.device.type == "cpu":  # the device's way would take longer here
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
        how = f"{self.workers} threads a rank, {self.prefetch} micro-batches ahead"
        note = f" ({self.note})" if self.note else ""
        return f"batches by {self.backend}{note} from {self.shards.encoding} shards, {how}"


def _in_time(
    made: Iterator[MicroBatchImages], shards: Shards, timeout_s: float
) -> Generator[MicroBatchImages, None, None]:
    """The same; where several ranks are and one waits longer than `timeout_s`, its process ends."""
    env = environment.launch_env()
    if env.world_size == 1 or math.isinf(timeout_s):
        yield from made
        return
    line = (
        f"rank {env.rank} waited {timeout_s:g} s (collective_timeout_s) for radiographs from {shards.folder}: the disk is slow, or gone; "
        "mend it, or give mirror=FOLDER on this machine's own; the same command goes on from the last checkpoint"
    )
    with contextlib.closing(Watchdog(timeout_s, line)) as watchdog:
        while True:
            with watchdog.waiting():
                images = next(made, None)
            if images is None:
                return
            yield images
