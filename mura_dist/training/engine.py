"""The training engine: DeepSpeed around a model. The only file that imports DeepSpeed.

    micro-batches of one step -> forward, backward, accumulated into the flat gradient (flat_parameters.py)
        -> all-reduce of that gradient (DeepSpeed, in place) and of one small vector: every micro-batch's loss, BatchNorm's
           sums, flags; nothing else is sent
        -> all of it finite?  optimiser step, running statistics, moving average  |  no: nothing has happened

DeepSpeed sees one parameter, the flat vector. Every rank does the same collectives whatever happens to it (out of memory, a
loss that is not finite, a wish to stop), and reads the same answer; so all take the step, or leave it out, or end, together.
"""

import contextlib
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mura_dist.core.config import Settings
from mura_dist.core.errors import CollectiveRunError
from mura_dist.data.loaders.loader import Batch
from mura_dist.distributed.process_group import World, set_timeout
from mura_dist.training import deepspeed_config, execution, micro_batch
from mura_dist.training.batchnorm import RunningStatistics
from mura_dist.training.checked_network import Network
from mura_dist.training.ema import WeightAverage
from mura_dist.training.flat_parameters import FlatParameters
from mura_dist.training.loss import weighted_bce
from mura_dist.training.optimizer_state import OptimizerState

_STOP, _ABANDON, _OUT_OF_MEMORY, _FAILED = 1, 2, 4, 8  # a rank's flags in the small vector, added
_LONG_S = 2.0  # a step that has taken as long is not waited for by a wish to stop


@dataclass(frozen=True)
class StepResult:
    """Over all ranks. `loss`: sum(weight x BCE) / global batch; `gradient_norm`: of the whole gradient, before clipping.

    applied: False where the loss or the gradient is not finite, or no sample could be read: weights, statistics and average are
    what they were.
    num_corrupt: radiographs of the global batch whose samples are corrupt; has_samples: whether there is any other.
    bad_micros: places in the global batch of the micro-batches whose loss is not finite; stop: some rank was asked to.
    abandoned: for that wish the step was left half done; it did not happen, and is done again.
    failed: some rank could not get its micro-batches; the step did not happen.
    """

    loss: float
    gradient_norm: float
    applied: bool
    nonfinite_micro_batches: tuple[int, ...]
    stop: bool
    abandoned: bool = False
    num_corrupt: int = 0
    has_samples: bool = True
    failed: bool = False


@dataclass
class _Forwarded:
    """One rank's part of a step. losses (micro-batches of the global batch,): 0 where they are others'."""

    losses: Tensor
    flags: int = 0
    num_corrupt: int = 0  # radiographs
    num_empty: int = 0  # micro-batches without any sample, which are not forwarded


class _FlatModule(nn.Module):
    """The module DeepSpeed is given: one parameter, the flat vector, and a forward. The model is no submodule of it."""

    def __init__(self, network: Network, weights: nn.Parameter) -> None:
        super().__init__()
        self.weights = weights
        self._network = network

    def forward(self, image: Tensor) -> Tensor:
        return self._network(image)


