"""Compute and check what follows from settings, shards and the number of ranks before the first step."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mura_dist.core import files
from mura_dist.core.config import AUTO, Settings
from mura_dist.core.errors import UserError
from mura_dist.data.loaders import sampler
from mura_dist.data.shards.reader import Shards
from mura_dist.training import deepspeed_config


@dataclass(frozen=True)
class Plan:
    """The sizes and the order of a training.

    Attributes:
        settings: The settings, with the micro-batch resolved after `with_micro_batch`.
        shards: The open shards.
        train: Rows of the train split, int64.
        select: Rows of the selecting split, which drives the plateau and the choice of the best checkpoint, int64.
        world_size: The number of ranks.
        deepspeed: The values of a user's DeepSpeed file.
    """

    settings: Settings
    shards: Shards
    train: np.ndarray
    select: np.ndarray
    world_size: int
    deepspeed: dict[str, Any]

    @classmethod
    def from_settings(cls, settings: Settings, world_size: int) -> "Plan":
        """Open the shards and compute the plan.

        Raises:
            UserError: shards, settings and number of ranks are incompatible.
        """
        shards = Shards.open(settings.shards, files.expand_user(settings.mirror) if settings.mirror else None)
        train, select = shards.rows("train"), shards.rows(settings.select_on)
        shards.check_tars("train", settings.select_on)
        plan = cls(settings, shards, train, select, world_size, {})
        if plan.steps_per_epoch == 0:
            raise UserError(
                f"global_batch={settings.global_batch} is larger than the train split ({len(train)} radiographs). "
                "Give a smaller global_batch."
            )
        return plan if settings.micro_batch == AUTO else plan.with_micro_batch(settings.micro_batch)

    def with_micro_batch(self, size: int) -> "Plan":
        """Return the plan with a micro-batch of `size` radiographs.

        Raises:
            UserError: the global batch is not a multiple of the micro-batches of all ranks.
        """
        plan = replace(self, settings=self.settings.model_copy(update={"micro_batch": size}))
        plan._check_micro_batch()
        return replace(plan, deepspeed=deepspeed_config.load_user_config(plan.settings, self.world_size))

    def _check_micro_batch(self) -> None:
        settings, size = self.settings, self.settings.micro_batch
        unit = size * self.world_size  # radiographs of the smallest possible step
        if unit > len(self.train):
            raise UserError(
                f"{self.world_size} ranks x micro_batch {size} = {unit} radiographs per step, but the train split has "
                f"{len(self.train)}. Start fewer ranks, or give a smaller micro_batch."
            )
        if settings.global_batch % unit:
            nearest = sampler.nearest_global_batch(settings.global_batch, unit)
            raise UserError(
                f"global_batch={settings.global_batch} is not a multiple of micro_batch {size} x {self.world_size} ranks = "
                f"{unit}. The nearest is global_batch={nearest}."
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps in an epoch."""
        return sampler.steps_per_epoch(len(self.train), self.settings.global_batch)

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps in the run."""
        return self.settings.epochs * self.steps_per_epoch

    @property
    def accumulation(self) -> int:
        """The number of micro-batches of a step on each rank."""
        return self.settings.global_batch // (self.settings.micro_batch * self.world_size)

    def max_num_corrupt(self, num_samples: int) -> int:
        """Return how many of `num_samples` may be corrupt by max_corrupt_samples: at least one, unless that setting is 0."""
        return math.ceil(num_samples * self.settings.max_corrupt_samples - 1e-9)

    def micro_batches(self, epoch: sampler.Epoch, step: int, rank: int) -> list[sampler.MicroBatch]:
        """Return the micro-batches that `rank` takes in `step`, 0-based within the epoch."""
        s = self.settings
        sizes = {"global_batch": s.global_batch, "micro_batch": s.micro_batch}
        return sampler.step_micro_batches(epoch, step, **sizes, rank=rank, world_size=self.world_size)

    def epoch(self, number: int) -> sampler.Epoch:
        """Return the order and the augmentation of epoch `number`, 0-based."""
        s = self.settings
        return sampler.epoch_permutation(self.train, s.seed, number, rotate_deg=s.rotate_deg, flip=s.flip)
