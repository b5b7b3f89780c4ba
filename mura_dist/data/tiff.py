"""Open the radiograph of a TIFF, and read its samples as its tags describe them.

    bytes -> directories of tags -> the page of the image proper -> Pillow's image -> samples

Pillow always opens the first page. It reads int8 and uint32 as uint8 and int32, leaves compressed samples of a big-endian file
in the wrong byte order, and misreads some separate planes. Variants that it would read wrongly are refused by name.
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from mura_dist.data.grayscale import UnreadableFileError

MAX_PAGES = 100  # searched for the image: a chain of pages may be as long as the file
MAX_TAGS = 4096  # per page
MAX_VALUES = 64  # per tag

SUBFILE_KIND, OLD_SUBFILE_KIND, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
FILL_ORDER, NUM_SAMPLES, PLANES, SUB_PAGES, SAMPLE_FORMAT = 266, 277, 284, 330, 339
_TAGS = {SUBFILE_KIND, OLD_SUBFILE_KIND, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC}
_TAGS |= {FILL_ORDER, NUM_SAMPLES, PLANES, SUB_PAGES, SAMPLE_FORMAT}
_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # BYTE, SHORT, LONG, IFD, LONG8, IFD8
_REDUCED_OR_MASK, _OLD_REDUCED = 1 | 4, 2
_UNCOMPRESSED, _SEPARATE, _GRAY_KINDS, _WHITE_IS_ZERO = 1, 2, (0, 1), 0
_UNSIGNED, _SIGNED, _FLOATING = 1, 2, 3
_FORMAT_NAMES = {_UNSIGNED: "unsigned integers", _SIGNED: "signed integers", _FLOATING: "floating-point numbers"}


class Page(NamedTuple):
    """A directory at `start`: for each tag of `_TAGS` its first value, offset and type code; offsets of its sub-pages."""

    start: int
    values: dict[int, int]
    offsets: dict[int, tuple[int, str]]
    sub_pages: tuple[int, ...]

    @property
    def rank(self) -> tuple[bool, int]:
        """Sort key: the image proper above reduced copies and masks, then by area."""
        reduced = self.values.get(SUBFILE_KIND, 0) & _REDUCED_OR_MASK
        reduced |= self.values.get(OLD_SUBFILE_KIND, 1) == _OLD_REDUCED
        return not reduced, self.values.get(WIDTH, 0) * self.values.get(HEIGHT, 0)


def open_picture(data: bytes) -> Image.Image:
    """Open the first page that is the image proper, or the largest where all are reduced. Pixels are not decoded yet.

    Raises:
        UnreadableFileError: Pillow does not read this kind of sample correctly.
        Exception: The file is corrupt.
    """
    order, big = "<" if data.startswith(b"II") else ">", 43 in data[2:4]
    pages = list(_walk(data, order, big))
    page = max(pages, key=lambda page: page.rank)
    gray, separate = page.values.get(NUM_SAMPLES, 1) == 1, page.values.get(PLANES) == _SEPARATE
    plain = page.values.get(BITS, 1) == 8 and page.values.get(FILL_ORDER, 1) == 1
    if separate and not gray and not plain and page.values.get(COMPRESSION, 1) == _UNCOMPRESSED:
        raise UnreadableFileError("out_of_scope", "a TIFF of deep colors in separate planes; save it in gray")
    changed = bytearray(data) if page is not pages[0] or (separate and gray) else data
    if isinstance(changed, bytearray):
        struct.pack_into(order + ("Q" if big else "I"), changed, 8 if big else 4, page.start)
        if separate and gray:  # one sample has the same layout either way, but Pillow misreads it
            offset, kind = page.offsets[PLANES]
            struct.pack_into(order + kind, changed, offset, 1)
    try:
        image: Any = Image.open(io.BytesIO(changed), formats=("TIFF",))
    except UnidentifiedImageError:
        _refuse_by_name(page, order, big)
        raise
    if image.mode in ("I", "F"):
        image.tile = [_in_native_order(tile) for tile in image.tile]
    return image


def samples(image: Any) -> np.ndarray | None:
    """Return the samples of a gray page in their dtype, (H, W), or None for colors and up to 8 unsigned bits."""
    tags = image.tag_v2
    kind, bits = tags.get(SAMPLE_FORMAT, (_UNSIGNED,))[0], tags.get(BITS, (1,))[0]
    if image.mode[0] in "IF":
        return np.asarray(image).view(np.uint32) if (kind, bits) == (_UNSIGNED, 32) else np.asarray(image)
    return np.asarray(image).view(np.int8) if (kind, bits) == (_SIGNED, 8) else None


def is_white_zero(image: Any) -> bool:
    """Return whether 0 means white. Pillow inverts 8 bits only."""
    return image.tag_v2.get(PHOTOMETRIC) == _WHITE_IS_ZERO


def _refuse_by_name(page: Page, order: str, big: bool) -> None:
    """Raise UnreadableFileError for a valid page that Pillow has no reader for."""
    if big and order == ">":
        raise UnreadableFileError("out_of_scope", "a big-endian BigTIFF is not read; save it as a TIFF of under 4 GB")
    kind, bits, fill = (page.values.get(tag, 1) for tag in (SAMPLE_FORMAT, BITS, FILL_ORDER))
    photometric = page.values.get(PHOTOMETRIC)
    key = (b"II" if order == "<" else b"MM", photometric, (kind,), fill, (bits,), ())
    gray = page.values.get(NUM_SAMPLES, 1) == 1 and photometric in _GRAY_KINDS
    if gray and kind in _FORMAT_NAMES and key not in TiffImagePlugin.OPEN_INFO:
        inverse = ", 0 for white," if photometric == _WHITE_IS_ZERO else ""
        reason = (
            f"a TIFF of {bits}-bit {_FORMAT_NAMES[kind]}{inverse} is not read; save it with 8 or 16 bits, 0 for black"
        )
        raise UnreadableFileError("out_of_scope", reason)


def _in_native_order(tile: Any) -> Any:
    """Correct a tile's byte order: libtiff returns native samples, but Pillow swaps all except uint16."""
    if tile[0] != "libtiff":
        return tile
    mode, *arguments = tile[3]
    return tile._replace(args=(mode.replace("B", "N"), *arguments))


