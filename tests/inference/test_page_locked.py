"""Test page-locked memory: CUDA frees it once, with its last view, and plain memory is used where CUDA refuses."""

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.cuda_runtime import Runtime

from mura_dist.inference import page_locked

SHAPE = (3, 1, 4, 5)


needs_libc = pytest.mark.skipif(sys.platform == "win32", reason="libc is loaded by no name")


@needs_libc
def test_memory_is_freed_once_with_its_last_view() -> None:
    runtime = Runtime()
    array = page_locked.allocate(SHAPE, runtime, 2)
    array[...] = np.arange(60, dtype=np.uint8).reshape(SHAPE)
    view = array[1:]
    address = array.ctypes.data
    del array
    gc.collect()
    assert runtime.calls == [("device", 2), ("allocate", address)]
    np.testing.assert_array_equal(view.ravel(), np.arange(20, 60))
    del view
    gc.collect()
    assert runtime.calls[2:] == [("device", 2), ("free", address)]


@needs_libc
def test_reused_addresses_are_freed_once_each() -> None:
    """libc returns the same pages for several models, and NumPy's arrays use them in between."""
    runtime, references = Runtime(), []
    for number in range(1, 13):
        array = page_locked.allocate((number, *SHAPE[1:]), runtime, 0)
        array[...] = number
        references.append(np.full((number, *SHAPE[1:]), 255, np.uint8))
        assert (array == number).all()
        del array
    gc.collect()
    calls = runtime.of("allocate", "free")
    assert [name for name, _ in calls] == ["allocate", "free"] * 12
    assert [address for name, address in calls if name == "allocate"] == [
        address for name, address in calls if name == "free"
    ]


@needs_libc
def test_memory_is_freed_on_its_gpu_from_any_thread() -> None:
    runtime = Runtime()
    arrays = [page_locked.allocate(SHAPE, runtime, 3)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert [name for name, _ in runtime.calls] == ["device", "allocate", "device", "free"]
    assert runtime.of("device") == [("device", 3)] * 2


def test_failed_cuda_allocation_uses_plain_memory_and_clears_the_error() -> None:
    runtime = Runtime(error=2)  # cudaErrorMemoryAllocation
    array = page_locked.allocate(SHAPE, runtime, 0)
    assert (array.shape, array.dtype) == (SHAPE, np.uint8)
    del array
    gc.collect()
    assert runtime.calls == [("device", 0), ("refused", 0), ("forget", 2)]


def test_missing_cuda_runtime_uses_plain_memory() -> None:
    assert page_locked.allocate(SHAPE, None, 0).shape == SHAPE


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_cuda_runtime_without_gpu_uses_plain_memory() -> None:
    from mura_dist.inference.engine_onnxruntime import import_onnxruntime
    from mura_dist.inference.provider_libraries import preload

    preload(import_onnxruntime(), [])
    if (runtime := page_locked.cuda_runtime()) is None:
        pytest.skip("no CUDA runtime is installed")
    array = page_locked.allocate(SHAPE, runtime, 0)
    array[...] = 7
    assert (array == 7).all()
    assert array.base is None  # allocated by NumPy
