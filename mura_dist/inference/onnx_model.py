"""An exported model: the engine that computes it, and its card. No torch.

    ONNX file -> engine on the requested provider -> OnnxModel: image -> logit, activation_map

`stream` keeps several batches in flight. On a CPU two batches on half the cores each are faster than one on all cores (1.12 x in
the median, docs/benchmarks.md). On a GPU one batch is copied while another is computed.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mura_dist.core.errors import UserError
from mura_dist.inference import onnx_metadata
from mura_dist.inference.batch_limit import LIMIT_S
from mura_dist.inference.engine import OPENVINO, OUTPUTS, InferenceEngine, SessionConfig, on_cpu
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
from mura_dist.inference.engine_openvino import OpenVino
from mura_dist.inference.processor import check_weight_bits
from mura_dist.inference.throughput import BusyTime
from mura_dist.models import model_list
from mura_dist.models.card import KEY, Card
from mura_dist.models.target import Target


class OnnxModel:
    """An exported model, ready to compute.

    Attributes:
        engine: Runtime with the file loaded.
        card: The file's model card.
        sha256: SHA-256 of the file.
        session_config: Resolved configuration of the engine.
        busy: Time in which `stream` computed.
    """

    def __init__(self, engine: InferenceEngine, card: Card, sha256: str, session_config: SessionConfig) -> None:
        """Combine an engine with its model's card. `load` is the usual way."""
        self.engine, self.card, self.sha256, self.session_config = engine, card, sha256, session_config
        self.busy = BusyTime()

    @classmethod
    def load(
        cls,
        path: Path,
        provider: str = "cpu",
        session_config: SessionConfig | None = None,
        limit_s: float = LIMIT_S,
    ) -> "OnnxModel":
        """Load an ONNX file.

        Args:
            path: The file, or a model list NAME.json beside the exported NAME.onnx.
            provider: cpu, cuda, tensorrt, openvino or a name of ONNX Runtime's.
            session_config: How to run the model. None leaves it to the machine.
            limit_s: Time limit of a batch in seconds.

        Raises:
            UserError: the file is missing or no mura-dist model, the list was not exported, or the provider does not start or
                does not compute the file's precision, or the processor does not compute its weights.
        """
        target = Target.parse(path)
        if target.kind == "list":
            return cls._load_list(target, provider, session_config, limit_s)
        if target.kind == "run":
            problem = "a folder" if path.is_dir() else "no such file"
            raise UserError(f"model {path}: {problem}. Give the model.onnx that `mura-dist export` wrote.")
        return cls.from_bytes(path.read_bytes(), str(path), provider, session_config, limit_s)

    @classmethod
    def _load_list(
        cls, target: Target, provider: str, session_config: SessionConfig | None, limit_s: float
    ) -> "OnnxModel":
        path, file = target.path, target.onnx_file
        listed = model_list.ModelList.load(path)
        remedy = f"Export it first: mura-dist export {path}"
        if not file.is_file():
            raise UserError(f"{path} is a list of checkpoints, and {file} does not exist. {remedy}")
        model = cls.load(file, provider, session_config, limit_s)
        if not model_list.have_same_weights(model.card.members, listed.members):
            raise UserError(f"{path} lists other members than {file} holds ({model.card.checkpoint}). {remedy}")
        return model

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        name: str,
        provider: str = "cpu",
        session_config: SessionConfig | None = None,
        limit_s: float = LIMIT_S,
    ) -> "OnnxModel":
        """Load the content of an ONNX file, like `load`. `name` is the file's name in messages."""
        session_config = (session_config or SessionConfig()).resolved(on_cpu(provider))
        remedy = "that `mura-dist export` wrote"
        try:
            text = onnx_metadata.read(data, KEY)
            external_file = onnx_metadata.external_file(data)
        except ValueError as error:
            raise UserError(f"{name} is not an ONNX model ({error}). Give the model.onnx {remedy}.") from error
        if external_file is not None:
            raise UserError(
                f"{name} has its weights in another file ({external_file[:80]!r}). Give the one file {remedy}."
            )
        card = Card.parse(text, name)
        check_weight_bits(card.weight_bits, name, "Export it again with --weight-bits 7.", provider=provider)
        engine: InferenceEngine
        if provider.lower() == OPENVINO:
            engine = OpenVino(data, name, session_config, card, limit_s)
        else:
            engine = OnnxRuntime(data, name, provider, session_config, card, limit_s)
        return cls(engine, card, hashlib.sha256(data).hexdigest(), session_config)

    @property
    def size(self) -> int:
        """Side of the input images in pixels."""
        return self.card.size

    @property
    def provider(self) -> str:
        """The engine's own name of the provider that computes."""
        return self.engine.name

    def outputs(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compute logit (B,) float32 and activation_map (B, h, w) float32 of image (B, 1, S, S) uint8."""
        logit, activation_map = self.engine.run(image, OUTPUTS)
        return logit, activation_map

    def logits(self, image: np.ndarray) -> np.ndarray:
        """Compute logit (B,) float32 of image (B, 1, S, S) uint8."""
        return self.engine.run(image, OUTPUTS[:1])[0]

    def stream(self, batches: Iterable[np.ndarray], outputs: Sequence[str] = OUTPUTS[:1]) -> Iterator[list[np.ndarray]]:
        """Yield `outputs` of each batch in order.

        Args:
            batches: image (B, 1, S, S) uint8 each. `session_config.streams` batches are in flight, and two more are fetched:
                batches may end in another order, and a stream should not wait for the caller.
            outputs: Names of the outputs to compute.
        """
        if self.session_config.streams == 1:
            for batch in batches:
                yield self._run(batch, outputs)
            return
        streams = self.session_config.streams or 1
        in_flight: deque[Future[list[np.ndarray]]] = deque()
        with ThreadPoolExecutor(streams, "stream") as pool:
            for batch in batches:
                in_flight.append(pool.submit(self._run, batch, outputs))
                if len(in_flight) > streams + 1:
                    yield in_flight.popleft().result()
            while in_flight:
                yield in_flight.popleft().result()

    def _run(self, batch: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        with self.busy:
            return self.engine.run(batch, outputs)
