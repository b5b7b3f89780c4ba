"""page_locked: memory that CUDA allocates is freed once, when its last view goes; where CUDA refuses, plain memory serves."""

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
def test_memory_is_freed_once_and_only_when_its_last_view_goes() -> None:
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
def test_each_range_is_freed_once_when_addresses_return() -> None:
    """As when a dozen models come and go; libc gives the same pages again, NumPy's arrays in between take them too."""
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
def test_the_thread_that_drops_it_frees_it_on_its_own_gpu() -> None:
    runtime = Runtime()
    arrays = [page_locked.allocate(SHAPE, runtime, 3)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    assert [name for name, _ in runtime.calls] == ["device", "allocate", "device", "free"]
    assert runtime.of("device") == [("device", 3)] * 2


def test_where_cuda_refuses_plain_memory_serves_and_the_error_is_forgotten() -> None:
    runtime = Runtime(error=2)  # cudaErrorMemoryAllocation
    array = page_locked.allocate(SHAPE, runtime, 0)
    assert (array.shape, array.dtype) == (SHAPE, np.uint8)
    del array
    gc.collect()
    assert runtime.calls == [("device", 0), ("refused", 0), ("forget", 2)]


def test_without_a_runtime_plain_memory_serves() -> None:
    assert page_locked.allocate(SHAPE, None, 0).shape == SHAPE


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU here")
def test_the_real_runtime_without_a_gpu_refuses_and_plain_memory_serves() -> None:
    from mura_dist.inference.engine_onnxruntime import import_onnxruntime
    from mura_dist.inference.provider_libraries import preload

    preload(import_onnxruntime(), [])
    if (runtime := page_locked.cuda_runtime()) is None:
        pytest.skip("no CUDA runtime is installed")
    array = page_locked.allocate(SHAPE, runtime, 0)
    array[...] = 7
    assert (array == 7).all()
    assert array.base is None  # NumPy's own
