"""Log the metrics of a run: metrics.jsonl, TensorBoard and a progress bar.

On ranks other than rank 0 the logger does nothing, so that the loop has no `if`. Lines of metrics.jsonl:

    {"kind": "step", "step", "epoch", "loss", "gradient_norm", "learning_rate", "images_per_s", "data_wait_share", "time_s"}
    {"kind": "skip", "step", "epoch", "what", "rows", "time_s"}
    {"kind": "epoch", "step", "epoch", "split", "train_loss", "tune_loss", "tune_kappa", "tune_auroc", "learning_rate",
     "skipped_steps", "damaged_samples", "evaluation_s", "overhead_share", "data_wait_share", "limited_by", "time_s"}

`step` is the number of steps done. `loss` is sum(weight x BCE) / global batch of that step. `gradient_norm` is the L2 norm of its
whole gradient before clipping. A skipped step has a line of its own. Its `what` is loss or gradient (not finite) or samples
(every sample of the step is corrupt), and `rows` are the affected rows.
`tune_*` are measured on the selecting split, `split`. They are null if a logit is not finite. `skipped_steps` and
`damaged_samples` (distinct radiographs) count over all ranks since the run began.

Wall-clock fields: `time_s`, seconds since this process started the loop; `evaluation_s`; `images_per_s`; `data_wait_share`, the
share of the steps' time that rank 0 waited for batches; `limited_by`, `data` if that share is over 5 %, else `compute`;
`overhead_share`, the share of the time since the previous epoch line that was neither step nor evaluation. All other fields do
not depend on interruptions: on resuming, the file is truncated to the checkpoint.
"""

import contextlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from mura_dist.core import files
from mura_dist.training.progress_lines import time_left

_DATA_LIMITED = 0.05  # share of waiting above which faster steps hardly make the run faster


def skip_reason(what: str) -> str:
    """Return why a step was skipped, from the `what` of its line."""
    return "every sample is corrupt" if what == "samples" else f"the {what} was NaN or infinite"


