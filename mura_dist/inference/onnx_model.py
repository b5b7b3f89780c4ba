"""An exported model, loaded and ready: what computes, and what the model says of itself. No torch.

    ONNX file -> an engine on the wanted provider, or UserError -> Model: image -> logit, activation_map

`stream` keeps several batches in flight: on a CPU two batches wait less for one another than one on all cores does (1.12 x in
the median, docs/benchmarks.md); on a GPU one is copied while another is computed.
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
from mura_dist.inference.throughput import BusyTime
from mura_dist.models import model_list
from mura_dist.models.card import KEY, Card
from mura_dist.models.target import Target


class OnnxModel:
    """An exported model, loaded and ready. `card` says what it is, `sha256` is the file's, `tuning` how it is run; `busy` sums
    the time in which `stream` computed."""

    def __init__(self, engine: InferenceEngine, card: Card, sha256: str, session_config: SessionConfig) -> None:
        self.engine, self.card, self.sha256, self.session_config = engine, card, sha256, session_config
        self.busy = BusyTime()

    @classmethod
    def load(
        cls, path: Path, provider: str = "cpu", session_config: SessionConfig | None = None, limit_s: float = LIMIT_S
    ) -> "OnnxModel":
        """The model of an ONNX file, or of the one beside a model list.

        provider: cpu, cuda, tensorrt, openvino or a name of ONNX Runtime's; limit_s: seconds that a batch may take.
        Raises UserError for a file that is not
        there, not ONNX or not ours, for a list that was not exported, for a provider that does not start, and for one
        that cannot compute in the file's precision.
        """
        target = Target.parse(path)
        if target.kind == "list":
            return cls._of_list(target, provider, session_config, limit_s)
        if target.kind == "run":
            what = "a folder" if path.is_dir() else "no such file"
            raise UserError(f"model {path}: {what}; give the model.onnx that `mura-dist export` wrote")
        return cls.from_bytes(path.read_bytes(), str(path), provider, session_config, limit_s)

    @classmethod
    def _of_list(
        cls, target: Target, provider: str, session_config: SessionConfig | None, limit_s: float
    ) -> "OnnxModel":
        path, file = target.path, target.onnx_file
        listed = model_list.ModelList.load(path)
        remedy = f"export it first: mura-dist export {path}"
        if not file.is_file():
            raise UserError(f"{path} is a list of checkpoints and {file} is not there; {remedy}")
        model = cls.load(file, provider, session_config, limit_s)
        if not model_list.have_same_weights(model.card.members, listed.members):
            raise UserError(f"{path} lists other members than {file} holds ({model.card.checkpoint}); {remedy}")
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
        """As `load`, of a file's content; `name` is what messages call it."""
        session_config = (session_config or SessionConfig()).resolved(on_cpu(provider))
        try:
            text = onnx_metadata.read(data, KEY)
            outside = onnx_metadata.external_file(data)
        except ValueError as error:
            raise UserError(
                f"{name} is not an ONNX model ({error}); give the model.onnx that `mura-dist export` wrote"
            ) from error
        if outside is not None:
            raise UserError(
                f"{name} names another file for its weights ({outside[:80]!r}); give the one file that `mura-dist export` wrote"
            )
        card = Card.parse(text, name)
        engine: InferenceEngine
        if provider.lower() == OPENVINO:
            engine = OpenVino(data, name, session_config, card, limit_s)
        else:
            engine = OnnxRuntime(data, name, provider, session_config, card, limit_s)
        return cls(engine, card, hashlib.sha256(data).hexdigest(), session_config)

    @property
    def size(self) -> int:
        """Pixels of a side of the images it takes."""
        return self.card.size

    @property
    def provider(self) -> str:
        """What computes, by its own name."""
        return self.engine.name

    def outputs(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """image (B, 1, S, S) uint8 -> logit (B,) float32, activation_map (B, h, w) float32."""
        logit, activation_map = self.engine.run(image, OUTPUTS)
        return logit, activation_map

    def logits(self, image: np.ndarray) -> np.ndarray:
        """image (B, 1, S, S) uint8 -> logit (B,) float32."""
        return self.engine.run(image, OUTPUTS[:1])[0]

    def stream(self, batches: Iterable[np.ndarray], outputs: Sequence[str] = OUTPUTS[:1]) -> Iterator[list[np.ndarray]]:
        """For each of `batches`, in order, what `outputs` names; up to `tuning.streams` in flight, one more is fetched ahead."""
        if self.session_config.streams == 1:
            for batch in batches:
                yield self._run(batch, outputs)
            return
        streams = self.session_config.streams or 1
        flying: deque[Future[list[np.ndarray]]] = deque()
        with ThreadPoolExecutor(streams, "stream") as pool:
            for batch in batches:
                flying.append(pool.submit(self._run, batch, outputs))
                if len(flying) > streams:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()

    def _run(self, batch: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        with self.busy:
            return self.engine.run(batch, outputs)
