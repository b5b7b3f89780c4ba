"""Extract stored values from words, and find padding (PS3.5, 8.1.1; PS3.3, C.7.5.1.1.2).

words, header's bits -> find_layout (of a codestream: find_stream_layout) -> Layout -> find_padding, extract
"""

from typing import NamedTuple

import numpy as np

from mura_dist.data import dicom_header
from mura_dist.data.dicom_codestream import Codestream
from mura_dist.data.dicom_header import Header


class Layout(NamedTuple):
    """Position of a value in a word: `bits` bits, the highest at `high_bit`, in two's complement if `signed`."""

    bits: int
    high_bit: int
    signed: bool

    @property
    def domain(self) -> tuple[int, int]:
        """Smallest and largest value."""
        top = 1 << (self.bits - self.signed)
        return (-top if self.signed else 0), top - 1


def find_layout(header: Header, stored_words: np.ndarray, bits: int, signed: int) -> Layout:
    """Return the layout of uncompressed or RLE data. `bits` and `signed` are the header's."""
    allocated = 8 * stored_words.dtype.itemsize
    return Layout(bits, _high_bit(header, stored_words, bits, allocated), bool(signed))


def find_stream_layout(header: Header, stored_words: np.ndarray, stream: Codestream, bits: int, signed: int) -> Layout:
    """Return the layout of a codestream's samples: values of its precision, or words with values of the header's fewer bits."""
    if stream.signed:
        return Layout(stream.precision, stream.precision - 1, True)
    narrow = bits < stream.precision
    high_bit = _high_bit(header, stored_words, bits, stream.precision) if narrow else stream.precision - 1
    if narrow and high_bit == bits - 1 and int(stored_words.max()) >> bits:
        narrow, high_bit = False, stream.precision - 1
    return Layout(bits if narrow else stream.precision, high_bit, bool(signed))


def _high_bit(header: Header, stored_words: np.ndarray, bits: int, allocated: int) -> int:
    """Return the header's HighBit, or bits - 1 where it is impossible or contradicts the words."""
    high_bit = dicom_header.get_integer(header.dataset, "HighBit")
    if high_bit is None or high_bit == bits - 1:
        return bits - 1
    possible = bits <= high_bit < allocated
    if possible and (int(stored_words.max()) >> bits or not np.any(stored_words & ((1 << (high_bit + 1 - bits)) - 1))):
        return high_bit
    header.ignore("HighBit")
    return bits - 1


def extract(stored_words: np.ndarray, layout: Layout) -> np.ndarray:
    """Extract the values from unsigned words, in place. The dtype has the words' size and the layout's sign."""
    size = 8 * stored_words.dtype.itemsize
    above, unused = size - 1 - layout.high_bit, size - layout.bits
    if above:
        np.left_shift(stored_words, above, out=stored_words)
    values = stored_words.view(stored_words.dtype.str.replace("u", "i")) if layout.signed else stored_words
    if unused:
        np.right_shift(values, unused, out=values)
    return values


# ---- padding


class Padding(NamedTuple):
    """First and last value of padding. `of_words` compares whole words, unused bits included."""

    low: int
    high: int
    of_words: bool

    def find(self, values: np.ndarray) -> np.ndarray:
        """Return where values are padding, bool (H, W)."""
        return values == self.low if self.low == self.high else (values >= self.low) & (values <= self.high)


def find_padding(header: Header, layout: Layout) -> Padding | None:
    """Read the header's padding, or None.

    It is a bit pattern in the pixels' representation. A pattern wider than a value describes the word.
    """
    first, last = (_pattern(header, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if first is None:
        return None
    edges = [first, first if last is None else last]
    stored = [value for value in (_stored(edge, layout) for edge in edges) if value is not None]
    low, high = sorted(stored if len(stored) == 2 else edges)
    return Padding(low, high, len(stored) < 2)


def check_padding(header: Header, mask: np.ndarray) -> np.ndarray | None:
    """Return the mask, or None where nothing is padding. If everything is, the attribute is wrong and ignored."""
    if mask.all():
        header.ignore("PixelPaddingValue")
        return None
    return mask if mask.any() else None


def _pattern(header: Header, keyword: str) -> int | None:
    """Return the attribute's 16 bits, or None."""
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
    """Return the stored value of a 16-bit pattern, or None where the pattern is wider than a value."""
    bits = min(layout.bits, 16)
    upper, value = pattern >> bits, pattern & ((1 << bits) - 1)
    if not layout.signed:
        return None if upper else value
    if upper not in (0, 0xFFFF >> bits):
        return None
    return value - (1 << bits) if value >> (bits - 1) else value
