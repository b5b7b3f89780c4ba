"""Decode the pixels of a DICOM of one frame into the values that its header means.

    Header -> words, as allocated, or what a codestream holds -> high bit, unused bits, sign (PS3.5, 8.1.1) -> Pixels

A codestream's own size, precision and sign hold; bits, sign and order of the header are of data that are not compressed.
"""

from typing import Any, NamedTuple

import numpy as np

from mura_dist.data import dicom_header
from mura_dist.data.dicom_codestream import Codestream, join_fragments, read_codestream
from mura_dist.data.dicom_header import Header
from mura_dist.data.grey import Unreadable

_RLE = "1.2.840.10008.1.2.5"
PALETTE = "PALETTE COLOR"
_YBR = ("YBR_FULL", "YBR_FULL_422")  # what has to become RGB; decoders do it for the color transforms of JPEG 2000


class Pixels(NamedTuple):
    """Stored values.

    values: (H, W) grey, or (H, W, 3) RGB, integers; padding: (H, W) bool, True where no image is, None where it is everywhere.
    domain: the smallest and the largest value that could be stored.
    """

    values: np.ndarray
    padding: np.ndarray | None
    domain: tuple[int, int]


class _Layout(NamedTuple):
    """Where a value lies in a word: `bits` of them, the highest at `high_bit`."""

    bits: int
    high_bit: int
    signed: bool

    @property
    def domain(self) -> tuple[int, int]:
        top = 1 << (self.bits - self.signed)
        return (-top if self.signed else 0), top - 1


def read_pixels(header: Header, shape: tuple[int, int, int], photometric: str) -> Pixels:
    """Decode the pixels; shape: rows, columns, samples as the header says. Raises Unreadable, or whatever a decoder does."""
    allocated, bits = header.require("BitsAllocated"), header.require("BitsStored")
    signed = header.require("PixelRepresentation")
    if not 1 <= bits <= allocated:
        raise Unreadable("unreadable", "BitsStored of its DICOM header is none of 1 to BitsAllocated")
    if signed not in (0, 1):
        raise Unreadable("unreadable", "PixelRepresentation of its DICOM header is neither 0 nor 1")
    decoder, data = _decoder(header.syntax), header.dataset["PixelData"]
    stream = None
    options = {"bits_allocated": allocated, "photometric_interpretation": photometric}
    if header.syntax.is_encapsulated:
        frame = join_fragments(data.value)
        if header.syntax != _RLE:
            stream = read_codestream(frame)
            if (stream.height, stream.width, stream.samples) != shape:
                raise Unreadable("unreadable", "its DICOM header and the image inside differ in size")
            options |= _stream_options(stream, photometric)
        words, photometric = _decode(decoder, _encapsulate(frame), shape, options)
    else:
        if data.is_undefined_length:
            raise Unreadable("unreadable", "its DICOM pixels are compressed, and TransferSyntaxUID does not say how")
        whole = shape[0] * shape[1] * shape[2] * allocated // 8
        if photometric == "YBR_FULL_422" and len(data.value) >= whole:  # the label says two thirds of it
            options["photometric_interpretation"] = "YBR_FULL"
        options |= {"planar_configuration": _planar(header, shape[2]), "pixel_vr": data.VR}
        words, photometric = _decode(decoder, data.value, shape, options)
    layout = _stream_layout(header, words, stream, bits, signed) if stream else _layout(header, words, bits, signed)
    padding = _padding(header, layout) if shape[2] == 1 else None
    mask = padding.find(words) if padding is not None and padding.of_words else None
    values = words if words.dtype.kind == "i" else _extract(words, layout)
    if padding is not None:
        mask = _check_padding(header, padding.find(values) if mask is None else mask)
    if stream and stream.transforms_color is False and photometric in _YBR and not _is_ybr(values):
        header.ignore("PhotometricInterpretation")
        photometric = "RGB"
    return Pixels(_to_rgb(values, photometric, header), mask, layout.domain)


def _decoder(syntax: Any) -> Any:
    """Return pydicom's decoder, for one plugin: lossy pixels must not depend on what else is installed."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:  # video, JPEG XL, JPIP, private ones and what has been retired
        decoder = None
    if decoder is None or (syntax.is_encapsulated and "pylibjpeg" not in decoder.available_plugins):
        raise Unreadable("out_of_scope", "a DICOM compressed as none here is; store it uncompressed or as JPEG 2000")
    return decoder


def _decode(decoder: Any, data: bytes, shape: tuple[int, int, int], options: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Return (H, W) or (H, W, 3) words, unsigned unless a codestream is signed, and what their colors then are."""
    sizes = dict(zip(("rows", "columns", "samples_per_pixel"), shape, strict=True)) | {"number_of_frames": 1}
    plain = {"pixel_keyword": "PixelData", "pixel_representation": 0, "planar_configuration": 0}
    plain |= {"apply_j2k_sign_correction": False, "apply_jls_sign_correction": False}
    plugin = "pylibjpeg" if decoder.is_encapsulated else ""
    options = sizes | plain | {"bits_stored": options["bits_allocated"]} | options  # all bits, as they are
    words, properties = decoder.as_array(data, raw=True, decoding_plugin=plugin, **options)
    if words.ndim != 2 + (shape[2] > 1):
        raise Unreadable("unreadable", "its DICOM header says one frame, its PixelData holds more")
    return words, str(properties["photometric_interpretation"])


def _encapsulate(frame: bytes) -> bytes:
    from pydicom.encaps import encapsulate

    return encapsulate([frame], has_bot=False)


