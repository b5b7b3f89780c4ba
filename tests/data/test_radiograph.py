"""Test radiograph.py: the pixels of every supported file kind, the errors of corrupt files, and that no other outcome occurs.

The first tests draw their files. The last ones read real and hostile files of shared/. The fuzzer in tools/robustness/ draws
the same files and corrupts thousands of them.
"""

import csv
import fnmatch
import io
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
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
    J2K,
    J2K_LOSSLESS,
    JPEG,
    JPEG_EXTENDED,
    JPEG_LOSSLESS,
    JPEG_LOSSLESS_SV1,
    RLE,
    SC,
    dicom,
    encapsulated,
    flat_jpeg,
    jpeg_lossless,
    without_meta,
)
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import AllTransferSyntaxes

from mura_dist.data import body_parts, mura, radiograph, raster
from mura_dist.data.radiograph import MAX_BYTES, MAX_PIXELS, UnreadableFileError, decode, read, read_identity


def drawn() -> np.ndarray:
    """Return (60, 45) uint8 with every value from 0 to 255: a bone on a gradient, with noise."""
    y, x = np.mgrid[:60, :45]
    bone = 120 * np.exp(-(((x - 20 - y / 10) / 6) ** 2))
    gray = np.clip(y + bone + np.random.default_rng(0).normal(0, 6, y.shape), 0, 255).astype(np.uint8)
    gray.flat[:256] = np.arange(256)
    return gray


GRAY = drawn()


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: bytes) -> UnreadableFileError:
    with pytest.raises(UnreadableFileError) as caught:
        read(io.BytesIO(data), 16)
    return caught.value


def outcome(data: bytes) -> str:
    """Return "read" or the error code. Fail on anything but a gray image or UnreadableFileError."""
    try:
        gray = read(io.BytesIO(data), 24)
    except UnreadableFileError as refused:
        return refused.code
    assert gray.shape == (24, 24)
    assert gray.dtype == np.uint8
    return "read"


# ---- lossless kinds of one radiograph


def palette_png() -> bytes:
    """Return a PNG whose indices differ from its values, so that the palette is needed."""
    image = Image.fromarray(255 - GRAY, "P")
    image.putpalette([level for index in range(256) for level in (255 - index,) * 3])
    return saved(image, "PNG")


def animated_png() -> bytes:
    return saved(Image.fromarray(GRAY), "PNG", save_all=True, append_images=[Image.fromarray(255 - GRAY)])


def white_is_zero(kind: str, values: np.ndarray) -> bytes:
    data = bytearray(saved(Image.fromarray(values), kind))
    position = data.index(struct.pack("<HHI", 262, 3, 1))  # PhotometricInterpretation, a SHORT
    data[position + 8] = 0
    return bytes(data)


GRAY_IMAGE = Image.fromarray(GRAY)
DEEP = GRAY.astype(np.uint16) * 100 + 1000  # minimum 1000, maximum 26500: a step is exactly 100
SAME: dict[str, Callable[[], bytes]] = {
    "gray png": lambda: saved(GRAY_IMAGE, "PNG"),
    "rgb png": lambda: saved(GRAY_IMAGE.convert("RGB"), "PNG"),
    "gray alpha png": lambda: saved(GRAY_IMAGE.convert("LA"), "PNG"),
    "rgba png": lambda: saved(GRAY_IMAGE.convert("RGBA"), "PNG"),
    "palette png": palette_png,
    "animated png": animated_png,
    "interlaced png": lambda: png(GRAY[..., None], GRAY_KIND, 8, interlaced=True),
    "16-bit gray alpha png": lambda: png(np.dstack([DEEP, np.full_like(DEEP, 0xFFFF)]), GRAY_ALPHA, 16),
    "16-bit png": lambda: saved(Image.fromarray(DEEP), "PNG"),
    "png and rubbish behind it": lambda: saved(GRAY_IMAGE, "PNG") + b"rubbish" * 9,
    "tiff": lambda: saved(GRAY_IMAGE, "TIFF"),
    "lzw tiff": lambda: saved(GRAY_IMAGE, "TIFF", compression="tiff_lzw"),
    "16-bit tiff": lambda: saved(Image.fromarray(DEEP), "TIFF"),
    "big-endian 16-bit tiff": lambda: saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
    "32-bit tiff": lambda: saved(Image.fromarray(DEEP.astype(np.int32) - 9000), "TIFF"),
    "float tiff": lambda: saved(Image.fromarray(DEEP.astype(np.float32)), "TIFF"),
    "white-is-zero tiff": lambda: white_is_zero("TIFF", 255 - GRAY),
    "white-is-zero 16-bit tiff": lambda: white_is_zero("TIFF", 27500 - DEEP),
    "jpeg 2000": lambda: saved(GRAY_IMAGE, "JPEG2000"),
    "jpeg 2000 codestream": lambda: saved(GRAY_IMAGE, "JPEG2000", no_jp2=True),
    "dicom": lambda: dicom(GRAY),
    "implicit dicom": lambda: dicom(GRAY, syntax=IMPLICIT),
    "bare dicom": lambda: dicom(GRAY)[132:],
    "bare implicit dicom without meta": lambda: without_meta(dicom(GRAY, syntax=IMPLICIT)),
    "rle dicom": lambda: dicom(GRAY, syntax=RLE),
    "jpeg 2000 dicom": lambda: dicom(GRAY, syntax=J2K_LOSSLESS),
    "lossless jpeg dicom": lambda: encapsulated(jpeg_lossless(GRAY, 8), JPEG_LOSSLESS_SV1),
    "big-endian dicom": lambda: dicom(
        DEEP.astype(">u2"), bits=16, syntax=BIG_ENDIAN
    ),  # retired, but present in archives
    "rgb dicom": lambda: dicom(np.dstack([GRAY] * 3)),
    "jpeg 2000 rgb dicom": lambda: dicom(np.dstack([GRAY] * 3), syntax=J2K_LOSSLESS),
    "16-bit rgb dicom": lambda: dicom(np.dstack([DEEP] * 3), bits=16),
    "16-bit dicom": lambda: dicom(DEEP, bits=16, Modality="DX", SOPClassUID=CR),
    "signed dicom": lambda: dicom(DEEP.astype(np.int16) - 9000, bits=16, Modality="CR"),
    "monochrome1 dicom": lambda: dicom(255 - GRAY, PhotometricInterpretation="MONOCHROME1"),
    "falling rescale": lambda: dicom(27500 - DEEP, bits=16, RescaleSlope="-2", RescaleIntercept="7"),
    "identity rescale": lambda: dicom(GRAY, RescaleSlope="1", RescaleIntercept="0"),
    "exact window": lambda: dicom(GRAY, WindowCenter="127.5", WindowWidth="255", VOILUTFunction="LINEAR_EXACT"),
    "first of two windows": lambda: dicom(GRAY, WindowCenter=["128", "9"], WindowWidth=["256", "9"]),
    "window of no width": lambda: dicom(DEEP, bits=16, WindowCenter="128", WindowWidth="0"),
    "no modality": lambda: dicom(GRAY, Modality=None),
}


