"""The training engine: DeepSpeed around a model. The only file that imports DeepSpeed.

    Batches of one step -> forward, backward, accumulate -> all-reduce of gradients (DeepSpeed) and of one small vector
    (loss, stop flag, BatchNorm's sums) -> optimiser step

BatchNorm's group is the micro-batch. Its running statistics move once a step, by the mean over all the global batch's
micro-batches on all ranks; so every rank holds the same model at every step and the world size leaves no trace in it.
"""

import contextlib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import Settings
from .loss import weighted_bce
from .pipeline import Batch
from .world import World

_MOMENTUM = 0.1  # BatchNorm's, torchvision's default


@dataclass(frozen=True)
class StepResult:
    """Over all ranks: the loss sum(weight x BCE) / global batch, and whether any rank wants to stop."""

    loss: float
    stop: bool


class RunningStatistics:
    """BatchNorm's running statistics as one flat vector that moves once a step.

    The modules' own buffers become views into `_last` with momentum 1: a forward leaves the micro-batch's mean and (unbiased)
    variance there. `sum` collects them over a step; `values` are what evaluation and checkpoints see.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)]
        buffers = [buffer for norm in self.norms for buffer in (norm.running_mean, norm.running_var)]
        self.values = torch.cat(
            [buffer for buffer in buffers if buffer is not None]
        ).detach()  # (sum of 2 x channels,) float32
        self._last = self.values.clone()
        self.sum = torch.zeros_like(self.values)
        start = 0
        for norm in self.norms:
            size, norm.momentum = norm.num_features, 1.0
            norm.running_mean, norm.running_var = (
                self._last[start : start + size],
                self._last[start + size : start + 2 * size],
            )
            start += 2 * size

    def collect(self) -> None:
        """After a micro-batch's forward."""
        self.sum += self._last

    def move(self, total: Tensor, num_micros: int) -> None:
        """`total`: the sums over all ranks; `num_micros`: micro-batches in the global batch."""
        self.values.lerp_(total / num_micros, _MOMENTUM)
        self.sum.zero_()

    def expose(self, steps: int) -> None:
        """Put the running statistics where the modules look for them: before evaluation and before a checkpoint."""
        self._last.copy_(self.values)
        for norm in self.norms:
            norm.num_batches_tracked = torch.full((), steps, dtype=torch.int64, device=self.values.device)


class Engine:
    """One rank's half of the training: a model, its optimiser, the way to the other ranks.

    The model's weights must be in place before (a checkpoint's, or fresh and equal on all ranks).
    """

    def __init__(self, model: nn.Module, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        self.num_micros = settings.global_batch // settings.micro_batch
        self.model = model.to(world.device)
        torch.set_flush_denormal(True)  # activations that become denormal slow a CPU several times
        self._engine = _deepspeed(self.model, settings, accumulation=self.num_micros // world.size)
        if (
            settings.zero_stage == 0
        ):  # ZeRO keeps the weights as views of its flat buffers, whose layout is not ours to change
            self.model.to(memory_format=torch.channels_last)
        self.statistics = RunningStatistics(self.model)

    def step(self, batches: Iterable[Batch], learning_rate: float, *, stop: bool = False) -> StepResult:
        """One optimiser step over this rank's micro-batches. `stop`: this rank was asked to stop."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        loss_sum = torch.zeros((), dtype=torch.float32, device=self.world.device)
        for batch in batches:
            with self._autocast():
                logit, _ = self._engine(batch.image)
            loss = weighted_bce(logit, batch.label, batch.weight)
            self.statistics.collect()
            # DeepSpeed divides by the accumulation steps and averages over ranks: together with this, by the global batch.
            self._engine.backward(loss / self.settings.micro_batch)
            self._engine.step()
            loss_sum += loss.detach()
        return self._agree(loss_sum, stop)

    def _agree(self, loss_sum: Tensor, stop: bool) -> StepResult:
        flags = torch.stack([loss_sum, torch.full_like(loss_sum, float(stop))])
        vector = torch.cat([flags, self.statistics.sum])  # under 1 MB
        dist.all_reduce(vector)
        self.statistics.move(vector[2:], self.num_micros)
        loss, stops = vector[:2].tolist()
        return StepResult(loss / self.settings.global_batch, stops > 0)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16)

    def expose(self, steps: int) -> nn.Module:
        """The model ready to evaluate or to save, after `steps` optimiser steps."""
        self.statistics.expose(steps)
        return self.model.eval()

    @property
    def _optimiser(self) -> torch.optim.Optimizer:
        """torch's own optimiser; under ZeRO it works on this rank's flat partition."""
        return self._engine.optimizer.optimizer if self.settings.zero_stage else self._engine.optimizer

    def optimiser_state(self) -> dict[str, Tensor]:
        """`<place of the parameter>.<name>` -> tensor; with ZeRO stage 1 this rank's share."""
        state = self._optimiser.state
        return {
            f"{place}.{name}": value.contiguous()
            for place, parameter in enumerate(self._parameters())
            for name, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_optimiser_state(self, tensors: dict[str, Tensor]) -> None:
        parameters = self._parameters()
        for key, value in tensors.items():
            place, _, name = key.partition(".")
            parameter = parameters[int(place)]
            # Counters stay where torch keeps them (on the CPU), moments take the parameter's device and layout.
            like = value.clone() if value.ndim == 0 else torch.empty_like(parameter).copy_(value)
            self._optimiser.state[parameter][name] = like

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self._optimiser.param_groups for parameter in group["params"]]


def _optimiser(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    kind = torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam
    return kind(model.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=decay)


def _deepspeed(model: nn.Module, settings: Settings, accumulation: int):  # type: ignore[no-untyped-def]
    """A DeepSpeedEngine. Imported here, and told so: it is to compile nothing (we use torch's optimisers and collectives)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {}
    config = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=_optimiser(model, settings), config=config, dist_init_required=False
    )
    return engine
