"""What it takes a rank to know an epoch: the whole order, then its micro-batches step by step. Time, memory.

Memory is what NumPy allocates (tracemalloc) beyond the rows themselves, which a rank has from its manifest.
"""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np

from mura_dist.data.loaders import sampler


def measure(radiographs: int, ranks: int, micro_batch: int) -> dict[str, Any]:
    """order_s; first_s: to its first step; epoch_s: all of one rank's micro-batches, one after the other, as a loader asks for
    them; micro_us: of one of them; peak_mib: beyond the rows, with_rows_mib: with them."""
    rows = np.arange(radiographs)
    started = time.perf_counter()
    ordered = _order(rows)
    ordered_s = time.perf_counter() - started
    _walk(ordered, ranks, micro_batch, steps=1)
    first_s = time.perf_counter() - started
    started = time.perf_counter()
    micros = _walk(ordered, ranks, micro_batch)
    epoch_s = time.perf_counter() - started
    del ordered
    peak = peak_bytes(rows, ranks, micro_batch)
    return {
        "radiographs": radiographs,
        "ranks": ranks,
        "micro_batch": micro_batch,
        "order_s": ordered_s,
        "first_s": first_s,
        "epoch_s": epoch_s,
        "micro_us": 1e6 * epoch_s / max(1, micros),
        "peak_mib": peak / 2**20,
        "with_rows_mib": (peak + rows.nbytes) / 2**20,
    }


def peak_bytes(rows: np.ndarray, ranks: int, micro_batch: int) -> int:
    """Most at any time, beyond `rows`: the order and then its first thousand steps."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        _walk(_order(rows), ranks, micro_batch, steps=1000)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _order(rows: np.ndarray) -> sampler.Epoch:
    return sampler.epoch_permutation(rows, 1, 2, rotate_deg=30.0, flip=True)


def _walk(ordered: sampler.Epoch, ranks: int, micro_batch: int, *, steps: int | None = None) -> int:
    """How many micro-batches a rank in the middle takes."""
    batch, number = micro_batch * ranks, 0
    sizes = {"global_batch": batch, "micro_batch": micro_batch, "world_size": ranks, "rank": ranks // 2}
    all_steps = sampler.steps_per_epoch(len(ordered.rows), batch)
    for step in range(all_steps if steps is None else min(steps, all_steps)):
        number += len(sampler.step_micro_batches(ordered, step, **sizes))
    return number


def format_row(row: dict[str, Any]) -> str:
    return (
        f"{row['radiographs']:,} radiographs, {row['ranks']} ranks, micro-batches of {row['micro_batch']}: order "
        f"{row['order_s']:.2f} s, to the first step {row['first_s']:.2f} s; then a rank's whole epoch {row['epoch_s']:.2f} s "
        f"({row['micro_us']:.0f} us a micro-batch); {row['peak_mib']:.0f} MiB, with the rows {row['with_rows_mib']:.0f}"
    )