def _walk(data: bytes, order: str, big: bool) -> Iterator[Page]:
    """Yield the directories in order, each before its sub-pages, up to the first of an image proper.

    Raises:
        struct.error: A directory is truncated.
        UnreadableFileError: None of the first MAX_PAGES is the image proper.
    """
    pending = [struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]]
    visited: set[int] = set()
    while pending:
        if len(visited) == MAX_PAGES:
            raise UnreadableFileError(
                "out_of_scope", f"a TIFF whose first {MAX_PAGES} pages are reduced copies or masks"
            )
        start = pending.pop(0)
        if start in visited:  # a cycle
            continue
        visited.add(start)
        page, following = _directory(data, start, order, big)
        yield page
        if page.rank[0]:
            return
        pending = [*page.sub_pages, *([following] if following else []), *pending]


def _directory(data: bytes, start: int, order: str, big: bool) -> tuple[Page, int]:
    """Return the directory at an offset, and the offset of the next one, 0 after the last."""
    count_format, offset_format = (order + "Q", order + "Q") if big else (order + "H", order + "I")
    width = struct.calcsize(offset_format)
    (num_tags,) = struct.unpack_from(count_format, data, start)
    if num_tags > MAX_TAGS:
        raise struct.error(f"{num_tags} tags in a page, at most {MAX_TAGS} are read")
    page, position = Page(start, {}, {}, ()), start + struct.calcsize(count_format)
    for _ in range(num_tags):
        tag, kind = struct.unpack_from(order + "HH", data, position)
        (count,) = struct.unpack_from(offset_format, data, position + 4)
        position += 4 + width
        if tag in _TAGS and kind in _TYPES and count:
            inline = count * struct.calcsize(order + _TYPES[kind]) <= width
            offset = position if inline else struct.unpack_from(offset_format, data, position)[0]
            values = struct.unpack_from(f"{order}{min(count, MAX_VALUES)}{_TYPES[kind]}", data, offset)
            page.values[tag], page.offsets[tag] = values[0], (offset, _TYPES[kind])
            if tag == SUB_PAGES:
                page = page._replace(sub_pages=values)
        position += width
    return page, struct.unpack_from(offset_format, data, position)[0]
