"""Train a model, in reading order: build -> resume -> loop(evaluate, save, step, log).

    torchrun --nproc-per-node 2 -m mura_dist.train RECIPE.toml [key=value ...]
    deepspeed --module mura_dist.train RECIPE.toml [key=value ...]
    mura-dist train RECIPE.toml [key=value ...]

The same command resumes from the last complete checkpoint. A finished run prints its summary.
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
    """Train or resume a run. Called on every rank.

    Args:
        settings: The recipe. Its `run` is the folder to write.
        quiet: Suppress progress.
        line_every_s: Seconds between lines of progress if stderr is no terminal.

    Returns:
        The summary that status.json records.

    Raises:
        UserError: the settings, the shards or the run's folder do not fit together.
        RunError: the training failed.
        StopRequestedError: the training was stopped on request and can be resumed.
    """
    processes.end_with_launcher()
    mlflow_process.check_installed(settings)
    settings = start.resolve_precision(settings)
    run = Run(Path(settings.run), settings)
    plan = Plan.from_settings(run.settings, environment.world_size())
    with contextlib.ExitStack() as stack:
        # Entered first, left last: SIGTERM of a launcher whose other rank failed must not prevent the write of status.json.
        stop = stack.enter_context(stop_event(settings.stop_signal))
        is_finished = environment.is_first() and not start.acquire_run(run, plan, stack)
        with (
            default_signal_handlers()
        ):  # torch waits for the other ranks in C++, where Python's signal handlers do not run
            world = stack.enter_context(
                process_group.join(
                    settings.collective_timeout_s, patience_s=max(settings.lock_wait_s, lock.UNVERIFIED_WAIT_S)
                )
            )
        if world.any(is_finished):
            if is_finished and settings.mlflow:
                log = Console(stderr=True, quiet=quiet, soft_wrap=True).print
                mlflow_process.send_remaining(run.folder, log, settings.mlflow)
            return run.status()["summary"]
        start.check_agreement(plan, world)
        run, plan, note = start.resolve_micro_batch(run, plan, world)
        try:
            summary = _train(run, plan, world, stop, ConsoleOptions(quiet, line_every_s, note))
        except (MemoryError, RuntimeError) as error:  # outside a step, where ranks do not exchange flags
            if micro_batch.is_memory_error(error):
                raise RunError(micro_batch.out_of_memory_message([world.rank], plan.settings.micro_batch)) from error
            raise
        world.barrier()
        if world.is_first:  # after the barrier: no rank can fail any more
            run.write_status("done", summary=summary)
    return summary


@dataclass(frozen=True)
class ConsoleOptions:
    """What a training writes to stderr.

    Attributes:
        quiet: Write nothing.
        line_every_s: Seconds between lines of progress if stderr is no terminal.
        note: Text appended to the first line.
    """

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
        facts = {"world_size": world.size, "device": str(world.device)}
        run.write_description(shards, plan.deepspeed, **facts, pipeline=loading.backend, threads=loading.workers)
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
    sender = mlflow_process.sender(run, metrics_logger.log, enabled=world.is_first)
    with (
        metrics_logger,
        sender,
        contextlib.closing(CheckpointWriter(run, plan, engine, metrics_logger, world)) as writer,
    ):
        metrics_logger.log(start.describe_start(plan, world, loading, state) + console.note)
        lines = ProgressLines(
            metrics_logger.log,
            start_step=state.step,
            num_steps=plan.num_steps,
            num_epochs=settings.epochs,
            every_s=math.inf if metrics_logger.console.is_terminal else console.line_every_s,  # a terminal has a bar
        )
        Training(plan, engine, state, loading, metrics_logger, lines, world, stop, writer).loop()
        writer.flush()
        return _summary(run, plan, state, metrics_logger)


@dataclass
class Training:
    """The training loop of one rank."""

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
        """Train to the last step.

        Each epoch begins with an evaluation, and one more follows the last epoch. So the first, the periodic and the last
        evaluation are the same code.

        Raises:
            StopRequestedError: on all ranks, if one rank was asked to stop. The state is saved.
            RunError: the training failed.
        """
        plan, state, is_stopping = self.plan, self.state, False
        steps: Iterator[list[Batch]] = iter(())
        while True:
            epoch, step_in_epoch = divmod(state.step, plan.steps_per_epoch)
            if step_in_epoch == 0 and state.evaluated_step != state.step:
                is_stopping = not self.evaluate(epoch)
                self.save(picture=True)
            is_unevaluated = (
                is_stopping and step_in_epoch == 0
            )  # the request interrupted the evaluation: the run is not done
            is_stale = step_in_epoch == 0 and state.is_stale(plan.settings)
            if not is_unevaluated and (state.step >= plan.num_steps or is_stale):
                self.writer.draw()
                return
            if is_stopping:
                self.exit_stopped()
            if step_in_epoch == 0 or state.step == self.metrics_logger.start_step:
                steps = self.epoch_steps(epoch, step_in_epoch)

            with self.watch("data"):
                batches, read_error = read_step(steps)
            with self.watch("step"):
                rate = schedule.learning_rate(plan.settings, state.plateau, state.step)
                result = self.engine.step(
                    batches,
                    rate,
                    loss_scale=state.loss_scale.value,
                    should_stop=self.stop.is_set,
                    read_failed=bool(read_error),
                )
            if result.read_failed:
                self.world.raise_failures(read_error)
            if result.abandoned:
                self.save()
                self.exit_stopped()
            self.record(result, epoch, step_in_epoch)
            self.log(result, epoch, rate)
            is_stopping = result.stop
            every = plan.settings.checkpoint_every
            # At an epoch's end the checkpoint is written once, after the evaluation.
            if (is_stopping or (every and state.step % every == 0)) and state.step % plan.steps_per_epoch:
                self.save()

    def exit_stopped(self) -> NoReturn:
        """Raise StopRequestedError once rank 0 has written its checkpoint: a launcher may kill the ranks after one exits."""
        self.writer.flush()
        self.world.barrier()
        raise StopRequestedError(
            f"stopped at step {self.state.step} of {self.plan.num_steps}. The same command resumes."
        )

    def epoch_steps(self, epoch: int, first: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step, from step `first` of the epoch on."""
        plan, permutation = self.plan, self.plan.epoch(epoch)
        steps = range(first, plan.steps_per_epoch)
        micro_batches = (micro for step in steps for micro in plan.micro_batches(permutation, step, self.world.rank))
        with contextlib.closing(self.loading.load(micro_batches)) as stream:
            for _ in steps:
                yield list(itertools.islice(stream, plan.accumulation))

    def record(self, result: StepResult, epoch: int, step_in_epoch: int) -> None:
        """Count an applied or a skipped step.

        Raises:
            CollectiveRunError: too many consecutive steps were skipped, or too many samples are corrupt.
        """
        settings, state = self.plan.settings, self.state
        state.corrupt_samples += result.num_corrupt
        self.check_corrupt(state.corrupt_samples, self.plan.train, "train")
        if result.applied:
            state.record_step(result.loss)
        else:
            state.record_skipped_step(empty=not result.has_samples)
            rows = self.rows_of(epoch, step_in_epoch, result.nonfinite_micro_batches)
            what = "samples" if not result.has_samples else "loss" if result.nonfinite_micro_batches else "gradient"
            self.metrics_logger.log_skipped_step({"step": state.step, "epoch": epoch, "what": what, "rows": rows})
            if state.skipped_in_row >= settings.skip_limit:
                remedy = (
                    "Use a lower learning_rate or clip_norm in a new run (run=NEW)"
                    if result.has_samples
                    else "Convert the shards again"
                )
                raise CollectiveRunError(
                    f"stopped: {skip_reason(what)} in {state.skipped_in_row} consecutive steps "
                    f"(skip_limit={settings.skip_limit}), last in step {state.step} "
                    f"(rows {', '.join(map(str, rows))}). The last checkpoint is intact. {remedy}."
                )
        if result.has_samples:
            state.loss_scale = state.loss_scale.after(result.applied, settings)

    def check_corrupt(self, num_corrupt: int, rows: np.ndarray, split: str) -> None:
        """Compare the number of corrupt samples of `rows` with max_corrupt_samples.

        Raises:
            CollectiveRunError: on all ranks, if there are more.
        """
        limit, shards = self.plan.max_num_corrupt(len(rows)), self.plan.shards
        if num_corrupt <= limit:
            return
        self.gather_corrupt_rows()
        first = int(np.intersect1d(self.state.damaged, rows)[0])
        raise CollectiveRunError(
            f"{num_corrupt} of {len(rows)} {split} samples are corrupt, the limit is {limit} (max_corrupt_samples="
            f"{self.plan.settings.max_corrupt_samples:g}); the first is {shards.describe(first)}. `mura-dist verify "
            f"{shards.folder}` lists all. Convert them again and run the same command to resume, or raise max_corrupt_samples."
        )

    def rows_of(self, epoch: int, step_in_epoch: int, numbers: tuple[int, ...]) -> list[int]:
        """Return the rows in micro-batches of a step, by their numbers over all ranks. No numbers: all of the step."""
        permutation, ranks = self.plan.epoch(epoch), range(self.world.size)
        micro_batches = [micro for rank in ranks for micro in self.plan.micro_batches(permutation, step_in_epoch, rank)]
        return [int(row) for number in numbers or range(len(micro_batches)) for row in micro_batches[number].rows]

    def log(self, result: StepResult, epoch: int, rate: float) -> None:
        """Log a step, every `log_every` steps to metrics.jsonl."""
        settings, step = self.plan.settings, self.state.step
        self.lines.step(step, epoch=epoch, loss=result.loss, learning_rate=rate, num_images=settings.global_batch)
        if step % settings.log_every == 0:
            num_images = settings.global_batch * min(settings.log_every, step - self.metrics_logger.start_step)
            line = {"step": step, "epoch": epoch, "loss": result.loss, "gradient_norm": result.gradient_norm}
            self.metrics_logger.log_steps({**line, "learning_rate": rate}, num_images=num_images, watch=self.watch)

    def evaluate(self, epoch: int) -> bool:
        """Score the selecting split, record the loss and log a line.

        Returns:
            False if a request to stop interrupted the evaluation. Nothing is recorded then.
        """
        settings, state = self.plan.settings, self.state

        def should_stop() -> bool:
            self.lines.evaluating(state.step, settings.select_on)
            return self.stop.is_set()

        self.lines.begin_evaluation()
        bar = self.metrics_logger.evaluation_bar(settings.select_on, len(self.plan.select))
        try:
            with self.watch("evaluation"), self.engine.eval_weights() as network, bar as progress:
                results = score_rows(
                    network, self.plan.select, self.loading, self.world, should_stop=should_stop, progress=progress
                )
        except InterruptedValidationError:
            return False
        self.check_corrupt(len(results.corrupt), self.plan.select, settings.select_on)
        loss, num_nonfinite = weighted_loss(results, self.loading.targets), int((~np.isfinite(results.logit)).sum())
        overall: dict[str, Any] = {"kappa": None, "auroc": None}
        if not num_nonfinite and len(results.rows):
            overall = compute_metrics(study_scores(self.plan.shards, results), resamples=0)["overall"]
        line: dict[str, Any] = {"step": state.step, "epoch": epoch, "split": settings.select_on}
        if epoch > 0:
            line["train_loss"] = state.train_loss_sum / state.taken_steps if state.taken_steps else None
        state.record_evaluation(epoch, loss, settings)
        self.gather_corrupt_rows()
        line |= {"tune_loss": loss, "tune_kappa": overall["kappa"], "tune_auroc": overall["auroc"]}
        line["learning_rate"] = schedule.learning_rate(settings, state.plateau, state.step)
        line |= {"skipped_steps": state.skipped_steps, "damaged_samples": len(state.damaged)}
        if num_nonfinite:
            self.metrics_logger.log(
                f"{num_nonfinite} of {len(results.rows)} logits are NaN or infinite: this evaluation has no effect on the "
                "learning rate and the best checkpoint"
            )
        self.metrics_logger.log_epoch(line, self.watch)
        self.lines.end_evaluation()
        return True

    def gather_corrupt_rows(self) -> None:
        """Merge the corrupt rows that all ranks have read, in this start or before, into the state."""
        rows = {*self.state.damaged, *self.plan.shards.corrupt}
        self.state.damaged = self.world.union(np.array(sorted(rows), np.int64)).tolist()

    def save(self, *, picture: bool = False) -> None:
        """Write a checkpoint. Called by all ranks.

        Args:
            picture: Redraw curves.png too.
        """
        self.gather_corrupt_rows()
        self.writer.save(self.state, picture=picture)


