"""ONNX Runtime as an InferenceEngine: a session on the requested provider.

A provider that does not start raises UserError. ONNX Runtime alone would compute on the CPU with a note in a log.
"""

import contextlib
import hashlib
import io
import os
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mura_dist.core.errors import RunError, UserError, install_remedy, nearest
from mura_dist.distributed import environment
from mura_dist.inference import page_locked, provider_libraries
from mura_dist.inference.batch_limit import LIMIT_S, BatchLimit
from mura_dist.inference.engine import (
    GRAPH_OPTIMIZATIONS,
    OPENVINO,
    OUTPUTS,
    PROVIDERS,
    SessionConfig,
    batch_error,
    cache_folder,
    check_signature,
)
from mura_dist.inference.provider_options import provider_options
from mura_dist.models.card import Card

_FATAL, _ERROR, _WARNING = 4, 3, 2  # ONNX Runtime's log levels; the last is its default


def import_onnxruntime() -> Any:
    """Import ONNX Runtime with its telemetry switched off. Raises UserError if it is not installed."""
    # Since 1.29 the Linux builds report each session to Microsoft: the model's file name, its hashes, its graph. The variable
    # has to be set before the import, which otherwise leaves a file among the temporary ones.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        remedy = install_remedy("cpu", "cuda")
        raise UserError(
            f"ONNX Runtime is not installed (cpu; cuda for an NVIDIA GPU). Install it: {remedy}."
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):  # both packages were installed, and one of them was removed
        raise UserError(
            "ONNX Runtime's files are incomplete: onnxruntime and onnxruntime-gpu fill the same folder. pip uninstall both, "
            f"then {install_remedy('cpu', 'cuda')}."
        )
    onnxruntime.disable_telemetry_events()  # Windows, and a package that was imported before
    return onnxruntime


class OnnxRuntime:
    """A session of ONNX Runtime. On a GPU its inputs and outputs are bound to the GPU's memory."""

    def __init__(
        self,
        data: bytes,
        name: str,
        alias: str,
        session_config: SessionConfig,
        card: Card | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Load the ONNX file `data`. On a GPU, run one batch of zeros.

        Args:
            data: Content of the file.
            name: Name of the file in messages.
            alias: Provider as named in `--provider`.
            session_config: A resolved configuration. A GPU runs batches of `batch_size` alone: smaller ones are padded, larger
                ones divided.
            card: The file's card; None for a file without one, on a CPU.
            limit_s: Time limit of a batch in seconds.

        Raises:
            UserError: the file is no model, or the provider does not start or does not compute the card's precision.
            RunError: the batch does not fit into the GPU's memory.
        """
        onnxruntime = import_onnxruntime()
        if card is not None and card.precision == "bf16":
            raise UserError(
                f"--provider {alias}: {name} is a bf16 model, which ONNX Runtime does not compute. Use --provider openvino."
            )
        self.session = _create_session(onnxruntime, data, name, alias, session_config, card)
        self.name: str = self.session.get_providers()[0]
        self.version: str = onnxruntime.__version__
        self.run_options = onnxruntime.RunOptions
        self.limit = BatchLimit(limit_s, name)
        if card is not None:
            inputs, outputs = (
                [(tensor.name, tensor.shape) for tensor in tensors]
                for tensors in (self.session.get_inputs(), self.session.get_outputs())
            )
            check_signature(name, card.size, inputs, outputs)
        self.slots: queue.SimpleQueue[GpuBatch] | None = None
        if self.name in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]):
            assert card is not None
            self._prepare_gpu(onnxruntime, np.zeros(_batch_shape(session_config, card), np.uint8), session_config)

    def _prepare_gpu(self, onnxruntime: Any, image: np.ndarray, session_config: SessionConfig) -> None:
        """Allocate a slot per stream and run each one: the GPU allocates its memory and chooses its algorithms."""
        runtime, self.slots = page_locked.cuda_runtime(), queue.SimpleQueue()
        try:
            for _ in range(session_config.streams or 1):
                host = page_locked.allocate(image.shape, runtime, _gpu())
                self.slots.put(GpuBatch(onnxruntime, self.session, host, ("cuda", _gpu())))
        except Exception as error:  # out of memory
            raise batch_error(self.name, image, error) from error
        for _ in range(session_config.streams or 1):  # SimpleQueue hands out the slots in turn
            self.run(image, OUTPUTS)  # TensorRT builds its engine, which takes minutes

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """Compute `outputs` for image (N, 1, S, S) uint8. Raises RunError if the batch fails or exceeds its time limit."""
        options = self.run_options()
        try:
            with self.limit.watched(lambda: setattr(options, "terminate", True)):
                if self.slots is None:
                    arrays: list[np.ndarray] = self.session.run(list(outputs), {"image": image}, options)
                    return arrays
                slot = self.slots.get()
                try:
                    return slot.run(image, outputs, options)
                finally:
                    self.slots.put(slot)
        except RunError:
            raise
        except Exception as error:  # ONNX Runtime raises a dozen types, none of them public
            raise batch_error(self.name, image, error) from error


class GpuBatch:
    """The memory of one batch in flight on a GPU: a page-locked array on the host and a tensor on the device.

    Every run has the shape of `host`. For another shape cuDNN would choose its algorithms again (ONNX Runtime remembers only
    the last shape), and TensorRT would build its engine again. Smaller batches are padded with zeros, whose outputs are dropped.
    """

    def __init__(self, onnxruntime: Any, session: Any, host: np.ndarray, device: tuple[str, int]) -> None:
        """Allocate the device's tensor.

        Args:
            onnxruntime: The imported package.
            session: Session that computes.
            host: Input array (B, 1, S, S) uint8.
            device: ONNX Runtime's name and number of the device.
        """
        self.session, self.host, self.device = session, host, device
        self.image = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(host.shape), np.uint8, *self.device)

    def run(self, image: np.ndarray, outputs: Sequence[str], options: Any = None) -> list[np.ndarray]:
        """Compute `outputs` for image (N, 1, S, S) uint8, of any N, in batches of `host`'s shape."""
        size = len(self.host)
        batches = [
            self._run(image[start : start + size], outputs, options) for start in range(0, max(1, len(image)), size)
        ]
        return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]

    def _run(self, image: np.ndarray, outputs: Sequence[str], options: Any) -> list[np.ndarray]:
        self.host[: len(image)] = image
        self.host[len(image) :] = 0
        self.image.update_inplace(self.host)
        binding = self.session.io_binding()
        binding.bind_ortvalue_input("image", self.image)
        for output in outputs:
            binding.bind_output(output, *self.device)
        self.session.run_with_iobinding(binding, options)
        return [output[: len(image)] for output in binding.copy_outputs_to_cpu()]


