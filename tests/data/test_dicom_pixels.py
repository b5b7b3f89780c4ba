"""Test dicom_pixels.py and dicom_codestream.py against NumPy: stored values for all word layouts, codestreams and attributes."""

import io
from typing import Any

import numpy as np
import pytest
from helpers.dicoms import (
    BIG_ENDIAN,
    EXPLICIT,
    IMPLICIT,
    J2K_LOSSLESS,
    JPEG,
    JPEG_LOSSLESS,
    RLE,
    dicom,
    encapsulated,
    jpeg_lossless,
)
from PIL import Image

from mura_dist.data import radiograph
from mura_dist.data.radiograph import UnreadableFileError, decode

SHAPE = (40, 50)


def drawn(low: int, high: int, seed: int = 0) -> np.ndarray:
    """Return random values (H, W) int64 that include both `low` and `high`."""
    values = np.random.default_rng(seed).integers(low, high + 1, SHAPE)
    values.flat[:2] = low, high
    return values


def domain(bits: int, signed: bool) -> tuple[int, int]:
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def stretched(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    return np.rint((values - low) * (255 / (high - low)))


def phrases(values: np.ndarray, bits: int, high_bit: int, allocated: int, noise: int = 0) -> np.ndarray:
    """Pack values into words; `noise` fills the unused bits."""
    mask, shift = (1 << bits) - 1, high_bit + 1 - bits
    unused = ((1 << allocated) - 1) & ~(mask << shift)
    return ((values & mask) << shift | noise & unused).astype(f"u{allocated // 8}")


def read(data: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    gray = decode(io.BytesIO(data))
    return gray, radiograph.read_details(io.BytesIO(data), 8).notes


def refusal(data: bytes) -> str:
    with pytest.raises(UnreadableFileError) as caught:
        decode(io.BytesIO(data))
    return str(caught.value)


# ---- words

LAYOUTS = [
    (8, 8, 7),
    (8, 5, 4),
    (8, 5, 6),
    (16, 16, 15),
    (16, 12, 11),
    (16, 12, 13),
    (16, 12, 15),
    (16, 8, 15),
    (16, 10, 9),
]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN, RLE])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("allocated", "bits", "high_bit"), LAYOUTS)
def test_values_are_read_from_any_bit_position(
    allocated: int, bits: int, high_bit: int, signed: bool, syntax: str, photometric: str
) -> None:
    values = drawn(*domain(bits, signed), seed=bits)
    stored = phrases(values, bits, high_bit, allocated)
    if syntax == BIG_ENDIAN and allocated == 16:
        stored = stored.astype(">u2")
    labels: dict[str, Any] = {"BitsStored": bits, "HighBit": high_bit, "PixelRepresentation": int(signed)}
    labels["PhotometricInterpretation"] = photometric
    gray, notes = read(dicom(stored, bits=allocated, syntax=syntax, **labels))
    expected = values if bits == 8 and not signed else stretched(values)
    np.testing.assert_array_equal(gray, 255 - expected if photometric == "MONOCHROME1" else expected)
    assert notes == ()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("bits", "high_bit"), [(12, 11), (12, 13), (10, 12)])
def test_unused_bits_are_ignored(bits: int, high_bit: int, signed: bool) -> None:
    """Old overlays or uninitialized memory may fill these bits."""
    values = drawn(*domain(bits, signed))
    noise = np.random.default_rng(1).integers(0, 0x10000, SHAPE)
    stored = phrases(values, bits, high_bit, 16, noise)
    labels = {"BitsStored": bits, "HighBit": high_bit, "PixelRepresentation": int(signed)}
    np.testing.assert_array_equal(read(dicom(stored, bits=16, **labels))[0], stretched(values))


@pytest.mark.parametrize("high_bit", [10, 0, 16, 15])
def test_impossible_high_bit_is_ignored(high_bit: int) -> None:
    """It is below the bits stored, above the bits allocated, or contradicted by the words."""
    values = drawn(1, 4095)
    gray, notes = read(dicom(values.astype(np.uint16), bits=12, HighBit=high_bit))
    np.testing.assert_array_equal(gray, stretched(values))
    assert notes == ("HighBit unusable and ignored",)


