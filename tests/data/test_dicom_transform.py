"""Test dicom_transform.py against NumPy: lookup tables, rescale and windows from stored values to gray, and unusable ones."""

import io
from typing import Any

import numpy as np
import pytest
from helpers.dicoms import BIG_ENDIAN, CR, EXPLICIT, IMPLICIT, dicom, sequence, table
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from mura_dist.data import radiograph
from mura_dist.data.radiograph import decode

VALUES = np.random.default_rng(0).integers(300, 3500, (20, 30))
VALUES.flat[:2] = 300, 3499


def read(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    gray = decode(io.BytesIO(data))
    return gray, radiograph.read_details(io.BytesIO(data), 8).notes


def drawn(syntax: str = EXPLICIT, values: np.ndarray = VALUES, bits: int = 12, **labels: Any) -> bytes:
    """Return a DICOM file of `values`, signed where some are negative."""
    stored = values.astype((">" if syntax == BIG_ENDIAN else "<") + ("i2" if values.min() < 0 else "u2"))
    return dicom(stored, bits=bits, syntax=syntax, SOPClassUID=CR, Modality="CR", **labels)


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.rint((values - low) * (255 / (high - low)))


def windowed(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.clip(np.rint(((values - (center - 0.5)) / (width - 1) + 0.5) * 255), 0, 255)


def ignored(*keywords: str) -> tuple[str, ...]:
    return tuple(f"{keyword} unusable and ignored" for keyword in keywords)


# ---- tables


def curve(bits: int, num_entries: int = 4096) -> np.ndarray:
    """Return a square root table with entries of `bits` bits, uint16."""
    return np.rint(np.sqrt(np.arange(num_entries) / (num_entries - 1)) * ((1 << bits) - 1)).astype(np.uint16)


def as_white(mapped: np.ndarray, white: float) -> np.ndarray:
    """Return the gray of the output of a VOI LUT; `white` is its largest entry."""
    return np.rint(mapped.astype(float) * (255 / white))


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize("vr", ["OW", "US"])
@pytest.mark.parametrize(("bits", "container"), [(8, "u1"), (8, "u2"), (10, "u2"), (12, "u2"), (14, "u2"), (16, "u2")])
@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_lookup_table_of_any_entry_size(keyword: str, bits: int, container: str, vr: str, syntax: str) -> None:
    entries = curve(bits)
    order = ">" if syntax == BIG_ENDIAN else "<"
    tables = {keyword: table(entries.astype(container), 0, bits, vr=vr, order=order)}
    mapped = entries[VALUES].astype(float)
    gray, notes = read(drawn(syntax, **tables))
    expected = stretched(mapped) if keyword == "ModalityLUTSequence" else np.rint(mapped * 255 / entries.max())
    np.testing.assert_array_equal(gray, expected)
    assert notes == ()


@pytest.mark.parametrize("num_entries", [255, 256, 0x10000])
@pytest.mark.parametrize("container", ["u1", "u2"])
def test_lookup_table_of_any_length(num_entries: int, container: str) -> None:
    """Odd lengths are padded. A descriptor of 0 means 65536 entries."""
    values = VALUES % 256 if num_entries < 0x10000 else VALUES
    entries = (np.arange(num_entries) * 255 // (num_entries - 1)).astype(container)
    mapped = entries[np.minimum(values, num_entries - 1)]
    np.testing.assert_array_equal(read(drawn(values=values, VOILUTSequence=table(entries, 0, 8)))[0], mapped)


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("first", [-1024, 64512])
@pytest.mark.parametrize("source", ["stored", "rescaled"])
def test_lookup_table_starts_at_a_negative_value(source: str, first: int, syntax: str) -> None:
    entries = curve(12)
    values = VALUES if source == "rescaled" else VALUES - 1024
    labels = {"RescaleSlope": "1", "RescaleIntercept": "-1024"} if source == "rescaled" else {}
    data = drawn(syntax, values=values, bits=16, VOILUTSequence=table(entries, first, 12), **labels)
    np.testing.assert_array_equal(read(data)[0], as_white(entries[VALUES], 4095))


@pytest.mark.parametrize("first", [40000, 40000 - 65536])
def test_lookup_table_starts_above_32767(first: int) -> None:
    entries = curve(12)
    data = drawn(values=VALUES + 40000, bits=16, VOILUTSequence=table(entries, first, 12))
    np.testing.assert_array_equal(read(data)[0], as_white(entries[VALUES], 4095))


def test_values_outside_a_lookup_table_are_clamped_to_its_ends() -> None:
    entries = curve(12, 1000)
    mapped = entries[np.clip(VALUES - 1000, 0, 999)]
    np.testing.assert_array_equal(read(drawn(VOILUTSequence=table(entries, 1000, 12)))[0], as_white(mapped, 4095))


def test_voi_table_is_applied_to_the_output_of_the_modality_table() -> None:
    """The output of the modality table is unsigned even for signed pixels."""
    modality, voi = curve(16), curve(10, 0x10000)
    tables = {"ModalityLUTSequence": table(modality, -1024, 16), "VOILUTSequence": table(voi, 0, 10)}
    gray, _ = read(drawn(values=VALUES - 1024, bits=16, **tables))
    np.testing.assert_array_equal(gray, as_white(voi[modality[VALUES]], 1023))


BROKEN = {
    "empty sequence": Sequence([]),
    "empty item": Sequence([Dataset()]),
    "short": sequence(LUTDescriptor=[4096, 0, 12], LUTData=bytes(range(200))),
    "bytes of 12 bits": sequence(LUTDescriptor=[4096, 0, 12], LUTData=bytes(range(256)) * 16),
    "flat": table(np.full(4096, 7, np.uint16), 0, 12),
    "of other values": table(curve(12, 1000), 20000, 12),
    "half a descriptor": sequence(LUTDescriptor=b"\0\x10", LUTData=curve(12).tobytes()),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_unusable_lookup_table_is_ignored(keyword: str, name: str) -> None:
    """The rescale or window that follows still applies."""
    labels = {"RescaleSlope": "2", "RescaleIntercept": "10", "WindowCenter": "4000", "WindowWidth": "6000"}
    gray, notes = read(drawn(**labels, **{keyword: BROKEN[name]}))
    np.testing.assert_array_equal(gray, windowed(2 * VALUES + 10, 4000, 6000))
    assert notes == ignored(keyword)


def test_first_usable_lookup_table_is_applied() -> None:
    entries = curve(12)
    tables = Sequence([*BROKEN["flat"], *table(entries, 0, 12), *table(entries[::-1].copy(), 0, 12)])
    gray, notes = read(drawn(VOILUTSequence=tables))
    np.testing.assert_array_equal(gray, as_white(entries[VALUES], 4095))
    assert notes == ()


# ---- numbers

NO_NUMBERS = ["nan", "inf", "-inf", "AUTO", "", "1e999", "1_0", "0x10", "1,024", "12,345", "1 2", "--1"]


@pytest.mark.parametrize("word", [*NO_NUMBERS, "0", "0.0", "-0", "0,0"])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_unusable_rescale_is_ignored(syntax: str, word: str) -> None:
    window = {"WindowCenter": "2000", "WindowWidth": "3000"}
    gray, notes = read(drawn(syntax, RescaleSlope=word.encode(), RescaleIntercept="5", **window))
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    assert "RescaleSlope unusable and ignored" in notes
    if word in NO_NUMBERS:
        gray, notes = read(drawn(syntax, RescaleSlope="3", RescaleIntercept=word.encode(), **window))
        np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
        assert notes == ignored("RescaleIntercept")


@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_rescale_without_slope_or_intercept_is_ignored(keyword: str) -> None:
    gray, notes = read(drawn(**{keyword: "3"}, WindowCenter="2000", WindowWidth="3000"))
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    assert notes == ignored(keyword)


@pytest.mark.parametrize("word", NO_NUMBERS)
def test_unusable_window_is_ignored(word: str) -> None:
    for keyword, counterpart in (("WindowCenter", "WindowWidth"), ("WindowWidth", "WindowCenter")):
        gray, notes = read(drawn(**{keyword: word.encode(), counterpart: "2000"}))
        np.testing.assert_array_equal(gray, stretched(VALUES))
        assert notes == ignored(keyword)
        gray, notes = read(drawn(**{keyword: word.encode()}))
        np.testing.assert_array_equal(gray, stretched(VALUES))
        assert notes == ignored(keyword)


@pytest.mark.parametrize("width", ["0", "-100", "0,0"])
def test_window_without_positive_width_is_ignored(width: str) -> None:
    gray, notes = read(drawn(WindowCenter="2000", WindowWidth=width.encode()))
    np.testing.assert_array_equal(gray, stretched(VALUES))
    assert "WindowWidth unusable and ignored" in notes


@pytest.mark.parametrize(
    ("center", "width"), [("\\2000", "\\3000"), ("AUTO\\2000\\9", "4\\3000\\9"), ("9\\2000", "0\\3000")]
)
def test_first_usable_window_is_applied(center: str, width: str) -> None:
    gray, notes = read(drawn(WindowCenter=center.encode(), WindowWidth=width.encode()))
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    assert notes


def test_later_windows_are_ignored() -> None:
    gray, notes = read(drawn(WindowCenter=b"2000\\AUTO", WindowWidth=b"3000\\"))
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    assert notes == ()


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_decimal_comma_is_read_and_noted(syntax: str) -> None:
    """2000,5 is read as 2000.5, never as 20005. 1,024 is ambiguous and not read."""
    labels = {"WindowCenter": b"2000,5", "WindowWidth": b"3000,0", "RescaleSlope": b"0,125", "RescaleIntercept": b"1,5"}
    gray, notes = read(drawn(syntax, **labels))
    np.testing.assert_array_equal(gray, windowed(VALUES * 0.125 + 1.5, 2000.5, 3000))
    assert set(notes) == {f"{keyword} has a decimal comma" for keyword in labels}


@pytest.mark.parametrize(("word", "number"), [("+2.0E3", 2000), (" 2000 ", 2000), ("2000.", 2000), ("2000\0", 2000)])
def test_decimal_strings_of_the_standard_are_read(word: str, number: float) -> None:
    gray, notes = read(drawn(WindowCenter=word.encode(), WindowWidth="3000"))
    np.testing.assert_array_equal(gray, windowed(VALUES, number, 3000))
    assert notes == ()


@pytest.mark.parametrize(
    ("function", "notes"),
    [
        (" linear ", ()),
        ("LINEAR", ()),
        ("", ()),
        ("SIGMOID2", ignored("VOILUTFunction")),
        ("linear_exact", ()),
        ("Sigmoid", ()),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_voi_lut_function_ignores_case_and_padding(function: str, notes: tuple[str, ...]) -> None:
    gray, message = read(drawn(WindowCenter="2000", WindowWidth="3000", VOILUTFunction=function.encode()))
    expected = windowed(VALUES, 2000, 3000)
    if function == "linear_exact":
        expected = np.clip(np.rint((VALUES - 500) * (255 / 3000)), 0, 255)
    if function == "Sigmoid":
        expected = np.rint(255 / (1 + np.exp(-4 * (VALUES - 2000) / 3000)))
    np.testing.assert_array_equal(gray, expected)
    assert message == notes


# ---- functional groups

WINDOW = {"WindowCenter": "2000", "WindowWidth": "3000"}
RESCALE = {"RescaleSlope": "2", "RescaleIntercept": "-500", "RescaleType": "US"}


def groups(name: str, **macros: Sequence) -> dict[str, Sequence]:
    return {f"{name}FunctionalGroupsSequence": sequence(**macros)}


@pytest.mark.parametrize("frames", ["1", None])
@pytest.mark.parametrize("name", ["Shared", "PerFrame"])
def test_functional_groups_of_a_single_frame_are_applied(name: str, frames: str | None) -> None:
    labels = {} if frames is None else {"NumberOfFrames": frames}
    window, rescale = sequence(**WINDOW), sequence(**RESCALE)
    gray, notes = read(drawn(**labels, **groups(name, FrameVOILUTSequence=window)))
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    both = groups(name, FrameVOILUTSequence=window, PixelValueTransformationSequence=rescale)
    np.testing.assert_array_equal(read(drawn(**labels, **both))[0], windowed(2 * VALUES - 500, 2000, 3000))
    assert notes == ()


def test_window_precedence_is_data_set_then_frame_then_shared() -> None:
    other_window = sequence(WindowCenter="100", WindowWidth="200")
    frame_first = groups("PerFrame", FrameVOILUTSequence=sequence(**WINDOW)) | groups(
        "Shared", FrameVOILUTSequence=other_window
    )
    np.testing.assert_array_equal(read(drawn(**frame_first))[0], windowed(VALUES, 2000, 3000))
    shared = groups("PerFrame", FrameVOILUTSequence=other_window) | WINDOW
    np.testing.assert_array_equal(read(drawn(**shared))[0], windowed(VALUES, 2000, 3000))


def test_window_of_the_frame_replaces_an_unusable_one() -> None:
    data = drawn(WindowCenter=b"AUTO", WindowWidth=b"AUTO", **groups("Shared", FrameVOILUTSequence=sequence(**WINDOW)))
    gray, notes = read(data)
    np.testing.assert_array_equal(gray, windowed(VALUES, 2000, 3000))
    assert notes == ignored("WindowCenter", "WindowWidth")


@pytest.mark.parametrize("broken", [Sequence([]), Sequence([Dataset()])])
def test_functional_groups_without_a_window_are_ignored(broken: Sequence) -> None:
    data = drawn(SharedFunctionalGroupsSequence=broken, PerFrameFunctionalGroupsSequence=broken)
    gray, notes = read(data)
    np.testing.assert_array_equal(gray, stretched(VALUES))
    assert notes == ()


# ---- polarity


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted", "notes"),
    [
        ("MONOCHROME1", None, True, ()),
        ("MONOCHROME2", None, False, ()),
        ("MONOCHROME1", "INVERSE", True, ()),
        ("MONOCHROME2", "IDENTITY", False, ()),
        (
            "MONOCHROME2",
            "INVERSE",
            True,
            ("PresentationLUTShape contradicts PhotometricInterpretation and is followed",),
        ),
        (
            "MONOCHROME1",
            " identity",
            False,
            ("PresentationLUTShape contradicts PhotometricInterpretation and is followed",),
        ),
        ("MONOCHROME1", "LIN OD", True, ignored("PresentationLUTShape")),
        ("MONOCHROME2", "", False, ignored("PresentationLUTShape")),
    ],
)
@pytest.mark.parametrize("window", [{}, WINDOW])
def test_presentation_lut_shape_is_applied(
    photometric: str, shape: str | None, inverted: bool, notes: tuple[str, ...], window: dict[str, str]
) -> None:
    labels = {} if shape is None else {"PresentationLUTShape": shape.encode()}
    gray, message = read(drawn(PhotometricInterpretation=photometric, **labels, **window))
    expected = windowed(VALUES, 2000, 3000) if window else stretched(VALUES)
    np.testing.assert_array_equal(gray, 255 - expected if inverted else expected)
    assert message == notes
