"""OpenVINO as an InferenceEngine: a model compiled for this CPU. It is the only engine that computes bf16, and an extra.

    ONNX file -> the compiled model in the cache folder, or else compiled now and cached -> one infer request per stream

OpenVINO's own cache loads a corrupt file without an error, and then computes other logits. Ours begins with its SHA-256.
"""

import contextlib
import hashlib
import io
import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist import __version__
from mura_dist.core import files
from mura_dist.core.errors import RunError, UserError, install_remedy
from mura_dist.inference.batch_limit import LIMIT_S, BatchLimit
from mura_dist.inference.engine import (
    OPENVINO_CPU,
    OUTPUTS,
    SessionConfig,
    Signature,
    batch_error,
    cache_folder,
    check_signature,
)
from mura_dist.models.card import Card

_DIGEST_BYTES = hashlib.sha256().digest_size


def _import_openvino() -> Any:
    """Import OpenVINO without openvino_telemetry, which reports its use. Raises UserError if it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # OpenVINO then imports its own stub
    try:
        import openvino
    except ImportError as error:
        remedy = f"{install_remedy('openvino')}, or do without --provider openvino and --precision bf16"
        raise UserError(f"OpenVINO is not installed. Install it: {remedy}.") from error
    return openvino


def supports_bf16() -> bool:
    """Return whether this CPU has instructions for bf16. Raises UserError if OpenVINO is not installed."""
    return "BF16" in _import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVino:
    """A model that OpenVINO compiled for this CPU, with one infer request per stream."""

    def __init__(
        self, data: bytes, name: str, session_config: SessionConfig, card: Card, limit_s: float = LIMIT_S
    ) -> None:
        """Load the ONNX file `data`, compiled in its card's precision, now or by an earlier process.

        Args:
            data: Content of the file.
            name: Name of the file in messages.
            session_config: A resolved configuration.
            card: The file's card.
            limit_s: Time limit of a batch in seconds.

        Raises:
            UserError: the file is no model, or this CPU does not compute its precision.
        """
        openvino = _import_openvino()
        core, self.name = openvino.Core(), OPENVINO_CPU
        self.version = str(openvino.__version__)
        self.tensor_type, self.lock = openvino.Tensor, threading.Lock()
        self.limit = BatchLimit(limit_s, name)
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if card.precision == "bf16" and not supports_bf16():
            raise UserError(
                f"{name} is a bf16 model, and this processor has no instructions for bf16. Give the fp32 or the int8 file."
            )
        properties = {  # set the precision: OpenVINO would choose bf16 on a processor that supports it
            "INFERENCE_PRECISION_HINT": "bf16" if card.precision == "bf16" else "f32",
            "NUM_STREAMS": session_config.streams or 1,
            "INFERENCE_NUM_THREADS": session_config.threads or 0,
        }
        cached = _cached_path(core, data, self.version)
        self.compiled = _load_cached(core, cached, properties)
        if self.compiled is None:
            self.compiled = core.compile_model(_read_model(core, data, name, card), "CPU", properties)
            _write_cached(cached, self.compiled)
        for _ in range(session_config.streams or 1):
            self.requests.put(self.compiled.create_infer_request())
        # OpenVINO initializes itself in the first run, which must not happen in several threads.
        self.run(np.zeros((1, 1, card.size, card.size), np.uint8), OUTPUTS)

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Compute `outputs` for image (N, 1, S, S) uint8. Raises RunError if the batch fails or exceeds its time limit."""
        request = self.requests.get()
        try:
            # One thread at a time creates and reads tensors. Two that began at once waited for each other for ever, one with
            # Python's lock, one with a lock of the library.
            with self.lock:
                tensor = self.tensor_type(np.ascontiguousarray(image), shared_memory=True)
                request.set_input_tensor(tensor)
            with self.limit.watched(request.cancel):
                request.infer()  # `tensor` has to live until this returns
            with self.lock:
                return [np.array(request.get_tensor(name).data) for name in outputs]
        except RunError:
            raise
        except RuntimeError as error:
            raise batch_error(self.name, image, error) from error
        finally:
            self.requests.put(request)


def _read_model(core: Any, data: bytes, name: str, card: Card) -> Any:
    try:
        model = core.read_model(data)
    except Exception as error:  # a RuntimeError of many lines
        raise UserError(f"{name} is not an ONNX model that OpenVINO can load. Export it again.") from error
    check_signature(name, card.size, _signatures(model.inputs), _signatures(model.outputs))
    return model


def _cached_path(core: Any, data: bytes, version: str) -> Path | None:
    """Return the path of a compiled model, or None without a home. Its name depends on all that the compiled model does.

    Streams and threads are no part of it, because OpenVINO applies them to a compiled model as well.
    """
    processor = core.get_property("CPU", "FULL_DEVICE_NAME"), *core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    key = "\0".join((hashlib.sha256(data).hexdigest(), __version__, version, *processor))
    with contextlib.suppress(UserError):
        return cache_folder() / "openvino" / f"{hashlib.sha256(key.encode()).hexdigest()}.blob"
    return None


def _load_cached(core: Any, path: Path | None, properties: dict[str, Any]) -> Any:
    """Return the compiled model in a file, or None if the file is missing, not readable or corrupt."""
    with contextlib.suppress(OSError, RuntimeError):
        content = path.read_bytes() if path is not None else b""
        digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest == hashlib.sha256(blob).digest():
            return core.import_model(io.BytesIO(blob), "CPU", properties)
    return None


def _write_cached(path: Path | None, compiled: Any) -> None:
    """Write a compiled model, unless the folder cannot be written. Processes that write it at once write the same bytes."""
    if path is not None:
        with contextlib.suppress(OSError, RuntimeError):
            blob = compiled.export_model().getvalue()
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, hashlib.sha256(blob).digest() + blob)


def _signatures(ports: Iterable[Any]) -> list[Signature]:
    """Return names and shapes. A dimension of any size is a string."""
    return [
        (port.any_name, [dim.get_length() if dim.is_static else str(dim) for dim in port.partial_shape])
        for port in ports
    ]
