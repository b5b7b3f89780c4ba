"""Contenders of known speed and memory for bench. The module is light, since the process of each contender imports it."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench.workload import Load
from mura_dist.core.errors import UserError


def sleeper(pause_s: float, load: Load) -> Callable[[Path], int]:
    def work(out: Path) -> int:
        assert not any(out.iterdir())
        (out / "something").write_text("left for the next turn to find")
        print("a library that talks")
        time.sleep(pause_s)
        return 1

    return work


def by_workers(pauses_s: dict[int, float], load: Load) -> Callable[[Path], int]:
    return sleeper(pauses_s[load.workers], load)


def queue(load: Load) -> Callable[[Path], int]:
    """Return a contender whose first item of a turn takes no time, like a loader that filled its queue meanwhile."""
    last = [0.0]

    def work(out: Path) -> int:
        waited = time.monotonic() - last[0] > 0.6
        time.sleep(0 if waited else 0.05)
        last[0] = time.monotonic()
        return 1

    return work


def exiting_contender(load: Load) -> Callable[[Path], int]:
    os._exit(7)


def failing_contender(load: Load) -> Callable[[Path], int]:
    raise UserError("a contender's own words")


def growing_loader(step_mib: int, load: Load) -> Callable[[], Iterator[Any]]:
    """Return a loader that keeps `step_mib` of memory for each batch."""
    import torch

    buffers = []

    def epoch() -> Iterator[Any]:
        for _ in range(2):
            buffers.append(np.ones(step_mib << 20, np.uint8))
            yield torch.zeros((8, 1, 64, 64), dtype=torch.uint8)

    return epoch


def batches(build: Callable[[Load], Callable[[], Iterator[Any]]], load: Load, num_epochs: int) -> list[np.ndarray]:
    """Return the batches of a loader, each uint8 (B, 1, S, S)."""
    epoch = build(load)
    return [batch.cpu().numpy() for _ in range(num_epochs) for batch in epoch()]
