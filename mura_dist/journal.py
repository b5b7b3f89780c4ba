"""What a run says while it runs: metrics.jsonl, TensorBoard, a progress bar, and where the time goes.

One object; on ranks other than the first it does nothing, so that the loop has no `if`. Lines of metrics.jsonl:

    {"kind": "step", "step", "epoch", "loss", "learning_rate", "images_per_s", "data_wait_share", "time_s"}
    {"kind": "epoch", "step", "epoch", "split", "train_loss", "tune_loss", "tune_kappa", "tune_auroc", "learning_rate",
     "evaluation_s", "damaged_samples", "data_wait_share", "limited_by", "time_s"}

`step` counts finished optimiser steps, `time_s` seconds since this process started the loop; `tune_*` are of the split
the run selects on, `split`. `data_wait_share` is the part of the steps' time spent waiting for batches, on the first
rank; `limited_by` says `data` where it is over 5 %, else `compute`. `damaged_samples` counts different radiographs, over
all ranks, since this start.
"""

import contextlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import atomic

_WAITING = 0.05  # of the time: with more than this, faster steps would hardly make a faster run


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
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


class Journal:
    """Writes into `folder` from `start_step` on; what an earlier start wrote beyond that step is cut away."""

    def __init__(
        self, folder: Path, *, enabled: bool, quiet: bool, start_step: int, num_steps: int, tensorboard: bool
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.enabled, self.started, self.start_step = enabled, time.perf_counter(), start_step
        self.console = Console(stderr=True, quiet=quiet or not enabled)
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn(
                "step {task.completed}/{task.total}  loss {task.fields[loss]:.4f}  {task.fields[speed]:.1f} images/s"
            ),
            TextColumn("data wait {task.fields[wait]:.1%}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task(
            "train", total=num_steps, completed=start_step, epoch=0, loss=float("nan"), speed=0.0, wait=0.0
        )
        self.writer: Any = None
        if not enabled:
            return
        before = [line for line in read(self.path) if line["step"] <= start_step]
        atomic.write_text(self.path, "".join(json.dumps(line) + "\n" for line in before))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                self.say(
                    "tensorboard=true, but it is not installed: no events are written; metrics.jsonl has everything"
                )
            else:
                self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        if self.writer is not None:
            self.writer.close()

    def steps(self, step: int, epoch: int, *, loss: float, learning_rate: float, images: int, watch: Stopwatch) -> None:
        """After some steps: `images` went through them, `watch` knows the seconds of "data" and "step" since the last call."""
        seconds = watch.reset()
        busy = seconds["data"] + seconds["step"]
        speed, wait = images / busy, seconds["data"] / busy
        line = {"step": step, "epoch": epoch, "loss": loss, "learning_rate": learning_rate}
        self._write({"kind": "step", **line, "images_per_s": round(speed, 3), "data_wait_share": round(wait, 5)})
        self.progress.update(self.task, completed=step, epoch=epoch, loss=loss, speed=speed, wait=wait)

    def epoch(self, line: dict[str, Any], watch: Stopwatch) -> None:
        """After an evaluation; `watch` knows the seconds of "data" and "step" since the one before."""
        spent = watch.epoch()
        said = "".join(f", {count} damaged samples" for count in [line["damaged_samples"]] if count)
        parts = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float)]
        if busy := spent["data"] + spent["step"]:
            wait = spent["data"] / busy
            line |= {"data_wait_share": round(wait, 5), "limited_by": "data" if wait > _WAITING else "compute"}
            remedy = "; more workers=, a faster disk or mirror= would help" if wait > _WAITING else ""
            said += f", data wait {wait:.1%}: {line['limited_by']} limits{remedy}"
        self._write({"kind": "epoch", **line})
        self.say(f"epoch {line['epoch']} (step {line['step']}): {', '.join(parts)}{said}")

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def lines(self) -> list[dict[str, Any]]:
        return read(self.path) if self.enabled else []

    def draw(self, curves: Callable[[list[dict[str, Any]], Path], None]) -> None:
        """Refresh curves.png."""
        if self.enabled:
            curves(self.lines(), self.path.with_name("curves.png"))

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
