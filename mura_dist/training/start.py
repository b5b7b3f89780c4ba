"""Prepare a run up to its first step.

settings -> resolve_precision -> acquire_run (rank 0: the folder's lock) -> check_agreement -> resolve_micro_batch
    -> find_checkpoint -> build_engine -> describe_start
"""

import contextlib
import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core import config, files
from mura_dist.core.config import AUTO, Settings
from mura_dist.core.errors import RunError, StopRequestedError, UserError
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.distributed import process_group
from mura_dist.distributed.process_group import World
from mura_dist.distributed.signals import stop_event
from mura_dist.models import densenet
from mura_dist.training import checkpoint, micro_batch, schedule
from mura_dist.training.checkpoint import Checkpoint
from mura_dist.training.engine import Engine
from mura_dist.training.plan import Plan
from mura_dist.training.run import Run
from mura_dist.training.state import State


def resolve_precision(settings: Settings) -> Settings:
    """Resolve precision=auto: to the precision the run began with, or to the one that this rank's device supports."""
    if settings.precision != "auto":
        return settings
    recorded = Run(Path(settings.run), settings).recipe_value("precision", None)
    precision = recorded or ("bf16" if process_group.supports_bf16() else "fp32")
    return settings.model_copy(update={"precision": precision})


def acquire_run(run: Run, plan: Plan, stack: contextlib.ExitStack) -> bool:
    """Check the run's folder and acquire its lock. Called on rank 0, while the other ranks wait in `join`.

    Args:
        run: The run.
        plan: Its plan.
        stack: Holds the lock until it closes.

    Returns:
        False if the run is finished.
    """
    with stop_event(run.settings.stop_signal) as stop:
        if not _is_unfinished(run, plan):
            return False
        stack.enter_context(run.writing(stop))
        if not _is_unfinished(run, plan):  # the former writer may have finished or replaced the run
            return False
        if stop.is_set():
            raise StopRequestedError("stopped before the first step. The same command resumes.")
    return True


def _is_unfinished(run: Run, plan: Plan) -> bool:
    run.check_identity(plan.shards)
    run.check_deepspeed(plan.deepspeed)
    return not _is_finished(run.status(), plan)


def _is_finished(status: dict[str, Any], plan: Plan) -> bool:
    if status.get("state") != "done":
        return False
    summary, early_stop = status["summary"], plan.settings.early_stop
    return summary["step"] >= plan.num_steps or 0 < early_stop <= summary["stale_epochs"]


def check_agreement(plan: Plan, world: World) -> None:
    """Compare settings, shards and DeepSpeed values between ranks. Called by all ranks.

    Without this check the weights would agree, but the ranks would train on different radiographs.

    Raises:
        UserError: on all ranks, if one rank differs from rank 0.
    """
    index = plan.shards.index
    text = json.dumps(
        [config.agreed(plan.settings), index["manifest"]["sha256"], index["size"], plan.deepspeed], sort_keys=True
    )
    checksums = world.gather(np.array([zlib.crc32(text.encode())], np.int64))[:, 0]  # (ranks,)
    differing = np.flatnonzero(checksums != checksums[0]).tolist()
    is_bf16 = world.gather(np.array([plan.settings.precision == "bf16"], np.uint8))[:, 0]  # (ranks,)
    if differing and is_bf16.min() < is_bf16.max():
        raise UserError(
            f"precision is {'bf16' if is_bf16[0] else 'not bf16'} on rank 0 and differs on rank "
            f"{np.argmax(is_bf16 != is_bf16[0])}: precision=auto depends on the processor. Set one precision "
            "for all ranks, for example precision=fp32."
        )
    if differing:
        raise UserError(
            f"rank {differing[0]} was started with other settings or other shards than rank 0. Give all ranks the same recipe, "
            "key=value arguments and shards."
        )