@pytest.mark.parametrize("keyword", ["BitsAllocated", "BitsStored", "PixelRepresentation", "Rows", "SamplesPerPixel"])
def test_refusal_names_the_missing_attribute(keyword: str) -> None:
    assert f"no usable {keyword}" in refusal(dicom(drawn(0, 255).astype(np.uint8), **{keyword: b""}))


@pytest.mark.parametrize(("keyword", "value"), [("BitsStored", 17), ("BitsStored", 0), ("PixelRepresentation", 2)])
def test_refusal_names_the_impossible_attribute(keyword: str, value: int) -> None:
    assert keyword in refusal(dicom(drawn(0, 4095).astype(np.uint16), bits=12, **{keyword: value}))


def test_surplus_pixel_data_is_refused() -> None:
    two = np.vstack([drawn(0, 255)] * 2).astype(np.uint8)
    assert "one frame" in refusal(dicom(two, Rows=SHAPE[0]))


# ---- codestreams


@pytest.mark.parametrize("claimed", [0, 1])
@pytest.mark.parametrize(("low", "high"), [(-300, 1200), (0, 2047), (-2048, 2047)])
def test_sign_of_the_codestream_overrides_the_header(low: int, high: int, claimed: int) -> None:
    values = drawn(low, high)
    data = dicom(values.astype(np.int16), bits=12, syntax=J2K_LOSSLESS, PixelRepresentation=claimed)
    np.testing.assert_array_equal(read(data)[0], stretched(values))


@pytest.mark.parametrize("bits", [12, 16])
def test_sign_of_the_header_applies_to_an_unsigned_codestream(bits: int) -> None:
    """JPEG has no sign, and JPEG 2000 encoders may omit it. The bits are those of signed values."""
    values = drawn(*domain(bits, signed=True))
    stored = phrases(values, bits, bits - 1, 16)
    for data in (
        dicom(stored, bits=bits, syntax=J2K_LOSSLESS, PixelRepresentation=1),
        encapsulated(jpeg_lossless(stored, bits), JPEG_LOSSLESS, bits=bits, **size(stored), PixelRepresentation=1),
    ):
        np.testing.assert_array_equal(read(data)[0], stretched(values))


def size(pixels: np.ndarray) -> dict[str, Any]:
    return {"Rows": pixels.shape[0], "Columns": pixels.shape[1]}


@pytest.mark.parametrize("extended", [False, True])
def test_signed_12_bit_values_in_a_16_bit_codestream(extended: bool) -> None:
    """The sign is extended to all bits, or is in bit 12 alone."""
    values = drawn(-2048, 2047)
    stored = (values & (0xFFFF if extended else 0xFFF)).astype(np.uint16)
    labels = {"PixelRepresentation": 1, "BitsAllocated": 16} | size(stored)
    np.testing.assert_array_equal(
        read(encapsulated(jpeg_lossless(stored, 16), JPEG_LOSSLESS, bits=12, **labels))[0], stretched(values)
    )


def test_precision_of_the_codestream_overrides_the_header() -> None:
    """No bits are lost where the header gives fewer."""
    values = drawn(0, 65535)
    for bits in (12, 16):
        data = encapsulated(jpeg_lossless(values, 16), JPEG_LOSSLESS, bits=bits, **size(values))
        np.testing.assert_array_equal(read(data)[0], stretched(values))
    of_8_bits = drawn(0, 255)
    data = encapsulated(jpeg_lossless(of_8_bits, 8), JPEG_LOSSLESS, bits=16, **size(values))
    np.testing.assert_array_equal(read(data)[0], of_8_bits)


