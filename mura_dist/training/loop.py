"""Training, top to bottom: build -> resume -> loop(evaluate, save, step, log).

    torchrun --nproc-per-node 2 -m mura_dist.train RECIPE.toml [key=value ...]
    deepspeed --module mura_dist.train RECIPE.toml [key=value ...]
    mura-dist train RECIPE.toml [key=value ...]

The same command again goes on from the last complete checkpoint; a finished run prints its summary.
"""

import contextlib
import itertools
import json
import math
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mura_dist.core.config import AUTO, Settings
from mura_dist.core.errors import CommonFailure, Failure, Refusal, Stopped
from mura_dist.data.loaders.loader import Batch, Loading, Targets
from mura_dist.distributed import environment, lock, process_group, processes
from mura_dist.distributed.process_group import World
from mura_dist.distributed.signals import asked_to_stop, at_once
from mura_dist.metrics.summary import measure
from mura_dist.models import densenet
from mura_dist.reports import training_curves
from mura_dist.training import checkpoint, micro_batch, schedule
from mura_dist.training.checkpoint import Checkpoint
from mura_dist.training.engine import Engine, StepResult
from mura_dist.training.metrics_log import Journal, Stopwatch
from mura_dist.training.plan import Plan
from mura_dist.training.run import Run
from mura_dist.training.state import State
from mura_dist.training.validation import Interrupted, scores, study_scores, weighted_loss

_DRAW_EVERY_S = 5.0


def train(settings: Settings, *, quiet: bool = False) -> dict[str, Any]:
    """Train or resume; returns the summary. Called on every rank. Raises Refusal, Failure, Stopped."""
    processes.end_with_launcher()
    settings = _with_precision(settings)
    run = Run(Path(settings.run), settings)
    plan = Plan.of(run.settings, environment.world_size())
    with contextlib.ExitStack() as stack:
        finished = environment.is_first() and not _begin(run, plan, stack)
        with at_once():  # torch waits for the others in C++, where no handler of ours is heard
            ranks = stack.enter_context(
                process_group.join(settings.timeout_s, patience_s=max(settings.wait_s, lock.DOUBT_S))
            )
        stop = stack.enter_context(asked_to_stop(settings.stop_signal))
        if ranks.any(finished):
            return run.status()["summary"]
        _agree(plan, ranks)
        run, plan = _with_micro_batch(run, plan, ranks)
        try:
            summary = _train(run, plan, ranks, stop, quiet=quiet)
        except (MemoryError, RuntimeError) as error:  # outside a step, where the ranks do not tell each other
            if micro_batch.is_exhausted(error):
                raise Failure(micro_batch.exhausted([ranks.rank], plan.settings.micro_batch)) from error
            raise
        ranks.barrier()
        if ranks.is_first:  # last: nobody's end can make a failure of it any more
            run.write_status("done", summary=summary)
    return summary


def _with_precision(settings: Settings) -> Settings:
    """The same; where the settings say auto, with the precision the run began with, or the one this rank's device computes."""
    if settings.precision != "auto":
        return settings
    begun = Run(Path(settings.run), settings).begun_with("precision", None)
    chosen = begun or ("bf16" if process_group.computes_bf16() else "fp32")
    return settings.model_copy(update={"precision": chosen})


def _begin(run: Run, plan: Plan, stack: contextlib.ExitStack) -> bool:
    """On the first rank, whose folder it is to judge while the others wait in `join`: hold the lock; False where all is done."""
    with asked_to_stop(run.settings.stop_signal) as early:
        if not _is_ours_to_do(run, plan):
            return False
        stack.enter_context(run.writing(early))
        if not _is_ours_to_do(run, plan):  # who wrote until now may have made it another run, or finished it
            return False
        if early.is_set():
            raise Stopped("stopped before it began; the same command goes on")
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


