"""What a run says while it runs: metrics.jsonl, TensorBoard, a progress bar, and where the time goes.

One object; on ranks other than the first it does nothing, so that the loop has no `if`. Lines of metrics.jsonl:

    {"kind": "step", "step", "epoch", "loss", "gradient_norm", "learning_rate", "images_per_s", "data_wait_share", "time_s"}
    {"kind": "skip", "step", "epoch", "what", "rows", "time_s"}
    {"kind": "epoch", "step", "epoch", "split", "train_loss", "tune_loss", "tune_kappa", "tune_auroc", "learning_rate",
     "skipped_steps", "damaged_samples", "evaluation_s", "overhead_share", "data_wait_share", "limited_by", "time_s"}

`step` counts steps done. `loss` is sum(weight x BCE) / global batch of that one step, `gradient_norm` that of its whole gradient
before clipping. A step that was left out has a line of its own: `what` was not finite (loss or gradient) or could not be read
(samples: every one of the step is corrupt), over which `rows`.
`tune_*` are of the split the run selects on, `split`; null where a logit is not finite. `skipped_steps` and
`damaged_samples` (different radiographs) count over all ranks since the run began.

Wall-clock: `time_s`, seconds since this process started the loop; `evaluation_s`; `images_per_s`; `data_wait_share`, the part
of the steps' time spent waiting for batches, on the first rank, whence `limited_by`, `data` where it is over 5 %, else
`compute`; `overhead_share`, the part of the time since the epoch line before that was neither step nor evaluation. All other
fields are the same whatever interrupted the run: on resuming, the file is cut back to the checkpoint.
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

_WAITING = 0.05  # of the time: with more than this, faster steps would hardly make a faster run


def skip_reason(what: str) -> str:
    """Say why a step was left out, by its line's `what`."""
    return "every sample is corrupt" if what == "samples" else f"{what} not finite"


class Stopwatch:
    """Seconds by name: `with watch("data"): ...`. `seconds` since the last reset, `total` since the last epoch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.total: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - started
            self.seconds[name] += taken
            self.total[name] += taken

    def reset(self) -> dict[str, float]:
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds

    def epoch(self) -> dict[str, float]:
        total, self.total = self.total, defaultdict(float)
        return total


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line a kill cut short is left out."""
    return list(parse(path.read_text(encoding="utf-8", errors="replace"))) if path.is_file() else []


