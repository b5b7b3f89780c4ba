"""Training, top to bottom: build -> resume -> loop(evaluate, save, step, log).

    torchrun --nproc-per-node 2 -m mura_dist.train RECIPE.toml [key=value ...]
    deepspeed --module mura_dist.train RECIPE.toml [key=value ...]
    mura-dist train RECIPE.toml [key=value ...]

The same command again goes on from the last complete checkpoint; a finished run prints its summary.
"""

import contextlib
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint, launcher, metrics, model, order, report, schedule, world
from .config import Settings
from .engine import Engine
from .evaluate import scores, study_scores, weighted_loss
from .journal import Journal, Stopwatch
from .pipeline import Batch, Loading, Targets
from .refusal import Failure, Refusal, Stopped
from .runs import Run
from .schedule import Plateau
from .shards import Shards
from .world import World


@dataclass
class State:
    """What a run is, besides tensors: state.json of a checkpoint."""

    step: int = 0  # finished optimiser steps
    plateau: Plateau = field(default_factory=Plateau)
    evaluated_step: int = -1  # the last step whose evaluation is in here
    select_loss: float | None = None  # of that evaluation; None before the first epoch and where not finite
    train_loss_sum: float = 0.0  # over the steps of the epoch so far

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "State":
        fields = {name: saved[name] for name in ("step", "evaluated_step", "select_loss", "train_loss_sum")}
        best = saved["plateau"]["best"]
        return cls(**fields, plateau=Plateau(**saved["plateau"] | {"best": float("inf") if best is None else best}))

    def to_json(self) -> dict[str, Any]:
        plateau = asdict(self.plateau)
        return asdict(self) | {
            "plateau": plateau | {"best": plateau["best"] if np.isfinite(plateau["best"]) else None},
            # Of these very weights, or of none: a checkpoint in mid-epoch was not evaluated and cannot be the best.
            "select_loss": self.select_loss if self.evaluated_step == self.step else None,
        }


@dataclass(frozen=True)
class Plan:
    """What follows from settings, shards and ranks before the first step; computed once, checked, printed."""

    settings: Settings
    shards: Shards
    train: np.ndarray  # rows, int64
    select: np.ndarray  # rows of the split that drives plateau and choice
    steps_per_epoch: int
    num_steps: int

    @classmethod
    def of(cls, settings: Settings, world_size: int) -> "Plan":
        """Raises Refusal where shards, settings and ranks do not go together."""
        shards = Shards.open(settings.shards, Path(settings.mirror).expanduser() if settings.mirror else None)
        train, select = shards.rows("train"), shards.rows(settings.select_on)
        shards.require("train", settings.select_on)
        micro, unit = settings.micro_batch, settings.micro_batch * world_size
        if unit > len(train):
            raise Refusal(
                f"{world_size} ranks x micro_batch {micro} = {unit} radiographs a step, the train split has {len(train)}; "
                "start fewer ranks or give a smaller micro_batch"
            )
        if settings.global_batch % unit:
            near = order.nearest_global_batch(settings.global_batch, unit)
            raise Refusal(
                f"global_batch={settings.global_batch} is not a multiple of micro_batch {micro} x {world_size} ranks = {unit}; "
                f"the nearest is global_batch={near}"
            )
        per_epoch = order.steps_per_epoch(len(train), settings.global_batch)
        if per_epoch == 0:
            raise Refusal(
                f"global_batch={settings.global_batch}: the train split has only {len(train)} radiographs; give a smaller one"
            )
        return cls(settings, shards, train, select, per_epoch, settings.epochs * per_epoch)


def train(settings: Settings, *, quiet: bool = False) -> dict[str, Any]:
    """Train or resume; returns the summary. Called on every rank. Raises Refusal, Failure, Stopped."""
    run, world_size = Run(Path(settings.run), settings), launcher.world_size()
    plan = Plan.of(settings, world_size)
    if launcher.is_first():  # the others meet it in `join`; the folder is its to judge, before it writes there
        run.check(plan.shards)
    if (before := run.status()).get("state") == "done" and before["summary"]["step"] >= plan.num_steps:
        return before["summary"]
    with contextlib.ExitStack() as stack:
        if launcher.is_first():
            stack.enter_context(run.writing())
        stop = stack.enter_context(stop_signals())
        ranks = stack.enter_context(world.join(settings.timeout_s))
        summary = _train(run, plan, ranks, stop, quiet=quiet)
        if ranks.is_first:
            run.write_status("done", summary=summary)
        ranks.barrier()
    return summary