def resolve_micro_batch(run: Run, plan: Plan, world: World) -> tuple[Run, Plan, str]:
    """Resolve micro_batch=auto: to the micro-batch the run began with, or to the largest that fits. Called by all ranks.

    Returns:
        The run and the plan with that micro-batch, and a note for the first line of progress.
    """
    if run.settings.micro_batch != AUTO:
        return run, plan, ""
    recorded = int(world.sum([run.recipe_value("micro_batch", AUTO) if world.is_first else 0])[0])
    num_resident = len(plan.train) + len(plan.select) if run.settings.pipeline == "resident" else 0
    plan = plan.with_micro_batch(
        recorded or micro_batch.find_micro_batch(run.settings, plan.shards.size, world, num_resident=num_resident)
    )
    if world.is_first:
        run.check_deepspeed(plan.deepspeed)
    note = ""
    if not recorded and world.device.type == "cpu":
        note = "; micro_batch=auto is 8 on a CPU, or the largest smaller size that divides the global batch evenly over the ranks"
    return Run(run.folder, plan.settings), plan, note


def find_checkpoint(run: Run, world: World) -> Checkpoint | None:
    """Return the newest valid checkpoint, the same on every rank. Rank 0 chooses it. Called by all ranks.

    Raises:
        RunError: a rank cannot read the checkpoint that rank 0 reads.
    """
    newest = None
    if world.is_first:
        newest = checkpoint.find_latest(run.checkpoints, lambda line: print(line, file=sys.stderr))  # noqa: T201
    step = int(world.sum([newest.step if newest is not None else -1.0 if world.is_first else 0.0])[0])
    if step < 0:
        return None
    try:
        return newest or checkpoint.read(checkpoint.checkpoint_folder(run.checkpoints, step))
    except ValueError as error:
        raise RunError(
            f"rank {world.rank} cannot read the checkpoint that rank 0 reads: {error}. Put run= on a disk that all ranks share."
        ) from error


def build_engine(plan: Plan, targets: RowTargets, saved: Checkpoint | None, world: World) -> Engine:
    """Build the engine with the state of a checkpoint, or with initial or pretrained weights.

    Args:
        plan: The plan of the run.
        targets: Labels and weights by row.
        saved: The checkpoint to resume from; None for a new run.
        world: The ranks.
    """
    settings = plan.settings
    network = densenet.build(settings.architecture, seed=settings.seed, base_rate=_base_rate(targets, plan.train))
    if saved is not None:
        saved.load_into(network)
    elif settings.pretrained:
        _load_pretrained(network, settings.pretrained, world)
    engine = Engine(network, settings, world)
    if saved is not None:
        engine.load_state(saved.training_state())
        engine.optimizer_state.load(saved.optimizer_state())
    return engine


def _load_pretrained(network: densenet.DenseNet, name: str, world: World) -> None:
    """Load pretrained weights. Local rank 0 loads first, because it may have to download the file."""
    source = name if name == densenet.IMAGENET else files.expand_user(name)
    if world.local_rank == 0:
        densenet.load_pretrained(network, source)
    world.barrier()
    if world.local_rank != 0:
        densenet.load_pretrained(network, source)


def _base_rate(targets: RowTargets, rows: np.ndarray) -> float:
    """Return the weighted share of positive labels, clipped to 0.01 to 0.99. The classifier's bias starts from it."""
    weight, label = targets.weight[rows].astype(np.float64), targets.label[rows]
    return float(np.clip((weight * label).sum() / max(weight.sum(), 1e-12), 0.01, 0.99))


def describe_start(plan: Plan, world: World, loading: BatchLoader, state: State) -> str:
    """Return the first line of progress: network, data, batches, steps and device."""
    s, rate = plan.settings, schedule.scaling(plan.settings) * plan.settings.learning_rate
    scaled = (
        f" (learning rate {rate:.4g}, {s.lr_scaling} scaling from batch {s.reference_batch})"
        if s.lr_scaling != "none"
        else ""
    )
    step = f", step={s.step}" if s.step != "eager" else ""
    return (
        f"{s.architecture}, {plan.shards.size} px, {len(plan.train)} train and {len(plan.select)} {s.select_on} radiographs; "
        f"global batch {s.global_batch} = {s.micro_batch} x {world.size} ranks x {plan.accumulation}{scaled}; "
        f"{plan.steps_per_epoch} steps per epoch, {plan.num_steps} in total, from step {state.step}; "
        f"{s.precision} on {world.device.type}{step}, {loading}{_bf16_warning(s)}"
    )


def _bf16_warning(settings: Settings) -> str:
    if settings.precision != "bf16" or process_group.supports_bf16():
        return ""
    return (
        "; warning: this device has no bf16 instructions, so fp32 is several times faster (precision=fp32 in a new run)"
    )
