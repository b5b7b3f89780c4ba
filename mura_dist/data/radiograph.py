"""One file in, one gray picture out: the only code that decodes and resizes a radiograph.

    path or file -> bytes -> what it is (file_kind.py) -> raster.py or dicom.py -> gray uint8 (H, W) -> (size, size)

The converter stores what `read` gives; predict and the page call the very same function: nothing can drift between
training and serving. The rules, in the order in which they apply:

- size: a header that promises more than MAX_PIXELS, or a file of more than MAX_BYTES, is refused before it is decoded;
- whole or not at all: damaged and cut-short data is refused, never half decoded;
- first frame of an animation, first page of a TIFF that is neither a reduced copy nor a mask; EXIF orientation applied;
  color profiles and PNG gamma ignored;
- color to gray by ITU-R 601 (r = g = b = v gives v), palettes by their colors, transparency over black;
- other than 8 unsigned bits: linear from the picture's own minimum..maximum to 0..255, nothing saturates, a constant gives 0
  (16-bit color in PNG, TIFF and JPEG 2000 is the exception: Pillow keeps the high bytes, linear from 0..65535);
- DICOM: modality LUT or rescale, then VOI LUT or the first window that can be used, the data set's or, of one frame, the
  functional groups'; where there is neither, 8 bits as they are and other depths from minimum to maximum of what is not
  padding; inverted by PresentationLUTShape, else by MONOCHROME1; padding black. One sample is gray whatever it is called; of
  a codestream its own precision, sign and order of samples hold. What cannot be used is ignored and noted in `RadiographDetails.notes`.
  In scope are single-frame CR, DX, RG and secondary captures;
- resize: bilinear, antialiased, aspect ratio not kept (MURA's paper).

A file that is none of this raises UnreadableFileError with one of five codes; nothing else comes out, whatever the bytes. One of them,
io_error, is the disk's or the machine's fault: several attempts failed, and a later one may not.
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

HEADER_BYTES = 1 << 20  # what `identity` looks at first: groups 0008 to 0020 open a DICOM, as a rule


def read(source: Source, size: int) -> np.ndarray:
    """The radiograph of a file, size x size: (size, size) uint8. Raises UnreadableFileError and nothing else."""
    assert size > 0, size
    return np.asarray(_gray(source).resize((size, size), Image.Resampling.BILINEAR))


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
        raise UserError(f"size={size}: must be at least 1. Give the pixels of a side, such as 320")
    try:
        return read(source, size)
    except UnreadableFileError as error:
        name = source if isinstance(source, Path | str) else "the file"
        raise UserError(f"{name}: {error.reason}. Give a radiograph as PNG, JPEG, TIFF or DICOM") from error


class RadiographDetails(NamedTuple):
    """A radiograph as the model sees it, and what only its file knows.

    image (size, size) uint8, what `read` gives; colors (n, n, 3) uint8, a sparse sample of the file's own, None of a gray one;
    display (h, w) uint8, the radiograph for a person, in its own proportions; None where nobody looks. notes: which attributes
    of a DICOM were ignored, or contradict another, by their keywords.
    """

    image: np.ndarray
    colors: np.ndarray | None
    display: np.ndarray | None
    notes: tuple[str, ...] = ()


def read_details(source: Source, size: int, longest: int = 0) -> RadiographDetails:
    """`read`, and more of the same decoding. longest: of `display`, in pixels, at most; 0: nobody looks. Raises UnreadableFileError."""
    gray, colors, notes = _decoded(source)
    image = np.asarray(gray.resize((size, size), Image.Resampling.BILINEAR))
    if not longest:
        return RadiographDetails(image, colors, None, notes)
    gray.thumbnail((longest, longest), Image.Resampling.BOX)
    return RadiographDetails(image, colors, np.asarray(gray), notes)


def decode(source: Source) -> np.ndarray:
    """The radiograph of a file as large as it is: (H, W) uint8. Raises UnreadableFileError and nothing else.

    `source` is a path, or a binary file that can seek; what the file is called says nothing about what it is.
    """
    return np.asarray(_gray(source))


def read_identity(source: Source) -> DicomIdentity | None:
    """Study, body part and laterality of a DICOM, from its header alone; None for any other file. Raises nothing."""
    _quieten()
    try:
        with open(source, "rb") if isinstance(source, Path | str | bytes) else contextlib.nullcontext(source) as file:
            file.seek(0)
            head = file.read(HEADER_BYTES)
            return dicom.read_identity(file, head) if _kind(head) == "DICOM" else None
    except Exception:  # whatever is wrong with the file, `read` says it better
        return None


def _gray(source: Source) -> Image.Image:
    return _decoded(source)[0]


def _decoded(source: Source) -> tuple[Image.Image, np.ndarray | None, tuple[str, ...]]:
    """The gray radiograph, a sample of the colors it had, and what of a DICOM's header was ignored."""
    data = read_bytes(source)
    kind = _kind(data)
    _quieten()
    try:
        return dicom.decode(data) if kind == "DICOM" else (*raster.decode(data, kind), ())
    except UnreadableFileError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, before ours
        raise UnreadableFileError("too_large", f"its {kind} header promises more than {MAX_PIXELS:,} pixels") from error
    except MemoryError as error:
        raise UnreadableFileError("too_large", f"this {kind} needs more memory than there is to decode") from error
    except Exception as error:  # the libraries raise some twenty kinds; to the reader they all say the same
        raise UnreadableFileError(
            "unreadable", f"its {kind} data is damaged, cut short or of an unsupported variant"
        ) from error


def _quieten() -> None:
    """What the libraries complain of is raised or harmless, and may quote a patient. By module, for good: entering
    and leaving `catch_warnings` around each file is not thread-safe."""
    for library in ("PIL", "pydicom"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")
        logger = logging.getLogger(library)
        if logger.level != logging.CRITICAL:
            logger.setLevel(logging.CRITICAL)


def read_bytes(source: Source) -> bytes:
    """Read a file whole. Raises UnreadableFileError and nothing else; io_error after several attempts."""
    try:
        return storage.with_retries(lambda: _read(source))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_io_fault(error):
            raise UnreadableFileError("io_error", f"cannot be read: {os_reason(error)}") from error
        why = getattr(error, "strerror", None) or "not a usable path"
        raise UnreadableFileError("unreadable", f"cannot be opened: {why.lower()}") from error
    except MemoryError as error:
        raise UnreadableFileError("too_large", "there is not enough memory to hold the file") from error


def _read(source: Source) -> bytes:
    if not isinstance(source, Path | str | bytes):
        return _all_of(source)
    if not os.path.isfile(source) and os.path.exists(source):  # opening a pipe would wait for ever
        raise UnreadableFileError("unreadable", "cannot be opened: not a regular file")
    with open(source, "rb") as file:
        return _all_of(file)


def _all_of(file: BinaryIO) -> bytes:
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        raise UnreadableFileError("too_large", f"the file is larger than {MAX_BYTES:,} bytes")
    file.seek(0)
    return file.read()


def _kind(data: bytes) -> str:
    """ "DICOM", or the name of Pillow's reader. Raises UnreadableFileError for what neither should try."""
    return "DICOM" if dicom.is_dicom(data) else file_kind.pillow_reader(data)