@pytest.mark.parametrize("name", ["RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT", "CMYK", "HSV", "ARGB"])
@pytest.mark.parametrize("syntax", [EXPLICIT, RLE, J2K_LOSSLESS])
@pytest.mark.parametrize("bits", [8, 12])
def test_single_sample_image_is_gray_for_any_photometric_interpretation(bits: int, syntax: str, name: str) -> None:
    values = drawn(0, (1 << bits) - 1)
    stored = values.astype(np.uint8 if bits == 8 else np.uint16)
    gray, notes = read(dicom(stored, bits=bits, syntax=syntax, PhotometricInterpretation=name))
    np.testing.assert_array_equal(gray, values if bits == 8 else stretched(values))
    assert notes == ("PhotometricInterpretation unusable and ignored",)


def test_single_sample_square_image_is_not_read_as_colors() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (24, 24))
    data = dicom(values.astype(np.uint16), bits=12, PhotometricInterpretation="RGB")
    np.testing.assert_array_equal(read(data)[0], stretched(values))


@pytest.mark.parametrize("name", ["", "MONOCHROME", "MONOCHROME3"])
def test_gray_of_unknown_polarity_is_refused(name: str) -> None:
    assert "PhotometricInterpretation" in refusal(dicom(drawn(0, 255).astype(np.uint8), PhotometricInterpretation=name))


@pytest.mark.parametrize("name", ["MONOCHROME2", "CMYK", "PALETTE COLOR", ""])
def test_three_samples_with_a_gray_interpretation_are_refused(name: str) -> None:
    colors = np.zeros((*SHAPE, 3), np.uint8)
    assert "PhotometricInterpretation" in refusal(dicom(colors, PhotometricInterpretation=name))


def colored() -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return np.dstack([5 * x, 6 * y, 250 - 5 * x]).astype(np.uint8)


