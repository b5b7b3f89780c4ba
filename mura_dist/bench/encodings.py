"""bench encodings: size, speed and effect of the encodings raw, png and jpeg.

    radiographs -> shards in each encoding -> bytes per radiograph; speed of conversion and loading
    --model: change of its probability for each distinct radiograph, compared with png

All contenders are this package's, so there are no ratios. The results are in `encodings`.
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

REFERENCE = "png"  # lossless
CONVERSION, LOADING, LOADING_ON_GPU = "conversion", "loading, cpu backend", "loading, dali backend on the GPU"


def contenders(load: Load) -> list[Contender]:
    """Return the contenders; converts the radiographs to all encodings first."""
    from mura_dist.data.shards.convert import convert

    for encoding in SUFFIX:
        convert(load.folder, load.scratch / encoding, size=load.size, encoding=encoding, workers=load.workers)
    return [contender for encoding in SUFFIX for contender in _contenders_of(encoding, load)]


def _contenders_of(encoding: str, load: Load) -> Iterator[Contender]:
    folder = load.scratch / encoding
    yield Contender(f"{encoding}: {CONVERSION}", partial(shards.conversion, encoding), is_own=True)
    backends = {LOADING: "cpu"} | ({LOADING_ON_GPU: "dali"} if device().type == "cuda" else {})
    for title, backend in backends.items():
        build = partial(stream, partial(pipeline.batches, folder, backend))
        yield Contender(f"{encoding}: {title}", build, is_own=True, is_stream=True)


def more(load: Load, options: Options, results: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Return `encodings`: a list with the results of each encoding.

    Each has encoding, bytes_per_radiograph, {median, min, max} of the measured rates (loading_gpu_images_per_s is null without a
    GPU), and probability_change {largest, mean, num_radiographs} compared with png, or null without a model.
    """
    rates = {result["name"]: result["images_per_s"] for result in results["contenders"]}
    changes = _probability_changes(load, options.model, log) if options.model is not None else {}
    return {
        "encodings": [
            {
                "encoding": encoding,
                "bytes_per_radiograph": _bytes_per_radiograph(load.scratch / encoding),
                "conversion_radiographs_per_s": rates[f"{encoding}: {CONVERSION}"],
                "loading_images_per_s": rates[f"{encoding}: {LOADING}"],
                "loading_gpu_images_per_s": rates.get(f"{encoding}: {LOADING_ON_GPU}"),
                "probability_change": changes.get(encoding),
            }
            for encoding in SUFFIX
        ]
    }


def model_size(model: Path, size: int | None) -> int:
    """Return the input size of `model` in pixels. Raises UserError for another --size or an invalid model."""
    from mura_dist.inference.engine import SessionConfig
    from mura_dist.inference.onnx_model import OnnxModel

    expected = OnnxModel.load(model, session_config=SessionConfig(threads=1)).size
    if size not in (None, expected):
        raise UserError(f"--size {size}: {model} takes {expected} px. Omit --size, or give --size {expected}.")
    return expected


def _bytes_per_radiograph(folder: Path) -> float:
    """Return the mean size of the image members; tar blocks and labels are equal in all encodings."""
    opened = Shards.open(folder)
    sizes = [len(opened.read_encoded(row)) for row in opened.manifest.frame.index]
    return sum(sizes) / len(sizes)


def _probability_changes(load: Load, path: Path, log: Callable[[str], None]) -> dict[str, dict[str, float]]:
    from mura_dist.inference.onnx_model import OnnxModel

    model, probabilities = OnnxModel.load(path, provider()), {}
    for encoding in SUFFIX:
        probabilities[encoding] = _probabilities(model.logits, load, encoding)
        log(f"probabilities of {len(probabilities[encoding])} radiographs from {encoding}")
    changes = {name: np.abs(values - probabilities[REFERENCE]) for name, values in probabilities.items()}
    return {
        name: {"largest": float(change.max()), "mean": float(change.mean()), "num_radiographs": len(change)}
        for name, change in changes.items()
    }


def _probabilities(logits: Callable[[np.ndarray], np.ndarray], load: Load, encoding: str) -> np.ndarray:
    """Return the probabilities float64 (n,) of the distinct radiographs, in the order of rows."""
    opened, distinct = Shards.open(load.scratch / encoding), set(load.paths[: load.num_files])
    rows = [row for row, path in enumerate(opened.manifest.frame["path"]) if path in distinct]
    batches = (rows[start : start + load.batch] for start in range(0, len(rows), load.batch))
    outputs = np.concatenate(
        [logits(np.stack([opened.read_pixels(row) for row in batch])[:, None]) for batch in batches]
    )
    return 1 / (1 + np.exp(-outputs.astype(np.float64)))