class Stopwatch:
    """Measured seconds by name: `with watch("data"): ...`. `seconds` since the last reset, `total` since the last epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            self.seconds[name] += elapsed
            self.total[name] += elapsed

    def reset(self) -> dict[str, float]:
        """Return `seconds`, and restart from zero."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def reset_total(self) -> dict[str, float]:
        """Return `total`, and restart from zero."""
        total, self.total = self.total, defaultdict(float)
        return total


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl. A last line that a kill truncated is skipped."""
    return list(parse(path.read_text(encoding="utf-8", errors="replace"))) if path.is_file() else []


def parse(text: str) -> Iterator[dict[str, Any]]:
    """Yield the valid lines of the text of a metrics.jsonl."""
    for raw_line in text.splitlines():
        with contextlib.suppress(ValueError):
            line = files.parse_json(raw_line, dict[str, Any])
            if isinstance(line.get("kind"), str) and isinstance(line.get("step"), int):
                yield line


class MetricsLogger:
    """The logger of a run, from `start_step` on.

    Lines that an earlier start wrote after that step, or after the last evaluation in its checkpoint, are removed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool,
        quiet: bool,
        start_step: int,
        evaluated_step: int,
        num_steps: int,
        tensorboard: bool,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.enabled, self.start_step, self.num_steps = enabled, start_step, num_steps
        self.started = self.last_epoch_line = time.perf_counter()
        self.console = Console(stderr=True, quiet=quiet or not enabled)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[remaining]}"),
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
            transient=True,
        )
        numbers = f"step {start_step}/{num_steps}"  # loss and speed follow
        self.task = self._add_task("training", num_steps, completed=start_step, numbers=numbers, visible=num_steps > 0)
        self.writer: Any = None
        if not enabled:
            return
        last_steps = {"epoch": evaluated_step}
        previous = [line for line in read(self.path) if line["step"] <= last_steps.get(line["kind"], start_step)]
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in previous))
        if tensorboard:
            self.writer = self._event_writer(folder / "tensorboard", start_step + 1)

    def _event_writer(self, folder: Path, first_step: int) -> Any:
        """Return TensorBoard's writer. If its package is missing or broken, log that and return None."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # the training does not depend on TensorBoard
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.log(f"no TensorBoard events are written: {reason}. metrics.jsonl has all values.")
            return None
        return SummaryWriter(str(folder), purge_step=first_step)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def log_steps(self, line: dict[str, Any], *, num_images: int, watch: Stopwatch) -> None:
        """Log the last of some steps.

        Args:
            line: Fields of the line.
            num_images: Number of radiographs in these steps.
            watch: Has the seconds of "data" and "step" since the last call.
        """
        seconds = watch.reset()
        busy = seconds["data"] + seconds["step"]
        speed, wait = num_images / busy, seconds["data"] / busy
        self._write({"kind": "step", **line, "images_per_s": round(speed, 3), "data_wait_share": round(wait, 5)})
        numbers = (
            f"step {line['step']}/{self.num_steps}  loss {line['loss']:.4f}  {speed:.1f} images/s  data wait {wait:.1%}"
        )
        self.progress.update(
            self.task,
            completed=line["step"],
            description=f"epoch {line['epoch']}",
            numbers=numbers,
            remaining=self._remaining(line["step"]),
        )

    def _add_task(self, description: str, total: int | None, **fields: Any) -> TaskID:
        return self.progress.add_task(description, total=total, **{"numbers": "", "remaining": "", **fields})

    @contextlib.contextmanager
    def evaluation_bar(self, split: str, num_radiographs: int) -> Iterator[Callable[[int, int | None], None]]:
        """Show a progress bar during an evaluation. Yields a function of the number of radiographs done and of their total."""
        task = self._add_task(f"evaluating {split}", num_radiographs, numbers=f"0/{num_radiographs} radiographs")

        def update(num_done: int, total: int | None) -> None:
            self.progress.update(task, completed=num_done, total=total, numbers=f"{num_done}/{total} radiographs")

        try:
            yield update
        finally:
            self.progress.remove_task(task)

    def _remaining(self, step: int) -> str:
        """Return the estimated time to the end, from all steps and evaluations since the start.

        rich's own column looks back 30 s, which is too short for slow steps.
        """
        return time_left(time.perf_counter() - self.started, step - self.start_step, self.num_steps - step)

    def log_skipped_step(self, line: dict[str, Any]) -> None:
        """Log a skipped step."""
        self._write({"kind": "skip", **line})
        rows = ", ".join(map(str, line["rows"]))
        self.log(f"step {line['step']} skipped: {skip_reason(line['what'])} (rows {rows})")

    def log_epoch(self, line: dict[str, Any], watch: Stopwatch) -> None:
        """Log an evaluation. `watch` has the seconds of "data", "step" and "evaluation" since the previous one."""
        spent, now = watch.reset_total(), time.perf_counter()
        wall, self.last_epoch_line = now - self.last_epoch_line, now
        values = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float)]
        notes = "".join(
            f", {line[name]} {label}"
            for name, label in (("skipped_steps", "steps skipped"), ("damaged_samples", "corrupt samples"))
            if line[name]
        )
        line |= {"evaluation_s": round(spent["evaluation"], 3)}
        if busy := spent["data"] + spent["step"]:
            wait, overhead = spent["data"] / busy, 1 - (spent["step"] + spent["evaluation"]) / wall
            line |= {"overhead_share": round(overhead, 5), "data_wait_share": round(wait, 5)}
            line |= {"limited_by": "data" if wait > _DATA_LIMITED else "compute"}
            remedy = " (use more workers=, a faster disk or mirror=)" if wait > _DATA_LIMITED else ""
            notes += f", data wait {wait:.1%}, limited by {line['limited_by']}{remedy}"
        self._write({"kind": "epoch", **line})
        self.log(f"epoch {line['epoch']} (step {line['step']}): {', '.join(values)}{notes}")

    def sync(self) -> None:
        """Sync metrics.jsonl to the disk, before a checkpoint refers to its lines."""
        if self.enabled and self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def log(self, text: str) -> None:
        """Print a line on stderr."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines of metrics.jsonl; none on ranks other than rank 0."""
        return read(self.path) if self.enabled else []

    def draw(self, curves: Callable[[list[dict[str, Any]], Path], None]) -> None:
        """Redraw curves.png with a function of the lines and the file."""
        if self.enabled:
            try:
                curves(self.lines(), self.path.with_name("curves.png"))
            except Exception as error:  # the training does not depend on the picture
                self.log(f"curves.png was not drawn: {error}")

    def _write(self, line: dict[str, Any]) -> None:
        if not self.enabled:
            return
        line = {**line, "time_s": round(time.perf_counter() - self.started, 3)}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])


def _finite(value: Any) -> Any:
    """Return None for NaN and infinity, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
