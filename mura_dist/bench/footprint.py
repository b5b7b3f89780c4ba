"""Start-up time and memory of a loader: seconds from the start of its process to the first batch, and memory.

    for each loader: new interpreter -> imports -> [memory] -> first batch -> [seconds] -> 1 epoch -> [memory] -> 10 -> [memory]

Memory is that of the process and its worker processes, minus that of the imports. `private` is anonymous and shared memory, each
page counted once. `rss` is resident memory summed over the processes, so pages shared by forked workers count several times. It
includes mapped files (libraries, shards), which belong to the page cache and can be reclaimed.
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
    """A loader to measure.

    Attributes:
        name: Its name in the results.
        build: Called with the Load after the imports; returns its epochs.
        imports: Modules to import first.
        num_images: Images per epoch.
        grows: Whether to run ten epochs, to measure growth.
        is_own: Whether it is this package's.
    """

    name: str
    build: Callable[[Load], Epochs]
    imports: tuple[str, ...]
    num_images: int
    grows: bool = False
    is_own: bool = False


def measure(
    loaders: Sequence[Loader], loads: Sequence[Load], rounds: int, log: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Start each loader `rounds` times in a new process.

    Returns:
        For each loader name, ours, workers, num_processes, images_an_epoch, and {median, min, max} of first_batch_s, imports_mib,
        rss_mib and private_mib. After ten epochs (else null) also growth_mib of the private memory from epoch 1 to 10,
        growth_percent (of private_mib) and growth_of_process_percent (of all resident memory, imports included).
    """
    samples: list[list[dict[str, float]]] = [[] for _ in loaders]
    for number in range(1, rounds + 1):
        for loader, load, numbers in zip(loaders, loads, samples, strict=True):
            numbers.append(_run_in_new_process(loader, load))
            log(f"start {number} of {rounds}: {loader.name}: first batch after {numbers[-1]['first_batch_s']:.2f} s")
    return [_summarize(*row) for row in zip(loaders, loads, samples, strict=True)]


def _summarize(loader: Loader, load: Load, numbers: list[dict[str, float]]) -> dict[str, Any]:
    summary = {"name": loader.name, "ours": loader.is_own, "workers": load.workers, "num_processes": len(numbers)}
    summary |= {"images_an_epoch": loader.num_images}
    summary |= dict.fromkeys(("growth_mib", "growth_percent", "growth_of_process_percent"))
    return summary | {key: spread([sample[key] for sample in numbers]) for key in numbers[0]}


def _run_in_new_process(loader: Loader, load: Load) -> dict[str, float]:
    started = time.monotonic()  # one clock for all processes of a machine
    command = [sys.executable, "-c", _START]
    result = subprocess.run(command, input=pickle.dumps((started, loader, load)), stdout=subprocess.PIPE, check=False)
    if result.returncode or not result.stdout:
        raise RunError(
            f"the process of {loader.name} exited with status {result.returncode}. Its output above gives the reason."
        )
    return json.loads(result.stdout)


def main() -> None:
    """Measure one loader in the new process. Input comes from stdin, results go to stdout, all other output to stderr."""
    started, loader, load = pickle.load(sys.stdin.buffer)
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(_measure(started, loader, load)), file=result, flush=True)


def _measure(started: float, loader: Loader, load: Load) -> dict[str, float]:
    for name in loader.imports:
        import_module(name)
    before = _memory_mib()
    batches = endless(loader.build(load))
    num_images = count(load, [next(batches)])
    numbers = {"first_batch_s": time.monotonic() - started, "imports_mib": before["rss"]}
    first = _run_epoch(loader, load, batches, num_images)
    numbers |= {f"{key}_mib": value - before[key] for key, value in first.items()}
    if loader.grows:
        for _ in range(EPOCHS - 1):
            last = _run_epoch(loader, load, batches)
        growth = last["private"] - first["private"]
        totals = {"growth_percent": numbers["private_mib"], "growth_of_process_percent": first["rss"]}
        numbers |= {"growth_mib": growth} | {key: 100 * growth / total for key, total in totals.items()}
    return numbers


def _run_epoch(loader: Loader, load: Load, batches: Iterator[Any], num_done: int = 0) -> dict[str, float]:
    """Finish the next epoch and return the memory."""
    count(load, islice(batches, (loader.num_images - num_done) // load.batch))
    return _memory_mib()


def _memory_mib() -> dict[str, float]:
    """Return rss and private of this process and its workers."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    pages_kib: dict[str, float] = {}
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, number, *_ = line.replace(":", " ").split()
            pages_kib[name] = pages_kib.get(name, 0) + int(number)
    return {key: sum(pages_kib[name] for name in names) / 1024 for key, names in _FIELDS.items()}
