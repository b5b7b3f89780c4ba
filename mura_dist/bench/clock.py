"""Timing of contenders, which run in turn, each in its own process: a rate per turn, a ratio per round.

    build all -> warm up each once -> try peers with several numbers of workers -> rounds A B A B ... -> rates, ratios per round

Each contender has its own process, since DeepSpeed starts once per process and libraries share threads, allocators and settings.
One runs at a time, so other load on the machine affects all. A stream fills its queues while others run. Its first work of a
turn is not counted, and empties them.

A peer is tried with several numbers of workers, in turn and more than once. The best rate of each number counts, since other load
can only slow it, and a peer with the wrong number of workers would flatter this package.
"""

import contextlib
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mura_dist.bench.workload import Load
from mura_dist.core.errors import RunError
from mura_dist.distributed import processes

_NUM_PROBES, _PROBE_S = 3, 0.7  # turns per number of workers; seconds per turn, at most a round's


class Timed(NamedTuple):
    """Number of images of a work, and seconds of it that are not measured."""

    num_images: int
    excluded_s: float


Work = Callable[[Path], int | Timed]
"""Does the work once, with an empty folder for its output, and returns the number of images."""


@dataclass(frozen=True)
class Contender:
    """Side of a comparison.

    Attributes:
        name: Its name in the results.
        build: Called with the Load in the contender's process; returns the work to measure.
        is_own: Whether it is this package's.
        worker_counts: Numbers of workers to try before the rounds; the best one is used. Empty: the Load's.
        is_stream: Whether its queues fill while others run.
        family: Ratios are computed within a family.
        baseline: Name of another contender with which this one is compared too.
    """

    name: str
    build: Callable[[Load], Work]
    is_own: bool = False
    worker_counts: tuple[int, ...] = ()
    is_stream: bool = False
    family: str = ""
    baseline: str = ""


def play(
    contenders: Sequence[Contender], load: Load, *, rounds: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Return rounds, contenders and ratios, as `runner.run` documents them. Raises RunError if a contender's process dies."""
    images: dict[str, list[int]] = {contender.name: [] for contender in contenders}
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    try:
        with contextlib.ExitStack() as stack:
            pools = {contender.name: stack.enter_context(processes.start_workers(1)) for contender in contenders}
            for ready in [pools[contender.name].submit(_prepare, contender, load) for contender in contenders]:
                ready.result()
            chosen = _choose(contenders, pools, min(seconds, _PROBE_S), log)
            for number, (name, pool) in itertools.product(range(1, rounds + 1), pools.items()):
                num_images, elapsed_s = pool.submit(_turn, seconds).result()
                images[name].append(num_images)
                rates[name].append(num_images / elapsed_s)
                log(f"round {number} of {rounds}: {name}: {rates[name][-1]:.2f} images/s")
    except BrokenProcessPool as error:
        raise RunError("a contender's process died, perhaps for lack of memory. Use fewer --radiographs.") from error
    results = [
        {"name": c.name, "ours": c.is_own, "num_images": sum(images[c.name]), "images_per_s": spread(rates[c.name])}
        | chosen[c.name]
        for c in contenders
    ]
    pairs = [
        (a.name, b.name) for b in contenders if not b.is_own for a in contenders if a.is_own and a.family == b.family
    ]
    pairs += [(contender.name, contender.baseline) for contender in contenders if contender.baseline]
    ratios = {f"{a} / {b}": spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in pairs}
    return {"rounds": rounds, "contenders": results, "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, min and max."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _choose(
    contenders: Sequence[Contender], pools: dict[str, ProcessPoolExecutor], seconds: float, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Return, by name, the best number of workers, and images/s with each number that was tried."""
    tried = {(c.name, count): 0.0 for c in contenders for count in c.worker_counts}
    for _, (name, count) in itertools.product(range(_NUM_PROBES), tried):
        num_images, elapsed_s = pools[name].submit(_turn, seconds, count).result()
        tried[name, count] = max(tried[name, count], num_images / elapsed_s)
    chosen: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        rates = {str(count): tried[contender.name, count] for count in contender.worker_counts}
        count = pools[contender.name].submit(_keep, int(max(rates, key=rates.__getitem__)) if rates else None).result()
        chosen[contender.name] = {"workers": count, "tried": rates}
        if rates:
            text = ", ".join(f"{number}: {rate:.0f}" for number, rate in rates.items())
            log(f"workers of {contender.name}: {count}; images/s with {text}")
    return chosen


# State of a contender's process: whether it is a stream, its work by number of workers, its resources.
_streams: bool
_scratch: Path
_works: dict[int, Work]
process = contextlib.ExitStack()


def _prepare(contender: Contender, load: Load) -> None:
    global _streams, _scratch, _works
    os.dup2(2, 1)  # stdout is for the result; DeepSpeed prints there
    _streams, _scratch = contender.is_stream, load.scratch
    _works = {
        count: contender.build(replace(load, workers=count)) for count in contender.worker_counts or (load.workers,)
    }
    for work in _works.values():
        _measure(work, 0)  # warm up: page cache, choice of kernels


def _keep(count: int | None) -> int:
    """Keep only the work with `count` workers (None: the only one), and release the processes and threads of the others."""
    global _works
    count = next(iter(_works)) if count is None else count
    _works = {count: _works[count]}
    gc.collect()
    return count


def _turn(seconds: float, count: int | None = None) -> tuple[int, float]:
    work = next(iter(_works.values())) if count is None else _works[count]
    if _streams:
        _measure(work, 0)
    return _measure(work, seconds)


def _measure(work: Work, seconds: float) -> tuple[int, float]:
    """Repeat the work for at least `seconds`; return images and seconds. Creating and removing folders is not timed."""
    num_images, elapsed_s = 0, 0.0
    while not num_images or elapsed_s < seconds:
        with tempfile.TemporaryDirectory(dir=_scratch) as folder:
            started = time.perf_counter()
            result = work(Path(folder))
            elapsed_s += time.perf_counter() - started
            if isinstance(result, Timed):
                elapsed_s -= result.excluded_s
                result = result.num_images
            num_images += result
    return num_images, elapsed_s
