"""An exported model, loaded and ready: what computes, and what the model says of itself. No torch.

    ONNX file -> an engine on the wanted provider, or Refusal -> Model: image -> logit, activation_map
        cpu, cuda, tensorrt, ... ONNX Runtime        openvino: OpenVINO's own runtime, an extra

A provider that is not there is refused; nothing falls back to another one in silence. `stream` keeps several batches in flight:
on a CPU two batches wait less for one another than one on all cores does (1.12 x in the median, docs/benchmarks.md); on a GPU
one is copied while another is computed.
"""

import contextlib
import ctypes
import hashlib
import io
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

# Since 1.29 ONNX Runtime's Linux builds tell Microsoft of each session: the model's file name, its hashes, its graph. Asked for
# by nobody here, and only this, before the import, keeps it from leaving a file among the temporary ones too.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnxruntime

from mura_dist.core.errors import Failure, Refusal, nearest
from mura_dist.distributed import environment
from mura_dist.distributed.processes import processors
from mura_dist.models import model_list
from mura_dist.models.card import KEY, Card

onnxruntime.disable_telemetry_events()  # Windows' way, and whoever had imported it before

ONNXRUNTIME: str = onnxruntime.__version__
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
OPENVINO, OPENVINO_CPU = "openvino", "OpenVINO CPU"  # as asked for, and as told
OUTPUTS = ("logit", "activation_map")
OPTIMISATIONS: dict[Literal["all", "extended"], str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
}  # ONNX Runtime's; all adds blocked layouts
_FATAL, _ERROR, _WARNING = 4, 3, 2  # ONNX Runtime's log levels; the last is its default


