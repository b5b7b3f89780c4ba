"""What a run is, besides tensors: state.json of a checkpoint. With the order a pure function, it is enough to go on from."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.training.schedule import LossScale, Plateau


@dataclass
class State:
    """Changed by the loop alone, and in the same way on every rank."""

    step: int = 0  # steps done, those left out among them: the place in the order
    plateau: Plateau = field(default_factory=Plateau)
    loss_scale: LossScale = field(default_factory=LossScale)
    evaluated_step: int = -1  # the last step whose evaluation is in here
    select_loss: float | None = None  # of that evaluation; None before the first epoch and where not finite
    stale_epochs: int = 0  # since the loss was last better: what early_stop counts
    train_loss_sum: float = 0.0  # over the steps taken of the epoch so far
    taken_steps: int = 0  # of the epoch so far
    skipped_steps: int = 0  # of the whole run: left out, their loss or gradient was not finite, or they had no sample
    skipped_in_row: int = 0
    damaged: list[int] = field(default_factory=list)  # rows met whose samples are damaged, ascending
    corrupt_samples: int = 0  # of the epoch so far, over all ranks: what max_corrupt_samples limits

    @classmethod
    def of(cls, saved: dict[str, Any]) -> "State":
        """From a checkpoint's state.json. Raises UserError where it lacks a field, or one is of another type."""
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
                f"state.json of the newest checkpoint is damaged ({reason}); delete it, or give run=NEW"
            ) from error

    def to_json(self) -> dict[str, Any]:
        plateau = asdict(self.plateau)
        return asdict(self) | {
            "plateau": plateau | {"best": plateau["best"] if math.isfinite(plateau["best"]) else None},
            # Of these very weights, or of none: a checkpoint in mid-epoch was not evaluated and cannot be the best.
            "select_loss": self.select_loss if self.evaluated_step == self.step else None,
        }

    def record_step(self, loss: float) -> None:
        """A step was taken."""
        self.step += 1
        self.train_loss_sum += loss
        self.taken_steps += 1
        self.skipped_in_row = 0

    def record_skipped_step(self, *, empty: bool = False) -> None:
        """A step was not: while an fp16 scale may be what is wrong it is not held against the run. `empty`: it had no sample."""
        self.step += 1
        self.skipped_steps += 1
        self.skipped_in_row += empty or not self.loss_scale.may_shrink

    def evaluated(self, epoch: int, loss: float, settings: Settings) -> None:
        """The selecting split's loss of these weights; before the first epoch, and where not finite, it decides nothing."""
        counts = epoch > 0 and math.isfinite(loss)
        if counts:
            self.stale_epochs = 0 if self.plateau.is_better(loss, settings) else self.stale_epochs + 1
            self.plateau = self.plateau.after(loss, settings)
        self.select_loss = loss if counts else None
        self.evaluated_step = self.step
        self.train_loss_sum, self.taken_steps, self.corrupt_samples = 0.0, 0, 0

    def is_stale(self, settings: Settings) -> bool:
        """Whether early_stop ends the run here."""
        return 0 < settings.early_stop <= self.stale_epochs
