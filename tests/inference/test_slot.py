"""Test GpuBatch: every run has one shape, which callers do not see. A session on the CPU stands in for a GPU's."""

import gc
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.cuda_runtime import Runtime
from helpers.models import S, noise

from mura_dist.inference import page_locked
from mura_dist.inference.engine import OUTPUTS
from mura_dist.inference.engine_onnxruntime import GpuBatch, import_onnxruntime
from mura_dist.inference.onnx_model import OnnxModel

B = 4


class RecordingSession:
    """An ONNX Runtime session that records the batch sizes of its runs."""

    def __init__(self, path: Path) -> None:
        self.session = import_onnxruntime().InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        self.shapes: list[tuple[int, ...]] = []
        self.io_binding = self.session.io_binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.session.run_with_iobinding(binding, options)
        self.shapes += [tuple(binding.get_outputs()[0].shape())]


@pytest.fixture
def session(model: Path) -> RecordingSession:
    return RecordingSession(model)


def gpu_batch_of(session: RecordingSession, host: np.ndarray | None = None) -> GpuBatch:
    host = np.full((B, 1, S, S), 255, np.uint8) if host is None else host
    return GpuBatch(import_onnxruntime(), session, host, ("cpu", 0))


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 8, 9])
def test_batches_of_any_size_run_in_one_shape(session: RecordingSession, model: Path, number: int) -> None:
    images = noise(number)
    logit, activation_map = gpu_batch_of(session).run(images, OUTPUTS)
    assert session.shapes == [(B,)] * max(1, -(-number // B))
    for actual, expected in zip((logit, activation_map), OnnxModel.load(model).outputs(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_unused_rows_are_zero_after_a_larger_batch(session: RecordingSession, model: Path) -> None:
    gpu_batch, images = gpu_batch_of(session), noise(9)
    gpu_batch.run(images[:B], OUTPUTS)
    assert gpu_batch.host.any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(
        gpu_batch.run(images[B : B + 1], OUTPUTS[:1])[0], OnnxModel.load(model).logits(images[B : B + 1])
    )
    assert not gpu_batch.host[1:].any()  # no pixels of another patient's radiograph remain


def test_image_of_wrong_size_raises_value_error(session: RecordingSession) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        gpu_batch_of(session).run(noise(2, size=S + 1), OUTPUTS)


@pytest.mark.skipif(sys.platform == "win32", reason="libc is loaded by no name")
def test_host_memory_is_freed_once_with_its_gpu_batch(session: RecordingSession) -> None:
    """Autotune loads a dozen models, one after another."""
    runtime = Runtime()
    for _ in range(3):
        gpu_batch = gpu_batch_of(session, page_locked.allocate((B, 1, S, S), runtime, 0))
        outputs = gpu_batch.run(noise(6), OUTPUTS)
        del gpu_batch
        gc.collect()
        assert np.isfinite(outputs[0]).all()
    assert [name for name, _ in runtime.of("allocate", "free")] == ["allocate", "free"] * 3
