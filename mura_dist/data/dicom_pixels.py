"""Decode the pixels of a single-frame DICOM into stored values.

    Header -> words as allocated, or of a codestream -> dicom_values: values, padding -> RGB unless gray -> Pixels

Size, precision and sign of a codestream take precedence. The header's bits, sign and order describe uncompressed data.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from mura_dist.data import dicom_header, dicom_values
from mura_dist.data.dicom_codestream import Codestream, join_fragments, read_codestream
from mura_dist.data.dicom_header import Header
from mura_dist.data.grayscale import UnreadableFileError

_RLE = "1.2.840.10008.1.2.5"
PALETTE = "PALETTE COLOR"
_YBR = ("YBR_FULL", "YBR_FULL_422")  # converted to RGB here; decoders convert the color transforms of JPEG 2000


# Unsigned words (H, W) or (H, W, 3) with the bits of signed values; photometric interpretation; the codestream, if any.
_Decoded = tuple[np.ndarray, str, Codestream | None]


class Pixels(NamedTuple):
    """Stored values of an image.

    values: Integers, (H, W) gray or (H, W, 3) RGB.
    padding: bool (H, W), True outside the image, or None where there is no padding.
    domain: Smallest and largest value that could be stored.
    """

    values: np.ndarray
    padding: np.ndarray | None
    domain: tuple[int, int]


def read_pixels(header: Header, shape: tuple[int, int, int], photometric: str) -> Pixels:
    """Decode the pixels.

    Args:
        header: Header with the PixelData.
        shape: Rows, columns and samples of the header.
        photometric: Photometric interpretation of the header.

    Raises:
        UnreadableFileError: Header and pixel data do not fit. Decoders may raise other exceptions.
    """
    bits, signed = header.require("BitsStored"), header.require("PixelRepresentation")
    if not 1 <= bits <= header.require("BitsAllocated"):
        raise UnreadableFileError("unreadable", "BitsStored of its DICOM header is not between 1 and BitsAllocated")
    if signed not in (0, 1):
        raise UnreadableFileError("unreadable", "PixelRepresentation of its DICOM header is neither 0 nor 1")
    decode = _decode_compressed if header.syntax.is_encapsulated else _decode_plain
    stored_words, photometric, stream = decode(header, _decoder(header.syntax), shape, photometric)
    if stream is None:
        layout = dicom_values.find_layout(header, stored_words, bits, signed)
    else:
        layout = dicom_values.find_stream_layout(header, stored_words, stream, bits, signed)
    padding = dicom_values.find_padding(header, layout) if shape[2] == 1 else None
    mask = padding.find(stored_words) if padding is not None and padding.of_words else None
    values = dicom_values.extract(stored_words, layout)
    if padding is not None:
        mask = dicom_values.check_padding(header, padding.find(values) if mask is None else mask)
    if stream and stream.transforms_color is False and photometric in _YBR and not _is_ybr(values):
        header.ignore("PhotometricInterpretation")
        photometric = "RGB"
    return Pixels(_to_rgb(values, photometric, header), mask, layout.domain)


def _decode_compressed(header: Header, decoder: Any, shape: tuple[int, int, int], photometric: str) -> _Decoded:
    """Decode compressed data. Only RLE, which compresses words, uses the header's BitsAllocated."""
    frame = join_fragments(header.dataset["PixelData"].value)
    options: dict[str, Any] = {"photometric_interpretation": photometric}
    if header.syntax == _RLE:
        stream = None
        options["bits_allocated"] = header.require("BitsAllocated")
    else:
        stream = read_codestream(frame)
        if (stream.height, stream.width, stream.samples) != shape:
            raise UnreadableFileError("unreadable", "its DICOM header and the image inside differ in size")
        options["bits_allocated"] = 8 if stream.precision <= 8 else 16 if stream.precision <= 16 else 32
        if stream.samples == 3 and stream.transforms_color:
            options["photometric_interpretation"] = "RGB"
    data = _encapsulate(frame)
    del frame  # it may be as large as the file
    return *_decode(decoder, data, shape, options), stream


