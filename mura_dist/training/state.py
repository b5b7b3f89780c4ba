"""Hold the numbers of a run besides its tensors: state.json of a checkpoint.

The order of samples is a pure function of the settings and `step`, so state and tensors are enough to resume.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.training.schedule import LossScale, Plateau


@dataclass
class State:
    """The progress of a run. Only the training loop changes it, identically on every rank. The fields are keys of state.json."""

    step: int = 0  # steps done, including skipped steps
    plateau: Plateau = field(default_factory=Plateau)
    loss_scale: LossScale = field(default_factory=LossScale)
    evaluated_step: int = -1  # the step of the last evaluation
    select_loss: float | None = None  # loss of that evaluation; None before the first epoch or if not finite
    stale_epochs: int = 0  # evaluations since the last better loss; early_stop limits them
    train_loss_sum: float = 0.0  # sum over the applied steps of this epoch
    taken_steps: int = 0  # number of applied steps in this epoch
    skipped_steps: int = 0  # number in the whole run: loss or gradient not finite, or no valid sample
    skipped_in_row: int = 0
    damaged: list[int] = field(default_factory=list)  # rows whose samples are corrupt, ascending
    corrupt_samples: int = 0  # number in this epoch over all ranks; max_corrupt_samples limits it

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "State":
        """Return the state in a checkpoint's state.json.

        Raises:
            UserError: a field is missing or has another type.
        """
        try:
            fields = {
                name: saved[name] for name in cls.__dataclass_fields__ if name in saved or name != "corrupt_samples"
            }
            best = saved["plateau"]["best"]
            fields["plateau"] = saved["plateau"] | {"best": math.inf if best is None else best}
            return TypeAdapter(cls).validate_python(fields)
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error).replace("\n", " ")[:160]
            raise UserError(
                f"state.json of the newest checkpoint is corrupt ({reason}). Delete that checkpoint, or use a new run=NEW."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return the content of state.json, without infinities."""
        plateau = asdict(self.plateau)
        return asdict(self) | {
            "plateau": plateau | {"best": plateau["best"] if math.isfinite(plateau["best"]) else None},
            # A checkpoint in mid-epoch was not evaluated and cannot be the best.
            "select_loss": self.select_loss if self.evaluated_step == self.step else None,
        }

    def record_step(self, loss: float) -> None:
        """Count an applied step."""
        self.step += 1
        self.train_loss_sum += loss
        self.taken_steps += 1
        self.skipped_in_row = 0

    def record_skipped_step(self, *, empty: bool = False) -> None:
        """Count a skipped step. It does not count towards skip_limit while an fp16 loss scale may be too large.

        Args:
            empty: The step had no valid sample.
        """
        self.step += 1
        self.skipped_steps += 1
        self.skipped_in_row += empty or not self.loss_scale.may_shrink

    def record_evaluation(self, epoch: int, loss: float, settings: Settings) -> None:
        """Record the loss on the selecting split. Before the first epoch, or if it is not finite, the loss decides nothing."""
        counts = epoch > 0 and math.isfinite(loss)
        if counts:
            self.stale_epochs = 0 if self.plateau.is_better(loss, settings) else self.stale_epochs + 1
            self.plateau = self.plateau.after(loss, settings)
        self.select_loss = loss if counts else None
        self.evaluated_step = self.step
        self.train_loss_sum, self.taken_steps, self.corrupt_samples = 0.0, 0, 0

    def is_stale(self, settings: Settings) -> bool:
        """Return whether early_stop ends the run after this evaluation."""
        return 0 < settings.early_stop <= self.stale_epochs
