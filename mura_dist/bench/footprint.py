"""What a loader costs before it is fast: seconds from the start of its process to the first batch, and memory.

    in turn: a fresh interpreter -> imports -> [memory] -> first batch -> [seconds] -> an epoch -> [memory] -> ten -> [memory]

Memory is of the process and its worker processes, less what the imports took. `private`: anonymous and shared memory, each
page once; nobody else has it. `rss`: what is resident, summed over the processes (what forked workers share counts in
each), and with it the pages of files that are mapped, libraries or shards: those are the page cache's, there once for all, and
the kernel takes them back when it needs them.
"""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from mura_dist.bench.clock import spread
from mura_dist.bench.streams import Epochs, count, endless
from mura_dist.bench.workload import Load
from mura_dist.core.errors import RunError

EPOCHS = 10
_START = "from mura_dist.bench.footprint import main; main()"
_FIELDS = {"rss": ("Rss",), "private": ("Pss_Anon", "Pss_Shmem")}


@dataclass(frozen=True)
class Loader:
    """Measured with `build(load)` after `imports`; an epoch is `num_images`. `grows`: the ten epochs are run too."""

    name: str
    build: Callable[[Load], Epochs]
    imports: tuple[str, ...]
    num_images: int
    grows: bool = False
    ours: bool = False


def measure(
    loaders: Sequence[Loader], loads: Sequence[Load], rounds: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Of each loader: name, ours, workers, num_processes, images_an_epoch, and {median, min, max} of first_batch_s, imports_mib,
    rss_mib, private_mib and, where ten epochs were run (else null), growth_mib of the private memory from epoch 1 to 10,
    growth_percent: of private_mib, growth_of_process_percent: of all that is resident, imports too."""
    seen: list[list[dict[str, float]]] = [[] for _ in loaders]
    for number in range(1, rounds + 1):
        for loader, load, numbers in zip(loaders, loads, seen, strict=True):
            numbers.append(_fresh(loader, load))
            log(f"start {number} of {rounds}: {loader.name}: first batch after {numbers[-1]['first_batch_s']:.2f} s")
    return [_facts(*each) for each in zip(loaders, loads, seen, strict=True)]


def _facts(loader: Loader, load: Load, numbers: list[dict[str, float]]) -> dict[str, Any]:
    known = {"name": loader.name, "ours": loader.ours, "workers": load.workers, "num_processes": len(numbers)}
    known |= {"images_an_epoch": loader.num_images}
    known |= dict.fromkeys(("growth_mib", "growth_percent", "growth_of_process_percent"))
    return known | {key: spread([each[key] for each in numbers]) for key in numbers[0]}


def _fresh(loader: Loader, load: Load) -> dict[str, float]:
    started = time.monotonic()  # one clock for all processes of a machine
    command = [sys.executable, "-c", _START]
    done = subprocess.run(command, input=pickle.dumps((started, loader, load)), stdout=subprocess.PIPE, check=False)
    if done.returncode or not done.stdout:
        raise RunError(f"the process of {loader.name} ended with status {done.returncode}; its words are above")
    return json.loads(done.stdout)


def main() -> None:
    """In the fresh process: what to measure comes by stdin, the numbers go to stdout, all else to stderr."""
    started, loader, load = pickle.load(sys.stdin.buffer)
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(_measured(started, loader, load)), file=result, flush=True)


def _measured(started: float, loader: Loader, load: Load) -> dict[str, float]:
    for name in loader.imports:
        import_module(name)
    before = _memory_mib()
    batches = endless(loader.build(load))
    num_images = count(load, [next(batches)])
    numbers = {"first_batch_s": time.monotonic() - started, "imports_mib": before["rss"]}
    one = _epoch(loader, load, batches, num_images)
    numbers |= {f"{key}_mib": value - before[key] for key, value in one.items()}
    if loader.grows:
        for _ in range(EPOCHS - 1):
            ten = _epoch(loader, load, batches)
        growth = ten["private"] - one["private"]
        whole = {"growth_percent": numbers["private_mib"], "growth_of_process_percent": one["rss"]}
        numbers |= {"growth_mib": growth} | {key: 100 * growth / of for key, of in whole.items()}
    return numbers


def _epoch(loader: Loader, load: Load, batches: Iterator[Any], done: int = 0) -> dict[str, float]:
    """Memory after the (rest of the) next epoch."""
    count(load, islice(batches, (loader.num_images - done) // load.batch))
    return _memory_mib()


def _memory_mib() -> dict[str, float]:
    """rss and private of this process and its workers."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages_kib: dict[str, float] = {}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, number, *_ = line.replace(":", " ").split()
            pages_kib[name] = pages_kib.get(name, 0) + int(number)
    return {key: sum(pages_kib[name] for name in names) / 1024 for key, names in _FIELDS.items()}
