"""Load batches from a shard folder in any PyTorch loop.

    data_loader(shards, split) -> DataLoader -> Batch, Batch, ...        resumed from {"epoch": 3, "step": 120}

The order and the augmentation of `train` are those of `mura-dist train`: pure functions of (shards, seed, epoch, step).
"""

from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import torch

from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data.class_weights import LossWeights
from mura_dist.data.loaders import sampler
from mura_dist.data.loaders.backend import BACKENDS
from mura_dist.data.loaders.loader import Batch, BatchLoader, RowTargets
from mura_dist.data.loaders.sampler import MicroBatch
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import environment


class DataLoader:
    """An iterable of the Batches of one epoch. Each iteration continues where the previous one ended.

    A Batch holds image (B, 1, S, S) uint8, label (B,) float32, weight (B,) float32, row (B,) int64 and mask (B,) bool, on
    the device. Where mask is False, the position is padding or a corrupt sample: weight 0, and row -1 for padding.
    """

    def __init__(
        self,
        loader: BatchLoader,
        rows: np.ndarray,
        *,
        seed: int,
        shuffle: bool,
        rotate_deg: float,
        flip: bool,
        rank: int,
        world_size: int,
    ) -> None:
        """Wrap a loader for `rows`, int64 (n,). Use `data_loader` to create one."""
        self.loader, self.rows = loader, rows
        self.seed, self.shuffle, self.rotate_deg, self.flip = seed, shuffle, rotate_deg, flip
        self.rank, self.world_size = rank, world_size
        self.epoch, self.step = 0, 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch on this rank."""
        global_batch = self.loader.micro_batch * self.world_size
        return len(self.rows) // global_batch if self.shuffle else -(-len(self.rows) // global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the current epoch from the current step on, then begin the next epoch.

        Raises:
            RunError: The shards cannot be read, or a sample is corrupt and `strict` is set.
        """
        micro_batches = self._micro_batches()[self.step :]
        for batch in self.loader.load(micro_batches):
            self.step += 1
            yield batch
        self.epoch, self.step = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, at its first batch."""
        self.epoch, self.step = _check_position("epoch", epoch), 0

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the number of its batches that were yielded."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` returned, on any number of ranks of the same global batch."""
        epoch, step = (_check_position(name, state.get(name)) for name in ("epoch", "step"))
        if step > len(self):
            raise UserError(
                f"step {step} of a data loader's state: this epoch has {len(self)} batches. Give what state_dict returned."
            )
        self.epoch, self.step = epoch, step

    def _micro_batches(self) -> list[MicroBatch]:
        sizes = {"micro_batch": self.loader.micro_batch, "rank": self.rank, "world_size": self.world_size}
        if not self.shuffle:
            return sampler.evaluation_micro_batches(self.rows, **sizes)
        order = sampler.epoch_permutation(self.rows, self.seed, self.epoch, rotate_deg=self.rotate_deg, flip=self.flip)
        global_batch = self.loader.micro_batch * self.world_size
        return [
            batch
            for step in range(len(self))
            for batch in sampler.step_micro_batches(order, step, global_batch=global_batch, **sizes)
        ]


def data_loader(
    shards: StoragePath,
    *,
    split: str = "train",
    micro_batch: int = 32,
    seed: int = 0,
    shuffle: bool | None = None,
    rotate_deg: float | None = None,
    flip: bool | None = None,
    loss_weights: LossWeights = "none",
    device: torch.device | str | None = None,
    pipeline: str = "auto",
    workers: int = 0,
    strict: bool = False,
) -> DataLoader:
    """Open a shard folder for a training or evaluation loop. Under torchrun each rank gets its share.

    Args:
        shards: Folder or URL that `mura-dist shards` wrote.
        split: train, tune or valid.
        micro_batch: Radiographs per batch and rank.
        seed: Seed of order and augmentation.
        shuffle: Draw a new order in each epoch and drop the last incomplete batch. Without it every radiograph comes once, in
            order, and `mask` is False for padding. Default: for train only.
        rotate_deg: Largest angle of rotation in degrees. Default: 30 where shuffled, else 0.
        flip: Flip left-right with probability 1/2. Default: where shuffled.
        loss_weights: none, class or study_type: what `Batch.weight` holds.
        device: Where batches go. Default: this rank's GPU, else the CPU.
        pipeline: auto, dali, cpu or resident.
        workers: Loading threads. 0: chosen from the machine.
        strict: Raise RunError at the first corrupt sample. Otherwise it is reported once, and `mask` is False for it.

    Returns:
        An iterable of Batches.

    Raises:
        UserError: no finished shards, an empty split, fewer radiographs than a batch, or a value out of range.
    """
    _check_choice("pipeline", pipeline, ("auto", *BACKENDS))
    _check_choice("loss_weights", loss_weights, get_args(LossWeights))
    opened = Shards.open(shards)
    rows = opened.rows(split)
    if micro_batch < 1:
        raise UserError(f"micro_batch={micro_batch}: must be at least 1. Give the radiographs per batch.")
    if workers < 0:
        raise UserError(
            f"workers={workers}: must be at least 0. Give the loading threads, or 0 for a choice by the machine."
        )
    if rotate_deg is not None and not 0 <= rotate_deg <= 180:
        raise UserError(f"rotate_deg={rotate_deg}: must lie between 0 and 180. Give the largest angle in degrees.")
    if device is None:
        device = torch.device("cuda", environment.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(device)
    shuffle = split == "train" if shuffle is None else shuffle
    if shuffle and len(rows) < (global_batch := micro_batch * environment.world_size()):
        raise UserError(
            f"micro_batch={micro_batch}: a step takes {global_batch} of {len(rows)} radiographs. Give a smaller one."
        )
    targets = RowTargets.from_shards(opened, loss_weights)
    loader = BatchLoader.for_machine(
        opened, targets, device, micro_batch, pipeline=pipeline, workers=workers, strict=strict
    )
    return DataLoader(
        loader,
        rows,
        seed=seed,
        shuffle=shuffle,
        rotate_deg=(30.0 if shuffle else 0.0) if rotate_deg is None else rotate_deg,
        flip=shuffle if flip is None else flip,
        rank=environment.rank(),
        world_size=environment.world_size(),
    )


def _check_choice(name: str, choice: str, choices: Sequence[str]) -> None:
    if choice not in choices:
        raise UserError(f"{name}={choice}: must be one of {', '.join(choices)}.")


def _check_position(name: str, number: int | None) -> int:
    if not isinstance(number, int | np.integer) or number < 0:
        raise UserError(f"{name} {number!r} of a data loader: must be a whole number. Count from 0.")
    return int(number)
