"""Decode and resize a radiograph. No other module does.

    path or file -> bytes -> format (file_kind.py) -> raster.py or dicom.py -> gray uint8 (H, W) -> (size, size)

The converter stores the result of `read`, and predict and the page call the same function, so that preprocessing cannot differ
between training and serving. The rules, in order:

- Size: a header of more than MAX_PIXELS or a file of more than MAX_BYTES is refused before it is decoded.
- Completeness: corrupt and truncated data is refused, never half decoded.
- Frames: the first frame of an animation; the first page of a TIFF that is neither a reduced copy nor a mask.
- EXIF orientation is applied. Color profiles and PNG gamma are ignored.
- Color to gray by ITU-R 601 (r = g = b = v gives v), palettes by their colors, transparency over black.
- Depths other than 8 unsigned bits: linear from the image's minimum..maximum to 0..255; a constant gives 0. 16-bit color in
  PNG, TIFF and JPEG 2000 is the exception: Pillow keeps the high bytes, linear from 0..65535.
- DICOM: modality LUT or rescale, then VOI LUT or the first usable window, of the data set or its single frame's functional
  groups. Without either, 8 bits are unchanged, and other depths are scaled from minimum to maximum outside the padding. The
  result is inverted by PresentationLUTShape, else by MONOCHROME1. Padding is black. One sample is always gray. A codestream's
  precision, sign and sample order take precedence. Unusable attributes are ignored and noted in `RadiographDetails.notes`. In
  scope are single-frame CR, DX, RG and secondary captures.
- Resize: bilinear, antialiased, without keeping the aspect ratio (MURA's paper).

Any other content raises UnreadableFileError with one of five codes, and no other exception. The code io_error is the fault of a
disk or machine: several attempts failed, but a later one may succeed.
"""

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from mura_dist.core import storage
from mura_dist.core.errors import UserError, is_io_fault, os_reason
from mura_dist.data import dicom, file_kind, raster
from mura_dist.data.dicom import DicomIdentity
from mura_dist.data.grayscale import MAX_BYTES, MAX_PIXELS, UnreadableFileError

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "DicomIdentity",
    "RadiographDetails",
    "Source",
    "UnreadableFileError",
    "decode",
    "read",
    "read_bytes",
    "read_details",
    "read_identity",
    "read_radiograph",
]

Source = Path | str | bytes | BinaryIO

HEADER_BYTES = 1 << 20  # `read_identity` parses these first; groups 0008 to 0020 usually open a DICOM


def read(source: Source, size: int) -> np.ndarray:
    """Read a radiograph, resized to uint8 (size, size). Raises UnreadableFileError and no other exception."""
    assert size > 0, size
    return np.asarray(_decode(source)[0].resize((size, size), Image.Resampling.BILINEAR))


def read_radiograph(source: Source, size: int = 320) -> np.ndarray:
    """Read a radiograph as training, prediction and the page do.

    Args:
        source: Path, or a binary file that can seek: PNG, JPEG, TIFF, JPEG 2000 or DICOM.
        size: Side of the result in pixels. The aspect ratio is not kept.

    Returns:
        (size, size) uint8.

    Raises:
        UserError: no readable radiograph, or a size below 1.
    """
    if size < 1:
        raise UserError(f"size={size}: must be at least 1. Give the pixels of a side, such as 320.")
    try:
        return read(source, size)
    except UnreadableFileError as error:
        name = source if isinstance(source, Path | str) else "the file"
        raise UserError(f"{name}: {error.reason}. Give a radiograph as PNG, JPEG, TIFF or DICOM.") from error


class RadiographDetails(NamedTuple):
    """A radiograph with details of its file.

    image: The result of `read`, uint8 (size, size).
    colors: Sparse sample of the file's colors, uint8 (n, n, 3), or None for a gray file.
    display: The radiograph with its aspect ratio, uint8 (h, w), or None unless requested.
    notes: DICOM attributes that were ignored or contradict each other, by keyword.
    """

    image: np.ndarray
    colors: np.ndarray | None
    display: np.ndarray | None
    notes: tuple[str, ...] = ()


