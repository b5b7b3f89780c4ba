"""Write a run's checkpoints beside the steps, and redraw its curves.

    engine, state, on all ranks -> weights checked, copied -> in a thread of the first rank: checkpoint.py, prune, status.json

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
    """Does one piece of work after another in a thread of its own; what fails there is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Waits for the piece before."""
        self.flush()
        self._last = self._pool.submit(work)

    def flush(self) -> None:
        """Until all is done; raises what the last piece raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread when its piece is done, whatever became of it."""
        self._pool.shutdown(wait=True)


class CheckpointWriter:
    """The checkpoints of one run, from all ranks to the first rank's disk."""

    def __init__(self, run: Run, plan: Plan, engine: Engine, metrics_logger: MetricsLogger, world: World) -> None:
        self.run, self.plan, self.engine, self.metrics_logger, self.world = run, plan, engine, metrics_logger, world
        self._background = BackgroundWriter()
        self._drawn = -math.inf  # when curves.png last was

    def save(self, state: State, *, picture: bool = False) -> None:
        """Write a checkpoint, on all ranks; where one writes all, it does so beside the next steps, and so is a picture drawn."""
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
        # Epochs of moments do not each get a picture that takes longer than they.
        if picture and time.monotonic() - self._drawn >= _DRAW_EVERY_S:
            self._draw()

    def _files(self) -> dict[str, checkpoint.Tensors]:
        with self.engine.eval_weights() as network:
            files = {"model": checkpoint.copy_to_cpu(network.state_dict())}
        rest = checkpoint.copy_to_cpu(self.engine.state())
        return files | ({"training": rest} if rest else {})

    def _check_weights(self, step: int) -> None:
        """Raise CollectiveRunError where weights are no numbers, or where ranks hold different ones: the last checkpoint stays."""
        told = self.world.gather(np.array(self.engine.fingerprint(), np.int64))  # (ranks, 2)
        where, remedy = f"after step {step}", "the last checkpoint is sound"
        if not told[:, 1].all():
            raise CollectiveRunError(
                f"the weights are not finite {where}; {remedy}; give run=NEW and a lower learning_rate"
            )
        if others := np.flatnonzero(told[:, 0] != told[0, 0]).tolist():
            raise CollectiveRunError(
                f"{where} rank {others[0]} holds other weights than rank 0; {remedy}: the same command goes on from it; "
                "look for faulty memory or different versions on its machine"
            )

    def draw(self) -> None:
        """Refresh curves.png, on the first rank, beside what follows."""
        if self.world.is_first:
            self._background.submit(self._draw)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self.metrics_logger.draw(training_curves.draw)

    def flush(self) -> None:
        """Wait until all is on the disk; raises what the last piece raised."""
        self._background.flush()

    def close(self) -> None:
        """End the thread when its piece is done, whatever became of it."""
        self._background.close()
