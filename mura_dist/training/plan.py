"""What follows from settings, shards and ranks before the first step; computed once, checked, printed."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mura_dist.core import files
from mura_dist.core.config import AUTO, Settings
from mura_dist.core.errors import UserError
from mura_dist.data.loaders import sampler as order
from mura_dist.data.shards.reader import Shards
from mura_dist.training import deepspeed_config


@dataclass(frozen=True)
class Plan:
    settings: Settings
    shards: Shards
    train: np.ndarray  # rows, int64
    select: np.ndarray  # rows of the split that drives plateau and choice
    world_size: int
    deepspeed: dict[str, Any]  # what the user's DeepSpeed file adds

    @classmethod
    def from_settings(cls, settings: Settings, world_size: int) -> "Plan":
        """Raises UserError where shards, settings and ranks do not go together."""
        shards = Shards.open(settings.shards, files.expand_user(settings.mirror) if settings.mirror else None)
        train, select = shards.rows("train"), shards.rows(settings.select_on)
        shards.check_tars("train", settings.select_on)
        plan = cls(settings, shards, train, select, world_size, {})
        if plan.steps_per_epoch == 0:
            raise UserError(
                f"global_batch={settings.global_batch}: the train split has only {len(train)} radiographs; give a smaller one"
            )
        return plan if settings.micro_batch == AUTO else plan.with_micro_batch(settings.micro_batch)

    def with_micro_batch(self, micro: int) -> "Plan":
        """The same, its micro-batch settled. Raises UserError as `from_settings` does."""
        plan = replace(self, settings=self.settings.model_copy(update={"micro_batch": micro}))
        plan._check_micro_batch()
        return replace(plan, deepspeed=deepspeed_config.user(plan.settings, self.world_size))

    def _check_micro_batch(self) -> None:
        settings, micro = self.settings, self.settings.micro_batch
        unit = micro * self.world_size  # radiographs of the least step there can be
        if unit > len(self.train):
            raise UserError(
                f"{self.world_size} ranks x micro_batch {micro} = {unit} radiographs a step, the train split has "
                f"{len(self.train)}; start fewer ranks or give a smaller micro_batch"
            )
        if settings.global_batch % unit:
            near = order.nearest_global_batch(settings.global_batch, unit)
            raise UserError(
                f"global_batch={settings.global_batch} is not a multiple of micro_batch {micro} x {self.world_size} ranks = "
                f"{unit}; the nearest is global_batch={near}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return order.steps_per_epoch(len(self.train), self.settings.global_batch)

    @property
    def num_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on each rank."""
        return self.settings.global_batch // (self.settings.micro_batch * self.world_size)

    def max_num_corrupt(self, num_samples: int) -> int:
        """Return how many of `num_samples` may be corrupt: the share max_corrupt_samples, but one at least where it is not 0."""
        return math.ceil(num_samples * self.settings.max_corrupt_samples - 1e-9)

    def micros(self, ordered: order.Epoch, step: int, rank: int) -> list[order.MicroBatch]:
        """The micro-batches of `step` (0-based within the epoch) that `rank` takes."""
        s = self.settings
        sizes = {"global_batch": s.global_batch, "micro_batch": s.micro_batch}
        return order.step_micro_batches(ordered, step, **sizes, rank=rank, world_size=self.world_size)

    def order(self, epoch: int) -> order.Epoch:
        s = self.settings
        return order.epoch_permutation(self.train, s.seed, epoch, rotate_deg=s.rotate_deg, flip=s.flip)
