"""Test the options of the GPU providers over precisions, batch sizes and image sizes."""

import itertools
import mmap
from pathlib import Path

import pytest

from mura_dist.inference.engine import PROVIDERS
from mura_dist.inference.engine_onnxruntime import import_onnxruntime
from mura_dist.inference.provider_options import provider_options
from mura_dist.models.card import Precision

FOLDER = Path("engines")
GRID = list(itertools.product(("fp32", "fp16", "int8"), (1, 7, 64), (64, 320), (0, 3)))


@pytest.mark.parametrize(("precision", "batch_size", "size", "device"), GRID)
def test_cuda_options(precision: Precision, batch_size: int, size: int, device: int) -> None:
    options = provider_options(PROVIDERS["cuda"], precision, (batch_size, 1, size, size), device, FOLDER)
    half = "1" if precision == "fp16" else "0"
    assert options == {
        "device_id": str(device),
        "use_tf32": half,  # off for fp32
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "prefer_nhwc": half,
    }


@pytest.mark.parametrize(("precision", "batch_size", "size", "device"), GRID)
def test_tensorrt_options(precision: Precision, batch_size: int, size: int, device: int) -> None:
    options = provider_options(PROVIDERS["tensorrt"], precision, (batch_size, 1, size, size), device, FOLDER)
    profiles = {options[f"trt_profile_{bound}_shapes"] for bound in ("min", "opt", "max")}
    assert profiles == {f"image:{batch_size}x1x{size}x{size}"}
    assert options["trt_fp16_enable"] == ("1" if precision == "fp16" else "0")
    assert (options["device_id"], options["trt_engine_cache_path"]) == (str(device), "engines")


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CoreMLExecutionProvider"])
def test_cpu_providers_have_no_options(provider: str) -> None:
    assert provider_options(provider, "fp32", (4, 1, 64, 64), 0, FOLDER) == {}


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_provider_library_contains_every_option_name(provider: str) -> None:
    """ONNX Runtime refuses an unknown option where the provider starts, which needs a GPU."""
    folder = Path(import_onnxruntime().__file__).parent / "capi"
    library = folder / f"libonnxruntime_providers_{provider}.so"
    if not library.is_file():
        pytest.skip("this environment has the extra cpu")
    options = provider_options(PROVIDERS[provider], "fp16", (4, 1, 64, 64), 0, FOLDER)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        unknown = [name for name in options if data.find(name.encode() + b"\0") < 0]
        assert not unknown
        assert provider != "cuda" or data.find(options["cudnn_conv_algo_search"].encode()) >= 0
