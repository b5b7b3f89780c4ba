"""How a model runs fastest on this machine: measured once, kept for later.

    model, provider -> candidates (streams, threads, batch size, graph optimization) -> images/s of each, in turns
        -> the best, in the cache folder under (model, engine, processor, number of processors) -> Tuning

A later command finds it there without being told; another model, version or machine finds nothing and runs as it comes.
"""

import contextlib
import hashlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mura_dist.core import files
from mura_dist.core.errors import RunError, UserError, os_reason
from mura_dist.distributed.processes import num_processors
from mura_dist.inference.engine import GRAPH_OPTIMIZATIONS, PROVIDERS, SessionConfig, cache_folder, pipelined_config
from mura_dist.inference.onnx_model import OnnxModel

FILE = "tuning.json"
_JSON_KEY = "optimisation"  # of SessionConfig.optimization in FILE
_ROUNDS, _SECONDS = 4, 1.0  # turns of a finalist, and what one lasts at least
_FINALISTS = 3  # of the first turn; all at once would be as many models in memory
_MOST_BYTES = 600 << 20  # of memory that batches in flight may take, about
_BYTES_PER_PIXEL = 260  # of a radiograph under way in DenseNet-169, fp32


def load_tuned_config(model: OnnxModel) -> SessionConfig | None:
    """What an earlier `choose` kept for this model on this machine."""
    entry = _known().get(_key(model))
    with contextlib.suppress(ValueError):
        if isinstance(entry, dict) and isinstance(values := entry.get("tuning"), dict):
            values = {{_JSON_KEY: "optimization"}.get(key, key): value for key, value in values.items()}
            session_config = TypeAdapter(SessionConfig).validate_python(values)
            return (
                session_config
                if all(number is not None and number > 0 for number in _numbers(session_config))
                else None
            )
    return None


def _numbers(session_config: SessionConfig) -> tuple[int | None, ...]:
    return session_config.batch_size, session_config.streams, session_config.threads


def _known() -> dict[str, Any]:
    """What the cache holds; a damaged one holds nothing."""
    with contextlib.suppress(OSError, ValueError):
        known = files.parse_json((cache_folder() / FILE).read_bytes())
        if isinstance(known, dict):
            return known
    return {}


def tune(path: Path, provider: str, log: Callable[[str], None] = lambda line: None) -> SessionConfig:
    """Measure, keep and return the fastest way to run the model of `path`; `log` hears a line for each way.

    Raises what OnnxModel.load raises. Where it cannot be kept, `log` hears a warning.
    """
    first = {}
    for session_config in candidates(path, provider):
        with contextlib.suppress(RunError):  # it does not fit into memory
            first[session_config] = _images_per_s(OnnxModel.load(path, provider, session_config))
    if not first:
        raise RunError("--autotune: the model could be run in no way; predict without it says why")
    promising = sorted(first, key=lambda session_config: -first[session_config])[:_FINALISTS]
    models = {session_config: OnnxModel.load(path, provider, session_config) for session_config in promising}
    rates = {session_config: [rate] for session_config, rate in first.items()}
    for _ in range(_ROUNDS - 1):
        for session_config, model in models.items():
            rates[session_config].append(_images_per_s(model))
    medians = {session_config: statistics.median(found) for session_config, found in rates.items()}
    for session_config, rate in sorted(medians.items(), key=lambda pair: -pair[1]):
        log(f"{rate:9.2f} radiographs/s  {describe(session_config)}")
    best = max(promising, key=lambda session_config: medians[session_config])
    try:
        _keep(models[best], best, medians)
    except UserError as error:
        log(f"warning: not kept for later runs: {error}")
    except OSError as error:
        place = f"{cache_folder()}: {os_reason(error)}; XDG_CACHE_HOME=FOLDER names another place"
        log(f"warning: not kept for later runs: {place}")
    return best


def describe(session_config: SessionConfig) -> str:
    return (
        f"batch size {session_config.batch_size}, {session_config.streams} in flight, {session_config.threads} threads, "
        f"graph optimization {session_config.optimization}"
    )


def candidates(path: Path, provider: str) -> Iterator[SessionConfig]:
    """Yield the ways worth a try, the usual one first."""
    model = OnnxModel.load(path, provider, pipelined_config())
    yield model.session_config
    yield from candidate_configs(model.session_config, model.provider, model.size)


def candidate_configs(usual: SessionConfig, provider: str, size: int) -> Iterator[SessionConfig]:
    """Yield the ways worth a try beside the usual one; on a CPU always with all threads there are.

    Args:
        provider: by its own name.
        size: pixels of a side of a radiograph.
    """
    if provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]):
        # The runs of a TensorRT session take turns: a second one only waits with its batch.
        sizes, streams = [16, 32, 64, 128], [1] if provider == PROVIDERS["tensorrt"] else [1, 2, 3]
        most = 3 * 128
    else:
        sizes, streams = [1, 2, 4, 8, 16], sorted({1, min(2, num_processors()), num_processors()})
        most = _MOST_BYTES // (size**2 * _BYTES_PER_PIXEL)  # radiographs under way
    for number in streams:
        for batch_size in sizes:
            way = replace(usual, batch_size=batch_size, streams=number)
            if way != usual and batch_size * number <= most:
                yield way
    if provider == PROVIDERS["cpu"]:
        yield from (replace(usual, optimization=one) for one in GRAPH_OPTIMIZATIONS if one != usual.optimization)


def _images_per_s(model: OnnxModel) -> float:
    number, size = model.session_config.batch_size or 1, model.size
    batch = np.random.default_rng(0).integers(0, 256, (number, 1, size, size), dtype=np.uint8)
    list(model.stream([batch] * (model.session_config.streams or 1)))  # memory is taken, kernels are chosen
    done, started = 0, time.perf_counter()

    def until() -> Iterator[np.ndarray]:
        while time.perf_counter() - started < _SECONDS:
            yield batch

    for _ in model.stream(until()):
        done += number
    return done / (time.perf_counter() - started)


def _key(model: OnnxModel) -> str:
    """Hashed: the cache tells nobody what it is of."""
    parts = (model.sha256, model.provider, model.engine.version, _processor(), str(num_processors()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _keep(model: OnnxModel, best: SessionConfig, rates: dict[SessionConfig, float]) -> None:
    path = cache_folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = [_to_json(session_config) | {"images_per_s": round(rate, 3)} for session_config, rate in rates.items()]
    entry = {"tuning": _to_json(best), "measured": measured, "provider": model.provider, "size": model.size}
    files.write_json(path, _known() | {_key(model): entry})


def _to_json(session_config: SessionConfig) -> dict[str, Any]:
    values = asdict(session_config)
    return values | {_JSON_KEY: values.pop("optimization")}
