"""Test an exported model on a GPU. Skipped without one."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import gpu

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
if gpu.CUDA and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
    pytest.skip("onnxruntime-gpu is not installed", allow_module_level=True)

from helpers.models import card_of, noise, tiny  # noqa: E402

from mura_dist.core.errors import UserError  # noqa: E402
from mura_dist.inference import page_locked  # noqa: E402
from mura_dist.inference.engine import SessionConfig  # noqa: E402
from mura_dist.inference.export import onnx, precision  # noqa: E402
from mura_dist.inference.onnx_model import OnnxModel  # noqa: E402

pytestmark = gpu.MARKS
PROVIDERS = ["cuda", "tensorrt"] if gpu.CUDA else ["cpu"]
needs_cuda = pytest.mark.skipif(not gpu.CUDA, reason="page-locked memory needs a CUDA device")

LIMITS = {"fp32": 1e-4, "fp16": precision.batch_limit("fp16", "cuda")}  # of a logit


@pytest.fixture(scope="module")
def exported() -> Callable[[str], bytes]:
    files = {
        "fp32": onnx.build_onnx(tiny(), card_of()),
        "fp16": onnx.build_onnx(
            precision.to_half_precision(tiny()), card_of().model_copy(update={"precision": "fp16"})
        ),
    }
    return files.__getitem__


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", LIMITS)
def test_logits_equal_the_cpus_at_any_batch_size(exported: Callable[[str], bytes], provider: str, name: str) -> None:
    images = noise(21)
    exact = OnnxModel.from_bytes(exported("fp32"), "the model").logits(images)
    try:
        model = OnnxModel.from_bytes(exported(name), "the model", provider, SessionConfig(8, streams=2))
    except UserError as error:
        if "TensorRT 10" not in str(error):
            raise
        pytest.skip("TensorRT 10 is not installed")
    for number in (1, 5, 8, 21):
        batches = (images[start : start + number] for start in range(0, len(images), number))
        logits = np.concatenate([logit for (logit,) in model.stream(batches)])
        np.testing.assert_allclose(logits, exact, atol=LIMITS[name])


@needs_cuda
def test_memory_is_page_locked_until_freed() -> None:
    runtime = page_locked.cuda_runtime()
    assert runtime is not None

    def is_locked(address: int) -> bool:
        flags = ctypes.c_uint()
        error = runtime.cudaHostGetFlags(ctypes.byref(flags), ctypes.c_void_p(address))
        runtime.cudaGetLastError()
        return error == 0

    array = page_locked.allocate((8, 1, 64, 64), runtime, 0)
    address = array.ctypes.data
    assert is_locked(address)
    del array
    gc.collect()
    assert not is_locked(address)


def test_models_load_and_unload(exported: Callable[[str], bytes]) -> None:
    """Autotune does so. Each model has its own page-locked memory."""
    images = noise(16)
    exact = OnnxModel.from_bytes(exported("fp32"), "the model").logits(images)
    for batch_size in (16, 4, 8, 16):
        model = OnnxModel.from_bytes(exported("fp32"), "the model", PROVIDERS[0], SessionConfig(batch_size))
        np.testing.assert_allclose(model.logits(images), exact, atol=1e-4)
        del model
        gc.collect()
