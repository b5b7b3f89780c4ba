"""Train a model with DeepSpeed on several ranks. No other file imports DeepSpeed.

    micro-batches of one step -> forward, backward, accumulated into the flat gradient (flat_parameters.py)
        -> all-reduce of that gradient (DeepSpeed, in place) and of one small vector: the loss of every micro-batch, BatchNorm's
           sums, flags; nothing else is sent
        -> all finite: optimizer step, running statistics, moving average; else: nothing changes

DeepSpeed sees one parameter, the flat vector. Each rank takes part in the same collectives, whatever its own state (out of
memory, loss not finite, stop requested), and reads the same result. So all ranks apply the step, skip it, or exit together.
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
_LONG_S = 2.0  # a request to stop abandons a step that has run for longer


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, the same on every rank.

    Attributes:
        loss: sum(weight x BCE) / global batch.
        gradient_norm: L2 norm of the whole gradient, before clipping.
        applied: False if the loss or the gradient is not finite, or if there was no valid sample. Nothing has changed then.
        nonfinite_micro_batches: Numbers, within the global batch, of the micro-batches whose loss is not finite.
        stop: A rank was asked to stop.
        abandoned: The step was abandoned for that request. It has no effect and is repeated on resume.
        num_corrupt: Number of corrupt samples in the global batch.
        has_samples: Whether the global batch has any valid sample.
        read_failed: A rank could not read its micro-batches. The step has no effect.
    """

    loss: float
    gradient_norm: float
    applied: bool
    nonfinite_micro_batches: tuple[int, ...]
    stop: bool
    abandoned: bool = False
    num_corrupt: int = 0
    has_samples: bool = True
    read_failed: bool = False


@dataclass
class _Accumulated:
    """The result of one rank's micro-batches. losses (num_micro_batches,) is 0 for those of other ranks."""

    losses: Tensor
    flags: int = 0
    num_corrupt: int = 0  # radiographs
    num_empty: int = 0  # micro-batches without a valid sample; they are not forwarded


class _FlatModule(nn.Module):
    """The module that DeepSpeed wraps. Its one parameter is the flat vector. The model is not a submodule."""

    def __init__(self, network: Network, weights: nn.Parameter) -> None:
        super().__init__()
        self.weights = weights
        self._network = network

    def forward(self, image: Tensor) -> Tensor:
        return self._network(image)


