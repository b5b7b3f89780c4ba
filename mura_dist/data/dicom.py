"""Decode a DICOM, and read its study, body part and laterality.

    bytes -> dicom_header.parse -> in scope? -> dicom_pixels: stored values -> dicom_transform: display values
        -> gray image (L), color sample or None, notes
    file -> dicom_identity -> DicomIdentity

Only dicom_header and dicom_pixels import pydicom, inside functions, so that a folder of PNG never loads it.
"""

import io

import numpy as np
from PIL import Image

from mura_dist.data import dicom_header
from mura_dist.data.dicom_header import Header, is_dicom
from mura_dist.data.dicom_identity import DicomIdentity, read_identity
from mura_dist.data.dicom_pixels import PALETTE, Pixels, read_pixels
from mura_dist.data.dicom_transform import to_display
from mura_dist.data.grayscale import UnreadableFileError, check_size, find_extent, map_blocks, sample_colors, scale

__all__ = ["DicomIdentity", "decode", "is_dicom", "read_identity"]

_FOR_PROCESSING = "1.2.840.10008.5.1.4.1.1.1.1.1"
_MODALITIES = ("CR", "DX", "RG", "OT", "SC")
_NONSTANDARD_DX = ("DR", "XR")  # accepted where the SOP class agrees
_SOP_CLASSES = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.7")  # CR, DX, SC
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_BY_LETTERS = {"".join(name.replace("_", " ").split()): name for name in (*_MONOCHROME, *_COLORS, PALETTE)}


def decode(data: bytes) -> tuple[Image.Image, np.ndarray | None, tuple[str, ...]]:
    """Decode a DICOM file's content.

    Returns:
        The radiograph in mode L; a sample of its colors, uint8 (n, n, 3), or None for gray files; notes on ignored attributes.

    Raises:
        UnreadableFileError: The file is out of scope or cannot be decoded. Decoders may raise other exceptions.
    """
    header = dicom_header.parse(io.BytesIO(data))
    _check_scope(header)
    width, height, samples = (header.require(keyword) for keyword in ("Columns", "Rows", "SamplesPerPixel"))
    check_size(width, height)
    if samples not in (1, 3):
        raise UnreadableFileError("unreadable", f"it has {samples} samples per pixel, neither gray nor color")
    photometric = _photometric(header, samples)
    pixels = read_pixels(header, (height, width, samples), photometric)
    if photometric in _MONOCHROME:
        return Image.fromarray(_from_monochrome(pixels, header, photometric)), None, tuple(header.notes)
    return *_from_color(pixels.values), tuple(header.notes)


def _check_scope(header: Header) -> None:
    dataset = header.dataset
    modality = dicom_header.get_label(dataset, "Modality")
    sop_class = dicom_header.get_label(header.meta, "MediaStorageSOPClassUID") or dicom_header.get_label(
        dataset, "SOPClassUID"
    )
    if not (modality or sop_class) or ("Rows" not in dataset and sop_class in _SOP_CLASSES):
        raise UnreadableFileError("unreadable", "its DICOM header is corrupt or truncated")
    if modality not in _MODALITIES and (modality not in ("", *_NONSTANDARD_DX) or sop_class not in _SOP_CLASSES):
        raise UnreadableFileError("out_of_scope", "its DICOM modality is none of CR, DX, RG or a secondary capture")
    if "Rows" not in dataset:
        raise UnreadableFileError("out_of_scope", "a DICOM without an image, a report for instance")
    if (dicom_header.get_integer(dataset, "NumberOfFrames") or 1) > 1:
        raise UnreadableFileError("out_of_scope", "a DICOM of several frames")
    if sop_class == _FOR_PROCESSING or dicom_header.get_label(dataset, "PresentationIntentType") == "FOR PROCESSING":
        raise UnreadableFileError(
            "out_of_scope", "raw detector data 'for processing'; send the image 'for presentation'"
        )


def _photometric(header: Header, samples: int) -> str:
    """Return the photometric interpretation in the standard's spelling. One sample is always gray.

    Raises:
        UnreadableFileError: The attribute fits no number of samples.
    """
    label = dicom_header.get_label(header.dataset, "PhotometricInterpretation")
    name = _BY_LETTERS.get(label.replace(" ", ""), label)
    if samples == 3 and name in _COLORS:
        return name
    if samples == 1 and name in (*_MONOCHROME, PALETTE):
        return name
    if samples == 3 or not name or name.startswith("MONOCHROME"):
        raise UnreadableFileError(
            "unreadable", "PhotometricInterpretation of its DICOM header does not say what its samples are"
        )
    header.ignore("PhotometricInterpretation")
    return "MONOCHROME2"


def _from_monochrome(pixels: Pixels, header: Header, photometric: str) -> np.ndarray:
    """Map stored values of up to 16 bits to gray, uint8 (H, W), by a table of all values between the extremes."""
    stored, padding, domain = pixels
    first, last = int(stored.min()), int(stored.max())
    if last - first > 0xFFFF:
        raise UnreadableFileError("unreadable", "its DICOM pixels are not gray integers of up to 16 bits")
    image = stored if padding is None else stored[~padding]
    span = slice(int(image.min()) - first, int(image.max()) - first + 1)
    table = to_display(np.arange(first, last + 1), span, domain, header)  # (V,) uint8
    if _is_inverted(photometric, header):
        table = 255 - table
    index = np.int32 if stored.dtype.itemsize < 4 else np.int64
    gray = map_blocks(lambda block: table[np.subtract(block, first, dtype=index)], stored)
    if padding is not None:
        gray[padding] = 0
    return gray


def _is_inverted(photometric: str, header: Header) -> bool:
    """Return whether small values are white.

    PresentationLUTShape describes the output (PS3.3, C.8.11.3), so it takes precedence. In a valid file both attributes agree.
    """
    inverted = photometric == "MONOCHROME1"
    shape = dicom_header.get_label(header.dataset, "PresentationLUTShape")
    if shape in ("IDENTITY", "INVERSE"):
        if inverted != (shape == "INVERSE"):
            header.note("PresentationLUTShape contradicts PhotometricInterpretation and is followed")
        return shape == "INVERSE"
    if "PresentationLUTShape" in header.dataset:
        header.ignore("PresentationLUTShape")
    return inverted


def _from_color(values: np.ndarray) -> tuple[Image.Image, np.ndarray | None]:
    if values.dtype == np.uint8:
        color = Image.fromarray(values[..., :3])
        return color.convert("L"), sample_colors(color)
    luma = np.zeros(values.shape[:2], np.float32)  # (H, W)
    for channel, weight in enumerate((0.299, 0.587, 0.114)):
        luma += np.multiply(values[..., channel], weight, dtype=np.float32)
    return Image.fromarray(scale(luma, *find_extent(luma))), None
