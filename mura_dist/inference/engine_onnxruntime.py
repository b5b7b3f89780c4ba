"""ONNX Runtime, of one of two extras: a session on the provider that was asked for, or UserError; on a GPU bound to its memory.

A provider that is not there is refused; nothing falls back to another one in silence.
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
    """Import ONNX Runtime, kept from reporting its sessions. Raises UserError where neither extra installed it."""
    # Since 1.29 its Linux builds tell Microsoft of each session: the model's file name, its hashes, its graph. Asked for by
    # nobody here, and only this, before the import, keeps it from leaving a file among the temporary ones too.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        remedy = install_remedy("cpu", "cuda")
        raise UserError(f"ONNX Runtime is not installed (cpu; cuda for an NVIDIA GPU); {remedy}") from error
    if not hasattr(onnxruntime, "InferenceSession"):  # what is left where both were installed and one was removed
        raise UserError(
            "ONNX Runtime's files are incomplete (onnxruntime and onnxruntime-gpu fill the same folder); pip uninstall both, "
            f"then {install_remedy('cpu', 'cuda')}"
        )
    onnxruntime.disable_telemetry_events()  # Windows' way, and for whoever had imported it before
    return onnxruntime


class OnnxRuntime:
    """A session of ONNX Runtime, bound to its device where that is a GPU."""

    def __init__(
        self,
        data: bytes,
        name: str,
        alias: str,
        session_config: SessionConfig,
        card: Card | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        """Load the ONNX file `data`, which messages call `name`; a GPU has run one batch of zeros then.

        Args:
            alias: the provider, as a user names it.
            tuning: settled. A GPU runs batches of `batch_size` alone: smaller ones are padded, larger ones divided.
            card: None for a file without one, on a CPU.
            limit_s: seconds that a batch may take.

        Raises:
            UserError: where it is no model, the provider does not start, or does not compute the card's precision.
            RunError: where the batch does not fit into the GPU's memory.
        """
        onnxruntime = import_onnxruntime()
        if card is not None and card.precision == "bf16":
            raise UserError(
                f"--provider {alias}: {name} is for bf16, which ONNX Runtime does not compute; OpenVINO does: --provider openvino"
            )
        self.session = _session(onnxruntime, data, name, alias, session_config, card)
        self.name: str = self.session.get_providers()[0]
        self.version: str = onnxruntime.__version__
        self.run_options = onnxruntime.RunOptions
        self.limit = BatchLimit(limit_s, name)
        if card is not None:
            inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
            check_signature(
                name,
                card.size,
                [(each.name, each.shape) for each in inputs],
                [(each.name, each.shape) for each in outputs],
            )
        self.slots: queue.SimpleQueue[GpuBatch] | None = None
        if self.name in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]):
            assert card is not None
            image, runtime, self.slots = (
                np.zeros(_shape(session_config, card), np.uint8),
                page_locked.cuda_runtime(),
                queue.SimpleQueue(),
            )
            try:
                for _ in range(session_config.streams or 1):
                    host = page_locked.allocate(image.shape, runtime, _device())
                    self.slots.put(GpuBatch(onnxruntime, self.session, host, ("cuda", _device())))
            except Exception as error:  # no memory there
                raise batch_error(self.name, image, error) from error
            for _ in range(
                session_config.streams or 1
            ):  # each slot in turn: memory is taken and algorithms are chosen here
                self.run(image, OUTPUTS)  # TensorRT builds its engine, which takes minutes

    def run(self, image: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        options = self.run_options()
        try:
            with self.limit.watched(lambda: setattr(options, "terminate", True)):
                if self.slots is None:
                    found: list[np.ndarray] = self.session.run(list(outputs), {"image": image}, options)
                    return found
                slot = self.slots.get()
                try:
                    return slot.run(image, outputs, options)
                finally:
                    self.slots.put(slot)
        except RunError:
            raise
        except Exception as error:  # as of a session: a dozen kinds
            raise batch_error(self.name, image, error) from error


class GpuBatch:
    """A batch in flight on a GPU: page-locked memory here, which the GPU copies from by itself, and memory there; both stay.

    Every run has the one shape of `host`: for another one cuDNN would choose its algorithms again (ONNX Runtime remembers the
    last shape alone), and TensorRT would build its engine again. What is missing of a batch is zeros, whose outputs are dropped.
    """

    def __init__(self, onnxruntime: Any, session: Any, host: np.ndarray, device: tuple[str, int]) -> None:
        """host: (B, 1, S, S) uint8; device: ONNX Runtime's name and number of it."""
        self.session, self.host, self.device = session, host, device
        self.image = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(host.shape), np.uint8, *self.device)

    def run(self, image: np.ndarray, outputs: Sequence[str], options: Any = None) -> list[np.ndarray]:
        """Compute `outputs` of image (N, 1, S, S) uint8, of any N, in batches of the one shape."""
        size = len(self.host)
        parts = [
            self._run(image[start : start + size], outputs, options) for start in range(0, max(1, len(image)), size)
        ]
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

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


