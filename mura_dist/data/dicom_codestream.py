"""Read the headers of a compressed image before a decoder allocates memory for it.

    PixelData -> join_fragments -> codestream -> read_codestream -> Codestream: size, samples, precision, sign, color transform

The codestream takes precedence over the DICOM header (PS3.5, 8.2), which describes the image before compression.
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
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xDE, 0xF7} - {0xC4, 0xC8, 0xCC}  # JPEG, hierarchical JPEG, JPEG-LS


class Codestream(NamedTuple):
    """Geometry and sample format of a compressed image.

    `precision` is the bits per sample. `signed` is False for JPEG and JPEG-LS, which cannot express it. `transforms_color`
    tells whether decoders return RGB. It is None where only the DICOM header knows (JPEG, JPEG-LS).
    """

    width: int
    height: int
    samples: int
    precision: int
    signed: bool = False
    transforms_color: bool | None = None


def join_fragments(pixel_data: bytes) -> bytes:
    """Join the fragments of a single-frame image.

    The offset table in front of them is only checked for further frames.

    Raises:
        UnreadableFileError: The pixel data is corrupt, or has several frames.
    """
    view, starts, fragments, offset = memoryview(pixel_data), set(), [], 0
    while offset + 8 <= len(view):
        tag, length = struct.unpack_from("<II", view, offset)
        if tag == _DELIMITER:
            break
        if tag != _ITEM or offset + 8 + length > len(view):
            raise UnreadableFileError("unreadable", "its DICOM pixel data is corrupt or truncated")
        starts.add(offset)
        fragments.append(view[offset + 8 : offset + 8 + length])
        offset += 8 + length
    table, *images = fragments or [memoryview(b"")]
    first = 8 + len(table)
    offsets = {first + offset for (offset,) in struct.iter_unpack("<I", table[: len(table) // 4 * 4])}
    if len(offsets) > 1 and images and offsets <= starts:
        raise UnreadableFileError("out_of_scope", "a DICOM of several frames")
    return b"".join(images or [table])


def read_codestream(frame: bytes) -> Codestream:
    """Read the headers of a JPEG, JPEG-LS or JPEG 2000.

    Raises:
        UnreadableFileError: There is no header, or headers contradict each other.
    """
    streams = set(_jpeg2000(frame) if _SIZ in frame else _jpeg(frame))
    if len(streams) != 1:
        raise UnreadableFileError("unreadable", "the image in its DICOM has several sizes, or none")
    return streams.pop()


def _jpeg2000(frame: bytes) -> Iterator[Codestream]:
    """Yield the content of every image and tile size segment."""
    for start in (match.start() for match in re.finditer(re.escape(_SIZ), frame)):
        length, _, x1, y1, x0, y0 = struct.unpack_from(">HHIIII", frame, start + 4)
        samples, depth = struct.unpack_from(">HB", frame, start + 40)
        transform = _transforms_color(frame, start + 4 + length)
        yield Codestream(x1 - x0, y1 - y0, samples, (depth & 0x7F) + 1, depth > 0x7F, transform)


def _transforms_color(frame: bytes, offset: int) -> bool:
    """Return whether the main header, from the segment at `offset` on, has a color transform."""
    while offset + 9 <= len(frame) and frame[offset] == 0xFF and frame[offset + 1] != _TILE:
        if frame[offset + 1] == _COD:
            return frame[offset + 8] == 1
        offset += 2 + struct.unpack_from(">H", frame, offset + 2)[0]
    return False


def _jpeg(frame: bytes) -> Iterator[Codestream]:
    """Yield the content of every frame header before the first scan, of JPEG and JPEG-LS."""
    offset = 2
    while frame[offset + 1] != _SCAN:
        if frame[offset + 1] in _FRAME_HEADERS:
            precision, height, width, samples = struct.unpack_from(">BHHB", frame, offset + 4)
            yield Codestream(width, height, samples, precision)
        offset += 1 if frame[offset + 1] == 0xFF else 2 + struct.unpack_from(">H", frame, offset + 2)[0]