@pytest.mark.parametrize("name", SAME)
def test_lossless_kinds_give_identical_pixels(name: str) -> None:
    np.testing.assert_array_equal(decode(io.BytesIO(SAME[name]())), GRAY)


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_error_is_within_its_compression_loss(mode: str, options: dict[str, Any]) -> None:
    smooth = Image.fromarray(GRAY[10:]).convert(mode)
    gray = decode(io.BytesIO(saved(smooth, "JPEG", quality=98, **options)))
    assert np.abs(gray.astype(int) - GRAY[10:]).max() <= 6


def test_jpeg_in_dicom_equals_the_plain_jpeg() -> None:
    frame = saved(GRAY_IMAGE, "JPEG")
    difference = decode(io.BytesIO(encapsulated(frame, JPEG))).astype(int) - decode(io.BytesIO(frame))
    assert np.abs(difference).max() <= 2, "another decoder's rounding"


# ---- PNG: every bit depth, interlaced and not

ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]  # y, x, steps
GRAY_KIND, COLOR, PALETTE, GRAY_ALPHA, COLOR_ALPHA = 0, 2, 3, 4, 6
PNG_KINDS = [(GRAY_KIND, 1), (GRAY_KIND, 2), (GRAY_KIND, 4), (GRAY_KIND, 8), (GRAY_KIND, 16), (COLOR, 8), (COLOR, 16)]
PNG_KINDS += [(PALETTE, 1), (PALETTE, 2), (PALETTE, 4), (PALETTE, 8), (GRAY_ALPHA, 8), (GRAY_ALPHA, 16)]
PNG_KINDS += [(COLOR_ALPHA, 8), (COLOR_ALPHA, 16)]  # all kinds of PNG


def png_lines(samples: np.ndarray, depth: int) -> bytes:
    """Return the lines of samples (H, W, C) with filter None. Pillow's encoder and PngSuite cover the other filters."""
    bits = samples[..., None] >> np.arange(depth - 1, -1, -1) & 1  # (H, W, C, depth)
    lines = np.packbits(bits.reshape(len(samples), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + line.tobytes() for line in lines)


def png(samples: np.ndarray, kind: int, depth: int, *, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """Return a PNG of samples (H, W, C), with `extra` chunks before its pixels."""
    height, width = samples.shape[:2]
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [samples]
    lines = b"".join(png_lines(piece, depth) for piece in passes if piece.size)
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", len(body), name) + body + struct.pack(">I", zlib.crc32(name + body))


def png_of(kind: int, depth: int, *, interlaced: bool, seed: int = 0) -> tuple[bytes, np.ndarray]:
    """Return a PNG of random samples, alpha and palette, and the gray (H, W) that they mean."""
    rng, top = np.random.default_rng(seed), (1 << depth) - 1
    channels = {GRAY_KIND: 1, COLOR: 3, PALETTE: 1, GRAY_ALPHA: 2, COLOR_ALPHA: 4}[kind]
    samples = rng.integers(0, top + 1, (13, 19, channels))
    alpha = samples[..., -1] / top if kind in (GRAY_ALPHA, COLOR_ALPHA) else np.ones((13, 19))
    luma = np.array([0.299, 0.587, 0.114])
    if kind == PALETTE:
        palette = rng.integers(0, 256, (top + 1, 3))
        data = png(
            samples, kind, depth, interlaced=interlaced, extra=chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        )
        return data, (palette @ luma)[samples[..., 0]]
    if kind in (COLOR, COLOR_ALPHA):
        gray = (samples[..., :3] >> (depth - 8)) @ luma
    elif depth == 16:
        values = samples[..., 0]
        gray = (values - values.min()) * 255 / (values.max() - values.min())
    else:
        gray = samples[..., 0] * 255 / top
    return png(samples, kind, depth, interlaced=interlaced), gray * alpha


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("kind", "depth"), PNG_KINDS)
def test_png_of_every_color_type_and_depth(kind: int, depth: int, interlaced: bool) -> None:
    data, expected = png_of(kind, depth, interlaced=interlaced)
    np.testing.assert_allclose(
        decode(io.BytesIO(data)), expected, atol=1.51 if kind in (GRAY_ALPHA, COLOR_ALPHA) else 1.01
    )


def test_16_bit_png_with_alpha_keeps_12_bit_precision() -> None:
    """Pillow alone would keep the high bytes: 16 levels from 0 to 15, which look black."""
    samples = np.stack([np.arange(4096).reshape(64, 64), np.full((64, 64), 0xFFFF)], axis=2)
    expected = np.rint(np.arange(4096) * 255 / 4095).reshape(64, 64)
    for interlaced in (False, True):
        np.testing.assert_array_equal(decode(io.BytesIO(png(samples, GRAY_ALPHA, 16, interlaced=interlaced))), expected)
    for position in range(16, 33):  # another parser reads this header, and still checks its checksum
        data = bytearray(png(samples, GRAY_ALPHA, 16))
        data[position] ^= 1
        assert refusal(bytes(data)).code == "unreadable"


# ---- lossy kinds and the compressions of DICOM

LOSSY: dict[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved(GRAY_IMAGE, "JPEG"),
    "progressive jpeg": lambda: saved(GRAY_IMAGE, "JPEG", progressive=True),
    "rgb jpeg": lambda: saved(GRAY_IMAGE.convert("RGB"), "JPEG"),
    "cmyk jpeg": lambda: saved(GRAY_IMAGE.convert("CMYK"), "JPEG"),
    "jpeg in dicom": lambda: encapsulated(saved(GRAY_IMAGE, "JPEG"), JPEG),
    "jpeg 2000 in dicom": lambda: encapsulated(
        saved(GRAY_IMAGE, "JPEG2000", no_jp2=True, irreversible=True, quality_layers=[4]), J2K
    ),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_kinds_stay_close(name: str) -> None:
    difference = np.abs(decode(io.BytesIO(LOSSY[name]())).astype(int) - GRAY)
    assert difference[10:].mean() < 4.5, (
        "the noise is of 6 gray levels; the first rows, every value in turn, are no picture"
    )


@pytest.mark.parametrize(("syntax", "predictor"), [(JPEG_LOSSLESS, 1), (JPEG_LOSSLESS, 2), (JPEG_LOSSLESS_SV1, 1)])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_lossless_jpeg_in_dicom(bits: int, syntax: str, predictor: int) -> None:
    rng = np.random.default_rng(bits)
    stored = rng.integers(0, 1 << bits, (60, 45), dtype=np.uint16)
    stored.flat[:2] = 0, (1 << bits) - 1
    expected = np.rint(stored * (255 / ((1 << bits) - 1)))
    data = encapsulated(jpeg_lossless(stored, bits, predictor), syntax, bits=bits)
    np.testing.assert_array_equal(decode(io.BytesIO(data)), expected)


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, RLE, J2K_LOSSLESS])
def test_deep_dicom_in_lossless_syntaxes(syntax: str, bits: int) -> None:
    stored = np.random.default_rng(bits).integers(0, 1 << bits, (60, 45), dtype=np.uint16)
    low, high = int(stored.min()), int(stored.max())
    expected = np.rint((stored.astype(float) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(decode(io.BytesIO(dicom(stored, bits=bits, syntax=syntax))), expected)


COMPRESSED = [str(uid) for uid in AllTransferSyntaxes if uid.is_encapsulated]
DECODED = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)} | {RLE}