def _train(run: Run, plan: Plan, ranks: World, stop: threading.Event, *, quiet: bool) -> dict[str, Any]:
    settings, shards = plan.settings, plan.shards
    targets = Targets.of(shards, weighted=settings.loss_weights == "study_type")
    saved = _resume_point(run, ranks)
    network = model.build(settings.architecture, seed=settings.seed, base_rate=_base_rate(targets, plan.train))
    if saved is not None:
        network.load_state_dict(saved.model())
    elif settings.pretrained:
        model.load_pretrained(network, Path(settings.pretrained).expanduser())
    engine = Engine(network, settings, ranks)
    state = State()
    if saved is not None:
        engine.load_optimiser_state(saved.optimiser(ranks.rank, ranks.size, settings.zero_stage))
        state = State.of(saved.state)
    loading = Loading.of(settings, shards, targets, ranks.device)
    if ranks.is_first:
        run.describe(
            shards, world_size=ranks.size, device=str(ranks.device), pipeline=loading.backend, threads=loading.workers
        )
        run.write_status("running", step=state.step, num_steps=plan.num_steps)
    journal = Journal(
        run.folder,
        enabled=ranks.is_first,
        quiet=quiet,
        start_step=state.step,
        num_steps=plan.num_steps,
        tensorboard=settings.tensorboard,
    )
    with journal:
        _introduce(journal, plan, ranks, loading, state)
        _loop(run, plan, engine, state, loading, journal, ranks, stop)
        return _summary(run, plan, state, journal)


def _loop(
    run: Run,
    plan: Plan,
    engine: Engine,
    state: State,
    loading: Loading,
    journal: Journal,
    ranks: World,
    stop: threading.Event,
) -> None:
    """Evaluate before stepping, once more than there are epochs: first, periodic and last evaluation are one piece of code."""
    settings, watch, stopping = plan.settings, Stopwatch(), False
    steps: Iterator[list[Batch]] = iter(())
    while True:
        epoch, within = divmod(state.step, plan.steps_per_epoch)
        if within == 0 and state.evaluated_step != state.step:
            _evaluate(plan, engine, state, loading, journal, ranks, watch)
            _save(run, plan, engine, state, ranks)
            journal.draw(report.curves)
        if state.step >= plan.num_steps:
            return
        if stopping:
            raise Stopped(f"stopped at step {state.step} of {plan.num_steps}; the same command goes on")
        if within == 0 or state.step == journal.start_step:
            steps = _steps_of_epoch(plan, epoch, within, loading, ranks)

        with watch("data"):
            micros = next(steps)
        with watch("step"):
            lr = schedule.learning_rate(settings, state.plateau, state.step)
            result = engine.step(micros, lr, stop=stop.is_set())
        if not np.isfinite(result.loss):
            rows = ", ".join(str(row) for batch in micros for row in batch.row.tolist())
            raise Failure(
                f"the loss of step {state.step} is {result.loss} (rows of rank {ranks.rank}: {rows}); "
                "the last checkpoint is sound; give run=NEW and a lower learning_rate"
            )
        state.step += 1
        state.train_loss_sum += result.loss

        if state.step % settings.log_every == 0:
            images = settings.global_batch * min(settings.log_every, state.step - journal.start_step)
            journal.steps(state.step, epoch, loss=result.loss, learning_rate=lr, images=images, watch=watch)
        stopping = result.stop
        due = settings.checkpoint_every and state.step % settings.checkpoint_every == 0
        if (due or stopping) and state.step % plan.steps_per_epoch:  # at an epoch's end: once, when it is evaluated
            _save(run, plan, engine, state, ranks)


