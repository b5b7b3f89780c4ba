"""Training, top to bottom: build -> resume -> loop(evaluate, save, step, log).

    torchrun --nproc-per-node 2 -m mura_dist.train RECIPE.toml [key=value ...]
    deepspeed --module mura_dist.train RECIPE.toml [key=value ...]
    mura-dist train RECIPE.toml [key=value ...]

The same command again goes on from the last complete checkpoint; a finished run prints its summary.
"""

import contextlib
import itertools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console

from mura_dist.core.config import Settings
from mura_dist.core.errors import CollectiveRunError, RunError, StopRequestedError
from mura_dist.data.loaders.loader import Batch, BatchLoader, RowTargets
from mura_dist.distributed import environment, lock, process_group, processes
from mura_dist.distributed.process_group import World
from mura_dist.distributed.signals import default_signal_handlers, stop_event
from mura_dist.metrics.summary import compute_metrics
from mura_dist.training import checkpoint, micro_batch, mlflow_process, schedule, start
from mura_dist.training.checkpoint_writer import CheckpointWriter
from mura_dist.training.engine import Engine, StepResult
from mura_dist.training.metrics_log import MetricsLogger, Stopwatch, skip_reason
from mura_dist.training.plan import Plan
from mura_dist.training.progress_lines import LINE_EVERY_S, ProgressLines
from mura_dist.training.run import Run
from mura_dist.training.scores import study_scores
from mura_dist.training.state import State
from mura_dist.training.validation import InterruptedValidationError, score_rows, weighted_loss


def train(settings: Settings, *, quiet: bool = False, line_every_s: float = LINE_EVERY_S) -> dict[str, Any]:
    """Train or resume; returns the summary. Called on every rank. Raises UserError, RunError, StopRequestedError.

    `line_every_s`: seconds between lines of progress where stderr is no terminal.
    """
    processes.end_with_launcher()
    mlflow_process.check_installed(settings)
    settings = start.resolve_precision(settings)
    run = Run(Path(settings.run), settings)
    plan = Plan.from_settings(run.settings, environment.world_size())
    with contextlib.ExitStack() as stack:
        # First in, last out: a launcher's SIGTERM, when another rank failed, must not keep status.json from being written.
        stop = stack.enter_context(stop_event(settings.stop_signal))
        finished = environment.is_first() and not start.acquire_run(run, plan, stack)
        with default_signal_handlers():  # torch waits for the others in C++, where no handler of ours is heard
            world = stack.enter_context(
                process_group.join(
                    settings.collective_timeout_s, patience_s=max(settings.lock_wait_s, lock.UNVERIFIED_WAIT_S)
                )
            )
        if world.any(finished):
            if finished and settings.mlflow:
                log = Console(stderr=True, quiet=quiet, soft_wrap=True).print
                mlflow_process.send_rest(run.folder, log, settings.mlflow)
            return run.status()["summary"]
        start.check_agreement(plan, world)
        run, plan, note = start.resolve_micro_batch(run, plan, world)
        try:
            summary = _train(run, plan, world, stop, ConsoleOptions(quiet, line_every_s, note))
        except (MemoryError, RuntimeError) as error:  # outside a step, where the ranks do not tell each other
            if micro_batch.is_memory_error(error):
                raise RunError(micro_batch.exhausted([world.rank], plan.settings.micro_batch)) from error
            raise
        world.barrier()
        if world.is_first:  # last: nobody's end can make a failure of it any more
            run.write_status("done", summary=summary)
    return summary


@dataclass(frozen=True)
class ConsoleOptions:
    """What a training says on stderr: nothing if `quiet`, else `note` in its first line, and a line every `line_every_s`."""

    quiet: bool
    line_every_s: float
    note: str


def _train(run: Run, plan: Plan, world: World, stop: threading.Event, console: ConsoleOptions) -> dict[str, Any]:
    settings, shards = plan.settings, plan.shards
    targets = RowTargets.from_shards(shards, settings.loss_weights)
    saved = start.find_checkpoint(run, world)
    state = (
        State(loss_scale=schedule.LossScale.from_settings(settings)) if saved is None else State.from_json(saved.state)
    )
    loading = BatchLoader.from_settings(settings, shards, targets, world.device)
    engine = start.build_engine(plan, targets, saved, world)
    if world.is_first:
        how = {"world_size": world.size, "device": str(world.device)}
        run.describe(shards, plan.deepspeed, **how, pipeline=loading.backend, threads=loading.workers)
        run.write_status("running", step=state.step, num_steps=plan.num_steps)
    metrics_logger = MetricsLogger(
        run.folder,
        enabled=world.is_first,
        quiet=console.quiet,
        start_step=state.step,
        evaluated_step=state.evaluated_step,
        num_steps=plan.num_steps,
        tensorboard=settings.tensorboard,
    )
    sending = mlflow_process.sending(run, metrics_logger.log, enabled=world.is_first)
    with (
        metrics_logger,
        sending,
        contextlib.closing(CheckpointWriter(run, plan, engine, metrics_logger, world)) as writer,
    ):
        metrics_logger.log(start.describe_start(plan, world, loading, state) + console.note)
        lines = ProgressLines(
            metrics_logger.log,
            start_step=state.step,
            num_steps=plan.num_steps,
            num_epochs=settings.epochs,
            every_s=math.inf if metrics_logger.console.is_terminal else console.line_every_s,  # a terminal has the bar
        )
        Training(plan, engine, state, loading, metrics_logger, lines, world, stop, writer).loop()
        writer.flush()
        return _summary(run, plan, state, metrics_logger)