@pytest.mark.parametrize("syntax", COMPRESSED)
def test_every_compressed_syntax_is_decoded_or_refused(syntax: str) -> None:
    """The data are invalid. With a decoder the error is about the data, otherwise about the syntax."""
    refused = refusal(encapsulated(b"\xff\xd8rubbish", syntax))
    if syntax in DECODED:
        assert refused.code == "unreadable"
    else:
        assert (
            str(refused)
            == "out_of_scope: a DICOM with an unsupported compression; store it uncompressed or as JPEG 2000"
        )


def test_12_bit_jpeg_in_dicom() -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (6, 5))
    stored.flat[:2] = 0, 4095
    data = encapsulated(flat_jpeg(stored, 12), JPEG_EXTENDED, bits=12, Rows=48, Columns=40)
    expected = np.kron(np.rint(stored * (255 / 4095)), np.ones((8, 8)))
    np.testing.assert_array_equal(decode(io.BytesIO(data)), expected)


@pytest.mark.shared
def test_jpeg_ls_and_htj2k_decode_to_a_smooth_image(hostile: Path) -> None:
    """No encoder for them is installed, so these files come from elsewhere."""
    for name in ("JLSL_08_07_0_1F", "JLSL_16_15_1_1F", "HTJ2KLossless_08_RGB"):
        gray = decode(hostile / f"dicom/{name}.dcm").astype(int)
        assert np.ptp(gray) > 200
        assert np.abs(np.diff(gray, axis=1)).mean() < 12


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for values in (GRAY, DEEP):
        data = saved(Image.fromarray(values), kind, exif=exif)
        np.testing.assert_array_equal(decode(io.BytesIO(data)), UPRIGHT[orientation](GRAY))


def test_transparency_is_composed_over_black() -> None:
    alpha = np.tile(np.array([0, 128, 255], np.uint8), (60, 15))
    data = saved(Image.merge("LA", [GRAY_IMAGE, Image.fromarray(alpha)]), "PNG")
    np.testing.assert_allclose(decode(io.BytesIO(data)), GRAY * (alpha / 255), atol=0.51)
    keyed = decode(io.BytesIO(saved(GRAY_IMAGE, "PNG", transparency=200)))
    np.testing.assert_array_equal(keyed, np.where(GRAY == 200, 0, GRAY))
    keyed = decode(io.BytesIO(saved(Image.fromarray(DEEP), "PNG", transparency=1000 + 200 * 100)))
    np.testing.assert_array_equal(keyed, np.where(GRAY == 200, 0, GRAY))


def test_colors_are_converted_to_luma() -> None:
    colors = np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    luma = colors @ np.array([0.299, 0.587, 0.114])
    for data in (saved(Image.fromarray(colors), "PNG"), dicom(colors), dicom(colors, syntax=J2K_LOSSLESS)):
        np.testing.assert_allclose(decode(io.BytesIO(data)), luma, atol=0.51)