def read_step(steps: Iterator[list[Batch]]) -> tuple[list[Batch], str]:
    """Return this rank's micro-batches of the next step, and an empty text; or no batches and why they cannot be read."""
    try:
        return next(steps), ""
    except RunError as error:
        return [], str(error)


def _summary(run: Run, plan: Plan, state: State, metrics_logger: MetricsLogger) -> dict[str, Any]:
    best = checkpoint.best_folder(checkpoint.list_folders(run.checkpoints)) if metrics_logger.enabled else None
    epochs = [line for line in metrics_logger.lines() if line["kind"] == "epoch"]
    return {
        "run": str(run.folder),
        "step": state.step,
        "epochs": state.step // plan.steps_per_epoch,
        "best_checkpoint": best.name if best else None,
        "select_on": plan.settings.select_on,
        "last": epochs[-1] if epochs else None,
        "drops": state.plateau.drops,
        "stale_epochs": state.stale_epochs,
        "skipped_steps": state.skipped_steps,
        "damaged_samples": len(state.damaged),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """Return the line that the command prints on stdout when the run is done."""
    last = summary["last"] or {}
    scores = ", ".join(
        f"{key} {last[key]:.4f}" for key in ("tune_loss", "tune_auroc", "tune_kappa") if last.get(key) is not None
    )
    corrupt = f"; {number} corrupt samples skipped" if (number := summary.get("damaged_samples")) else ""
    return (
        f"{summary['run']}: {summary['epochs']} epochs, {summary['step']} steps; "
        f"last on {summary['select_on']}: {scores}; best {summary['best_checkpoint']}{corrupt}"
    )