def _decode_plain(header: Header, decoder: Any, shape: tuple[int, int, int], photometric: str) -> _Decoded:
    """Decode uncompressed data."""
    data, allocated = header.dataset["PixelData"], header.require("BitsAllocated")
    if data.is_undefined_length:
        raise UnreadableFileError(
            "unreadable", "its DICOM pixels are compressed, but TransferSyntaxUID names no compression"
        )
    if (
        photometric == "YBR_FULL_422" and len(data.value) >= math.prod(shape) * allocated // 8
    ):  # the label says two thirds
        photometric = "YBR_FULL"
    options = {"photometric_interpretation": photometric, "bits_allocated": allocated, "pixel_vr": data.VR}
    options["planar_configuration"] = _planar(header, shape[2])
    return *_decode(decoder, data.value, shape, options), None


def _decoder(syntax: Any) -> Any:
    """Return pydicom's decoder for one fixed plugin, so that lossy pixels do not depend on installed packages."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # video, JPEG XL, JPIP, private and retired syntaxes
        decoder = None
    if decoder is None or (syntax.is_encapsulated and "pylibjpeg" not in decoder.available_plugins):
        raise UnreadableFileError(
            "out_of_scope", "a DICOM with an unsupported compression; store it uncompressed or as JPEG 2000"
        )
    return decoder


def _decode(decoder: Any, data: bytes, shape: tuple[int, int, int], options: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Return words with all allocated bits, and their photometric interpretation."""
    sizes = dict(zip(("rows", "columns", "samples_per_pixel"), shape, strict=True)) | {"number_of_frames": 1}
    plain = {"pixel_keyword": "PixelData", "pixel_representation": 0, "planar_configuration": 0}
    plain |= {"apply_j2k_sign_correction": False, "apply_jls_sign_correction": False}
    plugin = "pylibjpeg" if decoder.is_encapsulated else ""
    options = sizes | plain | {"bits_stored": options["bits_allocated"]} | options
    stored_words, properties = decoder.as_array(data, raw=True, decoding_plugin=plugin, **options)
    if stored_words.ndim != 2 + (shape[2] > 1):
        raise UnreadableFileError("unreadable", "its DICOM header names one frame, but its PixelData has more")
    return stored_words, str(properties["photometric_interpretation"])


def _encapsulate(frame: bytes) -> bytes:
    from pydicom.encaps import encapsulate

    return encapsulate([frame], has_bot=False)


def _planar(header: Header, samples: int) -> int:
    """Return the planar configuration, by pixel (0) unless the header has 1."""
    planar = dicom_header.get_integer(header.dataset, "PlanarConfiguration")
    if samples > 1 and planar not in (None, 0, 1):
        header.ignore("PlanarConfiguration")
    return int(planar == 1)


def _is_ybr(values: np.ndarray) -> bool:
    """Return whether untransformed colors, uint8 (H, W, 3), are YBR as labeled, or RGB, which is more frequent.

    Radiographs are gray: in YBR the chroma is near 128, in RGB all channels are nearly equal.

    Raises:
        UnreadableFileError: Neither fits.
    """
    first, chroma = values[..., :1].astype(np.int16), values[..., 1:].astype(np.int16)
    from_ybr, from_rgb = (float(np.abs(chroma - neutral).mean()) for neutral in (128, first))
    if max(from_ybr, from_rgb) < 2 * min(from_ybr, from_rgb):
        raise UnreadableFileError(
            "unreadable", "PhotometricInterpretation of its DICOM header and its JPEG 2000 contradict each other"
        )
    return from_ybr <= from_rgb


def _to_rgb(values: np.ndarray, photometric: str, header: Header) -> np.ndarray:
    """Convert palette values (H, W) and YBR values (H, W, 3) to RGB (H, W, 3). Return others unchanged."""
    from pydicom.pixels import apply_color_lut, convert_color_space

    if photometric == PALETTE:
        return apply_color_lut(values, header.dataset)
    if photometric not in _YBR:
        return values
    if values.dtype != np.uint8:
        raise UnreadableFileError(
            "unreadable", "PhotometricInterpretation of its DICOM header is for 8 bits, its pixels have more"
        )
    return convert_color_space(values, "YBR_FULL", "RGB")
