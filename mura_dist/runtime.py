"""An exported model, loaded and ready: what computes, and what the model says of itself. No torch.

ONNX file -> ONNX Runtime's session on the wanted provider, or Refusal -> Model: image -> logit, activation_map
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime

from . import members
from .card import KEY, Card
from .refusal import Refusal

ONNXRUNTIME: str = onnxruntime.__version__
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# TF32 keeps 3 digits of 7: logits would leave the parity gate's 1e-4.
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
_FATAL, _ERROR, _WARNING = 4, 3, 2  # ONNX Runtime's log levels; the last is its default


class Model:
    """An exported model, loaded and ready. `card` says what it is, `sha256` is the file's."""

    def __init__(self, session: onnxruntime.InferenceSession, card: Card, sha256: str) -> None:
        self.session, self.card, self.sha256 = session, card, sha256

    @classmethod
    def load(cls, path: Path, provider: str = "cpu", threads: int | None = None) -> "Model":
        """The model of an ONNX file, or of the one beside a model list.

        provider: cpu, cuda, tensorrt or a name of ONNX Runtime's; threads: None for all cores. Raises Refusal for a
        file that is not there, not ONNX or not ours, for a list that was not exported, and for a provider that does not
        start.
        """
        if members.is_list(path):
            return cls._of_list(path, provider, threads)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise Refusal(f"model {path}: {what}; give the model.onnx that `mura-dist export` wrote")
        return cls.from_bytes(path.read_bytes(), str(path), provider, threads)

    @classmethod
    def _of_list(cls, path: Path, provider: str, threads: int | None) -> "Model":
        listed, file = members.ModelList.load(path), members.exported(path)
        remedy = f"export it first: mura-dist export {path}"
        if not file.is_file():
            raise Refusal(f"{path} is a list of checkpoints and {file} is not there; {remedy}")
        model = cls.load(file, provider, threads)
        if not members.same(model.card.members, listed.members):
            raise Refusal(f"{path} lists other members than {file} holds ({model.card.checkpoint}); {remedy}")
        return model

    @classmethod
    def from_bytes(cls, data: bytes, name: str, provider: str = "cpu", threads: int | None = None) -> "Model":
        """As `load`, of a file's content; `name` is what messages call it."""
        session = _session(data, name, provider, threads)
        card = Card.parse(session.get_modelmeta().custom_metadata_map.get(KEY), name)
        return cls(session, card, hashlib.sha256(data).hexdigest())

    @property
    def size(self) -> int:
        """Pixels of a side of the images it takes."""
        return self.card.size

    @property
    def provider(self) -> str:
        """ONNX Runtime's name of what computes."""
        return self.session.get_providers()[0]

    def outputs(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """image (B, 1, S, S) uint8 -> logit (B,) float32, activation_map (B, h, w) float32."""
        logit, activation_map = self.session.run(["logit", "activation_map"], {"image": image})
        return logit, activation_map

    def logits(self, image: np.ndarray) -> np.ndarray:
        """image (B, 1, S, S) uint8 -> logit (B,) float32."""
        return self.session.run(["logit"], {"image": image})[0]


def _session(data: bytes, name: str, asked: str, threads: int | None) -> onnxruntime.InferenceSession:
    """A session on the wanted provider, or Refusal; ONNX Runtime alone would go on with the CPU and a note in a log."""
    provider, available = PROVIDERS.get(asked.lower(), asked), onnxruntime.get_available_providers()
    if provider not in available:
        raise Refusal(f"--provider {asked}: this ONNX Runtime has {', '.join(available)}; name one of them, or cpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    options.intra_op_num_threads = threads or 0
    providers = [provider, "CUDAExecutionProvider"] if provider == "TensorrtExecutionProvider" else [provider]
    with _hushed() if provider != "CPUExecutionProvider" else contextlib.nullcontext():
        try:
            session = onnxruntime.InferenceSession(
                data, options, providers=[(each, _OPTIONS.get(each, {})) for each in providers]
            )
        except Exception as error:  # ONNX Runtime has a dozen kinds, none of them public
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            raise Refusal(
                f"{name} is not an ONNX model that ONNX Runtime can load ({reason}); export it again"
            ) from error
    started = session.get_providers()
    if started[0] != provider:
        raise Refusal(
            f"--provider {asked}: {provider} does not start here (driver, library or device is missing), "
            f"{started[0]} does; give --provider cpu, or install what onnxruntime {onnxruntime.__version__} needs"
        )
    return session


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Load the CUDA libraries of pip's nvidia packages; keep banners off the terminal, `_session` says it in a line."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if hasattr(onnxruntime, "preload_dlls"):  # since 1.21
                onnxruntime.preload_dlls()
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