def _batch_shape(session_config: SessionConfig, card: Card) -> tuple[int, int, int, int]:
    """Return (B, 1, S, S), the shape of every batch on a GPU."""
    return session_config.batch_size or 1, 1, card.size, card.size


def _create_session(
    onnxruntime: Any, data: bytes, name: str, alias: str, session_config: SessionConfig, card: Card | None
) -> Any:
    provider, available = PROVIDERS.get(alias.lower(), alias), onnxruntime.get_available_providers()
    if provider not in available:
        if provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]) and PROVIDERS["cuda"] not in available:
            raise UserError(
                f"--provider {alias}: the installed ONNX Runtime computes on CPUs only. pip uninstall onnxruntime, then "
                f"{install_remedy('cuda')}, or give --provider cpu."
            )
        raise UserError(
            f"--provider {alias}{nearest(alias, (*PROVIDERS, OPENVINO))}: not a provider of this ONNX Runtime "
            f"({', '.join(available)}). Name one of these, cpu or openvino."
        )
    providers = [provider, PROVIDERS["cuda"]] if provider == PROVIDERS["tensorrt"] else [provider]
    with _silenced(onnxruntime) if provider != PROVIDERS["cpu"] else contextlib.nullcontext():
        try:
            if provider != PROVIDERS["cpu"]:
                provider_libraries.preload(onnxruntime, providers)
            version = onnxruntime.__version__
            session = onnxruntime.InferenceSession(
                data,
                _session_options(onnxruntime, session_config),
                providers=[(each, _provider_options(each, data, version, session_config, card)) for each in providers],
            )
        except Exception as error:  # ONNX Runtime raises a dozen types, none of them public
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            if provider != PROVIDERS["cpu"]:
                raise _start_error(onnxruntime, alias, providers, f"on {name} ({reason})") from error
            raise UserError(
                f"{name} is not an ONNX model that ONNX Runtime can load ({reason}). Export it again."
            ) from error
    started = session.get_providers()
    if started[0] != provider:
        reason = (
            f"({started[0]} started instead: no GPU is visible, or its driver is too old for onnxruntime-gpu's CUDA)"
        )
        raise _start_error(onnxruntime, alias, providers, reason)
    return session


def _session_options(onnxruntime: Any, session_config: SessionConfig) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    level = getattr(onnxruntime.GraphOptimizationLevel, GRAPH_OPTIMIZATIONS[session_config.optimization])
    options.graph_optimization_level = level
    threads, streams = session_config.threads or 0, session_config.streams or 1
    options.intra_op_num_threads = max(1, threads - streams + 1)  # the thread that calls `run` computes too
    if streams > 1:  # a spinning thread would slow down the other streams
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _start_error(onnxruntime: Any, alias: str, providers: Sequence[str], reason: str) -> UserError:
    """Return an error that names the missing library of `providers`, or else `reason`."""
    library = provider_libraries.find_missing(onnxruntime, providers)
    if library is None:
        return UserError(
            f"--provider {alias}: {providers[0]} does not start {reason}. Fix that, or give --provider cpu."
        )
    return UserError(
        f"--provider {alias}: {providers[0]} does not start: {library} cannot be opened. "
        f"To fix it, {provider_libraries.remedy(library)}, or give --provider cpu."
    )


def _provider_options(
    provider: str, data: bytes, version: str, session_config: SessionConfig, card: Card | None
) -> dict[str, str]:
    if card is None:
        return {}
    shape = _batch_shape(session_config, card)
    folder = Path()
    if provider == PROVIDERS["tensorrt"]:
        # One folder per model and shape: TensorRT's provider tells engines apart by the graph's names, not by its weights.
        folder = cache_folder() / "tensorrt" / f"{hashlib.sha256(data).hexdigest()}-{version}-{shape[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        if card.precision != "fp16":
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # there is no option for it
    return provider_options(provider, card.precision, shape, _gpu(), folder)


def _gpu() -> int:
    """Return the number of this process's GPU. The ranks of a machine use one GPU each."""
    rank, num_ranks = environment.local_rank(), environment.local_world_size()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return rank % len(visible) if visible else rank if num_ranks > 1 else 0


@contextlib.contextmanager
def _silenced(onnxruntime: Any) -> Iterator[None]:
    """Keep ONNX Runtime's messages off the terminal. `_create_session` reports a provider that does not start."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