def _agree(plan: Plan, ranks: World) -> None:
    """Refusal, on all ranks, where one of them would train something else: its weights would agree, its radiographs not."""
    settings = plan.settings.model_dump(exclude={"shards", "mirror", "workers", "prefetch", "pretrained", "deepspeed"})
    index = plan.shards.index
    text = json.dumps([settings, index["manifest"]["sha256"], index["size"], plan.deepspeed], sort_keys=True)
    told = ranks.gather(np.array([zlib.crc32(text.encode())], np.int64))[:, 0]
    others = np.flatnonzero(told != told[0]).tolist()
    computed = ranks.gather(np.array([plan.settings.precision == "bf16"], np.uint8))[:, 0]
    if others and computed.min() < computed.max():
        raise Refusal(
            f"precision is {'bf16' if computed[0] else 'another'} on rank 0 and not on rank "
            f"{np.argmax(computed != computed[0])}: of auto, their processors differ; name one for all: precision=fp32"
        )
    if others:
        raise Refusal(
            f"rank {others[0]} was started with other settings or other shards than rank 0; give all the same recipe, "
            "key=value words and shards"
        )


def _with_micro_batch(run: Run, plan: Plan, ranks: World) -> tuple[Run, Plan]:
    """The same; where the settings say auto, with the micro-batch the run began with, or the one that fits."""
    if run.settings.micro_batch != AUTO:
        return run, plan
    begun = int(ranks.sum([run.begun_with("micro_batch", AUTO) if ranks.is_first else 0])[0])
    plan = plan.with_micro_batch(begun or micro_batch.fitting_micro_batch(run.settings, plan.shards.size, ranks))
    if ranks.is_first:
        run.check_deepspeed(plan.deepspeed)
    return Run(run.folder, plan.settings), plan


def _train(run: Run, plan: Plan, ranks: World, stop: threading.Event, *, quiet: bool) -> dict[str, Any]:
    settings, shards = plan.settings, plan.shards
    targets = Targets.of(shards, weighted=settings.loss_weights == "study_type")
    saved = _resume_point(run, ranks)
    state = State(loss_scale=schedule.LossScale.of(settings)) if saved is None else State.of(saved.state)
    engine = _engine(plan, targets, saved, ranks)
    loading = Loading.of(settings, shards, targets, ranks.device)
    if ranks.is_first:
        how = {"world_size": ranks.size, "device": str(ranks.device)}
        run.describe(shards, plan.deepspeed, **how, pipeline=loading.backend, threads=loading.workers)
        run.write_status("running", step=state.step, num_steps=plan.num_steps)
    journal = Journal(
        run.folder,
        enabled=ranks.is_first,
        quiet=quiet,
        start_step=state.step,
        evaluated_step=state.evaluated_step,
        num_steps=plan.num_steps,
        tensorboard=settings.tensorboard,
    )
    with journal, contextlib.closing(checkpoint.Beside()) as beside:
        journal.say(_introduction(plan, ranks, loading, state))
        Training(run, plan, engine, state, loading, journal, ranks, stop, beside).loop()
        beside.wait()
        return _summary(run, plan, state, journal)


def _engine(plan: Plan, targets: Targets, saved: Checkpoint | None, ranks: World) -> Engine:
    """With the weights, and what the optimiser knows, of a checkpoint; or with those a run begins with."""
    settings = plan.settings
    network = densenet.build(settings.architecture, seed=settings.seed, base_rate=_base_rate(targets, plan.train))
    if saved is not None:
        network.load_state_dict(saved.model())
    elif settings.pretrained:
        _load_pretrained(network, settings.pretrained, ranks)
    engine = Engine(network, settings, ranks)
    if saved is not None:
        engine.load_state(saved.training())
        engine.load_optimiser_state(saved.optimiser())
    return engine


def _load_pretrained(network: densenet.DenseNet, name: str, ranks: World) -> None:
    """One rank of a machine goes first: it may have to fetch the file."""
    where = name if name == densenet.IMAGENET else Path(name).expanduser()
    if ranks.local_rank == 0:
        densenet.load_pretrained(network, where)
    ranks.barrier()
    if ranks.local_rank != 0:
        densenet.load_pretrained(network, where)


