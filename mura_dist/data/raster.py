"""Decode the formats that Pillow reads: PNG, JPEG, JPEG 2000, TIFF.

    bytes, Pillow's format name -> gray image (L), color sample or None

Corrupt data raises UnreadableFileError or one of Pillow's many exceptions.
"""

import contextlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from mura_dist.data import tiff
from mura_dist.data.grayscale import UnreadableFileError, check_size, find_extent, map_blocks, sample_colors, scale

_PNG_KIND, _PNG_GRAY_ALPHA_16, _PNG_RGBA_8 = slice(24, 26), b"\x10\4", b"\x08\6"  # bit depth and color type
_UPRIGHT_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_UPRIGHT = dict(enumerate((Image.Transpose[name] for name in _UPRIGHT_NAMES.split()), start=2))  # by EXIF orientation
_EXIF_ORIENTATION = 0x0112

_stderr_lock = threading.Lock()


def decode(data: bytes, kind: str) -> tuple[Image.Image, np.ndarray | None]:
    """Decode a file's content with Pillow's reader `kind`.

    Returns:
        The radiograph in mode L, upright; a sample of its colors, uint8 (n, n, 3), or None for gray files.
    """
    as_rgba = kind == "PNG" and data[_PNG_KIND] == _PNG_GRAY_ALPHA_16
    image: Image.Image
    if kind == "TIFF":
        image = tiff.open_picture(data)
    else:
        image = Image.open(io.BytesIO(_relabel_as_rgba(data) if as_rgba else data), formats=(kind,))
    check_size(*image.size)
    if kind == "PNG":
        _check_png(data)
    with _silence_stderr() if kind == "TIFF" else contextlib.nullcontext():
        image.load()
    orientation = _orientation(image)
    deep = tiff.samples(image) if kind == "TIFF" else np.asarray(image) if image.mode[0] in "IF" else None
    if as_rgba:
        gray = _from_relabeled(image)
    elif deep is not None:
        gray = _from_deep(deep, image.info.get("transparency"), inverse=kind == "TIFF" and tiff.is_white_zero(image))
    else:
        gray = _from_shallow(image)
    colors = None if as_rgba or deep is not None else sample_colors(image)
    return (gray.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else gray), colors


def _relabel_as_rgba(data: bytes) -> bytes:
    """Relabel a PNG of 16-bit gray with alpha as 8-bit RGBA, which has the same bytes.

    Pillow would drop the low bytes, so that 12-bit gray would become black.
    """
    header = data[12:24] + _PNG_RGBA_8 + data[26:29]
    checksum = zlib.crc32(data[12:29]) ^ int.from_bytes(data[29:33], "big")  # nonzero: a wrong checksum stays wrong
    return data[:12] + header + (zlib.crc32(header) ^ checksum).to_bytes(4, "big") + data[33:]


def _from_relabeled(image: Image.Image) -> Image.Image:
    """Convert an image of _relabel_as_rgba to gray: red and green are the bytes of gray, blue and alpha those of alpha."""
    samples = np.asarray(image).view(">u2")  # (H, W, 2)
    values, alpha = samples[..., 0], samples[..., 1]
    gray, mask = scale(values, *find_extent(values)), map_blocks(lambda block: np.rint(block / 257), alpha)
    return Image.composite(Image.fromarray(gray), Image.new("L", image.size), Image.fromarray(mask))


def _check_png(data: bytes) -> None:
    """Check the checksums of pixel data, which Pillow skips: a file half of zeros would come out half decoded."""
    offset, view = 8, memoryview(data)
    while offset + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        end = offset + 8 + length
        if name == b"IDAT":
            checksum = zlib.crc32(view[offset + 4 : end]).to_bytes(4, "big")
            if checksum != data[end : end + 4]:
                raise UnreadableFileError("unreadable", "its PNG data is corrupt or truncated")
        offset = len(data) if name == b"IEND" else end + 4


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # corrupt EXIF does not affect the pixels
        return 1


def _from_shallow(image: Image.Image) -> Image.Image:
    """Convert an image of up to 8 bits per sample to gray, transparency over black."""
    if not image.has_transparency_data:
        return image.convert("L")
    colors = image.convert("RGBA")
    return Image.composite(colors.convert("L"), Image.new("L", image.size), colors.getchannel("A"))


def _from_deep(values: np.ndarray, key: object, *, inverse: bool) -> Image.Image:
    """Scale values of other depths, which `convert("L")` would clip at 255. `key` is the transparent value, if any."""
    gray = scale(values, *find_extent(values))  # (H, W) uint8
    if inverse:
        gray = 255 - gray
    if isinstance(key, int):
        gray[values == key] = 0
    return Image.fromarray(gray)


@contextlib.contextmanager
def _silence_stderr() -> Iterator[None]:
    """Redirect file descriptor 2, to which libtiff writes its errors although they are raised."""
    with _stderr_lock, open(os.devnull, "wb") as null:
        try:
            saved = os.dup(2)
        except OSError:  # there is no stderr
            yield
            return
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
