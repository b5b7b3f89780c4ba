"""The Triton kernel of warp.py. Imported where Triton is installed and the device is CUDA. Its interpreter runs anywhere."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # output pixels per program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # fusing a product and a sum would round differently from torch


def warp_by_triton(pixels: Tensor, slots: Tensor, maps: Tensor) -> Tensor:
    """Warp in one kernel, with the bits of warp_by_torch."""
    size = pixels.shape[-1]
    out = torch.empty((len(slots), 1, size, size), dtype=torch.uint8, device=pixels.device)
    grid = (len(slots), triton.cdiv(size * size, _BLOCK))
    strides = (slots.stride(0), maps.stride(0))
    _warp[grid](pixels, slots, maps, out, *strides, size=size, block=_BLOCK, **OPTIONS)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _warp(pixels, slots, maps, out, slot_stride, map_stride, size: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    radiograph = tl.program_id(0)
    position = tl.program_id(1) * block + tl.arange(0, block)
    is_output = position < size * size
    y, x = (position // size).to(tl.float32), (position % size).to(tl.float32)
    slot = tl.load(slots + radiograph * slot_stride)
    values = maps + radiograph * map_stride
    a, b, c = tl.load(values), tl.load(values + 1), tl.load(values + 2)
    d, e, f = tl.load(values + 3), tl.load(values + 4), tl.load(values + 5)
    source_x = a * x + (b * y + c)
    source_y = d * x + (e * y + f)
    x0, y0 = tl.floor(source_x), tl.floor(source_y)
    share_x, share_y = source_x - x0, source_y - y0
    column, row = x0.to(tl.int32), y0.to(tl.int32)
    is_real = is_output & (position >= tl.where(slot < 0, size * size, 0))
    has_left, has_right = (column >= 0) & (column < size), (column >= -1) & (column < size - 1)
    has_top, has_bottom = is_real & (row >= 0) & (row < size), is_real & (row >= -1) & (row < size - 1)
    corner = pixels + slot.to(tl.int64) * (size * size) + row * size + column
    near = tl.load(corner, has_top & has_left, other=0).to(tl.float32)
    far = tl.load(corner + 1, has_top & has_right, other=0).to(tl.float32)
    upper = near + share_x * (far - near)
    near = tl.load(corner + size, has_bottom & has_left, other=0).to(tl.float32)
    far = tl.load(corner + size + 1, has_bottom & has_right, other=0).to(tl.float32)
    lower = near + share_x * (far - near)
    value = upper + share_y * (lower - upper)
    # Round half to even: from 2**23 on, float32 has integers only.
    rounded = (value + 12582912.0) - 12582912.0
    tl.store(out + radiograph.to(tl.int64) * (size * size) + position, rounded.to(tl.uint8), is_output)
