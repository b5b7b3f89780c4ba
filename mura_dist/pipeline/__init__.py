"""From shards to batches: one contract, two backends with the same pixels.

    Micro (rows, angles, flips, mask) -> images of a backend -> Batch on the device

`dali` (made for the GPU) and `cpu` (OpenCV over memory-mapped shards) both rotate counter-clockwise about the centre, bilinear,
fill 0, canvas kept, then flip left-right. Where there is neither rotation nor flip, the pixels are the stored ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..manifest import class_weights
from ..order import Micro
from ..shards import Shards


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device. Where mask is False: row -1, image 0, label 0, weight 0."""

    image: Tensor  # (B, 1, S, S) uint8
    label: Tensor  # (B,) float32, 0 or 1
    weight: Tensor  # (B,) float32, the loss's
    row: Tensor  # (B,) int64
    mask: Tensor  # (B,) bool


@dataclass(frozen=True)
class Targets:
    """What is known of each row without opening it: label (num_rows,) and weight (num_rows,), float32."""

    label: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, shards: Shards, *, weighted: bool) -> "Targets":
        """`weighted`: by study type and label, counted over the train split (arXiv 1712.06957); else all weights are 1.

        A study type the train split lacks weighs 1/2: what the others weigh on average where classes are balanced.
        """
        frame = shards.manifest.frame
        label, study_type = frame["label"].to_numpy(), frame["study_type"].to_numpy()
        weight = np.ones(len(frame), np.float32)
        if weighted:
            train = shards.rows("train")
            table = class_weights(study_type[train], label[train])
            weight[:] = [table.get(name, (0.5, 0.5))[one] for name, one in zip(study_type, label, strict=True)]
        return cls(label.astype(np.float32), weight)


def batches(
    shards: Shards, targets: Targets, micros: Sequence[Micro], *, backend: str, device: torch.device, workers: int
) -> Iterator[Batch]:
    """A Batch for each of `micros`, in their order. Closing the iterator ends its threads."""
    if backend == "dali":
        from . import dali

        images = dali.images(shards, micros, workers=workers, device=device)
    else:
        from . import cpu

        images = (torch.from_numpy(array) for array in cpu.images(shards, micros, workers=workers))
    for micro, image in zip(micros, images, strict=True):
        yield _batch(micro, image, targets, device)


def _batch(micro: Micro, image: Tensor, targets: Targets, device: torch.device) -> Batch:
    label = np.where(micro.mask, targets.label[micro.rows], 0).astype(np.float32)
    weight = np.where(micro.mask, targets.weight[micro.rows], 0).astype(np.float32)
    if device.type == "cuda" and not image.is_cuda:
        image = image.pin_memory()
    on_device = [torch.from_numpy(array).to(device) for array in (label, weight, micro.rows, micro.mask)]
    return Batch(image.to(device, non_blocking=True), *on_device)
