"""warp.py and its Triton kernel: OpenCV's pixels, and one another's to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import NO_GPU

from mura_dist.data.loaders import opencv
from mura_dist.data.loaders.warp import inverse_maps, warp_by_torch

ANGLES = np.array([0, 0, 90, -90, 180, -180, 45, 30, -30, 12.3456, -7.77, 0.001, 179.5], np.float32)
FLIPS = np.arange(len(ANGLES)) % 2 == 1


def random_radiographs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random radiographs uint8 (5, S, S), the hardest to agree on; a slot for each of ANGLES, int32."""
    rng = np.random.default_rng(size)
    slots = rng.integers(0, 5, len(ANGLES)).astype(np.int32)
    return rng.integers(0, 256, (5, size, size), dtype=np.uint8), slots


def by_torch(pixels: np.ndarray, slots: np.ndarray, angles: np.ndarray, flips: np.ndarray) -> np.ndarray:
    maps = inverse_maps(angles, flips, pixels.shape[-1])
    warped = warp_by_torch(*map(torch.from_numpy, (pixels, slots, maps)))
    assert warped.shape == (len(slots), 1, *pixels.shape[1:])
    assert warped.dtype == torch.uint8
    return warped[:, 0].numpy()


@pytest.mark.parametrize("size", [2, 17, 64, 97, 320])
def test_the_pixels_are_opencvs(size: int) -> None:
    """Within one gray level everywhere, edges and fill included; equal but for one in 2,000: OpenCV fuses multiply and add."""
    pixels, slots = random_radiographs(size)
    expected = np.empty((len(ANGLES), size, size), np.uint8)
    for number, slot in enumerate(slots):
        opencv.augment(pixels[slot], float(ANGLES[number]), bool(FLIPS[number]), expected[number])
    difference = np.abs(by_torch(pixels, slots, ANGLES, FLIPS).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.9995


def test_quarter_turns_and_flips_move_pixels_unchanged() -> None:
    pixels, _ = random_radiographs(33)
    angles, flips = np.array([0, 0, 90, 180, 90], np.float32), np.array([0, 1, 0, 0, 1], bool)
    actual = by_torch(pixels, np.arange(5, dtype=np.int32), angles, flips)
    expected = [
        pixels[0],
        pixels[1][:, ::-1],
        np.rot90(pixels[2]),
        np.rot90(pixels[3], 2),
        np.rot90(pixels[4])[:, ::-1],
    ]
    np.testing.assert_array_equal(actual, expected)


def test_a_slot_of_minus_one_is_black() -> None:
    pixels, slots = np.full((2, 9, 9), 255, np.uint8), np.array([0, -1, 1], np.int32)
    actual = by_torch(pixels, slots, np.zeros(3, np.float32), np.zeros(3, bool))
    assert [image.max() for image in actual] == [255, 0, 255]


HALVES = np.array([[1, 0, 0.5, 0, 1, 0]], np.float32)  # each pixel and its right neighbor, half of both


def test_halves_are_rounded_to_even_as_opencv_does() -> None:
    pixels = np.array([[[0, 1, 2, 5], [255, 254, 253, 1], [7, 8, 3, 4], [0, 0, 0, 0]]], np.uint8)
    warped = warp_by_torch(*map(torch.from_numpy, (pixels, np.zeros(1, np.int32), HALVES)))
    assert warped[0, 0].tolist() == [[0, 2, 4, 2], [254, 254, 127, 0], [8, 6, 4, 2], [0, 0, 0, 0]]


INTERPRETED = """
import sys, numpy as np, torch
from mura_dist.data.loaders.warp import inverse_maps, warp_by_torch
from mura_dist.data.loaders.warp_triton import warp_by_triton
with np.load(sys.argv[1]) as saved:
    for size in saved["sizes"]:
        pixels, slots = saved[f"pixels{size}"], saved[f"slots{size}"]
        packed = np.empty((len(slots), 7), np.float32)  # as resident.py sends them: views with strides
        packed.view(np.int32)[:, 0] = slots
        packed[:, 1:] = inverse_maps(saved["angles"], saved["flips"], int(size))
        packed[-1, 1:] = saved["halves"]
        on_device = torch.from_numpy(packed)
        arguments = torch.from_numpy(pixels), on_device.view(torch.int32)[:, 0], on_device[:, 1:]
        triton, plain = warp_by_triton(*arguments), warp_by_torch(*arguments)
        assert triton.any(), "the interpreter ran"
        assert torch.equal(triton, plain), (size, (triton != plain).sum())
"""


def test_the_triton_kernel_gives_the_same_bits(tmp_path: Path) -> None:
    """Run by Triton's interpreter on the CPU, which an environment variable turns on at import."""
    arrays: dict[str, np.ndarray] = {"angles": ANGLES, "flips": FLIPS, "halves": HALVES, "sizes": np.array([9, 33, 40])}
    for size in arrays["sizes"].tolist():
        arrays[f"pixels{size}"], slots = random_radiographs(size)
        arrays[f"slots{size}"] = np.where(np.arange(len(slots)) == 4, -1, slots).astype(np.int32)
    np.savez(tmp_path / "arrays.npz", **arrays)
    command = [sys.executable, "-c", INTERPRETED, str(tmp_path / "arrays.npz")]
    environment = {**os.environ, **NO_GPU, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_the_triton_kernel_compiles_for_gpus_without_fused_products(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the machine code of an A100 and an H100, which needs none of them; a fused product would be rounded otherwise."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mura_dist.data.loaders import warp_triton

    signature = {"pixels": "*u8", "slots": "*i32", "maps": "*fp32", "out": "*u8"}
    signature |= {"slot_stride": "i32", "map_stride": "i32", "size": "constexpr", "block": "constexpr"}
    source = ASTSource(fn=warp_triton._warp, signature=signature, constexprs={"size": 320, "block": warp_triton._BLOCK})
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warp_triton.OPTIONS)
    assert len(kernel.asm["cubin"]) > 1000
    assert "mul.rn.f32" in kernel.asm["ptx"]
    assert "fma." not in kernel.asm["ptx"]
