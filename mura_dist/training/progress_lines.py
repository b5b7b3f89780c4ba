"""Lines of progress for a training whose stderr is no terminal: one every 30 s.

step 120/5000 (epoch 3 of 20): loss 0.4321, learning rate 0.0001, 85.2 images/s, 0:12:34 left
step 250/5000: evaluating tune for 0:00:31
"""

import time
from collections.abc import Callable
from datetime import timedelta

LINE_EVERY_S = 30.0


def time_left(elapsed_s: float, num_done: int, num_left: int) -> str:
    """Return the time that `num_left` steps take, if they take as long as the `num_done` that took `elapsed_s`."""
    return f"{timedelta(seconds=round(elapsed_s / num_done * num_left))} left"


class ProgressLines:
    """Says a line at the first step, or at the first moment of an evaluation, that is `every_s` after the line before.

    The time to the end is by all steps and evaluations since the start; images/s are by the steps since the line before.
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
        self._say, self._every_s, self._clock = log, every_s, clock
        self._start_step, self._num_steps, self._num_epochs = start_step, num_steps, num_epochs
        self._started = self._line_at = self._counted_from = self._evaluating_from = clock()
        self._num_images = 0

    def step(self, step: int, *, epoch: int, loss: float, learning_rate: float, num_images: int) -> None:
        """Hear of a step done: `step` counts them, `epoch` counts from 0."""
        self._num_images += num_images
        now = self._clock()
        if now - self._line_at < self._every_s:
            return
        speed = self._num_images / max(now - self._counted_from, 1e-9)
        left = time_left(now - self._started, step - self._start_step, self._num_steps - step)
        self._say(
            f"step {step}/{self._num_steps} (epoch {epoch + 1} of {self._num_epochs}): loss {loss:.4f}, "
            f"learning rate {learning_rate:.4g}, {speed:.1f} images/s, {left}"
        )
        self._line_at, self._counted_from, self._num_images = now, now, 0

    def begin_evaluation(self) -> None:
        """Hear that an evaluation begins."""
        self._evaluating_from = self._clock()

    def evaluating(self, step: int, split: str) -> None:
        """Hear that the evaluation after `step` goes on."""
        now = self._clock()
        if now - self._line_at >= self._every_s:
            so_far = timedelta(seconds=round(now - self._evaluating_from))
            self._say(f"step {step}/{self._num_steps}: evaluating {split} for {so_far}")
            self._line_at = now

    def end_evaluation(self) -> None:
        """Hear that an evaluation has ended with a line of its own."""
        self._line_at = self._counted_from = self._clock()
        self._num_images = 0
