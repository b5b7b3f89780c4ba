"""The common interface of the engines that compute an exported model.

provider, SessionConfig -> InferenceEngine: image (B, 1, S, S) uint8 -> the requested outputs
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
OPENVINO, OPENVINO_CPU = "openvino", "OpenVINO CPU"  # option value, reported name
OUTPUTS = ("logit", "activation_map")
GRAPH_OPTIMIZATIONS: dict[Literal["all", "extended"], str] = {
    "all": "ORT_ENABLE_ALL",  # adds blocked layouts
    "extended": "ORT_ENABLE_EXTENDED",
}

Signature = tuple[str, Sequence[object]]
"""Name and shape of an input or output."""


@dataclass(frozen=True)
class SessionConfig:
    """How a model is run. None leaves a value to the machine, which chooses the same value at each start.

    Only `optimization` changes fp32 logits, in their last bits.

    Attributes:
        batch_size: Radiographs per batch.
        streams: Batches in flight.
        threads: CPU threads of all streams together.
        optimization: ONNX Runtime's graph optimization level, a key of GRAPH_OPTIMIZATIONS.
    """

    batch_size: int | None = None
    streams: int | None = None
    threads: int | None = None
    optimization: Literal["all", "extended"] = "all"

    def resolved(self, on_cpu: bool) -> "SessionConfig":
        """Return a copy whose None values are replaced by the machine's choice."""
        threads = self.threads or max(1, num_processors() // environment.local_world_size())
        streams = self.streams or 1
        return replace(self, batch_size=self.batch_size or (4 if on_cpu else 64), streams=streams, threads=threads)


def pipelined_config(batch_size: int | None = None) -> SessionConfig:
    """Return the default configuration for a long sequence of batches: two batches in flight."""
    threads = max(1, num_processors() // environment.local_world_size())
    return SessionConfig(batch_size, min(2, threads), threads)


def on_cpu(provider: str) -> bool:
    """Return whether a provider, named as in `--provider`, computes on the CPU."""
    return provider.lower() in ("cpu", OPENVINO, PROVIDERS["cpu"].lower())


class InferenceEngine(Protocol):
    """A runtime with an ONNX file loaded.

    Attributes:
        name: Name of the provider that computes.
        version: Version of the runtime's library.
    """

    name: str
    version: str

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Compute `outputs` for image (N, 1, S, S) uint8, of any N. Several threads may call it at once."""
        ...


def check_signature(name: str, size: int, inputs: Sequence[Signature], outputs: Sequence[Signature]) -> None:
    """Check that a graph maps image (N, 1, S, S) to logit (N,) and activation_map (N, h, w).

    Args:
        name: Name of the file in messages.
        size: Pixels of a side, from the model card.
        inputs: (name, shape) of each input. A dimension that is no int may have any size.
        outputs: (name, shape) of each output.

    Raises:
        UserError: the graph has other inputs or outputs.
    """
    expected = {"image": (None, 1, size, size), "logit": (None,), "activation_map": (None, None, None)}
    shapes = {tensor: tuple(shape) for tensor, shape in (*inputs, *outputs)}
    fits = [tensor for tensor, _ in inputs] == ["image"] and {*OUTPUTS} <= {tensor for tensor, _ in outputs}
    for tensor, expected_shape in expected.items():
        shape = shapes.get(tensor, ())
        fits &= len(shape) == len(expected_shape) and all(
            expected_dim in (None, dim) or not isinstance(dim, int)
            for expected_dim, dim in zip(expected_shape, shape, strict=False)
        )
    if not fits:
        signature = ", ".join(f"{tensor} {list(shape)}" for tensor, shape in list(shapes.items())[:4])
        raise UserError(
            f"{name} is not a mura-dist model: it has {signature[:160]} instead of image [N, 1, {size}, {size}], logit [N] and "
            "activation_map [N, h, w]. Give the model.onnx that `mura-dist export` wrote."
        )


def batch_error(engine: str, image: np.ndarray, error: Exception) -> RunError:
    """Return the error to raise when the batch `image` could not be computed."""
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return RunError(
        f"{engine} failed on a batch of {len(image)} ({reason}). If memory ran out, give a smaller --batch-size."
    )


def cache_folder() -> Path:
    """Return the user's cache folder for mura-dist. Raises UserError if the user has no home directory."""
    variable, default = ("LOCALAPPDATA", "AppData/Local") if os.name == "nt" else ("XDG_CACHE_HOME", ".cache")
    return files.user_folder(variable, default) / "mura-dist"
