"""OpenVINO's own runtime, an extra: a model compiled for this CPU. The only engine that computes bf16."""

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


def _openvino() -> Any:
    """The package, without the one beside it that reports to its maker how it is used: a hospital's machine tells nobody.
    Raises UserError where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # what it imports instead is a stub of its own
    try:
        import openvino
    except ImportError as error:
        remedy = f"{install_remedy('openvino')}, or do without --provider openvino and --precision bf16"
        raise UserError(f"OpenVINO is not installed; {remedy}") from error
    return openvino


def supports_bf16() -> bool:
    """Whether OpenVINO finds instructions for bf16 here. Raises UserError where it is not installed."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVino:
    """A model compiled by OpenVINO for this CPU; a request a stream."""

    def __init__(
        self, data: bytes, name: str, session_config: SessionConfig, card: Card, limit_s: float = LIMIT_S
    ) -> None:
        """Load and compile the file `data`, which messages call `name`, in its card's precision. Raises UserError."""
        openvino = _openvino()
        core, self.name = openvino.Core(), OPENVINO_CPU
        self.version = str(openvino.__version__)
        self.tensor_of, self.lock = openvino.Tensor, threading.Lock()
        try:
            model = core.read_model(data)
        except Exception as error:  # plain RuntimeError, of many lines
            raise UserError(f"{name} is not an ONNX model that OpenVINO can load; export it again") from error
        check_signature(name, card.size, _signatures(model.inputs), _signatures(model.outputs))
        self.limit = BatchLimit(limit_s, name)
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if card.precision == "bf16" and not supports_bf16():
            raise UserError(
                f"{name} is for bf16, which this processor has no instructions for; give the fp32 or the int8 file"
            )
        self.compiled = core.compile_model(
            model,
            "CPU",
            {  # the precision too, or it would take bf16 by itself wherever the processor has it
                "INFERENCE_PRECISION_HINT": "bf16" if card.precision == "bf16" else "f32",
                "NUM_STREAMS": session_config.streams or 1,
                "INFERENCE_NUM_THREADS": session_config.threads or 0,
            },
        )
        for _ in range(session_config.streams or 1):
            self.requests.put(self.compiled.create_infer_request())
        # All that is done once, before there are threads.
        self.run(np.zeros((1, 1, card.size, card.size), np.uint8), OUTPUTS)

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        request = self.requests.get()
        try:
            # What makes and reads tensors goes one thread at a time: two that began so at once waited for each other for ever,
            # one with Python's lock, one with a lock of the library's.
            with self.lock:
                tensor = self.tensor_of(np.ascontiguousarray(image), shared_memory=True)
                request.set_input_tensor(tensor)
            with self.limit.watched(request.cancel):
                request.infer()  # `tensor` lives until it is done
            with self.lock:
                return [np.array(request.get_tensor(name).data) for name in outputs]
        except RunError:
            raise
        except RuntimeError as error:
            raise batch_error(self.name, image, error) from error
        finally:
            self.requests.put(request)


def _signatures(ports: Iterable[Any]) -> list[Signature]:
    """Names and shapes; a dimension of any size is no int."""
    return [
        (port.any_name, [dim.get_length() if dim.is_static else str(dim) for dim in port.partial_shape])
        for port in ports
    ]
