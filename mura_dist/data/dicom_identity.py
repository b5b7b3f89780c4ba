"""Read a DICOM's study, body part and laterality from its header, wherever in the file they stand. No pixel is decoded.

a file -> its first MiB, parsed -> where its pixels are not in it: the whole of it, values skipped -> DicomIdentity
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from mura_dist.data import body_parts, dicom_header
from mura_dist.data.dicom_header import Header

_MAX_READS = 1 << 15  # of a header beyond its head: two or three an element, up to eight an item
_MAX_BYTES = 1 << 26  # likewise: the values that are not skipped
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # the single-frame one; the multi-frame ones continue it
_CAPTURED = ("SC", "OT")  # modalities
_TAGS = ["SpecificCharacterSet", "StudyInstanceUID", "BodyPartExamined", "AnatomicRegionSequence"]
_TAGS += ["Laterality", "ImageLaterality"]
_TAGS += ["SOPClassUID", "Modality", "ConversionType", "BurnedInAnnotation"]


@dataclass(frozen=True, slots=True)
class DicomIdentity:
    """The study, body part and side that a DICOM names; "" where it does not say. Body part and laterality are told alike
    whatever the device's capitals and padding; they may be free text, and hold a name.

    `may_show_text`: its pixels may hold a name too. BurnedInAnnotation is there and is not NO; or it is a secondary capture,
    whose text often is the screen's; or its header could not be read. False promises nothing: the tag is optional.
    """

    study_uid: str
    body_part: str
    laterality: str
    may_show_text: bool = False


class _TooLongError(Exception):
    """A header of more elements, or of larger ones, than any device writes."""


class _Limited:
    """A file of which so much is read, and no more. Raises _TooLongError."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads, self._bytes = file, 0, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._reads, self._bytes = self._reads + 1, self._bytes + size
        if self._reads > _MAX_READS or self._bytes > _MAX_BYTES:
            raise _TooLongError
        return self._file.read(size)


def read_identity(file: BinaryIO, head: bytes) -> DicomIdentity:
    """Read the identity of a DICOM; `head`, its first bytes, have been read from `file`. Raises nothing."""
    try:
        content = io.BytesIO(head)
        header = _parse(content)
        whole = content.tell() < len(head) or not file.read(1)
    except Exception:
        return DicomIdentity("", "", "", may_show_text=True)
    if not whole:
        with contextlib.suppress(Exception):
            header, whole = _parse(_Limited(file)), True
    return DicomIdentity(
        _safe_text(header.dataset, "StudyInstanceUID"),
        _body_part(header.dataset),
        # An image's own laterality before its series': a series of both hands has "B", or whichever came first.
        body_parts.normalize_laterality(
            _safe_text(header.dataset, "ImageLaterality") or _safe_text(header.dataset, "Laterality")
        ),
        _may_show_text(header) or not whole,
    )


def _parse(file: Any) -> Header:
    return dicom_header.parse(file, stop_before_pixels=True, specific_tags=_TAGS)


def _safe_text(header: Any, keyword: str) -> str:
    """Return a value as written, several as DICOM writes them; "" where it is not there or holds what cannot be read."""
    try:
        value = header.get(keyword)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes):
            return "\\".join(map(str, value))
        return str(value or "").strip(" \0")
    except Exception:  # pydicom converts when it is asked: of the wrong kind, beyond its range, in no known alphabet
        return ""


def _body_part(header: Any) -> str:
    """Return the body part as written; where nothing is, by the code of the anatomic region."""
    if written := body_parts.normalize(_safe_text(header, "BodyPartExamined")):
        return written
    with contextlib.suppress(Exception):  # none, several, or no sequence at all
        (region,) = header.AnatomicRegionSequence
        return body_parts.body_part_of_code(
            _safe_text(region, "CodingSchemeDesignator"), _safe_text(region, "CodeValue")
        )
    return ""


def _may_show_text(header: Header) -> bool:
    classes = (_safe_text(header.meta, "MediaStorageSOPClassUID"), _safe_text(header.dataset, "SOPClassUID"))
    if any(one.startswith(_SECONDARY_CAPTURE) for one in classes):
        return True
    # The type of conversion stands in the module of secondary captures alone: digitized films carry labels, too.
    if body_parts.normalize(_safe_text(header.dataset, "Modality")) in _CAPTURED or "ConversionType" in header.dataset:
        return True
    try:
        return body_parts.normalize(str(header.dataset.get("BurnedInAnnotation") or "NO")) != "NO"
    except Exception:  # it says something, and nobody knows what
        return True