LUMA = np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize("planar", [0, 1, 7, None])
@pytest.mark.parametrize("syntax", [RLE, J2K_LOSSLESS, JPEG])
def test_planar_configuration_is_ignored_for_compressed_colors(syntax: str, planar: int | None) -> None:
    colors = colored()
    if syntax == JPEG:
        buffer = io.BytesIO()
        Image.fromarray(colors).save(buffer, "JPEG", quality=100, subsampling=0)
        labels = {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": planar}
        data = encapsulated(buffer.getvalue(), JPEG, **labels, **size(colors))
    else:
        data = dicom(colors, syntax=syntax, PlanarConfiguration=planar)
    np.testing.assert_allclose(read(data)[0], colors @ LUMA, atol=3 if syntax == JPEG else 0.51)


@pytest.mark.parametrize(("planar", "notes"), [(None, 0), (0, 0), (1, 0), (7, 1)])
def test_planar_configuration_of_uncompressed_colors(planar: int | None, notes: int) -> None:
    colors = colored()
    stored = np.moveaxis(colors, 2, 0) if planar == 1 else colors
    data = dicom(colors, PixelData=stored.tobytes(), PlanarConfiguration=planar)
    gray, message = read(data)
    np.testing.assert_allclose(gray, colors @ LUMA, atol=0.51)
    assert message == ("PlanarConfiguration unusable and ignored",) * notes


@pytest.mark.parametrize("name", ["RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"])
def test_jpeg_2000_with_color_transform_is_rgb_for_any_header(name: str) -> None:
    colors = colored()
    data = encapsulated(jpeg_2000(colors, transformed=True), J2K_LOSSLESS, **labels_of_colors(name))
    np.testing.assert_allclose(read(data)[0], colors @ LUMA, atol=0.51)


def jpeg_2000(colors: np.ndarray, *, transformed: bool) -> bytes:
    """Return a codestream with or without the component transform."""
    buffer = io.BytesIO()
    Image.fromarray(colors).save(buffer, "JPEG2000", no_jp2=True, mct=int(transformed))
    return buffer.getvalue()


def labels_of_colors(name: str) -> dict[str, Any]:
    return {"SamplesPerPixel": 3, "PhotometricInterpretation": name, "Rows": SHAPE[0], "Columns": SHAPE[1]}


@pytest.mark.parametrize("name", ["YBR_FULL", "YBR_FULL_422"])
def test_jpeg_2000_without_color_transform_follows_the_header(name: str) -> None:
    """A gray image shows which colors they are. A colored image does not and is refused."""
    gray = drawn(0, 255).astype(np.uint8)
    alike, neutral = np.dstack([gray] * 3), np.dstack([gray, *[np.full_like(gray, 128)] * 2])
    for colors, num_notes in ((alike, 1), (neutral, 0)):
        display, notes = read(
            encapsulated(jpeg_2000(colors, transformed=False), J2K_LOSSLESS, **labels_of_colors(name))
        )
        np.testing.assert_array_equal(display, gray)
        assert notes == ("PhotometricInterpretation unusable and ignored",) * num_notes
    neither = encapsulated(jpeg_2000(colored(), transformed=False), J2K_LOSSLESS, **labels_of_colors(name))
    assert "PhotometricInterpretation" in refusal(neither)


@pytest.mark.parametrize("complete", [False, True])
def test_subsampled_chroma_is_detected_by_interpretation_and_length(complete: bool) -> None:
    """The interpretation declares one chroma sample for two pixels. Full-length data have one for each pixel."""
    gray = drawn(0, 255).astype(np.uint8)
    pairs = np.full((*SHAPE, 2), 128, np.uint8)
    pairs[..., 0] = gray
    pixels = np.dstack([gray, np.full_like(gray, 128), np.full_like(gray, 128)])
    halved = np.stack([gray[:, ::2], gray[:, 1::2], *[np.full((40, 25), 128, np.uint8)] * 2], axis=2)
    data = dicom(pixels, PhotometricInterpretation="YBR_FULL_422", PixelData=(pixels if complete else halved).tobytes())
    np.testing.assert_array_equal(read(data)[0], gray)


# ---- offset tables


def fragmented(frame: bytes, table: bytes, num_fragments: int = 1) -> bytes:
    """Return PixelData with an offset table of our own."""
    step = -(-len(frame) // num_fragments)
    step += step % 2
    pieces = [frame[start : start + step] for start in range(0, len(frame), step)]
    item = b"\xfe\xff\x00\xe0"
    return b"".join(item + len(piece).to_bytes(4, "little") + piece for piece in (table, *pieces))


@pytest.mark.parametrize("num_fragments", [1, 3])
@pytest.mark.parametrize(
    "table", ["", "00000000", "04000000", "ffffff7f", "0102", "0000000000000000", "0000000003000000"]
)
def test_single_frame_ignores_the_offset_table(table: str, num_fragments: int) -> None:
    values = drawn(0, 255)
    frame = jpeg_lossless(values, 8)
    frame += b"\0" * (len(frame) % 2)
    data = encapsulated(
        frame, JPEG_LOSSLESS, PixelData=fragmented(frame, bytes.fromhex(table), num_fragments), **size(values)
    )
    np.testing.assert_array_equal(read(data)[0], values)


def test_valid_offset_table_of_two_frames_is_used() -> None:
    frame = jpeg_lossless(drawn(0, 255), 8)
    frame += b"\0" * (len(frame) % 2)
    table = b"\0\0\0\0" + (len(frame) + 8).to_bytes(4, "little")
    pixel_data = fragmented(frame + frame, table, 2)
    data = encapsulated(frame, JPEG_LOSSLESS, PixelData=pixel_data, Rows=SHAPE[0], Columns=SHAPE[1])
    assert refusal(data) == "out_of_scope: a DICOM of several frames"


# ---- padding


def padded(bits: int, signed: bool, pattern: int) -> tuple[np.ndarray, np.ndarray]:
    """Return words (H, W) uint16 with the padding pattern on the last lines, and the expected gray."""
    values = drawn(100, 900) - (500 if signed else 0)
    stored = phrases(values, bits, bits - 1, 16)
    stored[35:] = pattern
    gray = stretched(values[:35])
    return stored, np.vstack([gray, np.zeros((5, SHAPE[1]))])


SIGNS = [
    (16, False, 63536),
    (16, True, 63536),
    (16, False, 0),
    (16, True, 0x8000),
    (12, False, 65535),
    (12, True, 0x830),
]
SIGNS += [(12, True, 0xF830), (12, True, 0x7830), (12, False, 4095), (10, False, 0xFFFF), (12, False, 0xF830)]


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
@pytest.mark.parametrize("written", ["US", "SS"])
@pytest.mark.parametrize(("bits", "signed", "pattern"), SIGNS)
def test_padding_matches_by_bit_pattern(bits: int, signed: bool, pattern: int, written: str, syntax: str) -> None:
    """The sign of the attribute and the number of stored bits do not matter."""
    stored, expected = padded(bits, signed, pattern)
    value = pattern - 0x10000 if written == "SS" and pattern > 0x7FFF else pattern
    for values in ([value], [value, value]):  # a single value, and a range of one value
        labels: dict[str, Any] = dict(zip(("PixelPaddingValue", "PixelPaddingRangeLimit"), values, strict=False))
        raw = {name: (value & 0xFFFF).to_bytes(2, "little") for name, value in labels.items()}
        data = dicom(
            stored, bits=16, syntax=syntax, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(signed), **raw
        )
        if written == "SS" and syntax == EXPLICIT:
            data = data.replace(b"\x28\0\x20\x01US", b"\x28\0\x20\x01SS").replace(
                b"\x28\0\x21\x01US", b"\x28\0\x21\x01SS"
            )
        np.testing.assert_array_equal(read(data)[0], expected)


def test_padding_range_uses_the_sign_of_the_pixels() -> None:
    values = drawn(0, 900)
    stored = values.copy()
    stored[35:] = -2000
    stored[37:] = -1990
    expected = np.vstack([stretched(values[:35]), np.zeros((5, SHAPE[1]))])
    raw = {"PixelPaddingValue": (63536).to_bytes(2, "little"), "PixelPaddingRangeLimit": (63546).to_bytes(2, "little")}
    np.testing.assert_array_equal(read(dicom(stored.astype(np.int16), bits=16, **raw))[0], expected)


@pytest.mark.parametrize(("signed", "pattern"), [(False, 65535), (True, 32767)])
def test_16_bit_padding_value_does_not_match_12_bit_white(signed: bool, pattern: int) -> None:
    """Some devices write such a value by default. No stored word equals it, and white or -1 must not turn black."""
    values = drawn(*domain(12, signed))
    values[3] = -1 if signed else 4095
    stored = phrases(values, 12, 11, 16)
    gray, _ = read(dicom(stored, bits=12, PixelRepresentation=int(signed), PixelPaddingValue=pattern))
    np.testing.assert_array_equal(gray, stretched(values))


@pytest.mark.parametrize(
    ("value", "limit", "note"), [(0, b"", "PixelPaddingRangeLimit"), (b"", None, "PixelPaddingValue")]
)
def test_unusable_padding_is_noted_and_ignored(value: int | bytes, limit: bytes | None, note: str) -> None:
    values = drawn(0, 4095)
    labels = {"PixelPaddingValue": value} | ({} if limit is None else {"PixelPaddingRangeLimit": limit})
    gray, notes = read(dicom(values.astype(np.uint16), bits=12, **labels))
    visited = values[values > 0] if value == 0 else values
    expected = np.rint(np.clip(values - visited.min(), 0, None) * (255 / (4095 - visited.min())))
    np.testing.assert_array_equal(gray, expected)
    assert notes == (f"{note} unusable and ignored",)


def test_padding_that_covers_all_pixels_is_ignored() -> None:
    values = drawn(0, 4095)
    gray, notes = read(dicom(values.astype(np.uint16), bits=12, PixelPaddingValue=0, PixelPaddingRangeLimit=4095))
    np.testing.assert_array_equal(gray, stretched(values))
    assert notes == ("PixelPaddingValue unusable and ignored",)
