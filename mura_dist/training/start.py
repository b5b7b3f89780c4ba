"""Prepare a run up to its first step: settle auto, lock the folder, agree between ranks, resume.

settings -> with_precision -> begin (first rank: the folder's lock) -> agree -> with_micro_batch
    -> resume_point -> make_engine -> introduction
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
    """Settle precision=auto: the precision the run began with, or the one this rank's device computes."""
    if settings.precision != "auto":
        return settings
    begun = Run(Path(settings.run), settings).recipe_value("precision", None)
    chosen = begun or ("bf16" if process_group.supports_bf16() else "fp32")
    return settings.model_copy(update={"precision": chosen})


def acquire_run(run: Run, plan: Plan, stack: contextlib.ExitStack) -> bool:
    """Hold the folder's lock; False where all is done. On the first rank, while the others wait in `join`."""
    with stop_event(run.settings.stop_signal) as early:
        if not _is_ours_to_do(run, plan):
            return False
        stack.enter_context(run.writing(early))
        if not _is_ours_to_do(run, plan):  # who wrote until now may have made it another run, or finished it
            return False
        if early.is_set():
            raise StopRequestedError("stopped before it began; the same command goes on")
    return True


def _is_ours_to_do(run: Run, plan: Plan) -> bool:
    run.check(plan.shards)
    run.check_deepspeed(plan.deepspeed)
    return not _is_finished(run.status(), plan)


def _is_finished(status: dict[str, Any], plan: Plan) -> bool:
    if status.get("state") != "done":
        return False
    summary, stop_at = status["summary"], plan.settings.early_stop
    return summary["step"] >= plan.num_steps or 0 < stop_at <= summary["stale_epochs"]


def check_agreement(plan: Plan, world: World) -> None:
    """Raise UserError, on all ranks, where one of them would train something else: its weights would agree, its radiographs not."""
    index = plan.shards.index
    text = json.dumps(
        [config.agreed(plan.settings), index["manifest"]["sha256"], index["size"], plan.deepspeed], sort_keys=True
    )
    told = world.gather(np.array([zlib.crc32(text.encode())], np.int64))[:, 0]
    others = np.flatnonzero(told != told[0]).tolist()
    computed = world.gather(np.array([plan.settings.precision == "bf16"], np.uint8))[:, 0]
    if others and computed.min() < computed.max():
        raise UserError(
            f"precision is {'bf16' if computed[0] else 'another'} on rank 0 and not on rank "
            f"{np.argmax(computed != computed[0])}: of auto, their processors differ; name one for all: precision=fp32"
        )
    if others:
        raise UserError(
            f"rank {others[0]} was started with other settings or other shards than rank 0; give all the same recipe, "
            "key=value words and shards"
        )


def resolve_micro_batch(run: Run, plan: Plan, world: World) -> tuple[Run, Plan, str]:
    """Settle micro_batch=auto: the micro-batch the run began with, or the one that fits. Also returns what the log says of it."""
    if run.settings.micro_batch != AUTO:
        return run, plan, ""
    begun = int(world.sum([run.recipe_value("micro_batch", AUTO) if world.is_first else 0])[0])
    num_resident = len(plan.train) + len(plan.select) if run.settings.pipeline == "resident" else 0
    plan = plan.with_micro_batch(
        begun or micro_batch.find_micro_batch(run.settings, plan.shards.size, world, num_resident=num_resident)
    )
    if world.is_first:
        run.check_deepspeed(plan.deepspeed)
    on_cpu = not begun and world.device.type == "cpu"
    note = "; micro_batch=auto is 8 on a CPU, or the next smaller that cuts the global batch evenly over the ranks"
    return Run(run.folder, plan.settings), plan, note if on_cpu else ""


def find_checkpoint(run: Run, world: World) -> Checkpoint | None:
    """Return the newest sound checkpoint, the same on every rank: the first rank decides."""
    found = None
    if world.is_first:
        found = checkpoint.find_latest(run.checkpoints, lambda line: print(line, file=sys.stderr))  # noqa: T201
    step = int(world.sum([found.step if found is not None else -1.0 if world.is_first else 0.0])[0])
    if step < 0:
        return None
    try:
        return found or checkpoint.read(checkpoint.checkpoint_folder(run.checkpoints, step))
    except ValueError as error:
        raise RunError(f"rank {world.rank}: {error}, rank 0 reads it; put run= on a disk that all ranks see") from error


def build_engine(plan: Plan, targets: RowTargets, saved: Checkpoint | None, world: World) -> Engine:
    """Build the engine with the weights and the optimizer's state of a checkpoint, or with those a run begins with."""
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
    """One rank of a machine goes first: it may have to fetch the file."""
    where = name if name == densenet.IMAGENET else files.expand_user(name)
    if world.local_rank == 0:
        densenet.load_pretrained(network, where)
    world.barrier()
    if world.local_rank != 0:
        densenet.load_pretrained(network, where)


def _base_rate(targets: RowTargets, rows: np.ndarray) -> float:
    """The weighted share of positives, where the head starts; kept off 0 and 1."""
    weight, label = targets.weight[rows].astype(np.float64), targets.label[rows]
    return float(np.clip((weight * label).sum() / max(weight.sum(), 1e-12), 0.01, 0.99))


def describe_start(plan: Plan, world: World, loading: BatchLoader, state: State) -> str:
    """Return the run's first line of progress: network, data, batches, steps, device."""
    s, rate = plan.settings, schedule.scaling(plan.settings) * plan.settings.learning_rate
    scaled = (
        f" (learning rate {rate:.4g} by {s.lr_scaling} from a batch of {s.reference_batch})"
        if s.lr_scaling != "none"
        else ""
    )
    step = f", step={s.step}" if s.step != "eager" else ""
    return (
        f"{s.architecture}, {plan.shards.size} px, {len(plan.train)} train and {len(plan.select)} {s.select_on} radiographs; "
        f"global batch {s.global_batch} = {s.micro_batch} x {world.size} ranks x {plan.accumulation}{scaled}; "
        f"{plan.steps_per_epoch} steps an epoch, {plan.num_steps} in all, from step {state.step}; "
        f"{s.precision} on {world.device.type}{step}, {loading}{_slow(s)}"
    )


def _slow(settings: Settings) -> str:
    """A warning where a run goes on in, or was given, a precision that this device has no instructions for."""
    if settings.precision != "bf16" or process_group.supports_bf16():
        return ""
    return "; warning: there are no instructions for bf16 here, fp32 is several times as fast (precision=fp32, in a new run)"
