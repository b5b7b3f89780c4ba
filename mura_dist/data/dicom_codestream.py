"""Read what a compressed picture says of itself, before any decoder allocates memory for it.

    PixelData -> join_fragments -> codestream -> read_codestream -> Codestream: size, samples, precision, sign, color transform

What it says holds against the DICOM header (PS3.5, 8.2): the header's labels are of the picture before it was compressed.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from mura_dist.data.grayscale import UnreadableFileError

_ITEM, _DELIMITER = 0xE000FFFE, 0xE0DDFFFE
_SIZ = b"\xff\x4f\xff\x51"  # JPEG 2000: start of codestream, image and tile size
_COD, _TILE = 0x52, 0x90  # JPEG 2000: coding style, start of tile
_SCAN = 0xDA
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xDE, 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG, its hierarchical kind, JPEG-LS


class Codestream(NamedTuple):
    """precision: bits of a sample; signed: samples are, which JPEG and JPEG-LS cannot say.

    transforms_color: decoders give RGB; None: the stream does not say, the DICOM header does (JPEG, JPEG-LS).
    """

    width: int
    height: int
    samples: int
    precision: int
    signed: bool = False
    transforms_color: bool | None = None


def join_fragments(pixel_data: bytes) -> bytes:
    """Join the fragments of a picture of one frame. Raises UnreadableFileError where they are of several.

    The table of offsets before them is for finding frames: of one frame, whatever it says is of no use.
    """
    view, starts, fragments, offset = memoryview(pixel_data), set(), [], 0
    while offset + 8 <= len(view):
        tag, length = struct.unpack_from("<II", view, offset)
        if tag == _DELIMITER:
            break
        if tag != _ITEM or offset + 8 + length > len(view):
            raise UnreadableFileError("unreadable", "its DICOM pixel data is damaged or cut short")
        starts.add(offset)
        fragments.append(view[offset + 8 : offset + 8 + length])
        offset += 8 + length
    table, *pictures = fragments or [memoryview(b"")]
    first = 8 + len(table)
    offsets = {first + offset for (offset,) in struct.iter_unpack("<I", table[: len(table) // 4 * 4])}
    if len(offsets) > 1 and pictures and offsets <= starts:
        raise UnreadableFileError("out_of_scope", "a DICOM of several frames")
    return b"".join(pictures or [table])


def read_codestream(frame: bytes) -> Codestream:
    """Read the headers of a JPEG, JPEG-LS or JPEG 2000. Raises UnreadableFileError where they contradict each other."""
    streams = set(_jpeg2000(frame) if _SIZ in frame else _jpeg(frame))
    if len(streams) != 1:
        raise UnreadableFileError("unreadable", "the image in its DICOM says several sizes, or none")
    return streams.pop()


def _jpeg2000(frame: bytes) -> Iterator[Codestream]:
    """Yield what every image and tile size segment says."""
    for start in (match.start() for match in re.finditer(re.escape(_SIZ), frame)):
        length, _, right, bottom, left, top = struct.unpack_from(">HHIIII", frame, start + 4)
        samples, depth = struct.unpack_from(">HB", frame, start + 40)
        transform = _transforms_color(frame, start + 4 + length)
        yield Codestream(right - left, bottom - top, samples, (depth & 0x7F) + 1, depth > 0x7F, transform)


def _transforms_color(frame: bytes, offset: int) -> bool:
    """Return whether the main header, from its segment at `offset` on, says that components are transformed."""
    while offset + 9 <= len(frame) and frame[offset] == 0xFF and frame[offset + 1] != _TILE:
        if frame[offset + 1] == _COD:
            return frame[offset + 8] == 1
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    return False


def _jpeg(frame: bytes) -> Iterator[Codestream]:
    """Yield what every frame header says before the first scan, JPEG and JPEG-LS."""
    offset = 2
    while frame[offset + 1] != _SCAN:
        if frame[offset + 1] in _FRAME_HEADERS:
            precision, height, width, samples = struct.unpack_from(">BHHB", frame, offset + 4)
            yield Codestream(width, height, samples, precision)
        offset += 1 if frame[offset + 1] == 0xFF else 2 + struct.unpack_from(">H", frame, offset + 2)[0]
