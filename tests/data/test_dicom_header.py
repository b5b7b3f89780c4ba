"""Test dicom_header.py and the scope of dicom.py: recognition of DICOM files, spelling of attributes, and notes."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from helpers.dicoms import (
    BIG_ENDIAN,
    CR,
    DEFLATED,
    DX_PROCESSING,
    EXPLICIT,
    IMPLICIT,
    JPEG_LOSSLESS,
    SC,
    dicom,
    encapsulated,
    jpeg_lossless,
    put,
    without_meta,
)
from PIL import Image
from pydicom.dataset import Dataset

from mura_dist.data import dicom as reader
from mura_dist.data import radiograph
from mura_dist.data.radiograph import UnreadableFileError, decode

DX = "1.2.840.10008.5.1.4.1.1.1.1"
VALUES = np.arange(600, dtype=np.uint16).reshape(20, 30)
GRAY = np.rint(VALUES * (255 / 599))


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableFileError) as caught:
        decode(io.BytesIO(data))
    return str(caught.value)


def drawn(syntax: str = EXPLICIT, **labels: Any) -> bytes:
    stored = VALUES.astype(">u2") if syntax == BIG_ENDIAN else VALUES
    return dicom(stored, bits=12, syntax=syntax, **{"Modality": "DX", "SOPClassUID": DX} | labels)


# ---- recognition


def bare(syntax: str, first: str, value: Any) -> bytes:
    """Return a data set without file meta information whose first element is `first`."""
    dataset = pydicom.dcmread(io.BytesIO(drawn(syntax)))
    start = pydicom.tag.Tag(first)
    retained = Dataset(
        {element.tag: element for element in dataset if element.tag >= start or element.tag.group == 0x28}
    )
    put(retained, first, value, syntax)
    put(retained, "Modality", "DX")
    if start > pydicom.tag.Tag("Modality"):
        put(retained, "Modality", None)
        put(retained, "SOPClassUID", None) if "SOPClassUID" in retained else None
    buffer = io.BytesIO()
    retained.save_as(buffer, implicit_vr=syntax == IMPLICIT, little_endian=syntax != BIG_ENDIAN, overwrite=True)
    return buffer.getvalue()


FIRST = {
    "SpecificCharacterSet": "ISO_IR 100",
    "ImageType": ["ORIGINAL", "PRIMARY"],
    "InstanceCreationDate": "20200101",
    "SOPClassUID": DX,
    "SOPInstanceUID": "1.2.3",
    "StudyDate": "20200101",
    "Modality": "DX",
}


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("first", FIRST)
def test_data_set_without_file_meta_is_read(first: str, syntax: str) -> None:
    np.testing.assert_array_equal(decode(io.BytesIO(bare(syntax, first, FIRST[first]))), GRAY)


@pytest.mark.parametrize("group", [0x0010, 0x0018, 0x0020, 0x0028, 0x0032, 0x0040, 0x0060])
def test_data_set_of_any_first_group_is_recognized(group: int) -> None:
    """Recognition does not decide on the scope."""
    for data in (
        struct.pack("<HH2sH4s", group, 0x10, b"LO", 4, b"text") + bytes(200),
        struct.pack("<HHI4s", group, 0x10, 4, b"text") + bytes(200),
        struct.pack(">HH2sH4s", group, 0x10, b"LO", 4, b"text") + bytes(200),
        struct.pack("<HH2sHI4s", group, 0x10, b"OB", 0, 4, b"text") + bytes(200),
    ):
        assert reader.is_dicom(data)


def test_other_files_are_not_recognized_as_dicom() -> None:
    for text in ("( a b c )", "  two blanks", "\x10\x20\x30\x40 control characters, and more"):
        assert not reader.is_dicom(text.encode("utf-16-le"))
        assert not reader.is_dicom(text.encode("utf-16-be"))
    for data in (
        b"",
        b"\x08\0",
        b"\x08\0\x05\0CS",
        b"\0" * 200,
        b"\0\0\1\0" + bytes(80),
        b"\x20\0\x10\0" + b"\xff" * 80,
    ):
        assert not reader.is_dicom(data)
    for kind in ("PNG", "JPEG", "TIFF", "JPEG2000", "GIF", "BMP", "WEBP", "ICO"):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(buffer, kind)
        assert not reader.is_dicom(buffer.getvalue()), kind


def test_file_meta_without_preamble_is_read(tmp_path: Path) -> None:
    """pydicom writes such a file by default."""
    dataset = pydicom.dcmread(io.BytesIO(drawn()))
    dataset.preamble = None
    del dataset.file_meta["FileMetaInformationGroupLength"]
    dataset.save_as(tmp_path / "a.dcm")
    assert (tmp_path / "a.dcm").read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(decode(tmp_path / "a.dcm"), GRAY)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
def test_prefix_without_preamble_is_read(syntax: str) -> None:
    np.testing.assert_array_equal(decode(io.BytesIO(drawn(syntax)[128:])), GRAY)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("uid", ["", " "])
def test_empty_transfer_syntax_is_read(uid: str, syntax: str) -> None:
    data = drawn(syntax)
    position = data.index(b"\2\0\x10\0UI") + 6
    (length,) = struct.unpack_from("<H", data, position)
    value = uid.encode() * 2
    data = data[:position] + struct.pack("<H", len(value)) + value + data[position + 2 + length :]
    np.testing.assert_array_equal(decode(io.BytesIO(data)), GRAY)


def test_compressed_pixels_under_an_uncompressed_syntax_are_refused() -> None:
    data = encapsulated(jpeg_lossless(VALUES, 12), JPEG_LOSSLESS, bits=12, Rows=20, Columns=30)
    assert "TransferSyntaxUID" in refusal(data.replace(JPEG_LOSSLESS.encode(), EXPLICIT.encode().ljust(22, b"\0")))
    assert "TransferSyntaxUID" in refusal(without_meta(data))


# ---- deflated files


@pytest.mark.parametrize("keyword", ["ImageComments", "SeriesDescription", "StudyInstanceUID"])
def test_deflated_syntax_uid_in_a_text_attribute_is_ignored(keyword: str) -> None:
    np.testing.assert_array_equal(decode(io.BytesIO(drawn(**{keyword: DEFLATED}))), GRAY)


@pytest.mark.parametrize("start", [0, 128, 132])
def test_deflated_file_is_refused_with_and_without_preamble(start: int) -> None:
    assert refusal(drawn(DEFLATED)[start:]).startswith("out_of_scope: a deflated DICOM")


# ---- attributes


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("shape", ["{}", "{} ", " {}", "{}\0", "{}  "])
@pytest.mark.parametrize("spell", [str.upper, str.lower, str.title])
@pytest.mark.parametrize(
    "name", ["MONOCHROME1", "MONOCHROME2", "MONOCHROME 2", "RGB", "YBR_RCT", "PALETTE COLOR", "Ybr-Full"]
)
def test_photometric_interpretation_ignores_case_and_padding(name: str, spell: Any, shape: str) -> None:
    label = shape.format(spell(name)).encode()
    if name.startswith("MONOCHROME"):
        expected = 255 - GRAY if name == "MONOCHROME1" else GRAY
        np.testing.assert_array_equal(decode(io.BytesIO(drawn(PhotometricInterpretation=label))), expected)
        return
    byte = (VALUES % 256).astype(np.uint8)
    if name == "PALETTE COLOR":
        ramp: dict[str, Any] = {}
        for color in ("Red", "Green", "Blue"):
            ramp[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
            ramp[f"{color}PaletteColorLookupTableData"] = bytes(range(256))
        data = dicom(byte, PhotometricInterpretation=label, **ramp)
    elif name == "Ybr-Full":  # no interpretation of the standard
        assert "PhotometricInterpretation" in refusal(dicom(np.dstack([byte] * 3), PhotometricInterpretation=label))
        return
    else:
        data = dicom(np.dstack([byte] * 3), PhotometricInterpretation=label)
    np.testing.assert_array_equal(decode(io.BytesIO(data)), byte)


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize("sop_class", [CR, DX, SC, None])
@pytest.mark.parametrize("modality", ["dx", " Cr", "rg ", "DX\0", "sc", "Ot"])
def test_modality_ignores_case_and_padding(modality: str, sop_class: str | None) -> None:
    np.testing.assert_array_equal(decode(io.BytesIO(bare_class(modality, sop_class))), GRAY)


@pytest.mark.parametrize("modality", ["DR", "dr", "XR"])
def test_nonstandard_modality_needs_a_radiography_sop_class(modality: str) -> None:
    """DR and XR are accepted with a CR or DX class only."""
    for sop_class in (CR, DX):
        np.testing.assert_array_equal(decode(io.BytesIO(bare_class(modality, sop_class))), GRAY)
    for sop_class in (None, "1.2.840.10008.5.1.4.1.1.2"):  # CT
        assert "modality" in refusal(bare_class(modality, sop_class))


def bare_class(modality: str, sop_class: str | None) -> bytes:
    """Return a file of this modality and SOP class. Without a class it has no file meta information, which would name one."""
    if sop_class is not None:
        return drawn(Modality=modality.encode(), SOPClassUID=sop_class)
    dataset = pydicom.dcmread(io.BytesIO(drawn()))
    retained = Dataset({element.tag: element for element in dataset if element.keyword != "SOPClassUID"})
    put(retained, "Modality", modality.encode())
    buffer = io.BytesIO()
    retained.save_as(buffer, implicit_vr=False, little_endian=True)
    return buffer.getvalue()


@pytest.mark.parametrize("modality", ["CT", "MG", "US", "IO", "PX", "RF", "XA", "MR", "radiograph"])
def test_other_modality_is_out_of_scope(modality: str) -> None:
    assert refusal(drawn(Modality=modality.encode())).startswith("out_of_scope: its DICOM modality is none of")


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_for_processing_image_is_refused_in_any_case() -> None:
    assert "raw detector" in refusal(drawn(PresentationIntentType=b"for processing"))
    assert "raw detector" in refusal(drawn(SOPClassUID=DX_PROCESSING))


# ---- notes


def test_notes_contain_attribute_names_and_no_values() -> None:
    labels = {
        "WindowCenter": b"Doe^Jane",
        "WindowWidth": b"4711",
        "PixelPaddingRangeLimit": b"",
        "PixelPaddingValue": 9999,
    }
    data = drawn(**labels, VOILUTFunction=b"DOE^JANE", RescaleSlope=b"Doe", RescaleIntercept=b"Jane")
    notes = radiograph.read_details(io.BytesIO(data), 8).notes
    assert len(notes) == 4
    assert "doe" not in " ".join(notes).lower()


def test_valid_attributes_cause_no_notes() -> None:
    assert (
        radiograph.read_details(io.BytesIO(drawn(WindowCenter="300", WindowWidth="600", PixelPaddingValue=0)), 8).notes
        == ()
    )
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(buffer, "PNG")
    assert radiograph.read_details(buffer, 8).notes == ()
