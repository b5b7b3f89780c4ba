"""Run `mura-dist bench WHAT`: measure speed side by side with the usual alternatives.

    workload.py    radiographs (--data, or phantoms) -> Load
    clock.py       contenders, in turn, each in its own process -> images/s; ratios within a round
    shards.py, pipeline.py (with peers.py), training.py, ranks.py, prediction.py, encodings.py: the contenders of each WHAT
    footprint.py   start-up time and memory of the pipeline
    plots.py       a plot of the results

Imports at module level stay few: every command reads BENCHES.
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
    """Default size in pixels, and number of phantoms or of radiographs in --data: some minutes on two cores."""

    size: int
    phantoms: int
    data: int


# 320 px as in the MURA paper, except for two ranks on one CPU.
BENCHES = {
    "shards": Defaults(320, 2000, 3000),
    "pipeline": Defaults(320, 400, 3000),
    "encodings": Defaults(320, 400, 1500),
    "train": Defaults(320, 32, 32),
    "ranks": Defaults(224, 32, 32),
    "predict": Defaults(320, 2000, 2000),
}
_COLUMNS = ("median", "min", "max")


def run(what: str, log: Callable[[str], None], options: Options | None = None) -> dict[str, Any]:
    """Run a benchmark.

    Args:
        what: One of BENCHES.
        log: Receives a line for each contender and round.
        options: Options of the command.

    Returns:
        what, command, hardware, versions, workload, rounds, contenders and ratios {"own / peer": {median, min, max}}. Each
        contender has name, ours (whether it is this package's), num_images, images_per_s {median, min, max}, workers, and tried:
        images/s by number of workers. shards adds `ceiling`, predict `ceilings`, pipeline `start` (footprint.py), encodings
        `encodings`, train `activations`.

    Raises:
        UserError: invalid options, or a folder without valid radiographs.
        RunError: a contender's process dies.
    """
    import tempfile

    options = options or Options()
    size, number = _size_and_number(what, options)
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


def _size_and_number(what: str, options: Options) -> tuple[int, int]:
    """Return the size in pixels and the number of radiographs."""
    from mura_dist.bench import encodings

    default = BENCHES[what]
    number = options.radiographs or (default.phantoms if options.data is None else default.data)
    if options.batch > number:
        raise UserError(
            f"--batch {options.batch}: must be at most the number of radiographs ({number}). Increase --radiographs."
        )
    if options.model is None:
        return options.size or default.size, number
    if what != "encodings":
        raise UserError(f"--model {options.model}: bench {what} has no --model, only bench encodings has. Omit it.")
    return encodings.model_size(options.model, options.size), number


def _measure(what: str, load: Load, options: Options, log: Callable[[str], None]) -> dict[str, Any]:
    from mura_dist.bench import clock, encodings, pipeline, prediction, ranks, shards, training

    modules: dict[str, Any] = {"shards": shards, "pipeline": pipeline, "encodings": encodings}
    module = (modules | {"train": training, "ranks": ranks, "predict": prediction})[what]
    results = clock.play(module.contenders(load), load, rounds=options.rounds, seconds=options.seconds, log=log)
    return results | (module.more(load, options, results, log) if hasattr(module, "more") else {})


def table(measured: dict[str, Any]) -> str:
    """Return the result of `run` as text."""
    rates = {
        row["name"]: row["images_per_s"] | {"images": row["num_images"], "workers": _format_workers(row)}
        for row in measured["contenders"]
    }
    blocks = [
        [measured["command"]],
        [", ".join(f"{k} {v}" for k, v in measured[key].items()) for key in ("workload", "hardware", "versions")],
        _lines("images/s", rates, (*_COLUMNS, "images", "workers")),
        _lines("times as fast", measured["ratios"], _COLUMNS),
        _ceiling_lines(measured.get("ceiling")),
        _prediction_ceiling_lines(measured.get("ceilings", [])),
        _start_lines(measured.get("start", [])),
        _encoding_lines(measured.get("encodings", [])),
        _activation_lines(measured.get("activations", [])),
    ]
    return "\n".join(line for block in blocks for line in block)


def _format_workers(row: dict[str, Any]) -> str:
    return f"{row['workers']} of {'/'.join(row['tried'])}" if row["tried"] else str(row["workers"])


def _lines(title: str, rows: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    if not rows:
        return []
    cells = {title: list(names)} | {key: [_cell(name, row[name]) for name in names] for key, row in rows.items()}
    width = max(map(len, cells))
    widths = [max(10, *(len(row[column]) + 2 for row in cells.values())) for column in range(len(names))]
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


def _ceiling_lines(ceiling: dict[str, Any] | None) -> list[str]:
    if ceiling is None:
        return []
    parts = {
        "decoding_s": "decoding and resizing, s",
        "start_s": "starting the command, s",
        "scan_s": "scanning the folder, s",
        "sha256_ms": "SHA-256, ms of a core per radiograph",
        "crc32_ms": "CRC-32, ms of a core per radiograph",
        "write_ms": "writing, ms of a core per radiograph",
        "compare_ms": "comparing with the disk, ms of a core per radiograph",
    }
    rows = {title: {"median": f"{ceiling['parts'][key]:.3f}"} for key, title in parts.items()}
    rows |= {"ceiling, radiographs/s": {"median": f"{ceiling['images_per_s']:.1f}"}}
    rows |= {"share of the ceiling reached": {"median": f"{ceiling['ratio']:.3f}"}}
    return _lines("ceiling of a conversion", rows, ("median",))


def _prediction_ceiling_lines(ceilings: Sequence[dict[str, Any]]) -> list[str]:
    columns = {
        "decode, ms": "decode_ms",
        "gate, ms": "gate_ms",
        "model, ms": "model_ms",
        "ceiling": "ceiling",
        "files / pixels": "ratio",
        "share": "share",
    }
    rows = {row["name"]: {title: f"{row[key]:.3f}" for title, key in columns.items()} for row in ceilings}
    lines = _lines("ceiling of a prediction", rows, tuple(columns))
    return [*lines, "ms of a core per radiograph; ceiling: model / (decode + gate + model)"] if lines else []


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
    rows = {row["name"]: {title: row[key] for title, key in columns.items()} for row in start}
    return _lines("new process", rows, tuple(columns)) + (
        [
            f"{start[0]['num_processes']} processes each; memory beyond the imports after one epoch; private: anonymous and "
            "shared memory; RSS: includes mapped files, which are page cache",
            "growth: of the private memory, from epoch 1 to 10; images per epoch: "
            + ", ".join(f"{row['name']} {row['images_an_epoch']}" for row in start),
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
    rows = {row["encoding"]: {title: row[key] for title, key in columns.items()} for row in encodings}
    return [*_lines("per radiograph", rows, tuple(columns)), *_change_lines(encodings)]


def _activation_lines(activations: Sequence[dict[str, Any]]) -> list[str]:
    rows = {row["network"]: {"MB": row["mb_per_radiograph"]} for row in activations}
    return _lines("activations for the backward pass, bf16, per radiograph", rows, ("MB",))


def _change_lines(encodings: Sequence[dict[str, Any]]) -> list[str]:
    changes = {row["encoding"]: row["probability_change"] for row in encodings}
    if None in changes.values():
        return ["change of a model's probability: not measured (give --model MODEL.onnx)"]
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

    changed = [(name, value) for name, value in asdict(options).items() if value != getattr(Options(), name)]
    return " ".join(["mura-dist bench", what, *(f"--{name} {shlex.quote(str(value))}" for name, value in changed)])


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the libraries."""
    from importlib import metadata

    from mura_dist.training.run import environment

    recorded = environment()
    own_versions = {name: recorded[name] for name in ("mura_dist", "python")} | recorded["versions"]
    return own_versions | {name: metadata.version(name) for name in ("pillow", "webdataset")}


def hardware() -> dict[str, Any]:
    """Return processor, device and the load average before the measurement, which shows other work on the machine."""
    import platform

    import torch

    from mura_dist.distributed import processes

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": next(iter(names), platform.machine()),
        "processors": processes.num_processors(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
