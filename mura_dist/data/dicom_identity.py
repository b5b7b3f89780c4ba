"""Read a DICOM's study, body part and laterality from its header, without decoding pixels.

file -> parse its first MiB -> if the header is longer: parse the file, skipping values -> DicomIdentity
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from mura_dist.data import body_parts, dicom_header
from mura_dist.data.dicom_header import Header

_MAX_READS = 1 << 15  # of a header: two or three per element, up to eight per item
_MAX_BYTES = 1 << 26  # of values that are not skipped
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # single-frame; also the prefix of the multi-frame classes
_CAPTURED = ("SC", "OT")  # modalities
_TAGS = ["SpecificCharacterSet", "StudyInstanceUID", "BodyPartExamined", "AnatomicRegionSequence"]
_TAGS += ["Laterality", "ImageLaterality"]
_TAGS += ["SOPClassUID", "Modality", "ConversionType", "BurnedInAnnotation"]


@dataclass(frozen=True, slots=True)
class DicomIdentity:
    """Study, body part and laterality of a DICOM, "" where missing.

    Body part and laterality are normalized (capitals, padding). They may be free text that contains a person's name.
    `may_show_text` warns that pixels may show a name: BurnedInAnnotation is present and not NO, the image is a secondary
    capture, or the header is unreadable. False is no guarantee, because the attribute is optional.
    """

    study_uid: str
    body_part: str
    laterality: str
    may_show_text: bool = False


class _TooLongError(Exception):
    """A header with more or larger elements than any device writes."""


class _LimitedReader:
    """A file that raises _TooLongError after _MAX_READS reads or _MAX_BYTES bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._reads, self._bytes = file, 0, 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        self._reads, self._bytes = self._reads + 1, self._bytes + size
        if self._reads > _MAX_READS or self._bytes > _MAX_BYTES:
            raise _TooLongError
        return self._file.read(size)


def read_identity(file: BinaryIO, head: bytes) -> DicomIdentity:
    """Read the identity of a DICOM. Unreadable headers give empty values, and no exception.

    Args:
        file: The file, positioned behind `head`.
        head: Its first bytes.
    """
    try:
        content = io.BytesIO(head)
        header = _parse(content)
        is_complete = content.tell() < len(head) or not file.read(1)
    except Exception:
        return DicomIdentity("", "", "", may_show_text=True)
    if not is_complete:
        with contextlib.suppress(Exception):
            header, is_complete = _parse(_LimitedReader(file)), True
    return DicomIdentity(
        _safe_text(header.dataset, "StudyInstanceUID"),
        _body_part(header.dataset),
        # The image's laterality takes precedence: a series of both hands has "B", or the side of its first image.
        body_parts.normalize_laterality(
            _safe_text(header.dataset, "ImageLaterality") or _safe_text(header.dataset, "Laterality")
        ),
        _may_show_text(header) or not is_complete,
    )


def _parse(file: Any) -> Header:
    return dicom_header.parse(file, stop_before_pixels=True, specific_tags=_TAGS)


def _safe_text(header: Any, keyword: str) -> str:
    """Return a value as written (several joined by a backslash), or "" where it is missing or invalid."""
    try:
        value = header.get(keyword)
        if isinstance(value, Iterable) and not isinstance(value, str | bytes):
            return "\\".join(map(str, value))
        return str(value or "").strip(" \0")
    except Exception:  # pydicom converts at the first access, and may fail in many ways
        return ""


def _body_part(header: Any) -> str:
    """Return the body part as written, else that of the anatomic region's code."""
    if written := body_parts.normalize(_safe_text(header, "BodyPartExamined")):
        return written
    with contextlib.suppress(Exception):  # no item, several, or not a sequence
        (region,) = header.AnatomicRegionSequence
        return body_parts.body_part_of_code(
            _safe_text(region, "CodingSchemeDesignator"), _safe_text(region, "CodeValue")
        )
    return ""


def _may_show_text(header: Header) -> bool:
    classes = (_safe_text(header.meta, "MediaStorageSOPClassUID"), _safe_text(header.dataset, "SOPClassUID"))
    if any(uid.startswith(_SECONDARY_CAPTURE) for uid in classes):
        return True
    # Only the secondary capture module has ConversionType. Digitized films show labels, too.
    if body_parts.normalize(_safe_text(header.dataset, "Modality")) in _CAPTURED or "ConversionType" in header.dataset:
        return True
    try:
        return body_parts.normalize(str(header.dataset.get("BurnedInAnnotation") or "NO")) != "NO"
    except Exception:  # present, but unreadable
        return True
