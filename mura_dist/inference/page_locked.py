"""Page-locked memory, which a GPU copies from by itself and at full speed.

    shape -> cudaHostAlloc -> uint8 array -> its last view goes -> cudaFreeHost

CUDA allocates the pages itself. Pages of NumPy's that CUDA only locks (cudaHostRegister) could be freed while they are locked:
what NumPy then puts at the same address would be copied from the old pages, without an error.
"""

import contextlib
import ctypes
import math
import weakref
from typing import Any

import numpy as np


def cuda_runtime() -> ctypes.CDLL | None:
    """Return the CUDA runtime that ONNX Runtime has loaded, or None where there is none."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def allocate(shape: tuple[int, ...], runtime: Any, device: int) -> np.ndarray:
    """Allocate a uint8 array of `shape` in page-locked memory, which is freed when no view of it is left.

    Args:
        runtime: the CUDA runtime's functions, or None.
        device: the GPU in whose context they are called, lest another one's memory is taken.

    Returns:
        The array, not initialized; of plain memory, which is only slower, where there is no runtime or it refuses.
    """
    num_bytes = math.prod(shape)
    if runtime is None:
        return np.empty(shape, np.uint8)
    address = ctypes.c_void_p()
    runtime.cudaSetDevice(ctypes.c_int(device))
    if runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(0)) or not address.value:
        runtime.cudaGetLastError()  # forgets the error, which the next call of anybody would otherwise report as its own
        return np.empty(shape, np.uint8)
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address.value)  # what all views of the array hold
    release = weakref.finalize(buffer, _free, runtime, address.value, device)
    release.atexit = False  # the end of the process frees it too
    return np.ctypeslib.as_array(buffer).reshape(shape)


def _free(runtime: Any, address: int, device: int) -> None:
    runtime.cudaSetDevice(ctypes.c_int(device))  # of the thread that dropped the last view
    runtime.cudaFreeHost(ctypes.c_void_p(address))