class Engine:
    """One rank's half of the training: a model, its optimiser, the way to the other ranks.

    The model's weights must be in place before (a checkpoint's, or fresh and equal on all ranks).
    """

    def __init__(self, model: nn.Module, settings: Settings, world: World) -> None:
        self.settings, self.world = settings, world
        self.num_micro_batches = settings.global_batch // settings.micro_batch
        self.model = model.to(world.device)
        self.flat = FlatParameters(self.model, channels_last=settings.channels_last)
        self.statistics = RunningStatistics(self.model)
        self.average = (
            WeightAverage(settings.ema, self.flat.weights.detach().clone(), self.statistics.values.clone())
            if settings.ema
            else None
        )
        torch.backends.cudnn.benchmark = settings.cudnn_benchmark
        self.network = execution.build(self.model.train(), self.flat, settings)
        self._engine = _deepspeed(_FlatModule(self.network, self.flat.weights), self.flat, settings, world)
        self._divided_by = world.size if self._engine.gradient_average else 1
        self.flat.attach()
        zero, optimizer = bool(settings.zero_stage), self._engine.optimizer
        self.optimizer_state = OptimizerState(optimizer.optimizer if zero else optimizer, world.rank, is_share=zero)

    # ---- one step

    def step(
        self,
        batches: Iterable[Batch],
        learning_rate: float,
        *,
        loss_scale: float = 1.0,
        asked: Callable[[], bool] = lambda: False,
        failed: bool = False,
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches.

        Args:
            asked: says whether this rank was asked to stop.
            failed: this rank could not get its micro-batches, and gives none; all ranks hear of it.

        Raises:
            CollectiveRunError: a rank runs out of memory.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._begin()
        mine = self._accumulate(batches, loss_scale, asked)
        own = self.world.record_event()
        gradients = self._reduce(loss_scale)
        mine.flags += _STOP * asked() + _FAILED * failed
        result, mean = self._agree(mine, gradients, own)
        if result.applied:
            self._apply(gradients, result.gradient_norm, mean)
        elif self.settings.zero_stage:
            self._engine.optimizer.averaged_gradients[0] = None
        return result

    def _begin(self) -> None:
        self.flat.attach()  # DeepSpeed lets go of gradients after a step
        self.flat.gradient.zero_()
        self.statistics.reset()
        self._engine.set_gradient_accumulation_boundary(False)

    def _accumulate(self, batches: Iterable[Batch], loss_scale: float, asked: Callable[[], bool]) -> _Forwarded:
        started = time.perf_counter()
        mine = _Forwarded(torch.zeros(self.num_micro_batches, device=self.world.device))
        first = self.world.rank * self.num_micro_batches // self.world.size
        factor = loss_scale * self._divided_by / self.settings.global_batch  # the sum over all ranks is divided once
        try:
            for place, batch in enumerate(batches, first):
                if place > first and asked() and time.perf_counter() - started > _LONG_S:
                    mine.flags = _ABANDON
                    return mine
                mine.num_corrupt += batch.num_corrupt
                if batch.num_corrupt == len(batch.image):
                    mine.num_empty += 1
                    continue
                logit = self._engine(batch.image)
                loss = weighted_bce(logit, batch.label, batch.weight, self.settings.label_smoothing)
                self.statistics.collect()
                self._engine.backward(loss * factor, scale_wrt_gas=False)
                mine.losses[place] = loss.detach()
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is one of the latter
            if not micro_batch.is_memory_error(error):
                raise
            mine.flags = _OUT_OF_MEMORY
        return mine

    def _reduce(self, loss_scale: float) -> list[Tensor]:
        """The gradient of the global batch: whole, or under ZeRO this rank's share of it."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        shares = self._engine.optimizer.averaged_gradients[0] if self.settings.zero_stage else [self.flat.gradient]
        if loss_scale != 1:
            torch._foreach_mul_(shares, 1 / loss_scale)
        return shares

    def _agree(
        self, mine: _Forwarded, gradients: list[Tensor], own: torch.cuda.Event | None
    ) -> tuple[StepResult, Tensor]:
        """The step's one small all-reduce, under 1 MB; and the only time the host waits for the device.

        own: where this rank's backward ends; from there on the others are waited for.
        """
        ranks, micros = self.world.size, self.num_micro_batches
        head = torch.zeros(
            ranks + 3, device=self.world.device
        )  # flags by rank, corrupt radiographs, empty micro-batches, norm
        for place, number in ((self.world.rank, mine.flags), (ranks, mine.num_corrupt), (ranks + 1, mine.num_empty)):
            if number:
                head[place].fill_(number)  # to assign it waits for the GPU in torch before 2.15
        # Without ZeRO every rank holds the whole gradient, and measures its part of it.
        parts = gradients if self.settings.zero_stage else [gradients[0].tensor_split(ranks)[self.world.rank]]
        head[-1] = torch.stack([torch.linalg.vector_norm(part) for part in parts]).square().sum()
        vector = torch.cat([head, mine.losses, self.statistics.sum])
        self.world.all_reduce(vector, own)
        sums = vector[: len(head) + micros].tolist()
        flags, by_micro, norm = list(map(int, sums[:ranks])), sums[len(head) :], math.sqrt(max(sums[ranks + 2], 0.0))
        num_corrupt, num_empty = int(sums[ranks]), int(sums[ranks + 1])
        if short := [rank for rank, flag in enumerate(flags) if flag & _OUT_OF_MEMORY]:
            raise CollectiveRunError(micro_batch.exhausted(short, self.settings.micro_batch))
        bad = tuple(place for place, loss in enumerate(by_micro) if not math.isfinite(loss))
        loss = math.fsum(by_micro) / self.settings.global_batch if not bad else math.nan
        abandoned, failed = (any(flag & which for flag in flags) for which in (_ABANDON, _FAILED))
        has_samples = num_empty < micros
        applied = not bad and not abandoned and not failed and has_samples and math.isfinite(norm)
        mean = vector[len(head) + micros :] / max(1, micros - num_empty)
        outcome = {"stop": any(flags), "abandoned": abandoned, "failed": failed}
        return StepResult(loss, norm, applied, bad, **outcome, num_corrupt=num_corrupt, has_samples=has_samples), mean

    def _apply(self, gradients: list[Tensor], norm: float, mean: Tensor) -> None:
        limit = self.settings.clip_norm
        if limit and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self._engine.step()
        self.statistics.update(mean)
        if self.average is not None:
            self.average.update(self.flat.weights.detach(), mean)

    # ---- what is evaluated and kept

    def fingerprint(self) -> tuple[int, bool]:
        """(a number that differs where a weight, a statistic or an average differs by a bit; whether all of them are finite)."""
        average = [] if self.average is None else [self.average.weights, self.average.statistics]
        vectors = [self.flat.weights.detach(), self.statistics.values, *average]
        digest = 0
        for vector in vectors:
            digest = zlib.crc32(vector.cpu().numpy().data, digest)
        return digest, all(bool(vector.isfinite().all()) for vector in vectors)

    @contextlib.contextmanager
    def eval_weights(self) -> Iterator[nn.Module]:
        """The model as the run offers it, ready to evaluate or to save: the moving average where there is one."""
        trained = None
        if self.average is None:
            self.statistics.load_into_model(self.statistics.values)
        else:
            trained = self.flat.weights.detach().clone()
            self._set(self.average.weights)
            self.statistics.load_into_model(self.average.statistics)
        try:
            yield self.model.eval()
        finally:
            self.model.train()
            if trained is not None:
                self._set(trained)

    def _set(self, weights: Tensor) -> None:
        self.flat.weights.data.copy_(weights)

    def state(self) -> dict[str, Tensor]:
        """What the checkpoint needs besides the offered model, and is the same on every rank: empty without a moving average."""
        if self.average is None:
            return {}
        updates = torch.tensor(self.average.updates)
        return {"weights": self.flat.weights.detach(), "statistics": self.statistics.values, "updates": updates}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The rest of a checkpoint whose model, the average, was in place when this engine was made."""
        if self.average is None:
            return
        self._set(tensors["weights"])
        self.statistics.values.copy_(tensors["statistics"])
        self.average.updates = int(tensors["updates"])
        if self.settings.zero_stage:
            self._engine.optimizer.refresh_fp32_params()


def _optimiser(weights: nn.Parameter, settings: Settings) -> torch.optim.Optimizer:
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD([weights], lr=lr, momentum=0.9, weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind([weights], lr=lr, betas=(0.9, 0.999), weight_decay=decay, fused=True)


def _deepspeed(module: nn.Module, flat: FlatParameters, settings: Settings, world: World) -> Any:
    """A DeepSpeedEngine. Imported here, and told so: it is to compile nothing (we use torch's optimisers and collectives)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        # DeepSpeed would take GPU number LOCAL_RANK, which may be 3 where this process sees one GPU, number 0
        # (srun --gpus-per-task=1).
        args=SimpleNamespace(device_rank=world.device.index or 0),
        model=module,
        optimizer=_optimiser(flat.weights, settings),
        config=deepspeed_config.config(settings, world.size, num_weights=flat.weights.numel()),
        dist_init_required=False,
    )
    set_timeout(settings.collective_timeout_s)  # DeepSpeed reduces over a group of its own
    engine.enable_backward_allreduce = False  # once a step, by `_reduce`, whatever became of the micro-batches
    if not settings.zero_stage and engine.postscale_gradients() and engine.gradient_predivide_factor() == 1:
        # The loss is divided by the global batch; dividing the sum of gradients too took 7 ms of a CPU, an eighth of sending it.
        engine.gradient_average = False
    return engine