class Engine:
    """A model with its optimizer and collectives, on one rank.

    The weights must be loaded before: from a checkpoint, or initialized equally on all ranks.

    Attributes:
        model: The network in training mode: image (B, 1, S, S) uint8 -> logit (B,), activation_map (B, h, w).
        network: The model as the settings execute it: image -> logit.
        flat: All weights and gradients as two vectors.
        statistics: BatchNorm's running statistics.
        average: The moving average of the weights, or None.
        optimizer_state: The optimizer's state as tensors.
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
        self._engine = _initialize_deepspeed(_FlatModule(self.network, self.flat.weights), self.flat, settings, world)
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
        should_stop: Callable[[], bool] = lambda: False,
        read_failed: bool = False,
    ) -> StepResult:
        """Take one optimizer step over this rank's micro-batches. Called by all ranks.

        Args:
            batches: The micro-batches, read one by one.
            learning_rate: The learning rate of this step.
            loss_scale: Factor of the loss, for fp16; gradients are divided by it.
            should_stop: Returns whether this rank was asked to stop.
            read_failed: This rank could not read its micro-batches and passes none.

        Raises:
            CollectiveRunError: a rank is out of memory.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._begin()
        accumulated = self._accumulate(batches, loss_scale, should_stop)
        backward_end = self.world.record_event()
        gradients = self._reduce(loss_scale)
        accumulated.flags += _STOP * should_stop() + _FAILED * read_failed
        result, mean = self._exchange(accumulated, gradients, backward_end)
        if result.applied:
            self._apply(gradients, result.gradient_norm, mean)
        elif self.settings.zero_stage:
            self._engine.optimizer.averaged_gradients[0] = None
        return result

    def _begin(self) -> None:
        self.flat.attach()  # DeepSpeed drops gradients after a step
        self.flat.gradient.zero_()
        self.statistics.reset()
        self._engine.set_gradient_accumulation_boundary(False)

    def _accumulate(self, batches: Iterable[Batch], loss_scale: float, should_stop: Callable[[], bool]) -> _Accumulated:
        started = time.perf_counter()
        result = _Accumulated(torch.zeros(self.num_micro_batches, device=self.world.device))
        first = self.world.rank * self.num_micro_batches // self.world.size
        factor = loss_scale * self._divided_by / self.settings.global_batch  # the sum over all ranks is divided once
        try:
            for number, batch in enumerate(batches, first):
                if number > first and should_stop() and time.perf_counter() - started > _LONG_S:
                    result.flags = _ABANDON
                    return result
                result.num_corrupt += batch.num_corrupt
                if batch.num_corrupt == len(batch.image):
                    result.num_empty += 1
                    continue
                logit = self._engine(batch.image)
                loss = weighted_bce(logit, batch.label, batch.weight, self.settings.label_smoothing)
                self.statistics.collect()
                self._engine.backward(loss * factor, scale_wrt_gas=False)
                result.losses[number] = loss.detach()
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not micro_batch.is_memory_error(error):
                raise
            result.flags = _OUT_OF_MEMORY
        return result

    def _reduce(self, loss_scale: float) -> list[Tensor]:
        """Return the gradient of the global batch, or under ZeRO this rank's share of it."""
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        shares = self._engine.optimizer.averaged_gradients[0] if self.settings.zero_stage else [self.flat.gradient]
        if loss_scale != 1:
            torch._foreach_mul_(shares, 1 / loss_scale)
        return shares

    def _exchange(
        self, accumulated: _Accumulated, gradients: list[Tensor], backward_end: torch.cuda.Event | None
    ) -> tuple[StepResult, Tensor]:
        """Exchange losses, flags and BatchNorm's sums: one all-reduce under 1 MB.

        It is the only time in a step that the host waits for the device.

        Args:
            accumulated: The result of this rank's micro-batches.
            gradients: The gradient of the global batch, or this rank's share of it.
            backward_end: Marks the end of this rank's backward. From there on it waits for other ranks.

        Returns:
            The step's result, and the mean of BatchNorm's batch statistics over the micro-batches with samples.
        """
        world_size, num_micro_batches = self.world.size, self.num_micro_batches
        # Flags by rank, number of corrupt samples, number of empty micro-batches, squared gradient norm.
        head = torch.zeros(world_size + 3, device=self.world.device)
        for index, number in (
            (self.world.rank, accumulated.flags),
            (world_size, accumulated.num_corrupt),
            (world_size + 1, accumulated.num_empty),
        ):
            if number:
                head[index].fill_(number)  # an assignment waits for the GPU in torch before 2.15
        # Without ZeRO every rank has the whole gradient and measures its slice.
        slices = gradients if self.settings.zero_stage else [gradients[0].tensor_split(world_size)[self.world.rank]]
        head[-1] = torch.stack([torch.linalg.vector_norm(piece) for piece in slices]).square().sum()
        vector = torch.cat([head, accumulated.losses, self.statistics.sum])
        self.world.all_reduce(vector, backward_end)
        sums = vector[: len(head) + num_micro_batches].tolist()
        flags, losses = list(map(int, sums[:world_size])), sums[len(head) :]
        num_corrupt, num_empty = int(sums[world_size]), int(sums[world_size + 1])
        norm = math.sqrt(max(sums[world_size + 2], 0.0))
        if out_of_memory := [rank for rank, flag in enumerate(flags) if flag & _OUT_OF_MEMORY]:
            raise CollectiveRunError(micro_batch.out_of_memory_message(out_of_memory, self.settings.micro_batch))
        nonfinite = tuple(number for number, loss in enumerate(losses) if not math.isfinite(loss))
        loss = math.fsum(losses) / self.settings.global_batch if not nonfinite else math.nan
        abandoned, read_failed = (any(flag & bit for flag in flags) for bit in (_ABANDON, _FAILED))
        has_samples = num_empty < num_micro_batches
        applied = not nonfinite and not abandoned and not read_failed and has_samples and math.isfinite(norm)
        mean = vector[len(head) + num_micro_batches :] / max(1, num_micro_batches - num_empty)
        result = StepResult(
            loss=loss,
            gradient_norm=norm,
            applied=applied,
            nonfinite_micro_batches=nonfinite,
            stop=any(flags),
            abandoned=abandoned,
            num_corrupt=num_corrupt,
            has_samples=has_samples,
            read_failed=read_failed,
        )
        return result, mean

    def _apply(self, gradients: list[Tensor], norm: float, mean: Tensor) -> None:
        limit = self.settings.clip_norm
        if limit and norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self._engine.step()
        self.statistics.update(mean)
        if self.average is not None:
            self.average.update(self.flat.weights.detach(), mean)

    # ---- evaluation and checkpoints

    def fingerprint(self) -> tuple[int, bool]:
        """Return a checksum of weights, statistics and averages, and whether all of them are finite."""
        average = [] if self.average is None else [self.average.weights, self.average.statistics]
        vectors = [self.flat.weights.detach(), self.statistics.values, *average]
        digest = 0
        for vector in vectors:
            digest = zlib.crc32(vector.cpu().numpy().data, digest)
        return digest, all(bool(vector.isfinite().all()) for vector in vectors)

    @contextlib.contextmanager
    def eval_weights(self) -> Iterator[nn.Module]:
        """Yield the model in eval mode with the weights that are evaluated and saved: the moving average if there is one."""
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
        """Return what a checkpoint needs besides the evaluated model. It is empty without a moving average."""
        if self.average is None:
            return {}
        updates = torch.tensor(self.average.updates)
        return {"weights": self.flat.weights.detach(), "statistics": self.statistics.values, "updates": updates}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state` returned. The checkpoint's model, the average, was loaded before the engine was built."""
        if self.average is None:
            return
        self._set(tensors["weights"])
        self.statistics.values.copy_(tensors["statistics"])
        self.average.updates = int(tensors["updates"])
        if self.settings.zero_stage:
            self._engine.optimizer.refresh_fp32_params()


def _build_optimizer(weights: nn.Parameter, settings: Settings) -> torch.optim.Optimizer:
    lr, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD([weights], lr=lr, momentum=0.9, weight_decay=decay, fused=True)
    optimizer_class = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return optimizer_class([weights], lr=lr, betas=(0.9, 0.999), weight_decay=decay, fused=True)


def _initialize_deepspeed(module: nn.Module, flat: FlatParameters, settings: Settings, world: World) -> Any:
    """Return a DeepSpeedEngine that compiles no extensions. Optimizers and collectives are torch's."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__ = {}
    engine, *_ = deepspeed.initialize(
        # DeepSpeed would use GPU number LOCAL_RANK, which does not exist if each process sees one GPU (srun --gpus-per-task=1).
        args=SimpleNamespace(device_rank=world.device.index or 0),
        model=module,
        optimizer=_build_optimizer(flat.weights, settings),
        config=deepspeed_config.build_config(settings, world.size, num_weights=flat.weights.numel()),
        dist_init_required=False,
    )
    set_timeout(settings.collective_timeout_s)  # DeepSpeed reduces over a group of its own
    engine.enable_backward_allreduce = False  # `_reduce` does it once a step
    if not settings.zero_stage and engine.postscale_gradients() and engine.gradient_predivide_factor() == 1:
        # The loss is already divided by the global batch. Dividing the gradients again would cost 7 ms on a CPU.
        engine.gradient_average = False
    return engine