@dataclass(frozen=True)
class Tuning:
    """How a model is run. batch_size: radiographs at once; streams: batches in flight; threads: of all streams together,
    on a CPU. None: a choice by the machine, the same on each start. Only `optimisation` moves fp32 logits, in their last bits."""

    batch_size: int | None = None
    streams: int | None = None
    threads: int | None = None
    optimisation: Literal["all", "extended"] = "all"

    def settled(self, on_cpu: bool) -> "Tuning":
        """With nothing left to choose."""
        threads = self.threads or max(1, processors() // environment.ranks_here())
        streams = self.streams or 1
        return replace(self, batch_size=self.batch_size or (4 if on_cpu else 64), streams=streams, threads=threads)


def flowing(batch_size: int | None = None) -> Tuning:
    """For many batches one after the other, before anything was measured: two in flight."""
    threads = max(1, processors() // environment.ranks_here())
    return Tuning(batch_size, min(2, threads), threads)


class Engine(Protocol):
    """What computes. `name` says which, `run` may be called from several threads at once."""

    name: str

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]: ...


class Model:
    """An exported model, loaded and ready. `card` says what it is, `sha256` is the file's, `tuning` how it is run."""

    def __init__(self, engine: Engine, card: Card, sha256: str, tuning: Tuning) -> None:
        self.engine, self.card, self.sha256, self.tuning = engine, card, sha256, tuning

    @classmethod
    def load(cls, path: Path, provider: str = "cpu", tuning: Tuning | None = None) -> "Model":
        """The model of an ONNX file, or of the one beside a model list.

        provider: cpu, cuda, tensorrt, openvino or a name of ONNX Runtime's. Raises Refusal for a file that is not
        there, not ONNX or not ours, for a list that was not exported, for a provider that does not start, and for one
        that cannot compute in the file's precision.
        """
        if model_list.is_list(path):
            return cls._of_list(path, provider, tuning)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise Refusal(f"model {path}: {what}; give the model.onnx that `mura-dist export` wrote")
        return cls.from_bytes(path.read_bytes(), str(path), provider, tuning)

    @classmethod
    def _of_list(cls, path: Path, provider: str, tuning: Tuning | None) -> "Model":
        listed, file = model_list.ModelList.load(path), model_list.exported(path)
        remedy = f"export it first: mura-dist export {path}"
        if not file.is_file():
            raise Refusal(f"{path} is a list of checkpoints and {file} is not there; {remedy}")
        model = cls.load(file, provider, tuning)
        if not model_list.same(model.card.members, listed.members):
            raise Refusal(f"{path} lists other members than {file} holds ({model.card.checkpoint}); {remedy}")
        return model

    @classmethod
    def from_bytes(cls, data: bytes, name: str, provider: str = "cpu", tuning: Tuning | None = None) -> "Model":
        """As `load`, of a file's content; `name` is what messages call it."""
        on_cpu = provider.lower() in ("cpu", OPENVINO, PROVIDERS["cpu"].lower())
        tuning = (tuning or Tuning()).settled(on_cpu)
        engine = engine_of(data, name, provider, tuning)
        card = Card.parse(engine.metadata(), name)
        engine.begin(card, name)
        return cls(engine, card, hashlib.sha256(data).hexdigest(), tuning)

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
        if self.tuning.streams == 1:
            for batch in batches:
                yield self.engine.run(batch, outputs)
            return
        streams = self.tuning.streams or 1
        flying: deque[Future[list[np.ndarray]]] = deque()
        with ThreadPoolExecutor(streams, "stream") as pool:
            for batch in batches:
                flying.append(pool.submit(self.engine.run, batch, outputs))
                if len(flying) > streams:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()


def engine_of(data: bytes, name: str, provider: str, tuning: Tuning) -> "_OnnxRuntime | _OpenVino":
    """What computes an ONNX file that need not be ours. It is to `begin` before it runs; `tuning` is settled."""
    if provider.lower() == OPENVINO:
        return _OpenVino(data, name, tuning)
    return _OnnxRuntime(data, name, provider, tuning)


# ---- ONNX Runtime


class _OnnxRuntime:
    """A session of ONNX Runtime, bound to its device where that is a GPU."""

    def __init__(self, data: bytes, name: str, asked: str, tuning: Tuning) -> None:
        self.session = _session(data, name, asked, tuning)
        self.name: str = self.session.get_providers()[0]
        self.bound = self.name in (PROVIDERS["cuda"], PROVIDERS["tensorrt"])
        self.slots: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(tuning.streams or 1 if self.bound else 0):
            self.slots.put(_Slot(self.session))

    def metadata(self) -> str | None:
        text: str | None = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        return text

    def begin(self, card: Card, name: str) -> None:
        if card.precision == "bf16":
            raise Refusal(
                f"{name} is for bf16, which ONNX Runtime's {self.name} does not compute; OpenVINO does: --provider openvino"
            )

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        try:
            if not self.bound:
                found: list[np.ndarray] = self.session.run(list(outputs), {"image": image})
                return found
            slot = self.slots.get()
            try:
                return slot.run(image, outputs)
            finally:
                self.slots.put(slot)
        except Exception as error:  # as of a session: a dozen kinds
            raise _failure(self.name, image, error) from error


def _failure(engine: str, image: np.ndarray, error: Exception) -> Failure:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return Failure(
        f"{engine} failed on a batch of {len(image)} ({reason}); if memory ran out, give a smaller --batch-size"
    )


class _Slot:
    """A batch in flight on a GPU: page-locked memory here, which the GPU copies from by itself, and memory there; both stay."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.host: np.ndarray | None = None  # (most so far, 1, S, S)
        self.device: dict[int, Any] = {}  # by number of images

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        number = len(image)
        if self.host is None or len(self.host) < number or self.host.shape[1:] != image.shape[1:]:
            self.host = _page_locked(image.shape, self.host)
        if number not in self.device:
            self.device[number] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                list(image.shape), np.uint8, "cuda", _device()
            )
        np.copyto(self.host[:number], image)
        self.device[number].update_inplace(self.host[:number])
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("image", self.device[number])
        for output in outputs:
            binding.bind_output(output, "cuda", _device())
        self.session.run_with_iobinding(binding)
        found: list[np.ndarray] = binding.copy_outputs_to_cpu()
        return found


def _page_locked(shape: tuple[int, ...], instead_of: np.ndarray | None) -> np.ndarray:
    """uint8 memory; plain memory, which is only slower, where CUDA does not lock it."""
    memory = np.empty(shape, np.uint8)
    with contextlib.suppress(OSError, AttributeError):
        cuda = _cuda()
        cuda.cudaSetDevice(ctypes.c_int(_device()))  # of this thread: another one's first GPU is not to be touched
        if instead_of is not None:
            cuda.cudaHostUnregister(ctypes.c_void_p(instead_of.ctypes.data))
        cuda.cudaHostRegister(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), ctypes.c_uint(0))
        cuda.cudaGetLastError()  # a refusal is forgotten, or the next to ask would take it for its own
    return memory


def _cuda() -> ctypes.CDLL:
    """The CUDA runtime that ONNX Runtime has loaded."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("no CUDA runtime")


def _session(data: bytes, name: str, asked: str, tuning: Tuning) -> onnxruntime.InferenceSession:
    """A session on the wanted provider, or Refusal; ONNX Runtime alone would go on with the CPU and a note in a log."""
    provider, available = PROVIDERS.get(asked.lower(), asked), onnxruntime.get_available_providers()
    if provider not in available:
        raise Refusal(
            f"--provider {asked}{nearest(asked, (*PROVIDERS, OPENVINO))}: this ONNX Runtime has {', '.join(available)}; name "
            "one of them, cpu, or openvino"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMISATIONS[tuning.optimisation])
    options.graph_optimization_level = level
    threads, streams = tuning.threads or 0, tuning.streams or 1
    options.intra_op_num_threads = max(1, threads - streams + 1)  # each stream brings a thread of its own
    if streams > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take from the other streams
    providers = [provider, PROVIDERS["cuda"]] if provider == PROVIDERS["tensorrt"] else [provider]
    with _hushed() if provider != PROVIDERS["cpu"] else contextlib.nullcontext():
        try:
            session = onnxruntime.InferenceSession(
                data, options, providers=[(each, _provider_options(each, data)) for each in providers]
            )
        except Exception as error:  # ONNX Runtime has a dozen kinds, none of them public
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            if provider != PROVIDERS["cpu"]:
                raise Refusal(
                    f"--provider {asked}: {provider} does not start on {name} ({reason}); give --provider cpu, or mend that"
                ) from error
            raise Refusal(
                f"{name} is not an ONNX model that ONNX Runtime can load ({reason}); export it again"
            ) from error
    started = session.get_providers()
    if started[0] != provider:
        raise Refusal(
            f"--provider {asked}: {provider} does not start here (driver, library or device is missing), "
            f"{started[0]} does; give --provider cpu, or install what onnxruntime {ONNXRUNTIME} needs"
        )
    return session


def _provider_options(provider: str, data: bytes) -> dict[str, str]:
    if provider == PROVIDERS["cuda"]:
        # TF32 keeps 3 digits of 7: logits would leave the parity gate's 1e-4. Algorithms chosen by timing differ between starts.
        return {"device_id": str(_device()), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    if provider == PROVIDERS["tensorrt"]:
        # A folder a model: TensorRT's provider tells engines apart by the graph's names, not by its weights.
        folder = cache_folder() / "tensorrt" / f"{hashlib.sha256(data).hexdigest()}-{ONNXRUNTIME}"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
        return {
            "device_id": str(_device()),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
        }
    return {}


def _device() -> int:
    """Which GPU: ranks of one machine take one each."""
    here, num_here = environment.local_rank(), environment.ranks_here()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return here % len(visible) if visible else here if num_here > 1 else 0


def cache_folder() -> Path:
    """Where this machine keeps what can be made again."""
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "mura-dist"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mura-dist"


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


# ---- OpenVINO


def version(engine: str) -> str:
    """Of what computes."""
    return str(_openvino().__version__) if engine == OPENVINO_CPU else ONNXRUNTIME


def _openvino() -> Any:
    """The package, without the one beside it that reports to its maker how it is used: a hospital's machine tells nobody.
    Raises Refusal where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # what it imports instead is a stub of its own
    try:
        import openvino
    except ImportError as error:
        raise Refusal(
            "OpenVINO is not installed; pip install 'mura-dist[openvino]', or do without --provider openvino and --precision bf16"
        ) from error
    return openvino


def computes_bf16() -> bool:
    """Whether OpenVINO finds instructions for bf16 here. Raises Refusal where it is not installed."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class _OpenVino:
    """A model compiled by OpenVINO for this CPU; a request a stream."""

    def __init__(self, data: bytes, name: str, tuning: Tuning) -> None:
        openvino = _openvino()
        self.core, self.tuning, self.name = openvino.Core(), tuning, OPENVINO_CPU
        self.tensor_of, self.lock = openvino.Tensor, threading.Lock()
        try:
            self.model = self.core.read_model(data)
        except Exception as error:  # plain RuntimeError, of many lines
            raise Refusal(f"{name} is not an ONNX model that OpenVINO can load; export it again") from error
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def metadata(self) -> str | None:
        try:
            return str(self.model.get_rt_info(["framework", KEY]).astype(str))
        except Exception:  # no such key
            return None

    def begin(self, card: Card, name: str) -> None:
        """Compile. Said in so many words, or it would take bf16 by itself wherever the processor has it."""
        if card.precision == "bf16" and not computes_bf16():
            raise Refusal(
                f"{name} is for bf16, which this processor has no instructions for; give the fp32 or the int8 file"
            )
        self.compiled = self.core.compile_model(
            self.model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if card.precision == "bf16" else "f32",
                "NUM_STREAMS": self.tuning.streams or 1,
                "INFERENCE_NUM_THREADS": self.tuning.threads or 0,
            },
        )
        for _ in range(self.tuning.streams or 1):
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
            request.infer()  # `tensor` lives until it is done
            with self.lock:
                return [np.array(request.get_tensor(name).data) for name in outputs]
        except RuntimeError as error:
            raise _failure(self.name, image, error) from error
        finally:
            self.requests.put(request)
