"""Log a line of progress every 30 s, for a training whose stderr is no terminal.

step 120/5000 (epoch 3 of 20): loss 0.4321, learning rate 0.0001, 85.2 images/s, 0:12:34 left
step 250/5000: evaluating tune for 0:00:31
"""

import time
from collections.abc import Callable
from datetime import timedelta

LINE_EVERY_S = 30.0


def time_left(elapsed_s: float, num_done: int, num_remaining: int) -> str:
    """Return the text for the time that `num_remaining` steps take, at the speed of the `num_done` steps."""
    return f"{timedelta(seconds=round(elapsed_s / num_done * num_remaining))} left"


class ProgressLines:
    """A logger of progress lines. It logs at the first step, or during an evaluation, `every_s` seconds after the previous line.

    The remaining time is estimated from all steps and evaluations since the start, images/s from the steps since the previous
    line.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        *,
        start_step: int,
        num_steps: int,
        num_epochs: int,
        every_s: float = LINE_EVERY_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._log, self._every_s, self._clock = log, every_s, clock
        self._start_step, self._num_steps, self._num_epochs = start_step, num_steps, num_epochs
        self._started = self._line_at = self._counted_from = self._evaluation_start = clock()
        self._num_images = 0

    def step(self, step: int, *, epoch: int, loss: float, learning_rate: float, num_images: int) -> None:
        """Count a step. `step` is the number of steps done, `epoch` is 0-based."""
        self._num_images += num_images
        now = self._clock()
        if now - self._line_at < self._every_s:
            return
        speed = self._num_images / max(now - self._counted_from, 1e-9)
        remaining = time_left(now - self._started, step - self._start_step, self._num_steps - step)
        self._log(
            f"step {step}/{self._num_steps} (epoch {epoch + 1} of {self._num_epochs}): loss {loss:.4f}, "
            f"learning rate {learning_rate:.4g}, {speed:.1f} images/s, {remaining}"
        )
        self._line_at, self._counted_from, self._num_images = now, now, 0

    def begin_evaluation(self) -> None:
        """Note the start of an evaluation."""
        self._evaluation_start = self._clock()

    def evaluating(self, step: int, split: str) -> None:
        """Log a line if one is due during the evaluation after `step`."""
        now = self._clock()
        if now - self._line_at >= self._every_s:
            elapsed = timedelta(seconds=round(now - self._evaluation_start))
            self._log(f"step {step}/{self._num_steps}: evaluating {split} for {elapsed}")
            self._line_at = now

    def end_evaluation(self) -> None:
        """Note the end of an evaluation, which has logged a line itself."""
        self._line_at = self._counted_from = self._clock()
        self._num_images = 0