def read_details(source: Source, size: int, max_display_px: int = 0) -> RadiographDetails:
    """Read a radiograph and details of its file, decoding it once.

    Args:
        source: Path, or a binary file that can seek.
        size: Side of `image` in pixels.
        max_display_px: Longest side of `display` in pixels. 0: no `display`.

    Raises:
        UnreadableFileError: The file contains no readable radiograph.
    """
    gray, colors, notes = _decode(source)
    image = np.asarray(gray.resize((size, size), Image.Resampling.BILINEAR))
    if not max_display_px:
        return RadiographDetails(image, colors, None, notes)
    gray.thumbnail((max_display_px, max_display_px), Image.Resampling.BOX)
    return RadiographDetails(image, colors, np.asarray(gray), notes)


def decode(source: Source) -> np.ndarray:
    """Read a radiograph in full size, uint8 (H, W). Raises UnreadableFileError and no other exception."""
    return np.asarray(_decode(source)[0])


def read_identity(source: Source) -> DicomIdentity | None:
    """Read study, body part and laterality of a DICOM's header. Return None for other and unreadable files."""
    _quieten()
    try:
        with open(source, "rb") if isinstance(source, Path | str | bytes) else contextlib.nullcontext(source) as file:
            file.seek(0)
            head = file.read(HEADER_BYTES)
            return dicom.read_identity(file, head) if _kind(head) == "DICOM" else None
    except Exception:  # `read` reports what is wrong with the file
        return None


def _decode(source: Source) -> tuple[Image.Image, np.ndarray | None, tuple[str, ...]]:
    """Return the radiograph in mode L, the color sample and the notes, as of RadiographDetails."""
    data = read_bytes(source)
    kind = _kind(data)
    _quieten()
    try:
        return dicom.decode(data) if kind == "DICOM" else (*raster.decode(data, kind), ())
    except UnreadableFileError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's limit, checked before MAX_PIXELS
        raise UnreadableFileError("too_large", f"its {kind} header has more than {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise UnreadableFileError("too_large", f"decoding this {kind} needs more memory than is available") from error
    except Exception as error:  # the libraries raise some twenty types, all of the same meaning
        raise UnreadableFileError(
            "unreadable", f"its {kind} data is corrupt, truncated or of an unsupported variant"
        ) from error


def _quieten() -> None:
    """Silence the libraries' warnings, which are raised anyway or harmless, and may quote patient data.

    They stay silent, because entering and leaving `catch_warnings` for each file is not thread-safe.
    """
    for library in ("PIL", "pydicom"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
        logger = logging.getLogger(library)
        if logger.level != logging.CRITICAL:
            logger.setLevel(logging.CRITICAL)


def read_bytes(source: Source) -> bytes:
    """Read a file's content. Raises UnreadableFileError and no other exception, with code io_error after several attempts."""
    try:
        return storage.with_retries(lambda: _read(source))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_io_fault(error):
            raise UnreadableFileError("io_error", f"cannot be read: {os_reason(error)}") from error
        why = getattr(error, "strerror", None) or "not a usable path"
        raise UnreadableFileError("unreadable", f"cannot be opened: {why.lower()}") from error
    except MemoryError as error:
        raise UnreadableFileError("too_large", "the file needs more memory than is available") from error


def _read(source: Source) -> bytes:
    if not isinstance(source, Path | str | bytes):
        return _read_file(source)
    if not os.path.isfile(source) and os.path.exists(source):  # opening a pipe would block
        raise UnreadableFileError("unreadable", "cannot be opened: not a regular file")
    with open(source, "rb") as file:
        return _read_file(file)


def _read_file(file: BinaryIO) -> bytes:
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        raise UnreadableFileError("too_large", f"the file is larger than {MAX_BYTES:,} bytes")
    file.seek(0)
    return file.read()


def _kind(data: bytes) -> str:
    """Return DICOM or the name of Pillow's reader. Raises UnreadableFileError for other formats."""
    return "DICOM" if dicom.is_dicom(data) else file_kind.pillow_reader(data)
