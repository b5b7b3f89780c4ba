"""The shared libraries that ONNX Runtime's GPU providers open.

    provider -> preload: load the libraries of pip's packages before a session is created
    provider that does not start -> find_missing -> remedy: for the error message

ONNX Runtime alone falls back to the CPU with a note in a log, or does not name the missing library.
"""

import contextlib
import ctypes
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mura_dist.core.errors import install_remedy
from mura_dist.inference.engine import PROVIDERS

# Provider -> its own library, whose dependencies the loader names, and the libraries that it opens later by name.
_LIBRARIES = {
    PROVIDERS["cuda"]: ("libonnxruntime_providers_cuda.so", ("libcudnn.so.9",)),
    PROVIDERS["tensorrt"]: ("libonnxruntime_providers_tensorrt.so", ()),
}
_TENSORRT = (
    "libnvinfer.so.10",
    "libnvinfer_plugin.so.10",
    "libnvonnxparser.so.10",
)  # in the order of their dependencies


def preload(onnxruntime: Any, providers: Iterable[str]) -> None:
    """Load the libraries of pip's packages, which are outside the loader's path, so that `providers` find them."""
    onnxruntime.preload_dlls()  # CUDA and cuDNN
    if PROVIDERS["tensorrt"] in providers:
        spec = importlib.util.find_spec("tensorrt_libs")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for name in _TENSORRT:
                with contextlib.suppress(OSError):  # find_missing names it
                    ctypes.CDLL(str(Path(folder) / name))


def find_missing(onnxruntime: Any, providers: Iterable[str]) -> str | None:
    """Return the first library required by one of `providers` that cannot be opened, or None."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    for library, opened_later in (_LIBRARIES[provider] for provider in providers if provider in _LIBRARIES):
        if (path := folder / library).is_file():  # other systems name their libraries otherwise
            for candidate in (str(path), *opened_later):
                if (name := find_unopenable(candidate)) is not None:
                    return name
    return None


def find_unopenable(library: str) -> str | None:
    """Return the first of `library` and its dependencies that the loader cannot open, or None."""
    try:
        ctypes.CDLL(library, mode=os.RTLD_LAZY)
    except OSError as error:
        match = re.match(r"(\S+): cannot open shared object file", str(error))
        return match[1] if match else None  # no match: it was opened and has another version
    return None


def remedy(library: str) -> str:
    """Return how to install a missing library, for the middle of a sentence."""
    if library.startswith("libcuda.so"):
        return "install NVIDIA's driver"
    if library.startswith(("libnvinfer", "libnvonnxparser")):
        return f"install TensorRT 10: {install_remedy('cuda')}, then pip install 'tensorrt-cu13<11'"
    return install_remedy("cuda")
