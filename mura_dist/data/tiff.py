"""Open the radiograph of a TIFF, and read its samples as the tags mean them.

    bytes -> directories of tags -> the page that is the picture itself -> Pillow's image of it -> its samples

Pillow opens the first page, whatever it is. It takes int8 and uint32 for uint8 and int32, leaves compressed samples of a
big-endian file in the wrong byte order, and decodes some separate planes as another kind of sample. What it cannot read rightly
is refused by name.
"""

import io
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from mura_dist.data.grayscale import UnreadableFileError

MAX_PAGES = 100  # read in search of the picture: a chain of pages may be as long as the file
MAX_TAGS = 4096  # of a page, likewise
MAX_VALUES = 64  # of a tag

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
    """A directory: where it stands; by tag the first value, the offset and the type of what `_TAGS` names; its sub-pages."""

    start: int
    values: dict[int, int]
    places: dict[int, tuple[int, str]]
    sub_pages: tuple[int, ...]

    @property
    def rank(self) -> tuple[bool, int]:
        """The picture itself before reduced copies and masks; a large copy before a small one."""
        reduced = self.values.get(SUBFILE_KIND, 0) & _REDUCED_OR_MASK
        reduced |= self.values.get(OLD_SUBFILE_KIND, 1) == _OLD_REDUCED
        return not reduced, self.values.get(WIDTH, 0) * self.values.get(HEIGHT, 0)


def open_picture(data: bytes) -> Image.Image:
    """Open the first page that is the picture itself; where all are reduced, the largest. Nothing is decoded yet.

    Raises:
        UnreadableFileError: its samples are of a kind that Pillow does not read rightly.
        Exception: one of many, where the file is broken.
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
        if separate and gray:  # a single plane is what it would be anyway, but not to Pillow
            offset, kind = page.places[PLANES]
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
    """Return the numbers of a gray page, (H, W) of their own dtype; None of colors and of up to 8 unsigned bits."""
    tags = image.tag_v2
    kind, bits = tags.get(SAMPLE_FORMAT, (_UNSIGNED,))[0], tags.get(BITS, (1,))[0]
    if image.mode[0] in "IF":
        return np.asarray(image).view(np.uint32) if (kind, bits) == (_UNSIGNED, 32) else np.asarray(image)
    return np.asarray(image).view(np.int8) if (kind, bits) == (_SIGNED, 8) else None


def is_white_zero(image: Any) -> bool:
    """Return whether the smallest number means white. Pillow inverts 8 bits itself, and no others."""
    return image.tag_v2.get(PHOTOMETRIC) == _WHITE_IS_ZERO


def _refuse_by_name(page: Page, order: str, big: bool) -> None:
    """Raise UnreadableFileError for a page whose tags are valid and of a kind that Pillow has no reader for."""
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
    """libtiff gives samples in the machine's byte order; Pillow knows that of uint16 alone, and swaps the others."""
    if tile[0] != "libtiff":
        return tile
    mode, *others = tile[3]
    return tile._replace(args=(mode.replace("B", "N"), *others))


def _walk(data: bytes, order: str, big: bool) -> Iterator[Page]:
    """Yield the directories in their order, each before its own sub-pages, up to the first that is the picture.

    Raises struct.error where one is cut short, UnreadableFileError where the picture is not among the first MAX_PAGES.
    """
    waiting = [struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]]
    seen: set[int] = set()
    while waiting:
        if len(seen) == MAX_PAGES:
            raise UnreadableFileError(
                "out_of_scope", f"a TIFF whose first {MAX_PAGES} pages are reduced copies or masks"
            )
        start = waiting.pop(0)
        if start in seen:  # a ring
            continue
        seen.add(start)
        page, following = _directory(data, start, order, big)
        yield page
        if page.rank[0]:
            return
        waiting = [*page.sub_pages, *([following] if following else []), *waiting]


def _directory(data: bytes, start: int, order: str, big: bool) -> tuple[Page, int]:
    """(the directory at an offset, the offset of the next; 0 where there is none)."""
    count_format, offset_format = (order + "Q", order + "Q") if big else (order + "H", order + "I")
    width = struct.calcsize(offset_format)
    (num_tags,) = struct.unpack_from(count_format, data, start)
    if num_tags > MAX_TAGS:
        raise struct.error(f"{num_tags} tags, more than a page has")
    page, position = Page(start, {}, {}, ()), start + struct.calcsize(count_format)
    for _ in range(num_tags):
        tag, kind = struct.unpack_from(order + "HH", data, position)
        (count,) = struct.unpack_from(offset_format, data, position + 4)
        position += 4 + width
        if tag in _TAGS and kind in _TYPES and count:
            inline = count * struct.calcsize(order + _TYPES[kind]) <= width
            offset = position if inline else struct.unpack_from(offset_format, data, position)[0]
            values = struct.unpack_from(f"{order}{min(count, MAX_VALUES)}{_TYPES[kind]}", data, offset)
            page.values[tag], page.places[tag] = values[0], (offset, _TYPES[kind])
            if tag == SUB_PAGES:
                page = page._replace(sub_pages=values)
        position += width
    return page, struct.unpack_from(offset_format, data, position)[0]
