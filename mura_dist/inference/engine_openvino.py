"""OpenVINO as an InferenceEngine: a model compiled for this CPU. It is the only engine that computes bf16, and an extra."""

import queue
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mura_dist.core.errors import RunError, UserError, install_remedy
from mura_dist.inference.batch_limit import LIMIT_S, BatchLimit
from mura_dist.inference.engine import OPENVINO_CPU, OUTPUTS, SessionConfig, Signature, batch_error, check_signature
from mura_dist.models.card import Card


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
        """Load and compile the ONNX file `data` in its card's precision.

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
        try:
            model = core.read_model(data)
        except Exception as error:  # a RuntimeError of many lines
            raise UserError(f"{name} is not an ONNX model that OpenVINO can load. Export it again.") from error
        check_signature(name, card.size, _signatures(model.inputs), _signatures(model.outputs))
        self.limit = BatchLimit(limit_s, name)
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if card.precision == "bf16" and not supports_bf16():
            raise UserError(
                f"{name} is a bf16 model, and this processor has no instructions for bf16. Give the fp32 or the int8 file."
            )
        self.compiled = core.compile_model(
            model,
            "CPU",
            {  # set the precision: OpenVINO would choose bf16 on a processor that supports it
                "INFERENCE_PRECISION_HINT": "bf16" if card.precision == "bf16" else "f32",
                "NUM_STREAMS": session_config.streams or 1,
                "INFERENCE_NUM_THREADS": session_config.threads or 0,
            },
        )
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


def _signatures(ports: Iterable[Any]) -> list[Signature]:
    """Return names and shapes. A dimension of any size is a string."""
    return [
        (port.any_name, [dim.get_length() if dim.is_static else str(dim) for dim in port.partial_shape])
        for port in ports
    ]