def _shape(session_config: SessionConfig, card: Card) -> tuple[int, int, int, int]:
    """(B, 1, S, S): that of every batch on a GPU."""
    return session_config.batch_size or 1, 1, card.size, card.size


def _session(
    onnxruntime: Any, data: bytes, name: str, alias: str, session_config: SessionConfig, card: Card | None
) -> Any:
    """A session on the wanted provider, or UserError; ONNX Runtime alone would go on with the CPU and a note in a log."""
    provider, available = PROVIDERS.get(alias.lower(), alias), onnxruntime.get_available_providers()
    if provider not in available:
        if provider in (PROVIDERS["cuda"], PROVIDERS["tensorrt"]) and PROVIDERS["cuda"] not in available:
            raise UserError(
                f"--provider {alias}: the ONNX Runtime installed here computes on CPUs alone; pip uninstall onnxruntime, then "
                f"{install_remedy('cuda')}, or give --provider cpu"
            )
        raise UserError(
            f"--provider {alias}{nearest(alias, (*PROVIDERS, OPENVINO))}: this ONNX Runtime has {', '.join(available)}; name "
            "one of them, cpu, or openvino"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    level = getattr(onnxruntime.GraphOptimizationLevel, GRAPH_OPTIMIZATIONS[session_config.optimization])
    options.graph_optimization_level = level
    threads, streams = session_config.threads or 0, session_config.streams or 1
    options.intra_op_num_threads = max(1, threads - streams + 1)  # each stream brings a thread of its own
    if streams > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would take from the other streams
    providers = [provider, PROVIDERS["cuda"]] if provider == PROVIDERS["tensorrt"] else [provider]
    with _hushed(onnxruntime) if provider != PROVIDERS["cpu"] else contextlib.nullcontext():
        try:
            if provider != PROVIDERS["cpu"]:
                provider_libraries.preload(onnxruntime, providers)
            session = onnxruntime.InferenceSession(
                data,
                options,
                providers=[
                    (each, _options(each, data, onnxruntime.__version__, session_config, card)) for each in providers
                ],
            )
        except Exception as error:  # ONNX Runtime has a dozen kinds, none of them public
            reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
            if provider != PROVIDERS["cpu"]:
                raise _not_started(onnxruntime, alias, providers, f"on {name} ({reason})") from error
            raise UserError(
                f"{name} is not an ONNX model that ONNX Runtime can load ({reason}); export it again"
            ) from error
    started = session.get_providers()
    if started[0] != provider:
        reason = f"here, {started[0]} does (no GPU is visible, or its driver is too old for onnxruntime-gpu's CUDA)"
        raise _not_started(onnxruntime, alias, providers, reason)
    return session


def _not_started(onnxruntime: Any, alias: str, providers: Sequence[str], reason: str) -> UserError:
    """Say why the first of `providers` does not start: a library that is missing, or else `reason`."""
    library = provider_libraries.find_missing(onnxruntime, providers)
    if library is None:
        return UserError(
            f"--provider {alias}: {providers[0]} does not start {reason}; mend that, or give --provider cpu"
        )
    return UserError(
        f"--provider {alias}: {providers[0]} does not start, {library} cannot be opened; "
        f"{provider_libraries.remedy(library)}, or give --provider cpu"
    )


def _options(
    provider: str, data: bytes, version: str, session_config: SessionConfig, card: Card | None
) -> dict[str, str]:
    if card is None:
        return {}
    shape = _shape(session_config, card)
    folder = Path()
    if provider == PROVIDERS["tensorrt"]:
        # A folder a model and shape: TensorRT's provider tells engines apart by the graph's names, not by its weights.
        folder = cache_folder() / "tensorrt" / f"{hashlib.sha256(data).hexdigest()}-{version}-{shape[0]}"
        folder.mkdir(parents=True, exist_ok=True)
        if card.precision != "fp16":
            os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # there is no option for it
    return provider_options(provider, card.precision, shape, _device(), folder)


def _device() -> int:
    """Which GPU: ranks of one machine take one each."""
    here, num_here = environment.local_rank(), environment.local_world_size()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return here % len(visible) if visible else here if num_here > 1 else 0


@contextlib.contextmanager
def _hushed(onnxruntime: Any) -> Iterator[None]:
    """Keep banners off the terminal; `_session` says in a line what does not start."""
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