def parse(text: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of `text` that are a metrics.jsonl's."""
    for each in text.splitlines():
        with contextlib.suppress(ValueError):
            line = files.parse_json(each, dict[str, Any])
            if isinstance(line.get("kind"), str) and isinstance(line.get("step"), int):
                yield line


class MetricsLogger:
    """Writes into `folder` from `start_step` on; what an earlier start wrote beyond that step, or beyond the last evaluation
    its checkpoint knows of, is cut away."""

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
        self.started = self.line_before = time.perf_counter()
        self.console = Console(stderr=True, quiet=quiet or not enabled)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
            transient=True,
        )
        numbers = f"step {start_step}/{num_steps}"  # no loss, no speed before there is one
        self.task = self._add_task("training", num_steps, completed=start_step, numbers=numbers, visible=num_steps > 0)
        self.writer: Any = None
        if not enabled:
            return
        ends = {"epoch": evaluated_step}
        before = [line for line in read(self.path) if line["step"] <= ends.get(line["kind"], start_step)]
        files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in before))
        if tensorboard:
            self.writer = self._event_writer(folder / "tensorboard", start_step + 1)

    def _event_writer(self, folder: Path, first_step: int) -> Any:
        """Return TensorBoard's writer; None, and a line, where its package is missing or broken."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # a training does not need it, whatever is wrong with it
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.log(f"no TensorBoard events are written: {reason}; metrics.jsonl has everything")
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

    def steps(self, line: dict[str, Any], *, images: int, watch: Stopwatch) -> None:
        """After some steps: `images` went through them, `watch` knows the seconds of "data" and "step" since the last call."""
        seconds = watch.reset()
        busy = seconds["data"] + seconds["step"]
        speed, wait = images / busy, seconds["data"] / busy
        self._write({"kind": "step", **line, "images_per_s": round(speed, 3), "data_wait_share": round(wait, 5)})
        numbers = (
            f"step {line['step']}/{self.num_steps}  loss {line['loss']:.4f}  {speed:.1f} images/s  data wait {wait:.1%}"
        )
        self.progress.update(
            self.task,
            completed=line["step"],
            description=f"epoch {line['epoch']}",
            numbers=numbers,
            left=self._left(line["step"]),
        )

    def _add_task(self, description: str, total: int | None, **fields: Any) -> TaskID:
        return self.progress.add_task(description, total=total, **{"numbers": "", "left": "", **fields})

    @contextlib.contextmanager
    def evaluating(self, split: str, num_radiographs: int) -> Iterator[Callable[[int, int | None], None]]:
        """Show a bar of its own while an evaluation runs. Yields what is called with the radiographs done and all of them."""
        task = self._add_task(f"evaluating {split}", num_radiographs, numbers=f"0/{num_radiographs} radiographs")

        def update(num_done: int, total: int | None) -> None:
            self.progress.update(task, completed=num_done, total=total, numbers=f"{num_done}/{total} radiographs")

        try:
            yield update
        finally:
            self.progress.remove_task(task)

    def _left(self, step: int) -> str:
        """Time to the end as this start has gone so far, evaluations included. (rich's own column looks back 30 s: it has nothing
        to say where steps are slow enough for one line in that time.)"""
        return time_left(time.perf_counter() - self.started, step - self.start_step, self.num_steps - step)

    def skip(self, line: dict[str, Any]) -> None:
        """A step was left out."""
        self._write({"kind": "skip", **line})
        rows = ", ".join(map(str, line["rows"]))
        self.log(f"step {line['step']} left out: {skip_reason(line['what'])} (rows {rows})")

    def epoch(self, line: dict[str, Any], watch: Stopwatch) -> None:
        """After an evaluation; `watch` knows the seconds of "data", "step" and "evaluation" since the one before."""
        spent, now = watch.epoch(), time.perf_counter()
        wall, self.line_before = now - self.line_before, now
        parts = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float)]
        said = "".join(
            f", {line[name]} {what}"
            for name, what in (("skipped_steps", "steps left out"), ("damaged_samples", "damaged samples"))
            if line[name]
        )
        line |= {"evaluation_s": round(spent["evaluation"], 3)}
        if busy := spent["data"] + spent["step"]:
            wait, other = spent["data"] / busy, 1 - (spent["step"] + spent["evaluation"]) / wall
            line |= {"overhead_share": round(other, 5), "data_wait_share": round(wait, 5)}
            line |= {"limited_by": "data" if wait > _WAITING else "compute"}
            remedy = "; more workers=, a faster disk or mirror= would help" if wait > _WAITING else ""
            said += f", data wait {wait:.1%}: {line['limited_by']} limits{remedy}"
        self._write({"kind": "epoch", **line})
        self.log(f"epoch {line['epoch']} (step {line['step']}): {', '.join(parts)}{said}")

    def sync(self) -> None:
        """What was written is on the disk: before a checkpoint that counts on it."""
        if self.enabled and self.path.is_file():
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def log(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def lines(self) -> list[dict[str, Any]]:
        return read(self.path) if self.enabled else []

    def draw(self, curves: Callable[[list[dict[str, Any]], Path], None]) -> None:
        """Refresh curves.png."""
        if self.enabled:
            try:
                curves(self.lines(), self.path.with_name("curves.png"))
            except Exception as error:  # a picture is no reason to end a training
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
    """JSON has no NaN: null says it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