def _stream_options(stream: Codestream, photometric: str) -> dict[str, Any]:
    """The decoders' containers, and the colors that come out of them."""
    container = 8 if stream.precision <= 8 else 16 if stream.precision <= 16 else 32
    options: dict[str, Any] = {"bits_allocated": container, "pixel_representation": int(stream.signed)}
    if stream.samples == 3 and stream.transforms_color:
        options["photometric_interpretation"] = "RGB"
    return options


def _planar(header: Header, samples: int) -> int:
    """By pixel (0), as nearly all do, where nothing else is said."""
    planar = dicom_header.integer(header.dataset, "PlanarConfiguration")
    if samples > 1 and planar not in (None, 0, 1):
        header.ignore("PlanarConfiguration")
    return int(planar == 1)


# ---- from words to values


def _layout(header: Header, words: np.ndarray, bits: int, signed: int) -> _Layout:
    """Of data that are not compressed, or by RLE, which compresses words."""
    allocated = 8 * words.dtype.itemsize
    return _Layout(bits, _high_bit(header, words, bits, allocated), bool(signed))


def _stream_layout(header: Header, words: np.ndarray, stream: Codestream, bits: int, signed: int) -> _Layout:
    """Of a codestream: its precision holds, but that what it holds may be words of fewer bits."""
    if stream.signed:
        return _Layout(stream.precision, stream.precision - 1, True)
    narrow = bits < stream.precision
    high_bit = _high_bit(header, words, bits, stream.precision) if narrow else stream.precision - 1
    if narrow and high_bit == bits - 1 and int(words.max()) >> bits:
        narrow, high_bit = False, stream.precision - 1
    return _Layout(bits if narrow else stream.precision, high_bit, bool(signed))


def _high_bit(header: Header, words: np.ndarray, bits: int, allocated: int) -> int:
    """The header's, unless it cannot be, or the words show that it is not."""
    high_bit = dicom_header.integer(header.dataset, "HighBit")
    if high_bit is None or high_bit == bits - 1:
        return bits - 1
    possible = bits <= high_bit < allocated
    if possible and (int(words.max()) >> bits or not np.any(words & ((1 << (high_bit + 1 - bits)) - 1))):
        return high_bit
    header.ignore("HighBit")
    return bits - 1


def _extract(words: np.ndarray, layout: _Layout) -> np.ndarray:
    """Take the values out of unsigned words, in place: the dtype of as many bits, signed or not."""
    size = 8 * words.dtype.itemsize
    above, unused = size - 1 - layout.high_bit, size - layout.bits
    if above:
        np.left_shift(words, above, out=words)
    values = words.view(words.dtype.str.replace("u", "i")) if layout.signed else words
    if unused:
        np.right_shift(values, unused, out=values)
    return values


# ---- padding


class _Padding(NamedTuple):
    """The first and the last value that mean "no image here"; of_words: as allocated, unused bits and all."""

    low: int
    high: int
    of_words: bool

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return (H, W) bool."""
        return values == self.low if self.low == self.high else (values >= self.low) & (values <= self.high)


def _padding(header: Header, layout: _Layout) -> _Padding | None:
    """The value is a pattern of bits in the pixels' representation, whatever its own (PS3.3, C.7.5.1.1.2); one that is wider
    than a value is the whole word's."""
    first, last = (_pattern(header, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return None
    edges = [first, first if last is None else last]
    stored = [value for value in (_stored(edge, layout) for edge in edges) if value is not None]
    low, high = sorted(stored if len(stored) == 2 else edges)
    return _Padding(low, high, len(stored) < 2)


def _check_padding(header: Header, mask: np.ndarray) -> np.ndarray | None:
    """None where nothing is padding; or all is, which says more of the attribute than of the picture."""
    if mask.all():
        header.ignore("PixelPaddingValue")
        return None
    return mask if mask.any() else None


def _pattern(header: Header, keyword: str) -> int | None:
    """The attribute's 16 bits, or None."""
    if keyword not in header.dataset:
        return None
    value, order = dicom_header.raw(header.dataset, keyword)
    if len(value) < 2 or header.dataset.get_item(keyword).VR in ("DS", "IS"):
        number = dicom_header.integer(header.dataset, keyword)
        if number is None:
            header.ignore(keyword)
        return None if number is None else number & 0xFFFF
    return int.from_bytes(value[:2], "little" if order == "<" else "big")


def _stored(pattern: int, layout: _Layout) -> int | None:
    """The stored value that 16 bits mean, or None where they are too many for it."""
    bits = min(layout.bits, 16)
    rest, value = pattern >> bits, pattern & ((1 << bits) - 1)
    if not layout.signed:
        return None if rest else value
    if rest not in (0, 0xFFFF >> bits):
        return None
    return value - (1 << bits) if value >> (bits - 1) else value


def _is_ybr(values: np.ndarray) -> bool:
    """Whether colors that no stream transforms are as the label says, or RGB, which is more frequent. (H, W, 3) uint8.

    Radiographs are grey: the colors of YBR stay at 128 then, those of RGB are alike. Raises Unreadable for neither.
    """
    first, others = values[..., :1].astype(np.int16), values[..., 1:].astype(np.int16)
    from_ybr, from_rgb = (float(np.abs(others - grey).mean()) for grey in (128, first))
    if max(from_ybr, from_rgb) < 2 * min(from_ybr, from_rgb):
        raise Unreadable(
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
        raise Unreadable(
            "unreadable", "PhotometricInterpretation of its DICOM header is for 8 bits, its pixels have more"
        )
    return convert_color_space(values, "YBR_FULL", "RGB")