def _steps_of_epoch(plan: Plan, epoch: int, first: int, loading: Loading, ranks: World) -> Iterator[list[Batch]]:
    """This rank's micro-batches, step by step, from step `first` of the epoch on."""
    s = plan.settings
    ordered = order.epoch_order(plan.train, s.seed, epoch, rotate_deg=s.rotate_deg, flip=s.flip)
    share = {"global_batch": s.global_batch, "micro_batch": s.micro_batch, "rank": ranks.rank, "world_size": ranks.size}
    steps = range(first, plan.steps_per_epoch)
    micros = (micro for step in steps for micro in order.step_micros(ordered, step, **share))
    with contextlib.closing(loading.batches(micros, ranks.device)) as stream:
        for _ in steps:
            yield list(itertools.islice(stream, s.global_batch // (s.micro_batch * ranks.size)))


def _evaluate(
    plan: Plan, engine: Engine, state: State, loading: Loading, journal: Journal, ranks: World, watch: Stopwatch
) -> None:
    """Score the selecting split; at an epoch's end the plateau hears of it. Changes `state`, logs a line."""
    started, network = time.perf_counter(), engine.expose(state.step)
    found = scores(network, plan.select, loading, ranks)
    loss = weighted_loss(found, loading.targets)
    quick = metrics.measure(study_scores(plan.shards, found), resamples=0)["overall"]
    epoch = state.step // plan.steps_per_epoch
    if epoch > 0:
        state.plateau = state.plateau.after(loss, plan.settings)
    state.select_loss = loss if epoch > 0 and np.isfinite(loss) else None
    state.evaluated_step = state.step
    line: dict[str, Any] = {"step": state.step, "epoch": epoch, "split": plan.settings.select_on}
    if epoch > 0:
        line["train_loss"] = state.train_loss_sum / plan.steps_per_epoch
    line |= {"tune_loss": loss, "tune_kappa": quick["kappa"], "tune_auroc": quick["auroc"]}
    line["learning_rate"] = schedule.learning_rate(plan.settings, state.plateau, state.step)
    line["evaluation_s"] = round(time.perf_counter() - started, 3)
    line["damaged_samples"] = len(ranks.union(np.array(sorted(plan.shards.damaged), np.int64)))
    state.train_loss_sum = 0.0
    journal.epoch(line, watch)


def _save(run: Run, plan: Plan, engine: Engine, state: State, ranks: World) -> None:
    """Write a checkpoint, on all ranks; Failure where the weights are no numbers any more, so that the last sound one stays."""
    weights = checkpoint.to_cpu(engine.expose(state.step).state_dict())
    stage = run.settings.zero_stage
    if not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
        raise Failure(
            f"the weights are not finite after step {state.step}; the last checkpoint is sound; "
            "give run=NEW and a lower learning_rate"
        )
    checkpoint.save(
        run.checkpoints,
        {**state.to_json(), "zero_stage": stage, "world_size": ranks.size},
        weights,
        checkpoint.to_cpu(engine.optimiser_state()),
        rank=ranks.rank,
        shares=ranks.size if stage else 1,
        barrier=ranks.barrier,
    )
    if ranks.is_first:
        checkpoint.prune(run.checkpoints, run.settings.keep_checkpoints)
        run.write_status("running", step=state.step, num_steps=plan.num_steps)


def _resume_point(run: Run, ranks: World) -> checkpoint.Checkpoint | None:
    """The newest sound checkpoint, the same on every rank: the first rank decides."""
    found = None
    if ranks.is_first:
        found = checkpoint.latest(run.checkpoints, lambda line: print(line, file=sys.stderr))  # noqa: T201
    step = int(ranks.sum([found.step if found is not None else -1.0 if ranks.is_first else 0.0])[0])
    if step < 0:
        return None
    return found or checkpoint.select(run.checkpoints, f"step-{step}")


def _base_rate(targets: Targets, rows: np.ndarray) -> float:
    """The weighted share of positives, where the head starts; kept off 0 and 1."""
    weight, label = targets.weight[rows].astype(np.float64), targets.label[rows]
    return float(np.clip((weight * label).sum() / max(weight.sum(), 1e-12), 0.01, 0.99))


def _introduce(journal: Journal, plan: Plan, ranks: World, loading: Loading, state: State) -> None:
    s = plan.settings
    accumulation = s.global_batch // (s.micro_batch * ranks.size)
    journal.say(
        f"{s.architecture}, {plan.shards.size} px, {len(plan.train)} train and {len(plan.select)} {s.select_on} radiographs; "
        f"global batch {s.global_batch} = {s.micro_batch} x {ranks.size} ranks x {accumulation}; "
        f"{plan.steps_per_epoch} steps an epoch, {plan.num_steps} in all, from step {state.step}; "
        f"{s.precision} on {ranks.device.type}, {loading}"
    )


def _summary(run: Run, plan: Plan, state: State, journal: Journal) -> dict[str, Any]:
    chosen = checkpoint.best(checkpoint.folders(run.checkpoints)) if journal.enabled else None
    epochs = [line for line in journal.lines() if line["kind"] == "epoch"]
    return {
        "run": str(run.folder),
        "step": state.step,
        "epochs": plan.settings.epochs,
        "best_checkpoint": chosen.name if chosen else None,
        "select_on": plan.settings.select_on,
        "last": epochs[-1] if epochs else None,
        "drops": state.plateau.drops,
    }


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT or SIGUSR2 sets; the loop saves at the next step and leaves. Twice: at once."""
    event = threading.Event()

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield event
        return
    names = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2]
    before = {name: signal.signal(name, handle) for name in names}
    try:
        yield event
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def summary_text(summary: dict[str, Any]) -> str:
    """What the command prints on stdout when it is done."""
    last = summary["last"] or {}
    scores = ", ".join(
        f"{key} {last[key]:.4f}" for key in ("tune_loss", "tune_auroc", "tune_kappa") if last.get(key) is not None
    )
    return (
        f"{summary['run']}: {summary['epochs']} epochs, {summary['step']} steps; "
        f"last on {summary['select_on']}: {scores}; best {summary['best_checkpoint']}"
    )


if __name__ == "__main__":
    from .cli import entry

    entry(["train", *sys.argv[1:]])
