"""Write a run's checkpoints in the background, and redraw its curves.

    engine, state, on all ranks -> weights checked, copied -> in a thread of rank 0: checkpoint.py, prune, status.json

Under ZeRO stage 1 each rank writes its share of the optimizer's state before the steps continue.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from mura_dist.core.errors import CollectiveRunError
from mura_dist.distributed.process_group import World
from mura_dist.reports import training_curves
from mura_dist.training import checkpoint
from mura_dist.training.engine import Engine
from mura_dist.training.metrics_log import MetricsLogger
from mura_dist.training.plan import Plan
from mura_dist.training.run import Run
from mura_dist.training.state import State

_DRAW_EVERY_S = 5.0


class BackgroundWriter:
    """A thread that runs one task after another. The next call raises the exception of a failed task."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Wait for the previous task, then start this one."""
        self.flush()
        self._last = self._pool.submit(task)

    def flush(self) -> None:
        """Wait until the last task is done, and raise its exception."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Wait for the last task, ignore its outcome, and end the thread."""
        self._pool.shutdown(wait=True)


class CheckpointWriter:
    """The writer of a run's checkpoints, from all ranks to the disk of rank 0."""

    def __init__(self, run: Run, plan: Plan, engine: Engine, metrics_logger: MetricsLogger, world: World) -> None:
        self.run, self.plan, self.engine, self.metrics_logger, self.world = run, plan, engine, metrics_logger, world
        self._background = BackgroundWriter()
        self._drawn_at = -math.inf  # time of the last curves.png

    def save(self, state: State, *, picture: bool = False) -> None:
        """Write a checkpoint. Called by all ranks. Rank 0 writes in the background, except under ZeRO's shares.

        Args:
            state: The state after the last step.
            picture: Redraw curves.png too.

        Raises:
            CollectiveRunError: weights are not finite or differ between ranks. The last checkpoint stays.
        """
        step, stage, world, parent = state.step, self.plan.settings.zero_stage, self.world, self.run.checkpoints
        self._check_weights(step)
        saved = {**state.to_json(), "zero_stage": stage, "world_size": world.size}
        if stage:
            if world.is_first:
                self._background.flush()
                checkpoint.begin_partial(parent, step)
            world.barrier()
            share = checkpoint.copy_to_cpu(self.engine.optimizer_state.tensors())
            checkpoint.write_optimizer_share(parent, step, share, rank=world.rank, num_shares=world.size)
            world.barrier()
        if world.is_first:
            files = self._files()
            if stage:
                write = partial(checkpoint.complete_partial, parent, saved, files)
            else:
                optimizer = checkpoint.copy_to_cpu(self.engine.optimizer_state.tensors())
                write = partial(checkpoint.write, parent, saved, files, optimizer)
            self._background.submit(partial(self._write, write, step, picture))

    def _write(self, write: Callable[[], Any], step: int, picture: bool) -> None:
        settings = self.plan.settings
        self.metrics_logger.sync()
        write()
        checkpoint.prune(self.run.checkpoints, settings.keep_checkpoints, settings.keep_best)
        self.run.write_status("running", step=step, num_steps=self.plan.num_steps)
        # A picture takes longer than an epoch of a small data set.
        if picture and time.monotonic() - self._drawn_at >= _DRAW_EVERY_S:
            self._draw()

    def _files(self) -> dict[str, checkpoint.Tensors]:
        with self.engine.eval_weights() as network:
            files = {"model": checkpoint.copy_to_cpu(network.state_dict())}
        training_state = checkpoint.copy_to_cpu(self.engine.state())
        return files | ({"training": training_state} if training_state else {})

    def _check_weights(self, step: int) -> None:
        fingerprints = self.world.gather(np.array(self.engine.fingerprint(), np.int64))  # (ranks, 2)
        if not fingerprints[:, 1].all():
            raise CollectiveRunError(
                f"the weights are NaN or infinite after step {step}. The last checkpoint is intact. Use a lower learning_rate "
                "in a new run (run=NEW)."
            )
        if differing := np.flatnonzero(fingerprints[:, 0] != fingerprints[0, 0]).tolist():
            raise CollectiveRunError(
                f"the weights of rank {differing[0]} differ from those of rank 0 after step {step}. The last checkpoint is "
                "intact. Check that machine for faulty memory and other versions, then run the same command to resume."
            )

    def draw(self) -> None:
        """Redraw curves.png in the background, on rank 0."""
        if self.world.is_first:
            self._background.submit(self._draw)

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        self.metrics_logger.draw(training_curves.draw)

    def flush(self) -> None:
        """Wait until everything is on the disk, and raise the exception of the last task."""
        self._background.flush()

    def close(self) -> None:
        """Wait for the last task, ignore its outcome, and end the thread."""
        self._background.close()
