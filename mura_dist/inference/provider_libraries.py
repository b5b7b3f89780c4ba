"""The shared libraries that ONNX Runtime's GPU providers open, and the name of the first one that is missing.

    provider -> preload: libraries in pip's packages, before a session wants them
    a provider that does not start -> missing -> remedy: for the one line that the user reads

ONNX Runtime itself falls back to the CPU with a note in a log, or names no library at all.
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

# By provider: its own library, whose needs the loader names, and what it opens later by name.
_LIBRARIES = {
    PROVIDERS["cuda"]: ("libonnxruntime_providers_cuda.so", ("libcudnn.so.9",)),
    PROVIDERS["tensorrt"]: ("libonnxruntime_providers_tensorrt.so", ()),
}
_TENSORRT = ("libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10")  # a library after those it needs


def preload(onnxruntime: Any, providers: Iterable[str]) -> None:
    """Open the libraries of pip's packages, which no loader path names, so that `providers` find them."""
    onnxruntime.preload_dlls()  # CUDA's and cuDNN's
    if PROVIDERS["tensorrt"] in providers:
        spec = importlib.util.find_spec("tensorrt_libs")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for name in _TENSORRT:
                with contextlib.suppress(OSError):  # `missing` names it
                    ctypes.CDLL(str(Path(folder) / name))


def find_missing(onnxruntime: Any, providers: Iterable[str]) -> str | None:
    """Return the first shared library that one of `providers` needs and that cannot be opened, or None."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    for library, opened_later in (_LIBRARIES[provider] for provider in providers if provider in _LIBRARIES):
        # Of a system that names its libraries otherwise nothing is known.
        if (path := folder / library).is_file():
            for each in (str(path), *opened_later):
                if (name := find_unopenable(each)) is not None:
                    return name
    return None


def find_unopenable(library: str) -> str | None:
    """Return the name of `library`, or else of the first library it needs, that the loader cannot open; None if all open."""
    try:
        ctypes.CDLL(library, mode=os.RTLD_LAZY)
    except OSError as error:
        match = re.match(r"(\S+): cannot open shared object file", str(error))
        return match[1] if match else None  # opened, and of another version
    return None


def remedy(library: str) -> str:
    """Return what to do about a missing library, for the middle of a line."""
    if library.startswith("libcuda.so"):
        return "install NVIDIA's driver"
    if library.startswith(("libnvinfer", "libnvonnxparser")):
        return f"install TensorRT 10: {install_remedy('cuda')}, then pip install 'tensorrt-cu13<11'"
    return install_remedy("cuda")
