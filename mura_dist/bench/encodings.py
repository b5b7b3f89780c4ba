"""bench encodings: what raw, png and jpeg cost and change.

    radiographs -> shards of each encoding -> bytes a radiograph; conversion and loading in turn, by the clock
    --model: its probability of each distinct radiograph as each encoding gives it, against png's

No contender is theirs, so there are no ratios; the numbers stand side by side in `encodings`.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.bench import pipeline, shards
from mura_dist.bench.clock import Contender
from mura_dist.bench.prediction import provider
from mura_dist.bench.streams import device, stream
from mura_dist.bench.workload import Load, Options
from mura_dist.core.errors import UserError
from mura_dist.data.shards.codec import SUFFIX
from mura_dist.data.shards.reader import Shards

AGAINST = "png"  # without loss
CONVERSION, LOADING, LOADING_ON_GPU = "conversion", "loading, cpu backend", "loading, dali backend on the GPU"


def contenders(load: Load) -> list[Contender]:
    from mura_dist.data.shards.convert import convert

    for encoding in SUFFIX:
        convert(load.folder, load.scratch / encoding, size=load.size, encoding=encoding, workers=load.workers)
    return [contender for encoding in SUFFIX for contender in _of(encoding, load)]


def _of(encoding: str, load: Load) -> Iterator[Contender]:
    folder = load.scratch / encoding
    yield Contender(f"{encoding}: {CONVERSION}", partial(shards.conversion, encoding), ours=True)
    backends = {LOADING: "cpu"} | ({LOADING_ON_GPU: "dali"} if device().type == "cuda" else {})
    for what, backend in backends.items():
        build = partial(stream, partial(pipeline.batches, folder, backend))
        yield Contender(f"{encoding}: {what}", build, ours=True, streams=True)


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """encodings: of each, its name, bytes_per_radiograph, {median, min, max} of what the clock measured (loading_gpu_images_per_s
    null without a GPU), and probability_change {largest, mean, num_radiographs} against png, null without a model."""
    rates = {one["name"]: one["images_per_s"] for one in results["contenders"]}
    changes = _probability_changes(load, options.model, log) if options.model is not None else {}
    return {
        "encodings": [
            {
                "encoding": encoding,
                "bytes_per_radiograph": _bytes_each(load.scratch / encoding),
                "conversion_radiographs_per_s": rates[f"{encoding}: {CONVERSION}"],
                "loading_images_per_s": rates[f"{encoding}: {LOADING}"],
                "loading_gpu_images_per_s": rates.get(f"{encoding}: {LOADING_ON_GPU}"),
                "probability_change": changes.get(encoding),
            }
            for encoding in SUFFIX
        ]
    }


def size_of(model: Path, size: int | None) -> int:
    """The pixels of a side that `model` takes. Raises UserError for another --size, and for what is no model of ours."""
    from mura_dist.inference.engine import SessionConfig
    from mura_dist.inference.onnx_model import OnnxModel

    wanted = OnnxModel.load(model, session_config=SessionConfig(threads=1)).size
    if size not in (None, wanted):
        raise UserError(f"--size {size}: {model} takes {wanted} px; leave --size out, or give --size {wanted}")
    return wanted


def _bytes_each(folder: Path) -> float:
    """Of the image members alone: tar's blocks and the label are the same for all encodings."""
    opened = Shards.open(folder)
    sizes = [len(opened.read_encoded(row)) for row in opened.manifest.frame.index]
    return sum(sizes) / len(sizes)


def _probability_changes(load: Load, path: Path, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    from mura_dist.inference.onnx_model import OnnxModel

    model, probabilities = OnnxModel.load(path, provider()), {}
    for encoding in SUFFIX:
        probabilities[encoding] = _probabilities(model.logits, load, encoding)
        log(f"probabilities of {len(probabilities[encoding])} radiographs from {encoding}")
    changes = {name: np.abs(values - probabilities[AGAINST]) for name, values in probabilities.items()}
    return {
        name: {"largest": float(change.max()), "mean": float(change.mean()), "num_radiographs": len(change)}
        for name, change in changes.items()
    }


def _probabilities(logits: Callable[[np.ndarray], np.ndarray], load: Load, encoding: str) -> np.ndarray:
    """float64, of the distinct radiographs in the order of rows."""
    opened, distinct = Shards.open(load.scratch / encoding), set(load.paths[: load.num_files])
    rows = [row for row, path in enumerate(opened.manifest.frame["path"]) if path in distinct]
    batches = (rows[start : start + load.batch] for start in range(0, len(rows), load.batch))
    found = np.concatenate([logits(np.stack([opened.read_pixels(row) for row in batch])[:, None]) for batch in batches])
    return 1 / (1 + np.exp(-found.astype(np.float64)))
