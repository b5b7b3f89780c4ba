"""Run `mura-dist bench WHAT`: how fast it is, side by side with what a user would use instead.

    workload.py  radiographs (--data, or phantoms), as links, as many as wanted -> Load
    clock.py     contenders of WHAT, each in a process of its own, in turn -> images/s; ratios of the same round, ours over theirs
    shards.py pipeline.py (its peers in peers.py) training.py ranks.py prediction.py encodings.py   the contenders of each WHAT
    footprint.py start and memory of the pipeline    plots.py  a picture of it all

Little is imported above the functions: every command comes through here for the names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mura_dist.bench.workload import Load, Options, prepare
from mura_dist.core.errors import UserError


class Defaults(NamedTuple):
    """Pixels of a side, and how many radiographs of phantoms and of --data: some minutes on two cores."""

    size: int
    phantoms: int
    data: int


# The paper's 320 px, but for two ranks on one CPU.
BENCHES = {
    "shards": Defaults(320, 2000, 3000),
    "pipeline": Defaults(320, 400, 3000),
    "encodings": Defaults(320, 400, 1500),
    "train": Defaults(320, 32, 32),
    "ranks": Defaults(224, 32, 32),
    "predict": Defaults(320, 48, 48),
}
_COLUMNS = ("median", "min", "max")


def run(what: str, log: Callable[[str], None], options: Options | None = None) -> dict[str, Any]:
    """Measure `what`; `log` hears a line for each contender and round, and of phantoms that are drawn.

    Returns what, command, hardware, versions, workload, rounds, contenders (each: name, ours, num_images, images_per_s
    {median, min, max}, workers, and `tried`, images/s with each number of workers a peer was tried with) and ratios {"ours /
    theirs": {median, min, max}}; of pipeline also `start` (footprint.py), of encodings `encodings`, of train
    `activations`. `what` is one of BENCHES. Raises UserError for options that do not serve it and for a folder that does not
    serve, RunError where a contender dies.
    """
    import tempfile

    options = options or Options()
    size, number = _settle(what, options)
    measured = {"what": what, "command": _command(what, options), "hardware": hardware(), "versions": versions()}
    with tempfile.TemporaryDirectory(prefix="mura-dist-bench-") as scratch:
        if options.data is None:
            log("drawing phantoms")
        load = prepare(options, Path(scratch), size=size, number=number)
        measured["workload"] = {
            "data": str(options.data or "phantoms"),
            "radiographs": len(load.paths),
            "distinct": load.num_files,
            "size_px": load.size,
            "batch": load.batch,
            "workers": load.workers,
            "architecture": load.architecture,
        }
        return measured | _measure(what, load, options, log)


def _settle(what: str, options: Options) -> tuple[int, int]:
    """Size and number of radiographs."""
    from mura_dist.bench import encodings

    default = BENCHES[what]
    number = options.radiographs or (default.phantoms if options.data is None else default.data)
    if options.batch > number:
        raise UserError(f"--batch {options.batch}: must be at most the radiographs, {number}; give --radiographs more")
    if options.model is None:
        return options.size or default.size, number
    if what != "encodings":
        raise UserError(f"--model {options.model}: bench {what} takes none, bench encodings does; leave it out")
    return encodings.size_of(options.model, options.size), number


def _measure(what: str, load: Load, options: Options, log: Callable[[str], None]) -> dict[str, Any]:
    from mura_dist.bench import clock, encodings, pipeline, prediction, ranks, shards, training

    rooms: dict[str, Any] = {"shards": shards, "pipeline": pipeline, "encodings": encodings}
    room = (rooms | {"train": training, "ranks": ranks, "predict": prediction})[what]
    results = clock.play(room.contenders(load), load, rounds=options.rounds, seconds=options.seconds, log=log)
    return results | (room.more(load, options, results, log) if hasattr(room, "more") else {})


def table(measured: dict[str, Any]) -> str:
    """What `run` returned, to read."""
    rates = {
        one["name"]: one["images_per_s"] | {"images": one["num_images"], "workers": _workers_words(one)}
        for one in measured["contenders"]
    }
    parts = [
        [measured["command"]],
        [", ".join(f"{k} {v}" for k, v in measured[part].items()) for part in ("workload", "hardware", "versions")],
        _lines("images/s", rates, (*_COLUMNS, "images", "workers")),
        _lines("times as fast", measured["ratios"], _COLUMNS),
        _start_lines(measured.get("start", [])),
        _encoding_lines(measured.get("encodings", [])),
        _activation_lines(measured.get("activations", [])),
    ]
    return "\n".join(line for part in parts for line in part)


def _workers_words(one: dict[str, Any]) -> str:
    return f"{one['workers']} of {'/'.join(one['tried'])}" if one["tried"] else str(one["workers"])


def _lines(title: str, rows: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    if not rows:
        return []
    cells = {title: list(names)} | {key: [_cell(name, row[name]) for name in names] for key, row in rows.items()}
    width = max(map(len, cells))
    widths = [max(10, *(len(row[place]) + 2 for row in cells.values())) for place in range(len(names))]
    return [
        "",
        *(
            key.ljust(width) + "".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
            for key, row in cells.items()
        ),
    ]


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"
    return value if isinstance(value, str) else f"{value:.{0 if name in ('images', 'bytes', 'radiographs') else 2}f}"


def _start_lines(start: Sequence[dict[str, Any]]) -> list[str]:
    columns = {
        "first batch, s": "first_batch_s",
        "imports, MiB": "imports_mib",
        "+ private, MiB": "private_mib",
        "+ RSS, MiB": "rss_mib",
        "growth, MiB": "growth_mib",
        "% of the private": "growth_percent",
        "% of the process": "growth_of_process_percent",
    }
    rows = {one["name"]: {title: one[key] for title, key in columns.items()} for one in start}
    return _lines("a fresh process", rows, tuple(columns)) + (
        [
            f"from the start of the process, {start[0]['num_processes']} of each; memory beyond the imports after one epoch; "
            "private is the loader's own, RSS has pages of mapped files too, which are page cache",
            "growth: of the private memory, from epoch 1 to 10; images an epoch: "
            + ", ".join(f"{one['name']} {one['images_an_epoch']}" for one in start),
        ]
        if start
        else []
    )


def _encoding_lines(encodings: Sequence[dict[str, Any]]) -> list[str]:
    if not encodings:
        return []
    columns = {
        "bytes": "bytes_per_radiograph",
        "conversion/s": "conversion_radiographs_per_s",
        "loading/s": "loading_images_per_s",
        "on a GPU": "loading_gpu_images_per_s",
    }
    rows = {one["encoding"]: {title: one[key] for title, key in columns.items()} for one in encodings}
    return [*_lines("a radiograph", rows, tuple(columns)), *_change_lines(encodings)]


def _activation_lines(activations: Sequence[dict[str, Any]]) -> list[str]:
    rows = {one["network"]: {"MB": one["mb_per_radiograph"]} for one in activations}
    return _lines("kept for the backward pass, bf16, a radiograph", rows, ("MB",))


def _change_lines(encodings: Sequence[dict[str, Any]]) -> list[str]:
    changes = {one["encoding"]: one["probability_change"] for one in encodings}
    if None in changes.values():
        return ["change of a model's probability: not measured; give --model MODEL.onnx"]
    rows = {
        name: {
            "largest": f"{change['largest']:.2e}",
            "mean": f"{change['mean']:.2e}",
            "radiographs": change["num_radiographs"],
        }
        for name, change in changes.items()
    }
    return _lines("change of probability against png", rows, ("largest", "mean", "radiographs"))


def _command(what: str, options: Options) -> str:
    import shlex

    given = [(name, value) for name, value in asdict(options).items() if value != getattr(Options(), name)]
    return " ".join(["mura-dist bench", what, *(f"--{name} {shlex.quote(str(value))}" for name, value in given)])


def versions() -> dict[str, str]:
    from importlib import metadata

    from mura_dist.training.run import environment

    here, theirs = environment(), ("pillow", "webdataset")
    known = {name: here[name] for name in ("mura_dist", "python")} | here["versions"]
    return known | {name: metadata.version(name) for name in theirs}


def hardware() -> dict[str, Any]:
    """The machine, and how busy it was before: on a shared one, the work of others is in the numbers."""
    import platform

    import torch

    from mura_dist.distributed import processes

    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": next(iter(names), platform.machine()),
        "processors": processes.num_processors(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
