"""Parse a DICOM, and read header values despite their usual faults.

    bytes or file -> is_dicom -> parse -> Header -> get_label, get_integer, get_numbers, get_bytes, get_items

Unusable attributes are ignored and noted by keyword. Notes and messages never contain values, which may identify a patient.
"""

import io
import math
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mura_dist.data import body_parts
from mura_dist.data.grayscale import UnreadableFileError

_DEFLATED = "1.2.840.10008.1.2.1.99"
_SYNTAXES = {  # of uncompressed data, by (implicit, little endian)
    (True, True): "1.2.840.10008.1.2",
    (False, True): "1.2.840.10008.1.2.1",
    (False, False): "1.2.840.10008.1.2.2",
}
_PREAMBLE, _PREFIX = 128, b"DICM"
# Groups that a data set without preamble may begin with.
_FIRST_GROUPS = range(0x02, 0x62, 2)
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_BINARY_VRS = frozenset(["FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"])
_DECIMAL = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", re.ASCII)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}", re.ASCII)  # ambiguous: 1,024


@dataclass(frozen=True)
class Header:
    """A parsed DICOM.

    `meta` is pydicom's data set of group 0002, `dataset` that of all others, `syntax` the transfer syntax as pydicom's UID.
    `notes` names attributes that were ignored or contradict each other.
    """

    dataset: Any
    meta: Any
    syntax: Any
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note unless it is present."""
        if text not in self.notes:
            self.notes.append(text)

    def ignore(self, keyword: str) -> None:
        """Note that an attribute's value is unusable."""
        self.note(f"{keyword} unusable and ignored")

    def require(self, keyword: str) -> int:
        """Return an attribute's integer. Raises UnreadableFileError where it has none."""
        value = get_integer(self.dataset, keyword)
        if value is None:
            raise UnreadableFileError("unreadable", f"its DICOM header has no usable {keyword}")
        return value


# ---- recognition


def is_dicom(data: bytes) -> bool:
    """Return whether the first bytes are those of a DICOM: with preamble, without it, or a data set in either byte order."""
    return bool(_start(data)) or _opens_bare(data, "<") or _opens_bare(data, ">")


def _start(data: bytes) -> int:
    """Return the offset of the first element."""
    if data[_PREAMBLE : _PREAMBLE + 4] == _PREFIX:
        return _PREAMBLE + 4
    return 4 if data.startswith(_PREFIX) else 0


def _opens_bare(data: bytes, order: str) -> bool:
    """Return whether data begins with an element of a first group, whose VR is valid or (little endian) implicit."""
    if len(data) < 12:
        return False
    group, _, vr, length = struct.unpack_from(f"{order}HH2sH", data)
    if group not in _FIRST_GROUPS:
        return False
    if vr in _LONG_VRS:
        return length == 0
    if vr in _SHORT_VRS:
        return 8 + length <= len(data)
    (length,) = struct.unpack_from("<I", data, 4)
    return order == "<" and length % 2 == 0 and 8 + length <= len(data)


# ---- parsing


def parse(file: BinaryIO, *, stop_before_pixels: bool = False, specific_tags: list[str] | None = None) -> Header:
    """Parse a DICOM that is_dicom recognizes. A data set truncated in its pixels comes out empty.

    pydicom's dcmread is not used, because it inflates without a bound.

    Raises:
        UnreadableFileError: The data set is deflated. pydicom may raise other exceptions.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.tag import Tag
    from pydicom.uid import UID

    file.seek(0)
    file.seek(_start(file.read(_PREAMBLE + 4)))
    meta = FileMetaDataset(read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2))
    uid = str(meta.get("TransferSyntaxUID") or "").strip(" \0")
    if uid == _DEFLATED:
        raise UnreadableFileError("out_of_scope", "a deflated DICOM; store it uncompressed or as JPEG 2000")
    implicit, little = next((encoding for encoding, plain in _SYNTAXES.items() if plain == uid), (False, True))
    if not uid:
        implicit, little = _guess_encoding(file)
    dataset = read_dataset(
        file,
        implicit,
        little,
        stop_when=(lambda tag, vr, length: tag >> 16 == 0x7FE0) if stop_before_pixels else None,
        specific_tags=None if specific_tags is None else [Tag(keyword) for keyword in specific_tags],
    )
    return Header(dataset, meta, UID(uid or _SYNTAXES[implicit, little]))


def _guess_encoding(file: BinaryIO) -> tuple[bool, bool]:
    """Return (implicit, little endian) of the element at the file's position."""
    head = file.read(6)
    file.seek(-len(head), io.SEEK_CUR)
    if head[4:6] not in _LONG_VRS | _SHORT_VRS:
        return True, True
    return False, head[1] == 0  # groups up to 00FF


# ---- values


def get_label(dataset: Any, keyword: str) -> str:
    """Return a defined term in capitals with single blanks (YBR_FULL is "YBR FULL"), or "" where missing."""
    return body_parts.normalize(str(_first(dataset, keyword) or ""))


def get_integer(dataset: Any, keyword: str) -> int | None:
    """Return the first value, or None where it is missing or not an integer."""
    try:
        return int(_first(dataset, keyword))
    except (TypeError, ValueError, OverflowError):
        return None


def _first(dataset: Any, keyword: str) -> Any:
    value = dataset.get(keyword)
    return next(iter(value), None) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value


def get_numbers(header: Header, scope: Any, keyword: str) -> list[float]:
    """Return the numbers of a decimal string attribute, NaN for each invalid value, or [] where it is missing.

    A decimal comma is read and noted. 1,024 is ambiguous and hence invalid.

    Args:
        header: Header that takes the notes.
        scope: The header's data set, or one nested in it.
        keyword: Keyword of the attribute.
    """
    element = scope.get_item(keyword)
    if element is None:
        return []
    value = element.value
    if isinstance(value, bytes) and element.VR in _BINARY_VRS:  # a binary VR instead of the standard's DS
        value = scope[keyword].value
    if isinstance(value, bytes):
        value = value.decode("latin-1").split("\\")
    values = value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    texts = [str(value).strip(" \0") for value in values]
    parsed = [_number(text) for text in texts]
    if any("," in text and math.isfinite(number) for text, number in zip(texts, parsed, strict=True)):
        header.note(f"{keyword} has a decimal comma")
    return parsed


def _number(text: str) -> float:
    usable = _DECIMAL.fullmatch(text) and not _THOUSANDS.fullmatch(text)
    value = float(text.replace(",", ".")) if usable else math.nan
    return value if math.isfinite(value) else math.nan


def get_bytes(dataset: Any, keyword: str) -> tuple[bytes, str]:
    """Return an attribute's bytes as stored (b"" where missing), and their byte order, "<" or ">"."""
    element = dataset.get_item(keyword)
    value = getattr(element, "value", None)
    return value if isinstance(value, bytes) else b"", "<" if getattr(element, "is_little_endian", True) else ">"


def get_items(dataset: Any, keyword: str) -> list[Any]:
    """Return the items of a sequence, or [] where it is missing or corrupt."""
    try:
        return [item for item in dataset.get(keyword) or () if hasattr(item, "get_item")]
    except Exception:  # pydicom parses a sequence at its first access
        return []
