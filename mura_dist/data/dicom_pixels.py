"""Decode the pixels of a DICOM of one frame into the values that its header means.

    Header -> words, as allocated, or what a codestream holds -> dicom_values: values, padding -> RGB, if not gray -> Pixels

A codestream's own size, precision and sign hold; bits, sign and order of the header are of data that are not compressed.
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
_YBR = ("YBR_FULL", "YBR_FULL_422")  # what has to become RGB; decoders do it for the color transforms of JPEG 2000


# Unsigned words (H, W) or (H, W, 3), signed values being their bits; what their colors are; the codestream, if there is one.
_Decoded = tuple[np.ndarray, str, Codestream | None]


class Pixels(NamedTuple):
    """Stored values.

    values: (H, W) gray, or (H, W, 3) RGB, integers; padding: (H, W) bool, True where no image is, None where it is everywhere.
    domain: the smallest and the largest value that could be stored.
    """

    values: np.ndarray
    padding: np.ndarray | None
    domain: tuple[int, int]


def read_pixels(header: Header, shape: tuple[int, int, int], photometric: str) -> Pixels:
    """Decode the pixels; shape: rows, columns, samples as the header says. Raises UnreadableFileError, or whatever a decoder does."""
    bits, signed = header.require("BitsStored"), header.require("PixelRepresentation")
    if not 1 <= bits <= header.require("BitsAllocated"):
        raise UnreadableFileError("unreadable", "BitsStored of its DICOM header is none of 1 to BitsAllocated")
    if signed not in (0, 1):
        raise UnreadableFileError("unreadable", "PixelRepresentation of its DICOM header is neither 0 nor 1")
    decode = _decode_compressed if header.syntax.is_encapsulated else _decode_plain
    words, photometric, stream = decode(header, _decoder(header.syntax), shape, photometric)
    if stream is None:
        layout = dicom_values.find_layout(header, words, bits, signed)
    else:
        layout = dicom_values.find_stream_layout(header, words, stream, bits, signed)
    padding = dicom_values.find_padding(header, layout) if shape[2] == 1 else None
    mask = padding.find(words) if padding is not None and padding.of_words else None
    values = dicom_values.extract(words, layout)
    if padding is not None:
        mask = dicom_values.check_padding(header, padding.find(values) if mask is None else mask)
    if stream and stream.transforms_color is False and photometric in _YBR and not _is_ybr(values):
        header.ignore("PhotometricInterpretation")
        photometric = "RGB"
    return Pixels(_to_rgb(values, photometric, header), mask, layout.domain)


def _decode_compressed(header: Header, decoder: Any, shape: tuple[int, int, int], photometric: str) -> _Decoded:
    """The header's bits allocated and planes are of no account, but for RLE, which compresses words."""
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
    """Data that are not compressed."""
    data, allocated = header.dataset["PixelData"], header.require("BitsAllocated")
    if data.is_undefined_length:
        raise UnreadableFileError(
            "unreadable", "its DICOM pixels are compressed, and TransferSyntaxUID does not say how"
        )
    if (
        photometric == "YBR_FULL_422" and len(data.value) >= math.prod(shape) * allocated // 8
    ):  # the label says two thirds
        photometric = "YBR_FULL"
    options = {"photometric_interpretation": photometric, "bits_allocated": allocated, "pixel_vr": data.VR}
    options["planar_configuration"] = _planar(header, shape[2])
    return *_decode(decoder, data.value, shape, options), None


def _decoder(syntax: Any) -> Any:
    """Return pydicom's decoder, for one plugin: lossy pixels must not depend on what else is installed."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # video, JPEG XL, JPIP, private ones and what has been retired
        decoder = None
    if decoder is None or (syntax.is_encapsulated and "pylibjpeg" not in decoder.available_plugins):
        raise UnreadableFileError(
            "out_of_scope", "a DICOM compressed as none here is; store it uncompressed or as JPEG 2000"
        )
    return decoder


def _decode(decoder: Any, data: bytes, shape: tuple[int, int, int], options: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Return words, with all the bits that are allocated, and what their colors are."""
    sizes = dict(zip(("rows", "columns", "samples_per_pixel"), shape, strict=True)) | {"number_of_frames": 1}
    plain = {"pixel_keyword": "PixelData", "pixel_representation": 0, "planar_configuration": 0}
    plain |= {"apply_j2k_sign_correction": False, "apply_jls_sign_correction": False}
    plugin = "pylibjpeg" if decoder.is_encapsulated else ""
    options = sizes | plain | {"bits_stored": options["bits_allocated"]} | options
    words, properties = decoder.as_array(data, raw=True, decoding_plugin=plugin, **options)
    if words.ndim != 2 + (shape[2] > 1):
        raise UnreadableFileError("unreadable", "its DICOM header says one frame, its PixelData holds more")
    return words, str(properties["photometric_interpretation"])


def _encapsulate(frame: bytes) -> bytes:
    from pydicom.encaps import encapsulate

    return encapsulate([frame], has_bot=False)


def _planar(header: Header, samples: int) -> int:
    """Return the planar configuration: by pixel (0), as nearly all do, where nothing else is said."""
    planar = dicom_header.get_integer(header.dataset, "PlanarConfiguration")
    if samples > 1 and planar not in (None, 0, 1):
        header.ignore("PlanarConfiguration")
    return int(planar == 1)


def _is_ybr(values: np.ndarray) -> bool:
    """Return whether colors that no stream transforms are as the label says, or RGB, which is more frequent. (H, W, 3) uint8.

    Radiographs are gray: the colors of YBR stay at 128 then, those of RGB are alike. Raises UnreadableFileError for neither.
    """
    first, others = values[..., :1].astype(np.int16), values[..., 1:].astype(np.int16)
    from_ybr, from_rgb = (float(np.abs(others - gray).mean()) for gray in (128, first))
    if max(from_ybr, from_rgb) < 2 * min(from_ybr, from_rgb):
        raise UnreadableFileError(
            "unreadable", "PhotometricInterpretation of its DICOM header and its JPEG 2000 contradict each other"
        )
    return from_ybr <= from_rgb


def _to_rgb(values: np.ndarray, photometric: str, header: Header) -> np.ndarray:
    """Values (H, W) of a palette and (H, W, 3) in another color space -> (H, W, 3); others as they are."""
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
