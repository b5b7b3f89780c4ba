"""Decode what Pillow reads: PNG, JPEG, JPEG 2000, TIFF.

    bytes, Pillow's name of their format -> gray image (L), a sample of its colors or None

What is broken raises one of Pillow's many exceptions, or UnreadableFileError.
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
    """Return the gray radiograph, upright, and a sample of the colors it had. `kind`: the name of Pillow's reader."""
    disguised = kind == "PNG" and data[_PNG_KIND] == _PNG_GRAY_ALPHA_16
    image: Image.Image
    if kind == "TIFF":
        image = tiff.open_picture(data)
    else:
        image = Image.open(io.BytesIO(_disguised(data) if disguised else data), formats=(kind,))
    check_size(*image.size)
    if kind == "PNG":
        _check_png(data)
    with _hushed() if kind == "TIFF" else contextlib.nullcontext():
        image.load()
    orientation = _orientation(image)
    deep = tiff.samples(image) if kind == "TIFF" else np.asarray(image) if image.mode[0] in "IF" else None
    if disguised:
        gray = _from_disguised(image)
    elif deep is not None:
        gray = _from_deep(deep, image.info.get("transparency"), inverse=kind == "TIFF" and tiff.is_white_zero(image))
    else:
        gray = _from_shallow(image)
    colors = None if disguised or deep is not None else sample_colors(image)
    return (gray.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else gray), colors


def _disguised(data: bytes) -> bytes:
    """Of 16-bit gray with alpha in a PNG Pillow keeps the high bytes alone: 12 bits of gray would come out black. To the
    format two samples of 16 bits are four of 8, byte for byte: given out as RGBA, all of them come through."""
    header = data[12:24] + _PNG_RGBA_8 + data[26:29]
    checksum = zlib.crc32(data[12:29]) ^ int.from_bytes(data[29:33], "big")  # not 0: wrong before, wrong after
    return data[:12] + header + (zlib.crc32(header) ^ checksum).to_bytes(4, "big") + data[33:]


def _from_disguised(image: Image.Image) -> Image.Image:
    """Red and green are the gray's bytes, blue and alpha the alpha's."""
    samples = np.asarray(image).view(">u2")  # (H, W, 2)
    values, alpha = samples[..., 0], samples[..., 1]
    gray, shown = scale(values, *find_extent(values)), map_blocks(lambda block: np.rint(block / 257), alpha)
    return Image.composite(Image.fromarray(gray), Image.new("L", image.size), Image.fromarray(shown))


def _check_png(data: bytes) -> None:
    """Pillow skips the checksums of pixel data: a file half of zeros would come out half decoded."""
    place, view = 8, memoryview(data)
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if name == b"IDAT":
            checksum = zlib.crc32(view[place + 4 : end]).to_bytes(4, "big")
            if checksum != data[end : end + 4]:
                raise UnreadableFileError("unreadable", "its PNG data is damaged or cut short")
        place = len(data) if name == b"IEND" else end + 4


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # broken EXIF does not break the picture beside it
        return 1


def _from_shallow(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits a sample or fewer."""
    if not image.has_transparency_data:
        return image.convert("L")
    colors = image.convert("RGBA")
    return Image.composite(colors.convert("L"), Image.new("L", image.size), colors.getchannel("A"))


def _from_deep(values: np.ndarray, key: object, *, inverse: bool) -> Image.Image:
    """Any other number of bits; `convert("L")` would clip them at 255. `key`: the value that is transparent, if any."""
    gray = scale(values, *find_extent(values))  # (H, W) uint8
    if inverse:
        gray = 255 - gray
    if isinstance(key, int):
        gray[values == key] = 0
    return Image.fromarray(gray)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """libtiff writes its complaints to file descriptor 2 itself; what it complains of is raised anyway."""
    with _stderr_lock, open(os.devnull, "wb") as nothing:
        try:
            kept = os.dup(2)
        except OSError:  # no stderr, nothing to hush
            yield
            return
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
