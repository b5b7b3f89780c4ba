"""Page-locked memory, from which a GPU copies asynchronously and at full speed.

    shape -> cudaHostAlloc -> uint8 array -> its last view is deleted -> cudaFreeHost

CUDA allocates the pages. NumPy's own pages, locked by cudaHostRegister, could be freed while they are locked. A new array at the
same address would then be copied from the old pages, without an error.
"""

import contextlib
import ctypes
import math
import weakref
from typing import Any

import numpy as np


def cuda_runtime() -> ctypes.CDLL | None:
    """Return the CUDA runtime that ONNX Runtime loaded, or None."""
    for name in ("libcudart.so.13", "libcudart.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def allocate(shape: tuple[int, ...], runtime: Any, device: int) -> np.ndarray:
    """Allocate an uninitialized uint8 array in page-locked memory, which is freed with its last view.

    Args:
        shape: Shape of the array.
        runtime: The CUDA runtime's functions. None, or a failed allocation, returns plain memory, which is slower to copy.
        device: GPU whose context allocates. Otherwise memory of another GPU would be used.
    """
    num_bytes = math.prod(shape)
    if runtime is None:
        return np.empty(shape, np.uint8)
    address = ctypes.c_void_p()
    runtime.cudaSetDevice(ctypes.c_int(device))
    if runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(num_bytes), ctypes.c_uint(0)) or not address.value:
        runtime.cudaGetLastError()  # clear the error, which a later call would report as its own
        return np.empty(shape, np.uint8)
    buffer = (ctypes.c_uint8 * num_bytes).from_address(address.value)  # every view of the array refers to it
    release = weakref.finalize(buffer, _free, runtime, address.value, device)
    release.atexit = False  # the exit of the process frees it too
    return np.ctypeslib.as_array(buffer).reshape(shape)


def _free(runtime: Any, address: int, device: int) -> None:
    runtime.cudaSetDevice(ctypes.c_int(device))  # for the thread that deleted the last view
    runtime.cudaFreeHost(ctypes.c_void_p(address))
