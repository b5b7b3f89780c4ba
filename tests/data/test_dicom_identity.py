"""Test dicom_identity.py: the identity is found at any position of the header, with bounded reads and without reading pixels."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.dicoms import CR, EXPLICIT, IMPLICIT, J2K_LOSSLESS, dicom, put, without_meta

from mura_dist.data import radiograph
from mura_dist.data.radiograph import DicomIdentity, read_identity

EXPECTED = DicomIdentity("1.2.9", "WRIST", "L")
NAMES = {
    "StudyInstanceUID": "1.2.9",
    "BodyPartExamined": "WRIST",
    "ImageLaterality": "L",
    "Modality": "CR",
    "SOPClassUID": CR,
}
MIB = 1 << 20


def drawn(syntax: str = EXPLICIT, **labels: Any) -> bytes:
    return dicom(np.zeros((64, 64), np.uint8), syntax=syntax, **NAMES | labels)


def private(data: bytes, group: int, value: bytes, element: int = 0x1001) -> bytes:
    """Insert a private element before all elements of a higher group."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.add_new((group, 0x0010), "LO", "A DEVICE")
    dataset.add_new((group, element), "OB", value)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


class Watched(io.BytesIO):
    """File that counts the bytes read."""

    num_bytes = 0

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        content = super().read(size)
        self.num_bytes += len(content)
        return content


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, J2K_LOSSLESS])
@pytest.mark.parametrize("group", [0x0009, 0x0011, 0x0019, 0x0029])
def test_identity_is_read_at_any_position(group: int, syntax: str, tmp_path: Path) -> None:
    data = private(drawn(syntax, BurnedInAnnotation="NO"), group, bytes(3 * MIB))
    for some in (data, without_meta(data)) if syntax != J2K_LOSSLESS else (data,):
        path = tmp_path / "image"
        path.write_bytes(some)
        assert read_identity(path) == EXPECTED
        file = Watched(some)
        assert read_identity(file) == EXPECTED
        assert file.num_bytes < 1.1 * MIB, "the private value is skipped"


@pytest.mark.parametrize("size", [MIB - 200, MIB - 4, MIB, MIB + 2])
def test_identity_is_read_across_the_edge_of_the_first_block(size: int) -> None:
    assert read_identity(io.BytesIO(private(drawn(), 0x0009, bytes(size)))) == EXPECTED


def test_annotation_behind_the_first_block_is_read() -> None:
    data = private(drawn(BurnedInAnnotation="YES"), 0x0019, bytes(2 * MIB))
    assert read_identity(io.BytesIO(data)) == DicomIdentity("1.2.9", "WRIST", "L", True)


def test_pixels_are_not_read() -> None:
    """The file has 40 MiB of pixels, with a header shorter or longer than the first block."""
    large = dicom(np.zeros((6400, 6400), np.uint8), **NAMES)
    for data in (large, private(large, 0x0009, bytes(2 * MIB))):
        file = Watched(data)
        assert read_identity(file) == EXPECTED
        assert file.num_bytes < 1.1 * MIB


def test_truncated_long_header_gives_no_study_uid() -> None:
    data = private(drawn(), 0x0019, bytes(3 * MIB))[: 2 * MIB]
    actual = read_identity(io.BytesIO(data))
    assert actual is not None
    assert (actual.study_uid, actual.body_part) == ("", "WRIST")


def elements(number: int) -> Iterator[bytes]:
    for position in range(number):
        yield struct.pack("<HH2sH4s", 0x0009, 0x1000 + position % 0xEFFF, b"SH", 4, b"text")


@pytest.mark.parametrize("nested", [False, True])
def test_endless_header_is_abandoned(nested: bool) -> None:
    """Its pixels may show text."""
    head = b"\x08\0\x60\0CS\2\0CR" + b"\x08\0\x16\0UI" + struct.pack("<H", len(CR) + 1) + CR.encode() + b"\0"
    endless = b"".join(elements(120_000))
    if nested:
        endless = (
            struct.pack("<HH2sHI", 0x0009, 0x1000, b"SQ", 0, 0xFFFFFFFF)
            + (
                b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
                + b"\x09\0\x01\x10LT\xc8\0"
                + bytes(200)
                + b"\xfe\xff\x0d\xe0\0\0\0\0"
            )
            * 200_000
        )
    file = Watched(head + endless)
    assert read_identity(file) == DicomIdentity("", "", "", True)
    assert file.num_bytes < 2 * MIB


def test_value_with_a_length_of_4_gb_is_not_allocated() -> None:
    data = bytearray(private(drawn(), 0x0009, bytes(2 * MIB)))
    position = data.index(b"\x20\0\x0d\0UI")
    data[position + 4 : position + 12] = b"UT\0\0\xfe\xff\xff\xff"
    actual = read_identity(io.BytesIO(bytes(data)))
    assert actual is not None
    assert actual.may_show_text


def test_attributes_in_sequence_items_are_not_the_identity() -> None:
    item = pydicom.dataset.Dataset()
    put(item, "StudyInstanceUID", "9.9.9")
    data = private(drawn(ReferencedStudySequence=pydicom.sequence.Sequence([item])), 0x0009, bytes(2 * MIB))
    assert read_identity(io.BytesIO(data)) == EXPECTED


def test_other_files_have_no_identity() -> None:
    assert read_identity(io.BytesIO(b"\x89PNG\r\n\x1a\n" + bytes(2 * MIB))) is None
    assert radiograph.read_identity(io.BytesIO(b"")) is None
