"""Take stored values out of words, and find what of them is padding (PS3.5, 8.1.1; PS3.3, C.7.5.1.1.2).

words, header's bits -> find_layout (of a codestream: find_stream_layout) -> Layout -> find_padding, extract
"""

from typing import NamedTuple

import numpy as np

from mura_dist.data import dicom_header
from mura_dist.data.dicom_codestream import Codestream
from mura_dist.data.dicom_header import Header


class Layout(NamedTuple):
    """The place of a value in a word: `bits` bits, the highest of them at `high_bit`; signed: as a complement of two."""

    bits: int
    high_bit: int
    signed: bool

    @property
    def domain(self) -> tuple[int, int]:
        """The smallest and the largest value."""
        top = 1 << (self.bits - self.signed)
        return (-top if self.signed else 0), top - 1


def find_layout(header: Header, words: np.ndarray, bits: int, signed: int) -> Layout:
    """Find it for data that are not compressed, or by RLE, which compresses words; bits, signed: the header's."""
    allocated = 8 * words.dtype.itemsize
    return Layout(bits, _high_bit(header, words, bits, allocated), bool(signed))


def find_stream_layout(header: Header, words: np.ndarray, stream: Codestream, bits: int, signed: int) -> Layout:
    """Find it for what a codestream holds: values of its precision, or words with values of the header's fewer bits."""
    if stream.signed:
        return Layout(stream.precision, stream.precision - 1, True)
    narrow = bits < stream.precision
    high_bit = _high_bit(header, words, bits, stream.precision) if narrow else stream.precision - 1
    if narrow and high_bit == bits - 1 and int(words.max()) >> bits:
        narrow, high_bit = False, stream.precision - 1
    return Layout(bits if narrow else stream.precision, high_bit, bool(signed))


def _high_bit(header: Header, words: np.ndarray, bits: int, allocated: int) -> int:
    """The header's, unless it cannot be, or the words show that it is not."""
    high_bit = dicom_header.get_integer(header.dataset, "HighBit")
    if high_bit is None or high_bit == bits - 1:
        return bits - 1
    possible = bits <= high_bit < allocated
    if possible and (int(words.max()) >> bits or not np.any(words & ((1 << (high_bit + 1 - bits)) - 1))):
        return high_bit
    header.ignore("HighBit")
    return bits - 1


def extract(words: np.ndarray, layout: Layout) -> np.ndarray:
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


class Padding(NamedTuple):
    """The first and the last value that mean "no image here"; of_words: as allocated, unused bits and all."""

    low: int
    high: int
    of_words: bool

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return (H, W) bool."""
        return values == self.low if self.low == self.high else (values >= self.low) & (values <= self.high)


def find_padding(header: Header, layout: Layout) -> Padding | None:
    """Read the header's padding, None where there is none.

    It is a pattern of bits in the pixels' representation, whatever its own; one that is wider than a value is the whole word's.
    """
    first, last = (_pattern(header, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return None
    edges = [first, first if last is None else last]
    stored = [value for value in (_stored(edge, layout) for edge in edges) if value is not None]
    low, high = sorted(stored if len(stored) == 2 else edges)
    return Padding(low, high, len(stored) < 2)


def check_padding(header: Header, mask: np.ndarray) -> np.ndarray | None:
    """Return the mask; None where nothing is padding, or all is, which says more of the attribute than of the picture."""
    if mask.all():
        header.ignore("PixelPaddingValue")
        return None
    return mask if mask.any() else None


def _pattern(header: Header, keyword: str) -> int | None:
    """The attribute's 16 bits, or None."""
    if keyword not in header.dataset:
        return None
    value, order = dicom_header.get_bytes(header.dataset, keyword)
    if len(value) < 2 or header.dataset.get_item(keyword).VR in ("DS", "IS"):
        number = dicom_header.get_integer(header.dataset, keyword)
        if number is None:
            header.ignore(keyword)
        return None if number is None else number & 0xFFFF
    return int.from_bytes(value[:2], "little" if order == "<" else "big")


def _stored(pattern: int, layout: Layout) -> int | None:
    """The stored value that 16 bits mean, or None where they are too many for it."""
    bits = min(layout.bits, 16)
    rest, value = pattern >> bits, pattern & ((1 << bits) - 1)
    if not layout.signed:
        return None if rest else value
    if rest not in (0, 0xFFFF >> bits):
        return None
    return value - (1 << bits) if value >> (bits - 1) else value
