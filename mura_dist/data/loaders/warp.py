"""Gather, rotate and flip radiographs on their device, with the pixels of opencv.py.

    pixels (n, S, S) uint8, slots, inverse maps -> (B, 1, S, S) uint8

The arithmetic is that of OpenCV's warpAffine: source position in float32, two linear interpolations along x and one along y, 0
outside, rounded half to even. Where OpenCV fuses a product and a sum, one pixel in some thousand differs by 1. On CUDA it is a
Triton kernel (warp_triton.py), elsewhere and without Triton torch operations.
"""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_CPU_CHUNK = 1  # radiographs per torch operation on a CPU, so that temporaries fit its cache

Warp = Callable[[Tensor, Tensor, Tensor], Tensor]


def inverse_maps(angles: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    """Compute the affine map from output to source positions.

    Args:
        angles: (B,), degrees counter-clockwise about the center (size - 1) / 2.
        flips: bool (B,), left-right flips after the rotation.
        size: S in pixels.

    Returns:
        float32 (B, 6). The source position of output pixel (x, y) is (a x + b y + c, d x + e y + f).
    """
    center, radians = (size - 1) / 2, np.deg2rad(angles.astype(np.float64))
    sign, cos, sin = np.where(flips, -1.0, 1.0), np.cos(radians), np.sin(radians)
    maps = np.empty((len(angles), 6), np.float64)
    maps[:, 0], maps[:, 1] = sign * cos, -sin
    maps[:, 3], maps[:, 4] = sign * sin, cos
    maps[:, 2] = center - (maps[:, 0] + maps[:, 1]) * center
    maps[:, 5] = center - (maps[:, 3] + maps[:, 4]) * center
    return maps.astype(np.float32)


def select_warp(device: torch.device) -> Warp:
    """Return the warp function of a device.

    warp(pixels (n, S, S) uint8, slots (B,) int32, maps (B, 6) float32) returns (B, 1, S, S) uint8. A slot of -1 gives 0.
    """
    if device.type != "cuda" or triton_error():
        return warp_by_torch
    from mura_dist.data.loaders.warp_triton import warp_by_triton

    return warp_by_triton


@functools.cache
def triton_error() -> str:
    """Return why Triton cannot compile kernels for a GPU of this machine, or ""."""
    try:
        from mura_dist.data.loaders import warp_triton  # noqa: F401
    except ImportError as error:
        return str(error)
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, gcc or clang or CC"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Triton needs Python's headers, on Debian python3-dev"
    return ""


def warp_by_torch(pixels: Tensor, slots: Tensor, maps: Tensor) -> Tensor:
    """Warp with torch operations, none of which waits for a value on the device."""
    size = pixels.shape[-1]
    out = torch.empty((len(slots), 1, size, size), dtype=torch.uint8, device=pixels.device)
    step = _CPU_CHUNK if pixels.device.type == "cpu" else len(slots)
    for start in range(0, len(slots), step):
        chunk = slice(start, start + step)
        _warp_chunk(pixels, slots[chunk], maps[chunk], out[chunk, 0])
    return out


def _warp_chunk(pixels: Tensor, slots: Tensor, maps: Tensor, out: Tensor) -> None:
    size, padded_size = pixels.shape[-1], pixels.shape[-1] + 2
    sources = pixels.index_select(0, slots.clamp(min=0)) * (slots >= 0)[:, None, None]
    padded = functional.pad(sources, (1, 1, 1, 1))  # (B, S + 2, S + 2), 0 outside the radiograph
    axis = torch.arange(size, dtype=torch.float32, device=pixels.device)
    a, b, c, d, e, f = maps[:, :, None, None].unbind(1)  # (B, 1, 1) each
    source_x = a * axis + (b * axis[:, None] + c)  # (B, S, S)
    source_y = d * axis + (e * axis[:, None] + f)
    x0, y0 = source_x.floor(), source_y.floor()
    share_x, share_y = source_x.sub_(x0), source_y.sub_(y0)
    columns = [x0.add(step).clamp_(0, size + 1).int() for step in (1, 2)]
    rows = [y0.add(step).clamp_(0, size + 1).int().mul_(padded_size) for step in (1, 2)]
    rows = [row.add_(_starts(len(slots), padded_size, pixels.device)) for row in rows]
    upper, lower = (
        _interpolate(_gather(padded, row + columns[0]), _gather(padded, row + columns[1]), share_x) for row in rows
    )
    out.copy_(_interpolate(upper, lower, share_y).round_())


def _starts(count: int, padded_size: int, device: torch.device) -> Tensor:
    """Return the start of each of `count` padded radiographs in flat memory, int32 (count, 1, 1)."""
    return torch.arange(count, dtype=torch.int32, device=device)[:, None, None] * (padded_size * padded_size)


def _gather(values: Tensor, position: Tensor) -> Tensor:
    return values.view(-1).index_select(0, position.view(-1)).view(position.shape).float()


def _interpolate(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Interpolate: first + share (second - first), in the memory of `second`."""
    return second.sub_(first).mul_(share).add_(first)
