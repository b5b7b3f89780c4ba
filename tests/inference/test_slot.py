"""engine_onnxruntime.Slot: every run has one shape, callers see none of it. A session on the CPU stands where a GPU's would."""

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


class Session:
    """A real session, and the shapes of `image` that it ran."""

    def __init__(self, path: Path) -> None:
        self.session = import_onnxruntime().InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        self.shapes: list[tuple[int, ...]] = []
        self.io_binding = self.session.io_binding

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.session.run_with_iobinding(binding, options)
        self.shapes += [tuple(binding.get_outputs()[0].shape())]


@pytest.fixture
def session(model: Path) -> Session:
    return Session(model)


def slot_of(session: Session, host: np.ndarray | None = None) -> GpuBatch:
    host = np.full((B, 1, S, S), 255, np.uint8) if host is None else host
    return GpuBatch(import_onnxruntime(), session, host, ("cpu", 0))


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 8, 9])
def test_batches_of_any_size_run_in_one_shape_with_the_same_outputs(session: Session, model: Path, number: int) -> None:
    images = noise(number)
    logit, activation_map = slot_of(session).run(images, OUTPUTS)
    assert session.shapes == [(B,)] * max(1, -(-number // B))
    for actual, expected in zip((logit, activation_map), OnnxModel.load(model).outputs(images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_what_a_batch_left_does_not_reach_the_next(session: Session, model: Path) -> None:
    slot, images = slot_of(session), noise(9)
    slot.run(images[:B], OUTPUTS)
    assert slot.host.any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(
        slot.run(images[B : B + 1], OUTPUTS[:1])[0], OnnxModel.load(model).logits(images[B : B + 1])
    )
    assert not slot.host[1:].any()  # zeros, of which none can be one of another patient's radiographs


def test_an_image_of_another_size_is_an_error(session: Session) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        slot_of(session).run(noise(2, size=S + 1), OUTPUTS)


@pytest.mark.skipif(sys.platform == "win32", reason="libc is loaded by no name")
def test_memory_of_a_slot_is_freed_once_with_it(session: Session) -> None:
    """A model that goes takes its slots with it, as when an autotune tries a dozen."""
    runtime = Runtime()
    for _ in range(3):
        slot = slot_of(session, page_locked.allocate((B, 1, S, S), runtime, 0))
        outputs = slot.run(noise(6), OUTPUTS)
        del slot
        gc.collect()
        assert np.isfinite(outputs[0]).all()
    assert [name for name, _ in runtime.of("allocate", "free")] == ["allocate", "free"] * 3