@dataclass
class Training:
    """One rank of a run that goes on."""

    plan: Plan
    engine: Engine
    state: State
    loading: BatchLoader
    metrics_logger: MetricsLogger
    lines: ProgressLines
    world: World
    stop: threading.Event
    writer: CheckpointWriter
    watch: Stopwatch = field(default_factory=Stopwatch)

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
                self.writer.draw()
                return
            if stopping:
                self.leave()
            if within == 0 or state.step == self.metrics_logger.start_step:
                steps = self.epoch_steps(epoch, within)

            with self.watch("data"):
                micros, reason = read_step(steps)
            with self.watch("step"):
                rate = schedule.learning_rate(plan.settings, state.plateau, state.step)
                scale = state.loss_scale.value
                result = self.engine.step(micros, rate, loss_scale=scale, asked=self.stop.is_set, failed=bool(reason))
            if result.failed:
                self.world.raise_failures(reason)
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
        self.writer.flush()
        self.world.barrier()
        raise StopRequestedError(
            f"stopped at step {self.state.step} of {self.plan.num_steps}; the same command goes on"
        )

    def epoch_steps(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches, step by step, from step `first` of the epoch on."""
        plan, ordered = self.plan, self.plan.order(epoch)
        steps = range(first, plan.steps_per_epoch)
        micros = (micro for step in steps for micro in plan.micros(ordered, step, self.world.rank))
        with contextlib.closing(self.loading.load(micros)) as stream:
            for _ in steps:
                yield list(itertools.islice(stream, plan.accumulation))

    def take(self, result: StepResult, epoch: int, within: int) -> None:
        """Count the step, taken or left out.

        Raises:
            CollectiveRunError: too many steps in a row were left out, or too many samples are corrupt.
        """
        settings, state = self.plan.settings, self.state
        state.corrupt_samples += result.num_corrupt
        self.check_corrupt(state.corrupt_samples, self.plan.train, "train")
        if result.applied:
            state.record_step(result.loss)
        else:
            state.record_skipped_step(empty=not result.has_samples)
            rows = self.rows_of_micro_batches(epoch, within, result.nonfinite_micro_batches)
            what = "samples" if not result.has_samples else "loss" if result.nonfinite_micro_batches else "gradient"
            self.metrics_logger.skip({"step": state.step, "epoch": epoch, "what": what, "rows": rows})
            if state.skipped_in_row >= settings.skip_limit:
                lower = "give run=NEW and a lower learning_rate, or clip_norm"
                raise CollectiveRunError(
                    f"{state.skipped_in_row} steps in a row were left out, the last of them step {state.step}: "
                    f"{skip_reason(what)} (rows {', '.join(map(str, rows))}); skip_limit={settings.skip_limit}; the last "
                    f"checkpoint is sound; {lower if result.has_samples else 'make the shards again'}"
                )
        if result.has_samples:
            state.loss_scale = state.loss_scale.after(result.applied, settings)

    def check_corrupt(self, number: int, rows: np.ndarray, split: str) -> None:
        """Raise CollectiveRunError, on all ranks, where more of the samples of `rows` are corrupt than max_corrupt_samples allows."""
        most, shards = self.plan.max_num_corrupt(len(rows)), self.plan.shards
        if number <= most:
            return
        self.gather_corrupt_rows()
        first = int(np.intersect1d(self.state.damaged, rows)[0])
        raise CollectiveRunError(
            f"{number} of {len(rows)} {split} samples are corrupt, at most {most} may be (max_corrupt_samples="
            f"{self.plan.settings.max_corrupt_samples:g}), the first of them {shards.describe(first)}; `mura-dist verify "
            f"{shards.folder}` names all: convert them again, then the same command resumes; or give a larger max_corrupt_samples"
        )

    def rows_of_micro_batches(self, epoch: int, within: int, micros: tuple[int, ...]) -> list[int]:
        """The radiographs of some micro-batches of a step; of none named: all of the step's, over all ranks."""
        ordered, all_ranks = self.plan.order(epoch), range(self.world.size)
        whole = [micro for rank in all_ranks for micro in self.plan.micros(ordered, within, rank)]
        return [int(row) for place in micros or range(len(whole)) for row in whole[place].rows]

    def log(self, result: StepResult, epoch: int, rate: float) -> None:
        settings, step = self.plan.settings, self.state.step
        self.lines.step(step, epoch=epoch, loss=result.loss, learning_rate=rate, num_images=settings.global_batch)
        if step % settings.log_every == 0:
            images = settings.global_batch * min(settings.log_every, step - self.metrics_logger.start_step)
            line = {"step": step, "epoch": epoch, "loss": result.loss, "gradient_norm": result.gradient_norm}
            self.metrics_logger.steps({**line, "learning_rate": rate}, images=images, watch=self.watch)

    def evaluate(self, epoch: int) -> bool:
        """Score the selecting split, tell `state`, log a line; False where a wish to stop came first, and nothing was done."""
        settings, state = self.plan.settings, self.state

        def should_stop() -> bool:
            self.lines.evaluating(state.step, settings.select_on)
            return self.stop.is_set()

        self.lines.begin_evaluation()
        bar = self.metrics_logger.evaluating(settings.select_on, len(self.plan.select))
        try:
            with self.watch("evaluation"), self.engine.eval_weights() as network, bar as progress:
                results = score_rows(
                    network, self.plan.select, self.loading, self.world, asked=should_stop, progress=progress
                )
        except InterruptedValidationError:
            return False
        self.check_corrupt(len(results.corrupt), self.plan.select, settings.select_on)
        loss, strange = weighted_loss(results, self.loading.targets), int((~np.isfinite(results.logit)).sum())
        quick: dict[str, Any] = {"kappa": None, "auroc": None}
        if not strange and len(results.rows):
            quick = compute_metrics(study_scores(self.plan.shards, results), resamples=0)["overall"]
        line: dict[str, Any] = {"step": state.step, "epoch": epoch, "split": settings.select_on}
        if epoch > 0:
            line["train_loss"] = state.train_loss_sum / state.taken_steps if state.taken_steps else None
        state.record_evaluation(epoch, loss, settings)
        self.gather_corrupt_rows()
        line |= {"tune_loss": loss, "tune_kappa": quick["kappa"], "tune_auroc": quick["auroc"]}
        line["learning_rate"] = schedule.learning_rate(settings, state.plateau, state.step)
        line |= {"skipped_steps": state.skipped_steps, "damaged_samples": len(state.damaged)}
        if strange:
            self.metrics_logger.log(
                f"{strange} of {len(results.rows)} logits are not finite: this evaluation decides nothing"
            )
        self.metrics_logger.epoch(line, self.watch)
        self.lines.end_evaluation()
        return True

    def gather_corrupt_rows(self) -> None:
        """What any rank met, now or before an interruption."""
        met = {*self.state.damaged, *self.plan.shards.damaged}
        self.state.damaged = self.world.union(np.array(sorted(met), np.int64)).tolist()

    def save(self, *, picture: bool = False) -> None:
        """Write a checkpoint, on all ranks; `picture`: and redraw curves.png."""
        self.gather_corrupt_rows()
        self.writer.save(self.state, picture=picture)


def read_step(steps: Iterator[list[Batch]]) -> tuple[list[Batch], str]:
    """Return this rank's micro-batches of the next step; where they cannot be read, none of them and why."""
    try:
        return next(steps), ""
    except RunError as error:
        return [], str(error)


def _summary(run: Run, plan: Plan, state: State, metrics_logger: MetricsLogger) -> dict[str, Any]:
    chosen = checkpoint.best_folder(checkpoint.list_folders(run.checkpoints)) if metrics_logger.enabled else None
    epochs = [line for line in metrics_logger.lines() if line["kind"] == "epoch"]
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
        "damaged_samples": len(state.damaged),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """What the command prints on stdout when it is done."""
    last = summary["last"] or {}
    scores = ", ".join(
        f"{key} {last[key]:.4f}" for key in ("tune_loss", "tune_auroc", "tune_kappa") if last.get(key) is not None
    )
    corrupt = f"; {number} corrupt samples left out" if (number := summary.get("damaged_samples")) else ""
    return (
        f"{summary['run']}: {summary['epochs']} epochs, {summary['step']} steps; "
        f"last on {summary['select_on']}: {scores}; best {summary['best_checkpoint']}{corrupt}"
    )
