"""What the engines that compute an exported model have in common: what they are asked for, and what they answer.

provider, Tuning -> Engine: image (B, 1, S, S) uint8 -> the outputs asked for
    cpu, cuda, tensorrt, ...  engine_onnxruntime.py        openvino  engine_openvino.py, an extra
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from mura_dist.core import files
from mura_dist.core.errors import RunError, UserError
from mura_dist.distributed import environment
from mura_dist.distributed.processes import num_processors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
OPENVINO, OPENVINO_CPU = "openvino", "OpenVINO CPU"  # as asked for, and as told
OUTPUTS = ("logit", "activation_map")
GRAPH_OPTIMIZATIONS: dict[Literal["all", "extended"], str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
}  # ONNX Runtime's; all adds blocked layouts


Signature = tuple[str, Sequence[object]]
"""The name and the shape of an input or output."""


@dataclass(frozen=True)
class SessionConfig:
    """How a model is run. batch_size: radiographs at once; streams: batches in flight; threads: of all streams together,
    on a CPU. None: a choice by the machine, the same on each start. Only `optimisation` moves fp32 logits, in their last bits."""

    batch_size: int | None = None
    streams: int | None = None
    threads: int | None = None
    optimization: Literal["all", "extended"] = "all"

    def resolved(self, on_cpu: bool) -> "SessionConfig":
        """With nothing left to choose."""
        threads = self.threads or max(1, num_processors() // environment.local_world_size())
        streams = self.streams or 1
        return replace(self, batch_size=self.batch_size or (4 if on_cpu else 64), streams=streams, threads=threads)


def pipelined_config(batch_size: int | None = None) -> SessionConfig:
    """For many batches one after the other, before anything was measured: two in flight."""
    threads = max(1, num_processors() // environment.local_world_size())
    return SessionConfig(batch_size, min(2, threads), threads)


def on_cpu(provider: str) -> bool:
    """Tell whether a provider, as it is asked for, computes on the CPU."""
    return provider.lower() in ("cpu", OPENVINO, PROVIDERS["cpu"].lower())


class InferenceEngine(Protocol):
    """A runtime with an ONNX file loaded. `name` says which, `version` is the library's; `run` may be called from several
    threads at once, with any number of images."""

    name: str
    version: str

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]: ...


def check_signature(name: str, size: int, inputs: Sequence[Signature], outputs: Sequence[Signature]) -> None:
    """Raise UserError where a graph does not take and give what the card says: image (N, 1, S, S) -> logit (N,), map (N, h, w).

    Args:
        name: what messages call the file.
        size: pixels of a side, the card's.
        inputs: (name, shape) of each, in which what is no int is any number.
    """
    wanted = {"image": (None, 1, size, size), "logit": (None,), "activation_map": (None, None, None)}
    shapes = {each: tuple(shape) for each, shape in (*inputs, *outputs)}
    fits = [each for each, _ in inputs] == ["image"] and {*OUTPUTS} <= {each for each, _ in outputs}
    for each, shape in wanted.items():
        there = shapes.get(each, ())
        pairs = zip(shape, there, strict=False)
        fits &= len(there) == len(shape) and all(
            dim in (None, seen) or not isinstance(seen, int) for dim, seen in pairs
        )
    if not fits:
        signature = ", ".join(f"{each} {list(shape)}" for each, shape in list(shapes.items())[:4])
        raise UserError(
            f"{name} is no model of ours: it has {signature[:160]}, not image [N, 1, {size}, {size}], logit [N] and "
            "activation_map [N, h, w]; give the model.onnx that `mura-dist export` wrote"
        )


def batch_error(engine: str, image: np.ndarray, error: Exception) -> RunError:
    """Say that a batch could not be computed, and what helps."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return RunError(
        f"{engine} failed on a batch of {len(image)} ({reason}); if memory ran out, give a smaller --batch-size"
    )


def cache_folder() -> Path:
    """Return where this machine keeps what can be made again. Raises UserError where the user has no home."""
    place = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return files.user_folder(*place) / "mura-dist"
