"""The clock: contenders, each in a process of its own, work in turn; a rate of each turn, a ratio of each round.

    build all -> each once to warm up -> a peer's numbers of workers, tried -> rounds A B A B ... -> rates, ratios of one round

A process each: DeepSpeed starts once in a process, and no library's threads, allocator or settings touch another's. One
works at a time, so what else the machine does falls on all. What fills its queues while others work (a stream) has its
first work of a turn not counted: it ends with queues as empty as it will leave them.

A peer is tried with several numbers of workers, each in turn and more than once: the best of what a number reached counts,
for what else the machine does can only have slowed it, and a peer held to the wrong number would flatter ours.
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
from typing import Any

from mura_dist.bench.workload import Load
from mura_dist.core.errors import RunError
from mura_dist.distributed import processes

_PROBES, _PROBE_S = 3, 0.7  # turns of each number of workers; no longer than a round's

Work = Callable[[Path], int]
"""Does the work once, writing (if at all) into the empty folder it is given; returns how many images it did."""


@dataclass(frozen=True)
class Contender:
    """`build(load)` is called in the contender's process and returns what is measured there.

    `tries`: numbers of workers that are tried before the rounds, the best of which is taken; none: those of the load.
    """

    name: str
    build: Callable[[Load], Work]
    ours: bool = False
    tries: tuple[int, ...] = ()
    streams: bool = False  # its queues fill while others work
    family: str = ""  # ratios are taken within one


def play(
    contenders: Sequence[Contender], load: Load, *, rounds: int, seconds: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """rounds, contenders and ratios, as `runner.run` documents them. Raises RunError where a contender dies."""
    images: dict[str, list[int]] = {contender.name: [] for contender in contenders}
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    try:
        with contextlib.ExitStack() as stack:
            pools = {contender.name: stack.enter_context(processes.start_workers(1)) for contender in contenders}
            for ready in [pools[contender.name].submit(_prepare, contender, load) for contender in contenders]:
                ready.result()
            chosen = _choose(contenders, pools, min(seconds, _PROBE_S), log)
            for number, (name, pool) in itertools.product(range(1, rounds + 1), pools.items()):
                num_images, taken = pool.submit(_turn, seconds).result()
                images[name].append(num_images)
                rates[name].append(num_images / taken)
                log(f"round {number} of {rounds}: {name}: {rates[name][-1]:.2f} images/s")
    except BrokenProcessPool as error:
        raise RunError("a contender's process died, perhaps out of memory; give fewer --radiographs") from error
    results = [
        {"name": c.name, "ours": c.ours, "num_images": sum(images[c.name]), "images_per_s": spread(rates[c.name])}
        | chosen[c.name]
        for c in contenders
    ]
    pairs = [(a.name, b.name) for b in contenders if not b.ours for a in contenders if a.ours and a.family == b.family]
    ratios = {f"{a} / {b}": spread([x / y for x, y in zip(rates[a], rates[b], strict=True)]) for a, b in pairs}
    return {"rounds": rounds, "contenders": results, "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _choose(
    contenders: Sequence[Contender], pools: dict[str, ProcessPoolExecutor], seconds: float, log: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """By name: the number of workers that serves best, and images/s with each that was tried."""
    tried = {(c.name, count): 0.0 for c in contenders for count in c.tries}
    for _, (name, count) in itertools.product(range(_PROBES), tried):
        num_images, taken = pools[name].submit(_turn, seconds, count).result()
        tried[name, count] = max(tried[name, count], num_images / taken)
    chosen: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        rates = {str(count): tried[contender.name, count] for count in contender.tries}
        count = pools[contender.name].submit(_keep, int(max(rates, key=rates.__getitem__)) if rates else None).result()
        chosen[contender.name] = {"workers": count, "tried": rates}
        if rates:
            said = ", ".join(f"{number}: {rate:.0f}" for number, rate in rates.items())
            log(f"workers of {contender.name}: {count}; images/s with {said}")
    return chosen


# In a contender's process: whether it streams, what it does with each number of workers, and what stays open as long as that.
_streams: bool
_scratch: Path
_works: dict[int, Work]
process = contextlib.ExitStack()


def _prepare(contender: Contender, load: Load) -> None:
    global _streams, _scratch, _works
    os.dup2(2, 1)  # stdout is for the result; DeepSpeed, for one, greets there
    _streams, _scratch = contender.streams, load.scratch
    _works = {count: contender.build(replace(load, workers=count)) for count in contender.tries or (load.workers,)}
    for work in _works.values():
        _measure(work, 0)  # files get into the cache, kernels are chosen


def _keep(count: int | None) -> int:
    """Only the work with `count` workers stays (None: it is the only one), and with it its processes and threads."""
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
    """(images, seconds) of as many whole works as fill `seconds`; making and removing their folders is not timed."""
    num_images, taken = 0, 0.0
    while not num_images or taken < seconds:
        with tempfile.TemporaryDirectory(dir=_scratch) as folder:
            started = time.perf_counter()
            num_images += work(Path(folder))
            taken += time.perf_counter() - started
    return num_images, taken