@dataclass
class Training:
    """One rank of a run that goes on."""

    run: Run
    plan: Plan
    engine: Engine
    state: State
    loading: Loading
    journal: Journal
    ranks: World
    stop: threading.Event
    beside: checkpoint.Beside
    watch: Stopwatch = field(default_factory=Stopwatch)
    drawn: float = -math.inf  # when curves.png last was

    def loop(self) -> None:
        """Evaluate before stepping, once more than there are epochs: first, periodic, last evaluation are one piece of code."""
        plan, state, stopping = self.plan, self.state, False
        steps: Iterator[list[Batch]] = iter(())
        while True:
            epoch, within = divmod(state.step, plan.steps_per_epoch)
            if within == 0 and state.evaluated_step != state.step:
                stopping = not self.evaluate(epoch)
                self.save(picture=True)
            unevaluated = stopping and within == 0  # the wish came first: not done yet, even at the last step
            if not unevaluated and (state.step >= plan.num_steps or (within == 0 and state.is_stale(plan.settings))):
                if self.ranks.is_first:
                    self.beside.do(self.draw)
                return
            if stopping:
                self.leave()
            if within == 0 or state.step == self.journal.start_step:
                steps = self.steps_of_epoch(epoch, within)

            with self.watch("data"):
                micros = next(steps)
            with self.watch("step"):
                rate = schedule.learning_rate(plan.settings, state.plateau, state.step)
                scale = state.loss_scale.value
                result = self.engine.step(micros, rate, loss_scale=scale, asked=self.stop.is_set)
            if result.abandoned:
                self.save()
                self.leave()
            self.take(result, epoch, within)
            self.log(result, epoch, rate)
            stopping = result.stop
            every = plan.settings.checkpoint_every
            # At an epoch's end once only, when it is evaluated.
            if (stopping or (every and state.step % every == 0)) and state.step % plan.steps_per_epoch:
                self.save()

    def leave(self) -> NoReturn:
        """When what the first rank writes is on the disk: a launcher that sees one rank end may kill the others."""
        self.beside.wait()
        self.ranks.barrier()
        raise Stopped(f"stopped at step {self.state.step} of {self.plan.num_steps}; the same command goes on")

    def steps_of_epoch(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches, step by step, from step `first` of the epoch on."""
        plan, ordered = self.plan, self.plan.order(epoch)
        steps = range(first, plan.steps_per_epoch)
        micros = (micro for step in steps for micro in plan.micros(ordered, step, self.ranks.rank))
        with contextlib.closing(self.loading.batches(micros, self.ranks.device)) as stream:
            for _ in steps:
                yield list(itertools.islice(stream, plan.accumulation))

    def take(self, result: StepResult, epoch: int, within: int) -> None:
        """Count the step, taken or left out. Raises CommonFailure where too many in a row were left out."""
        settings, state = self.plan.settings, self.state
        if result.applied:
            state.took(result.loss)
        else:
            state.left_out()
            rows = self.rows_of(epoch, within, result.bad_micros)
            what = "loss" if result.bad_micros else "gradient"
            self.journal.skip({"step": state.step, "epoch": epoch, "what": what, "rows": rows})
            if state.skipped_in_row >= settings.skip_limit:
                raise CommonFailure(
                    f"{state.skipped_in_row} steps in a row were left out, the last of them step {state.step}: {what} not finite "
                    f"(rows {', '.join(map(str, rows))}); skip_limit={settings.skip_limit}; the last checkpoint is sound; "
                    "give run=NEW and a lower learning_rate, or clip_norm"
                )
        state.loss_scale = state.loss_scale.after(result.applied, settings)

    def rows_of(self, epoch: int, within: int, micros: tuple[int, ...]) -> list[int]:
        """The radiographs of some micro-batches of a step; of none named: all of the step's, over all ranks."""
        ordered, ranks = self.plan.order(epoch), range(self.ranks.size)
        whole = [micro for rank in ranks for micro in self.plan.micros(ordered, within, rank)]
        return [int(row) for place in micros or range(len(whole)) for row in whole[place].rows]

    def log(self, result: StepResult, epoch: int, learning_rate: float) -> None:
        settings, step = self.plan.settings, self.state.step
        if step % settings.log_every == 0:
            images = settings.global_batch * min(settings.log_every, step - self.journal.start_step)
            line = {"step": step, "epoch": epoch, "loss": result.loss, "gradient_norm": result.gradient_norm}
            self.journal.steps({**line, "learning_rate": learning_rate}, images=images, watch=self.watch)

    def evaluate(self, epoch: int) -> bool:
        """Score the selecting split, tell `state`, log a line; False where a wish to stop came first, and nothing was done."""
        settings, state = self.plan.settings, self.state
        try:
            with self.watch("evaluation"), self.engine.offered() as network:
                found = scores(network, self.plan.select, self.loading, self.ranks, asked=self.stop.is_set)
        except Interrupted:
            return False
        loss, strange = weighted_loss(found, self.loading.targets), int((~np.isfinite(found.logit)).sum())
        quick: dict[str, Any] = {"kappa": None, "auroc": None}
        if not strange and len(found.rows):
            quick = measure(study_scores(self.plan.shards, found), resamples=0)["overall"]
        line: dict[str, Any] = {"step": state.step, "epoch": epoch, "split": settings.select_on}
        if epoch > 0:
            line["train_loss"] = state.train_loss_sum / state.taken_steps if state.taken_steps else None
        state.evaluated(epoch, loss, settings)
        self.notice_damage()
        line |= {"tune_loss": loss, "tune_kappa": quick["kappa"], "tune_auroc": quick["auroc"]}
        line["learning_rate"] = schedule.learning_rate(settings, state.plateau, state.step)
        line |= {"skipped_steps": state.skipped_steps, "damaged_samples": len(state.damaged)}
        if strange:
            self.journal.say(f"{strange} of {len(found.rows)} logits are not finite: this evaluation decides nothing")
        self.journal.epoch(line, self.watch)
        return True

    def notice_damage(self) -> None:
        """What any rank met, now or before an interruption."""
        met = {*self.state.damaged, *self.plan.shards.damaged}
        self.state.damaged = self.ranks.union(np.array(sorted(met), np.int64)).tolist()

    def save(self, *, picture: bool = False) -> None:
        """A checkpoint, on all ranks; where one writes all, it does so beside the next steps, and so is a picture drawn."""
        self.check_weights()
        self.notice_damage()
        stage, ranks, parent = self.plan.settings.zero_stage, self.ranks, self.run.checkpoints
        state = {**self.state.to_json(), "zero_stage": stage, "world_size": ranks.size}
        step = self.state.step
        if stage:
            if ranks.is_first:
                self.beside.wait()
                checkpoint.begin(parent, step)
            ranks.barrier()
            share = checkpoint.to_cpu(self.engine.optimiser_state())
            checkpoint.write_share(parent, step, share, rank=ranks.rank, shares=ranks.size)
            ranks.barrier()
        if ranks.is_first:
            files = self.files()
            if stage:
                write = partial(checkpoint.complete, parent, state, files)
            else:
                write = partial(
                    checkpoint.write, parent, state, files, checkpoint.to_cpu(self.engine.optimiser_state())
                )
            self.beside.do(partial(self._written, write, step, picture))

    def _written(self, write: Any, step: int, picture: bool) -> None:
        settings = self.plan.settings
        self.journal.sync()
        write()
        checkpoint.prune(self.run.checkpoints, settings.keep_checkpoints, settings.keep_best)
        self.run.write_status("running", step=step, num_steps=self.plan.num_steps)
        # Epochs of moments do not each get a picture that takes longer than they.
        if picture and time.monotonic() - self.drawn >= _DRAW_EVERY_S:
            self.draw()

    def files(self) -> dict[str, checkpoint.Tensors]:
        with self.engine.offered() as network:
            files = {"model": checkpoint.to_cpu(network.state_dict())}
        rest = checkpoint.to_cpu(self.engine.state())
        return files | ({"training": rest} if rest else {})

    def check_weights(self) -> None:
        """CommonFailure where weights are no numbers, or where ranks hold different ones: the last checkpoint stays."""
        told = self.ranks.gather(np.array(self.engine.fingerprint(), np.int64))  # (ranks, 2)
        where, remedy = f"after step {self.state.step}", "the last checkpoint is sound"
        if not told[:, 1].all():
            raise CommonFailure(f"the weights are not finite {where}; {remedy}; give run=NEW and a lower learning_rate")
        if others := np.flatnonzero(told[:, 0] != told[0, 0]).tolist():
            raise CommonFailure(
                f"{where} rank {others[0]} holds other weights than rank 0; {remedy}: the same command goes on from it; "
                "look for faulty memory or different versions on its machine"
            )

    def draw(self) -> None:
        """Refresh curves.png."""
        self.drawn = time.monotonic()
        self.journal.draw(training_curves.draw)


def _resume_point(run: Run, ranks: World) -> Checkpoint | None:
    """The newest sound checkpoint, the same on every rank: the first rank decides."""
    found = None
    if ranks.is_first:
        found = checkpoint.latest(run.checkpoints, lambda line: print(line, file=sys.stderr))  # noqa: T201
    step = int(ranks.sum([found.step if found is not None else -1.0 if ranks.is_first else 0.0])[0])
    if step < 0:
        return None
    try:
        return found or checkpoint.read(checkpoint.folder_of(run.checkpoints, step))
    except ValueError as error:
        raise Failure(f"rank {ranks.rank}: {error}, rank 0 reads it; put run= on a disk that all ranks see") from error


def _base_rate(targets: Targets, rows: np.ndarray) -> float:
    """The weighted share of positives, where the head starts; kept off 0 and 1."""
    weight, label = targets.weight[rows].astype(np.float64), targets.label[rows]
    return float(np.clip((weight * label).sum() / max(weight.sum(), 1e-12), 0.01, 0.99))


def _introduction(plan: Plan, ranks: World, loading: Loading, state: State) -> str:
    s, rate = plan.settings, schedule.scaling(plan.settings) * plan.settings.learning_rate
    scaled = (
        f" (learning rate {rate:.4g} by {s.lr_scaling} from a batch of {s.reference_batch})"
        if s.lr_scaling != "none"
        else ""
    )
    return (
        f"{s.architecture}, {plan.shards.size} px, {len(plan.train)} train and {len(plan.select)} {s.select_on} radiographs; "
        f"global batch {s.global_batch} = {s.micro_batch} x {ranks.size} ranks x {plan.accumulation}{scaled}; "
        f"{plan.steps_per_epoch} steps an epoch, {plan.num_steps} in all, from step {state.step}; "
        f"{s.precision} on {ranks.device.type}, {loading}{_slow(s)}"
    )


def _slow(settings: Settings) -> str:
    """A warning where a run goes on in, or was given, a precision that this device has no instructions for."""
    if settings.precision != "bf16" or process_group.computes_bf16():
        return ""
    return "; warning: there are no instructions for bf16 here, fp32 is several times as fast (precision=fp32, in a new run)"


def _summary(run: Run, plan: Plan, state: State, journal: Journal) -> dict[str, Any]:
    chosen = checkpoint.best(checkpoint.folders(run.checkpoints)) if journal.enabled else None
    epochs = [line for line in journal.lines() if line["kind"] == "epoch"]
    return {
        "run": str(run.folder),
        "step": state.step,
        "epochs": state.step // plan.steps_per_epoch,
        "best_checkpoint": chosen.name if chosen else None,
        "select_on": plan.settings.select_on,
        "last": epochs[-1] if epochs else None,
        "drops": state.plateau.drops,
        "stale_epochs": state.stale_epochs,
        "skipped_steps": state.skipped_steps,
    }


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