def test_deep_values_are_scaled_without_saturation() -> None:
    values = np.random.default_rng(2).integers(300, 60000, (20, 30), dtype=np.uint16)
    expected = np.rint((values - values.min()) * 255.0 / (int(values.max()) - int(values.min())))
    for data in (saved(Image.fromarray(values), "PNG"), dicom(values, bits=16)):
        np.testing.assert_array_equal(decode(io.BytesIO(data)), expected)
    assert not decode(io.BytesIO(saved(Image.fromarray(np.full((5, 5), 40000, np.uint16)), "PNG"))).any()
    holes = np.array([[np.nan, 1, 2], [3, np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(
        decode(io.BytesIO(saved(Image.fromarray(holes), "TIFF"))), [[0, 0, 128], [255, 255, 0]]
    )


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("width", ["1", "2", "900", "4000"])
def test_windows_agree_with_pydicom(function: str, width: str) -> None:
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    data = dicom(ramp, bits=12, Modality="DX", WindowCenter="1800", WindowWidth=width, VOILUTFunction=function)
    with np.errstate(over="ignore"):
        reference = apply_windowing(ramp, pydicom.dcmread(io.BytesIO(data))) / 4095 * 255
    np.testing.assert_allclose(decode(io.BytesIO(data)), reference, atol=0.51)


def test_lookup_tables_are_applied() -> None:
    stored = np.arange(100, 200, dtype=np.uint16).reshape(10, 10)
    table = Dataset()
    table.LUTDescriptor = [
        50,
        120,
        12,
    ]  # 50 entries from 120 on; the last one, 1000, is white although entries have 12 bits
    table.add_new("LUTData", "US", [int(entry) for entry in np.linspace(0, 1000, 50)])
    expected = np.rint(np.array(table.LUTData)[np.clip(stored.astype(int) - 120, 0, 49)] * 255 / 1000)
    voi = dicom(stored, bits=16, VOILUTSequence=Sequence([table]))
    np.testing.assert_array_equal(decode(io.BytesIO(voi)), expected)
    table.LUTDescriptor = [50, 120, 16]
    modality = dicom(stored, bits=16, ModalityLUTSequence=Sequence([table]))
    np.testing.assert_array_equal(decode(io.BytesIO(modality)), expected)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_excluded_from_scaling(photometric: str) -> None:
    stored = 27500 - DEEP if photometric == "MONOCHROME1" else DEEP.copy()
    stored[50:] = 65535
    values: dict[str, Any] = {"PixelPaddingValue": 65535, "PhotometricInterpretation": photometric}
    expected = np.where(stored == 65535, 0, GRAY)
    np.testing.assert_array_equal(decode(io.BytesIO(dicom(stored, bits=16, **values))), expected)


def test_dicom_palette_is_applied() -> None:
    values: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for color, factor in (("Red", 1.0), ("Green", 0.5), ("Blue", 0.25)):
        values[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        values[f"{color}PaletteColorLookupTableData"] = (np.arange(256) * factor).astype(np.uint8).tobytes()
    luma = 0.299 * GRAY + 0.587 * (GRAY // 2) + 0.114 * (GRAY // 4)
    np.testing.assert_allclose(decode(io.BytesIO(dicom(GRAY, **values))), luma, atol=0.51)


def test_read_equals_decode_with_pillow_antialiased_bilinear(tmp_path: Path) -> None:
    path = tmp_path / "a wrist.jpg"  # a PNG, despite its name
    path.write_bytes(saved(GRAY_IMAGE, "PNG"))
    expected = np.asarray(GRAY_IMAGE.resize((32, 32), Image.Resampling.BILINEAR))
    file = io.BytesIO(path.read_bytes())
    file.seek(17)
    for source in (path, str(path), os.fsencode(path), file):
        np.testing.assert_array_equal(read(source, 32), expected)
    assert read(path, 32).dtype == np.uint8


# ---- refusals


def bomb_png(width: int, height: int) -> bytes:
    header = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 9, b"IDAT") + bytes(13)


def bomb_in_dicom(syntax: str) -> bytes:
    """Return a DICOM whose header gives 60 x 45, with a codestream of 60,000 x 60,000."""
    kind, options = ("JPEG", {}) if syntax == JPEG else ("JPEG2000", {"no_jp2": True})
    frame = bytearray(saved(GRAY_IMAGE, kind, **options))
    if syntax == JPEG:
        struct.pack_into(">HH", frame, frame.index(b"\xff\xc0") + 5, 60000, 60000)
    else:
        struct.pack_into(">IIII", frame, 8, 60000, 60000, 0, 0)
        struct.pack_into(">II", frame, 24, 60000, 60000)
    return encapsulated(bytes(frame), syntax)


GIF, BMP, WEBP = (lambda kind=kind: saved(GRAY_IMAGE, kind) for kind in ("GIF", "BMP", "WEBP"))
REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "not_image", "the file is empty"),
    "text": (lambda: b"patient,label\n", "not_image", "first bytes are not those of an image"),
    "web page": (lambda: b"<!DOCTYPE html>", "not_image", "web page"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "not_image", "Git LFS pointer"),
    "appledouble": (lambda: b"\0\x05\x16\x07" + bytes(80), "not_image", "AppleDouble"),
    "gif": (GIF, "out_of_scope", "a GIF"),
    "bmp": (BMP, "out_of_scope", "a BMP"),
    "webp": (WEBP, "out_of_scope", "a WebP"),
    "signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "unreadable", "its PNG data is corrupt, truncated"),
    "our limit": (lambda: bomb_png(60000, 1000), "too_large", f"60000 x 1000 pixels, more than {MAX_PIXELS:,}"),
    "pillow's limit": (lambda: bomb_png(60000, 60000), "too_large", f"has more than {MAX_PIXELS:,} pixels"),
    "dicom limit": (lambda: dicom(GRAY, Rows=60000, Columns=1000), "too_large", "60000 pixels, more than"),
    "jpeg bomb in dicom": (lambda: bomb_in_dicom(JPEG), "unreadable", "header and the image inside differ in size"),
    "j2k bomb in dicom": (lambda: bomb_in_dicom(J2K), "unreadable", "header and the image inside differ in size"),
    "ct": (lambda: dicom(GRAY, Modality="CT"), "out_of_scope", "its DICOM modality is none of CR, DX"),
    "foreign object": (lambda: dicom(GRAY, Modality=None, SOPClassUID="1.2.840.1"), "out_of_scope", "modality"),
    "frames": (lambda: dicom(np.vstack([GRAY] * 2), Rows=60, NumberOfFrames=2), "out_of_scope", "several frames"),
    "for processing": (lambda: dicom(GRAY, PresentationIntentType="FOR PROCESSING"), "out_of_scope", "raw detector"),
    "for processing class": (lambda: dicom(GRAY, SOPClassUID=DX_PROCESSING), "out_of_scope", "raw detector data"),
    "deflated": (lambda: dicom(GRAY, syntax=DEFLATED), "out_of_scope", "a deflated DICOM; store it uncompressed"),
    "report": (
        lambda: dicom(GRAY, Rows=None, Columns=None, PixelData=None, SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1"),
        "out_of_scope",
        "without an image",
    ),
    "no pixels": (lambda: dicom(GRAY, PixelData=None), "unreadable", "its DICOM data is corrupt, truncated"),
    "short pixels": (lambda: dicom(GRAY, PixelData=b"\0" * 1000), "unreadable", "its DICOM data is corrupt, truncated"),
    "no header": (lambda: bytes(128) + b"DICM", "unreadable", "DICOM header is corrupt or truncated"),
    "nonsense sizes": (lambda: dicom(GRAY, SamplesPerPixel=60000), "unreadable", "60000 samples per pixel"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_has_code_and_reason(name: str) -> None:
    make, code, text = REFUSED[name]
    refused = refusal(make())
    assert (refused.code, text in refused.reason) == (code, True), refused
    assert str(refused) == f"{code}: {refused.reason}"


def test_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    def reason(path: Any) -> str:
        with pytest.raises(UnreadableFileError) as caught:
            read(path, 8)
        assert read_identity(path) is None
        return str(caught.value)

    assert reason(tmp_path / "none.png") == "unreadable: cannot be opened: no such file or directory"
    assert reason(tmp_path) == "unreadable: cannot be opened: not a regular file"
    assert reason("a\0b") == "unreadable: cannot be opened: not a usable path"
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert reason(tmp_path / "sparse.png") == f"too_large: the file is larger than {MAX_BYTES:,} bytes"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UnreadableFileError, match="not a regular file"):
        read(tmp_path / "pipe.png", 8)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root opens everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch(mode=0)
    with pytest.raises(UnreadableFileError, match="cannot be opened: permission denied"):
        read(tmp_path / "a.png", 8)


def test_memory_error_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(raster, "decode", fail)
    assert refusal(saved(GRAY_IMAGE, "PNG")).code == "too_large"


def test_unreadable_file_error_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(UnreadableFileError("too_large", "why")))
    assert (again.code, again.reason) == ("too_large", "why")


# ---- corrupt files

SEEDS = {name: SAME[name]() for name in ("gray png", "16-bit png", "tiff", "lzw tiff", "jpeg 2000", "dicom")} | {
    "jpeg": saved(GRAY_IMAGE, "JPEG"),
    "progressive jpeg": saved(GRAY_IMAGE, "JPEG", progressive=True),
    "rle dicom": SAME["rle dicom"](),
    "jpeg 2000 dicom": SAME["jpeg 2000 dicom"](),
}


@pytest.mark.parametrize("name", SEEDS)
def test_truncated_file_is_complete_or_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The same holds for a tail of zeros, in kinds that have checksums or end markers."""
    data = SEEDS[name]
    complete, codes = decode(io.BytesIO(data)), set()
    zeros_tell = "png" in name or "jpeg" in name
    first = 400 if "dicom" in name else 1  # a truncated UID is a different UID, so a very short DICOM is "out of scope"
    for end in range(first, len(data), max(1, len(data) // 60)):
        for tail in (0, len(data) - end) if zeros_tell else (0,):
            try:
                np.testing.assert_array_equal(decode(io.BytesIO(data[:end] + bytes(tail))), complete)
            except UnreadableFileError as refused:
                codes.add(refused.code)
    assert "unreadable" in codes
    assert codes <= {"not_image", "unreadable"}
    assert capfd.readouterr().err == "", "a library printed on stderr"


def test_flipped_bit_in_png_pixels_is_refused() -> None:
    data = SEEDS["gray png"]
    start = data.index(b"IDAT") + 4
    for position in range(start, len(data) - 12, 37):
        assert refusal(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]).code == "unreadable"


# ---- identity, imports


def output(tmp_path: Path, data: bytes) -> radiograph.DicomIdentity | None:
    path = tmp_path / "image"
    path.write_bytes(data)
    return read_identity(path)


PLAIN = {"SOPClassUID": CR, "Modality": "CR"}


def region(scheme: str, code: str) -> Any:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code, scheme, "Doe^Jane"
    return Sequence([item])


def raw(data: bytes, tag: bytes, kind: bytes, value: bytes) -> bytes:
    """Replace the VR and the value of the first element with that tag."""
    position = data.index(tag)
    (length,) = struct.unpack_from("<H", data, position + 6)
    return data[: position + 4] + kind + struct.pack("<H", len(value)) + value + data[position + 8 + length :]


def test_identity_is_read_from_the_header(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(dicom(GRAY, **PLAIN, StudyInstanceUID="1.2.9", BodyPartExamined="WRIST", ImageLaterality="L"))
    assert read_identity(path) == radiograph.DicomIdentity("1.2.9", "WRIST", "L")
    path.write_bytes(dicom(GRAY, **PLAIN, Laterality="R", ImageLaterality="L"))
    assert read_identity(os.fsencode(path)) == radiograph.DicomIdentity("", "", "L"), (
        "the image's own before its series'"
    )
    path.write_bytes(dicom(GRAY, **PLAIN, StudyInstanceUID="1.2.9", syntax=J2K_LOSSLESS)[:-900])
    assert read_identity(str(path)) == radiograph.DicomIdentity("1.2.9", "", ""), "the header is complete"
    path.write_bytes(saved(GRAY_IMAGE, "PNG"))
    assert read_identity(path) is None
    actual = radiograph.DicomIdentity("1.2.9", "WRIST", "L", True)
    assert pickle.loads(pickle.dumps(actual)) == actual


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize(
    ("values", "body_part", "laterality"),
    [
        ({"BodyPartExamined": " wrist ", "Laterality": "l "}, "WRIST", "L"),
        ({"BodyPartExamined": "Upper_Arm", "Laterality": "right"}, "UPPER ARM", "R"),
        ({"BodyPartExamined": ["HAND", "WRIST"], "Laterality": ["L", "R"]}, "HAND\\WRIST", "L\\R"),
        ({"BodyPartExamined": "", "ImageLaterality": "U"}, "", "U"),
        ({"BodyPartExamined": "HIP", "AnatomicRegionSequence": region("SRT", "T-D8600")}, "HIP", ""),
        ({"AnatomicRegionSequence": region("SRT", "T-D8600")}, "WRIST", ""),
        ({"AnatomicRegionSequence": region("SCT", " 16953009 ")}, "ELBOW", ""),
        ({"BodyPartExamined": "HAND", "AnatomicRegionSequence": region("SCT", "74670003")}, "HAND", ""),
        ({"AnatomicRegionSequence": region("LN", "74670003")}, "", ""),
        ({"AnatomicRegionSequence": region("SCT", "Doe^Jane")}, "", ""),
        ({"AnatomicRegionSequence": Sequence([])}, "", ""),
        ({"AnatomicRegionSequence": Sequence([*region("SCT", "74670003"), *region("SCT", "16953009")])}, "", ""),
    ],
)
def test_identity_is_normalized(tmp_path: Path, values: dict[str, Any], body_part: str, laterality: str) -> None:
    assert output(tmp_path, dicom(GRAY, **PLAIN, **values)) == radiograph.DicomIdentity("", body_part, laterality)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "value"), [(b"DS", b"WRIST "), (b"US", b"abc"), (b"IS", b"9e9 "), (b"UI", b"\xff\0")])
@pytest.mark.parametrize("tag", [b"\x18\0\x15\0", b"\x20\0\x60\0", b"\x20\0\x0d\0"])
def test_element_of_the_wrong_vr_affects_only_itself(tmp_path: Path, tag: bytes, kind: bytes, value: bytes) -> None:
    names = {"StudyInstanceUID": "1.2.9", "BodyPartExamined": "HAND", "Laterality": "L"}
    sound = dicom(GRAY, **PLAIN, **names)
    actual = output(tmp_path, raw(sound, tag, kind, value))
    assert actual is not None
    fields = (actual.study_uid, actual.body_part, actual.laterality)
    assert sum(value == expected for value, expected in zip(fields, names.values(), strict=True)) >= 2


@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"BurnedInAnnotation": "NO"}, False),
        ({"BurnedInAnnotation": " no "}, False),
        ({"BurnedInAnnotation": ""}, False),
        ({"BurnedInAnnotation": "YES"}, True),
        ({"BurnedInAnnotation": "yes "}, True),
        ({"BurnedInAnnotation": "Y"}, True),
        ({"BurnedInAnnotation": ["NO", "YES"]}, True),
        ({"Modality": "OT"}, True),
        ({"Modality": "sc "}, True),
        ({"Modality": "RG"}, False),
        ({"SOPClassUID": SC}, True),
        ({"SOPClassUID": f"{SC}.4"}, True),
        ({"SOPClassUID": SC, "BurnedInAnnotation": "NO"}, True),
        ({"ConversionType": "DF"}, True),
    ],
)
def test_may_show_text_follows_annotation_modality_and_class(
    tmp_path: Path, values: dict[str, Any], expected: bool
) -> None:
    actual = output(tmp_path, dicom(GRAY, **PLAIN | values))
    assert actual is not None
    assert actual.may_show_text is expected


def test_partially_read_header_may_show_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first HEADER_BYTES of a large file are read."""
    large = dicom(np.zeros((400, 400), np.uint8), **PLAIN, StudyInstanceUID="1.2.9", BurnedInAnnotation="YES")
    far = dicom(GRAY, **PLAIN, StudyInstanceUID="1.2.9", ImageComments="x" * 5000, BurnedInAnnotation="YES")
    sound = dicom(np.zeros((400, 400), np.uint8), **PLAIN, StudyInstanceUID="1.2.9")
    monkeypatch.setattr(radiograph, "HEADER_BYTES", 3000)
    assert [output(tmp_path, data).may_show_text for data in (large, far, sound)] == [True, True, False]
    for at in range(140, len(far), 97):  # any end of the first block
        monkeypatch.setattr(radiograph, "HEADER_BYTES", at)
        assert output(tmp_path, far).may_show_text, at


def test_unparsable_header_may_show_text(tmp_path: Path) -> None:
    deflated = dicom(GRAY, syntax=DEFLATED, BurnedInAnnotation="YES")
    assert output(tmp_path, deflated) == radiograph.DicomIdentity("", "", "", True)


@pytest.mark.shared
def test_identity_of_real_dicoms(shared: Path) -> None:
    """Ten hips of ten studies. Their headers name no body part."""
    actual = [read_identity(path) for path in sorted((shared / "radiographs/jordan-hip-dicom").glob("*.dcm"))]
    assert len({identity.study_uid for identity in actual if identity}) == 10
    assert {(identity.body_part, identity.laterality, identity.may_show_text) for identity in actual if identity} == {
        ("", "", False)
    }


# ---- the body part


@pytest.mark.parametrize("study_type", mura.STUDY_TYPES)
@pytest.mark.parametrize("shape", ["{}", "{} ", "{}s", "left {}", "{} LT", "R_{}", "{}\0"])
def test_body_part_spellings_of_every_study_type(study_type: str, shape: str) -> None:
    word = study_type.removeprefix("XR_")
    assert (
        body_parts.find_study_type(shape.format(word))
        == body_parts.find_study_type(shape.format(word.lower()))
        == study_type
    )


VOCABULARY = "CLAVICLE HIP KNEE ANKLE FOOT PELVIS CHEST ARM LEG FEMUR SKULL HANDWRIST JANE L S"
PHRASES = ["", "HAND\\WRIST", "NO HAND AT ALL", "HAND JANE", "DOE^JANE", "XR_JANE"]


@pytest.mark.parametrize("phrases", [*PHRASES, *VOCABULARY.split()])
def test_other_body_parts_have_no_study_type(phrases: str) -> None:
    assert body_parts.find_study_type(phrases) is None


def test_anatomic_codes_agree_with_pydicom() -> None:
    """Both schemes in pydicom's dictionaries name the same regions as the table."""
    from pydicom.sr import _concepts_dict, _snomed_dict

    for code, own in body_parts._SRT.items():
        concept = _snomed_dict.mapping["SRT"][code]
        assert (
            body_parts.body_part_of_code("SRT", code)
            == body_parts.body_part_of_code("SNM3", code)
            == body_parts.body_part_of_code("SCT", concept)
            == own
        )
        assert body_parts.find_study_type(own), own
    assert {body_parts.find_study_type(own) for own in body_parts._SCT.values()} == set(mura.STUDY_TYPES)
    concepts = _concepts_dict.concepts["SCT"]
    names = (
        "ElbowJoint",
        "Finger",
        "Thumb",
        "Forearm",
        "RadiusAndUlna",
        "Ulna",
        "Hand",
        "Humerus",
        "UpperArm",
        "Shoulder",
    )
    own = [body_parts.body_part_of_code("SCT", next(iter(concepts[name]))) for name in (*names, "WristJoint", "Carpus")]
    expected = "ELBOW FINGER THUMB FOREARM RADIUSULNA ULNA HAND HUMERUS UPPERARM SHOULDER WRIST WRIST"
    assert own == expected.split()


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "default", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def test_pydicom_is_imported_for_dicom_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(saved(GRAY_IMAGE, "PNG"))
    (tmp_path / "b").write_bytes(dicom(GRAY))
    code = """
import sys
from mura_dist.data import radiograph
heavy = lambda: sorted({"torch", "cv2", "matplotlib", "onnx", "pydicom"} & set(sys.modules))
radiograph.read(sys.argv[1], 8); print(heavy())
radiograph.read(sys.argv[2], 8); print(heavy())
"""
    assert run_python(code, str(tmp_path / "a"), str(tmp_path / "b")).stdout == "[]\n['pydicom']\n"


# ---- real and hostile files

# Every file of shared/hostile: (outcome, reason, patterns of files). The first group with a matching pattern counts, so
# exceptions precede their kind.
HOSTILE: list[tuple[str, str, str]] = [
    # -- no images
    ("not_image", "macOS's notes about another file, under that file's name", "appledouble/*"),
    ("not_image", "no bytes", "generated/zero_byte.png"),
    ("not_image", "a server's page, saved under a picture's name", "generated/html_error_page.png"),
    ("not_image", "a Git LFS pointer", "generated/git_lfs_pointer.png"),
    (
        "not_image",
        "a transfer as text has changed or dropped bytes of the signature, which exists to detect this",
        "pngsuite/xs1n0g01.png pngsuite/xs4n0g01.png pngsuite/xcrn0g04.png pillow/pngtest_bad.png.bin",
    ),
    # -- images that are no radiographs
    ("out_of_scope", "ultrasound (US)", "dicom/JPGLosslessP14SV1_1s_1f_8b.dcm dicom/OBXXXX1A_rle.dcm"),
    ("out_of_scope", "magnetic resonance, ten frames", "dicom/emri_small_jpeg_*.dcm"),
    (
        "out_of_scope",
        "GIF and icon: no formats of radiographs, for any declared size",
        "pillow/*.gif pillow/*.ico",
    ),
    # -- more declared pixels than MAX_PIXELS
    (
        "too_large",
        "900, 3,600 and 10,000 million pixels in the header, behind a file of 200 to 900,000 bytes",
        "generated/bomb_30000x30000_gray8.png generated/bomb_60000x60000_1bit.png generated/bomb_header_100000x100000.png",
    ),
    # -- missing or wrong pixels: a radiograph with a black or noisy half would be classified as if it were complete
    ("unreadable", "the signature and nothing behind it", "generated/header_only_8_bytes.png"),
    (
        "unreadable",
        "cut in its pixels",
        "generated/truncated_*pct* pillow/truncated_image.png pillow/truncated_jpeg.jpg",
    ),
    ("unreadable", "cut within the head of a chunk, before the pixels' end", "pillow/truncated_end_chunk.png"),
    ("unreadable", "the signature, and noise behind it", "pillow/broken.png"),
    ("unreadable", "an animation of no frame: a header without pixels", "pillow/apng_syntax_num_frames_zero.png"),
    ("unreadable", "corruption in the compressed stream of the pixels", "pillow/broken_data_stream.png"),
    ("unreadable", "a width or height of 0", "pillow/zero_height.j2k"),
    (
        "unreadable",
        "an impossible color type (1), bit depth (0, 99) or a header that belies its checksum",
        "pngsuite/xc1n0g08.png pngsuite/xd0n2c08.png pngsuite/xd9n2c08.png pngsuite/xhdn0g08.png",
    ),
    ("unreadable", "JPEG of 12 bits outside of DICOM: Pillow has no decoder for it", "libjpeg_turbo/monkey12.jpg"),
    # -- oddities around complete pixels: the pixels count
    ("read", "all pixels are present, only the end marker is missing", "generated/truncated_last_12_bytes.png"),
    (
        "read",
        "complete, with bytes behind the end or between the chunks that decoders ignore",
        "generated/trailing_garbage.png pillow/hopper_idat_after_image_end.png",
    ),
    ("read", "the first bytes determine the kind, not the name", "generated/*_inside.*"),
    ("read", "the name has a space, an accent, capitals", "generated/image1?copy*.PNG"),
    (
        "read",
        "valid extreme sizes: a single pixel, 4000 x 3, one value throughout",
        "generated/one_pixel.png generated/extreme_aspect_4000x3.png generated/all_black.png pillow/tRNS_null_1x1.png",
    ),
    (
        "read",
        "EXIF, XMP, Adobe segment, color profile or quantization tables corrupt or odd; the pixels are complete",
        "pillow/*exif* pillow/truncated_app14.jpg pillow/icc_profile_big.jpg pillow/hopper_16bit_qtables.jpg pillow/xmp_*",
    ),
    (
        "read",
        "an animation's default picture is a complete PNG",
        "pillow/apng_mode_*.png pillow/apng_single_frame_default.png",
    ),
    # -- supported kinds; test_files_of_one_group_have_identical_pixels and the tests below it compare the pixels
    (
        "read",
        "gray, palette, alpha, 1 bit, CMYK, progressive, turned by EXIF: one radiograph in many kinds",
        "generated/*",
    ),
    ("read", "baseline JPEG by other encoders, PNG of 16 bits in color", "libjpeg_turbo/*"),
    (
        "read",
        "the kinds Pillow writes for its own tests: transparency, palettes, 16 bits, eight EXIF orientations",
        "pillow/*",
    ),
    ("read", "computed radiography in JPEG 2000, MONOCHROME1", "dicom/RG?_J2K?.dcm"),
    ("read", "secondary captures (class SC, or modality OT): JPEG-LS, HTJ2K, palette, 16 bits in color", "dicom/*"),
    (
        "read",
        "the format's own test set: depths, color types, interlace, filters, sizes, gamma, order of chunks",
        "pngsuite/*",
    ),
]


def expected_outcome(name: str) -> str:
    """Return the outcome that HOSTILE lists for a file."""
    for code, _, phrases in HOSTILE:
        if any(fnmatch.fnmatchcase(name, word) for word in phrases.split()):
            return code
    raise AssertionError(f"{name} is in no group of HOSTILE")


@pytest.fixture
def hostile(shared: Path) -> Path:
    return shared / "hostile"


@pytest.mark.shared
def test_read_details_agrees_with_read(shared: Path, hostile: Path) -> None:
    """For every file that decodes, from a path and from memory. A colored file has a sample of its colors."""
    paths = [path for path in sorted(hostile.rglob("*")) if path.is_file()]
    paths += sorted((shared / "radiographs").rglob("*.png"))[::40] + sorted((shared / "radiographs").rglob("*.dcm"))[:2]
    num_colored = 0
    for path in paths:
        refusal = None
        try:
            expected = radiograph.read(path, 32)
        except radiograph.UnreadableFileError as error:
            refusal = str(error)
        if refusal is not None:
            with pytest.raises(radiograph.UnreadableFileError, match=re.escape(refusal)):
                radiograph.read_details(path, 32)
            continue
        complete = radiograph.decode(path)
        for source in (path, io.BytesIO(path.read_bytes())):
            actual = radiograph.read_details(source, 32, 100)
            np.testing.assert_array_equal(actual.image, expected)
            assert actual.display.dtype == np.uint8
            assert max(actual.display.shape) == min(100, max(complete.shape))
            assert actual.colors is None or actual.colors.shape[2:] == (3,)
        assert radiograph.read_details(path, 32).display is None
        num_colored += actual.colors is not None
    assert 20 < num_colored < len(paths)


@pytest.mark.shared
def test_hostile_files_have_the_listed_outcome(hostile: Path) -> None:
    with open(hostile / "what-each-is.csv", newline="", encoding="utf-8") as file:
        names = [line["file"] for line in csv.DictReader(file)]
    assert len(names) == 180
    assert {name: outcome((hostile / name).read_bytes()) for name in names} == {
        name: expected_outcome(name) for name in names
    }


@pytest.mark.shared
def test_every_pattern_of_the_hostile_table_matches_a_file(hostile: Path) -> None:
    names = [path.relative_to(hostile).as_posix() for path in hostile.rglob("*")]
    phrases = [word for _, _, group in HOSTILE for word in group.split()]
    assert [word for word in phrases if not fnmatch.filter(names, word)] == []


@pytest.mark.shared
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_hostile_files_need_little_memory_and_print_nothing(hostile: Path) -> None:
    """The limit is 300 MiB above the interpreter with NumPy and Pillow. Measured: 59 MiB, half of it for pydicom."""
    code = """
import re, sys
from pathlib import Path
from mura_dist.data import radiograph
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # ru_maxrss includes the parent's
before = peak()
for path in sorted(Path(sys.argv[1]).rglob("*.*")):
    radiograph.read_identity(path)
    try:
        radiograph.read(path, 320)
    except radiograph.UnreadableFileError as refused:
        assert "\\n" not in refused.reason and path.name not in refused.reason and len(refused.reason) < 100, refused
print((peak() - before) // 1024)
"""
    done = run_python(code, str(hostile))
    assert done.stderr == ""
    assert 10 <= int(done.stdout) <= 300, "MiB; pydicom alone takes 30"


SAME_PIXELS = [
    "generated/png_inside.jpg generated/jpeg_inside.png generated/radiograph_gray_alpha.png "
    "generated/radiograph_palette.png generated/trailing_garbage.png generated/truncated_last_12_bytes.png",
    "pillow/16bit.cropped.jp2 pillow/16bit.cropped.tif",
    "pillow/hopper.png pillow/hopper.tif pillow/hopper_idat_after_image_end.png",
    "pillow/i_trns.png pillow/l_trns.png",
    "pillow/p_trns_single.png pillow/rgb_trns.png",
    # PngSuite: interlaced (basi, bgai) and not, in one chunk or many, each filter of text, background and compression.
    "pngsuite/basi0g16.png pngsuite/oi1n0g16.png pngsuite/oi2n0g16.png pngsuite/oi4n0g16.png pngsuite/oi9n0g16.png",
    "pngsuite/basi2c16.png pngsuite/pp0n2c16.png",
    "pngsuite/basn4a08.png pngsuite/bgai4a08.png pngsuite/bgbn4a08.png",
    "pngsuite/basn6a08.png pngsuite/bgan6a08.png pngsuite/bgwn6a08.png",
    "pngsuite/basn0g08.png pngsuite/ps1n0g08.png pngsuite/ps2n0g08.png",
    "pngsuite/cm0n0g04.png pngsuite/cm9n0g04.png pngsuite/ct1n0g04.png pngsuite/ctzn0g04.png",
    "pngsuite/z00n2c08.png pngsuite/z06n2c08.png",
]


@pytest.mark.shared
@pytest.mark.parametrize("group", SAME_PIXELS)
def test_files_of_one_group_have_identical_pixels(group: str, hostile: Path) -> None:
    first, *remaining = (decode(hostile / name) for name in group.split())
    for image in remaining:
        np.testing.assert_array_equal(image, first)


def difference(first: Path, second: Path) -> float:
    """Return the mean absolute difference in gray levels."""
    return float(np.abs(decode(first).astype(int) - decode(second)).mean())


@pytest.mark.shared
def test_lossy_and_rotated_copies_stay_close(hostile: Path) -> None:
    generated, pillow = hostile / "generated", hostile / "pillow"
    for name in ("radiograph_progressive.jpg", "radiograph_cmyk.jpg", "radiograph_exif_orientation6.jpg"):
        assert difference(generated / name, generated / "png_inside.jpg") < 0.5
    for orientation in range(2, 9):  # without the rotation it is at least 40
        assert difference(pillow / f"hopper_orientation_{orientation}.jpg", pillow / "hopper.png") < 4
    assert difference(hostile / "dicom/RG3_J2KI.dcm", hostile / "dicom/RG3_J2KR.dcm") < 0.5


@pytest.mark.shared
def test_monochrome1_bone_is_bright(hostile: Path) -> None:
    leg = read(hostile / "dicom/RG3_J2KR.dcm", 100).astype(int)
    assert leg[20:60, 55:58].mean() > leg[20:60, 28:31].mean() + 60, "the shaft, and the air beside the leg"


@pytest.mark.shared
def test_16_bit_radiographs_keep_their_range(shared: Path) -> None:
    wrists = [path for path in (shared / "radiographs/grazpedwri").glob("*.png") if Image.open(path).mode == "I;16"]
    assert len(wrists) == 2
    for path in wrists:
        gray = decode(path)
        assert (gray.min(), gray.max()) == (0, 255)
        assert np.mean(gray == 255) < 0.001
        assert len(np.unique(gray)) > 200


@pytest.mark.shared
def test_dicom_and_jpeg_of_one_radiograph_agree(shared: Path) -> None:
    pairs = sorted((shared / "radiographs/jordan-hip-dicom").glob("*.dcm"))
    assert len(pairs) == 10
    for path in pairs:
        if path.stem != "331_DDH_1":  # a different exposure as published: Pillow decodes its codestream equally
            assert difference(path, path.with_suffix(".jpg")) < 1.2
