"""The fastest configuration of a model on this machine: measured once, cached for later commands.

    model, provider -> candidates (streams, threads, batch size, graph optimization) -> images/s of each, in turns
        -> the best, in the cache folder under (model, engine, processor, number of processors) -> SessionConfig

A later command finds the entry by itself. Another model, version or machine has no entry and runs with the default.
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
_JSON_KEY = "optimisation"  # SessionConfig.optimization in FILE
_ROUNDS, _SECONDS = 4, 1.0  # turns per finalist, least duration of a turn
_FINALISTS = 3  # limits the models in memory at once
_MAX_BYTES = 600 << 20  # approximate memory of the batches in flight
_BYTES_PER_PIXEL = 260  # activations of DenseNet-169 in fp32, per pixel of a radiograph


def load_tuned_config(model: OnnxModel) -> SessionConfig | None:
    """Return the configuration that an earlier `tune` cached for this model on this machine."""
    entry = _read_cache().get(_cache_key(model))
    with contextlib.suppress(ValueError):
        if isinstance(entry, dict) and isinstance(values := entry.get("tuning"), dict):
            values = {{_JSON_KEY: "optimization"}.get(key, key): value for key, value in values.items()}
            config = TypeAdapter(SessionConfig).validate_python(values)
            numbers = config.batch_size, config.streams, config.threads
            return config if all(number is not None and number > 0 for number in numbers) else None
    return None


def _read_cache() -> dict[str, Any]:
    """Return the content of the cache, or an empty dict if it is missing or corrupt."""
    with contextlib.suppress(OSError, ValueError):
        content = files.parse_json((cache_folder() / FILE).read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def tune(path: Path, provider: str, log: Callable[[str], None] = lambda line: None) -> SessionConfig:
    """Measure the configurations of a model, cache the fastest and return it.

    Args:
        path: The ONNX file.
        provider: As in OnnxModel.load.
        log: Called with one line per configuration, and with a warning if the cache cannot be written.

    Raises:
        UserError: OnnxModel.load refuses the model or the provider.
        RunError: no configuration ran.
    """
    first_rates = {}
    for config in candidates(path, provider):
        with contextlib.suppress(RunError):  # out of memory
            first_rates[config] = _measure_images_per_s(OnnxModel.load(path, provider, config))
    if not first_rates:
        raise RunError("--autotune: the model ran in no configuration. Predict without --autotune to see the reason.")
    finalists = sorted(first_rates, key=lambda config: -first_rates[config])[:_FINALISTS]
    models = {config: OnnxModel.load(path, provider, config) for config in finalists}
    rates = {config: [rate] for config, rate in first_rates.items()}
    for _ in range(_ROUNDS - 1):
        for config, model in models.items():
            rates[config].append(_measure_images_per_s(model))
    medians = {config: statistics.median(values) for config, values in rates.items()}
    for config, rate in sorted(medians.items(), key=lambda pair: -pair[1]):
        log(f"{rate:9.2f} radiographs/s  {describe(config)}")
    best = max(finalists, key=lambda config: medians[config])
    try:
        _write_cache(models[best], best, medians)
    except UserError as error:
        log(f"warning: not cached for later runs: {error}")
    except OSError as error:
        reason = f"{cache_folder()}: {os_reason(error)}. Name another folder with XDG_CACHE_HOME=FOLDER."
        log(f"warning: not cached for later runs: {reason}")
    return best


def describe(config: SessionConfig) -> str:
    """Return a configuration as text for one line of output."""
    return (
        f"batch size {config.batch_size}, {config.streams} in flight, {config.threads} threads, "
        f"graph optimization {config.optimization}"
    )


def candidates(path: Path, provider: str) -> Iterator[SessionConfig]:
    """Yield the configurations to measure, the default first."""
    model = OnnxModel.load(path, provider, pipelined_config())
    yield model.session_config
    yield from candidate_configs(model.session_config, model.provider, model.size)


def candidate_configs(default: SessionConfig, provider: str, size: int) -> Iterator[SessionConfig]:
    """Yield the configurations to measure beside the default. On a CPU each uses all threads.

    Args:
        default: Resolved configuration, not yielded.
        provider: The engine's own name of the provider.
        size: Side of a radiograph in pixels.
    """
    if provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]):
        # A TensorRT session runs one batch at a time, so a second batch in flight only waits.
        batch_sizes, streams = [16, 32, 64, 128], [1] if provider == PROVIDERS["tensorrt"] else [1, 2, 3]
        max_in_flight = 3 * 128
    else:
        batch_sizes, streams = [1, 2, 4, 8, 16], sorted({1, min(2, num_processors()), num_processors()})
        max_in_flight = _MAX_BYTES // (size**2 * _BYTES_PER_PIXEL)
    for num_streams in streams:
        for batch_size in batch_sizes:
            config = replace(default, batch_size=batch_size, streams=num_streams)
            if config != default and batch_size * num_streams <= max_in_flight:
                yield config
    if provider == PROVIDERS["cpu"]:
        yield from (
            replace(default, optimization=level) for level in GRAPH_OPTIMIZATIONS if level != default.optimization
        )


def _measure_images_per_s(model: OnnxModel) -> float:
    batch_size, size = model.session_config.batch_size or 1, model.size
    batch = np.random.default_rng(0).integers(0, 256, (batch_size, 1, size, size), dtype=np.uint8)
    list(model.stream([batch] * (model.session_config.streams or 1)))  # warm-up: memory and kernels
    num_images, start = 0, time.perf_counter()

    def batches() -> Iterator[np.ndarray]:
        while time.perf_counter() - start < _SECONDS:
            yield batch

    for _ in model.stream(batches()):
        num_images += batch_size
    return num_images / (time.perf_counter() - start)


def _cache_key(model: OnnxModel) -> str:
    """Return the key of a model on this machine. It is hashed, so that the cache does not reveal the model."""
    parts = (model.sha256, model.provider, model.engine.version, _processor_name(), str(num_processors()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor()


def _write_cache(model: OnnxModel, best: SessionConfig, rates: dict[SessionConfig, float]) -> None:
    path = cache_folder() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = [_to_json(config) | {"images_per_s": round(rate, 3)} for config, rate in rates.items()]
    entry = {"tuning": _to_json(best), "measured": measured, "provider": model.provider, "size": model.size}
    files.write_json(path, _read_cache() | {_cache_key(model): entry})


def _to_json(config: SessionConfig) -> dict[str, Any]:
    values = asdict(config)
    return values | {_JSON_KEY: values.pop("optimization")}
