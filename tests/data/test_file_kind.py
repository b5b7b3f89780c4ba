"""Test file_kind.py: an unsupported file is refused by its real kind, and a supported file is never taken for another kind."""

import bz2
import gzip
import io
import lzma
import pickle
import plistlib
import sqlite3
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from mura_dist.data.radiograph import UnreadableFileError, decode, read_identity

GRAY = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
FALSE_REASONS = ("corrupt, truncated", "first bytes are not those of an image format", "DICOM modality")


def by_pillow(kind: str, mode: str = "L") -> bytes:
    data = io.BytesIO()
    Image.fromarray(GRAY).convert(mode).save(data, kind)
    return data.getvalue()


def zipped(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("study1/image1.png"))
    return data.getvalue()


def by_numpy(save: Callable[..., None]) -> bytes:
    data = io.BytesIO()
    save(data, GRAY)
    return data.getvalue()


def database(path: Path = Path(":memory:")) -> bytes:
    connection = sqlite3.connect(path)
    connection.execute("create table study (name)")
    return connection.serialize()


def family(major: bytes, *compatible: bytes) -> bytes:
    """Return the first boxes of a file of the ISO base media family."""
    body = b"ftyp" + major + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(body) + 4) + body + struct.pack(">I4s", 8, b"mdat") + bytes(200)


def riff(kind: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 100) + kind + bytes(100)


def nifti(magic: bytes) -> bytes:
    return struct.pack("<I", 348) + bytes(340) + magic + bytes(100)


def jpeg_of(frame: int, bits: int = 8) -> bytes:
    """Return the tables, a comment and the frame header of a JPEG process that Pillow does not write."""
    head = b"\xff\xd8\xff\xfe\0\6CRCR\xff\xff\xdb" + struct.pack(">HB", 67, 0) + bytes(64)
    return head + b"\xff" + bytes([frame]) + struct.pack(">HBHHB", 11, bits, 24, 24, 1) + b"\1\x11\0" + bytes(99)


# name: (the file, the error code, a part of the reason)
EXPORT = "; export the radiograph as DICOM or PNG"
KINDS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "heic": (lambda: family(b"heic", b"mif1", b"heic"), "out_of_scope", "a HEIC picture, as phones take them" + EXPORT),
    "heic as mif1": (
        lambda: family(b"mif1", b"mif1", b"heic"),
        "out_of_scope",
        "a HEIC picture, as phones take them" + EXPORT,
    ),
    "heic sequence": (lambda: family(b"hevc", b"msf1"), "out_of_scope", "a HEIC picture, as phones take them" + EXPORT),
    "avif": (lambda: family(b"avif", b"mif1", b"miaf"), "out_of_scope", "an AVIF picture" + EXPORT),
    "avif as mif1": (lambda: family(b"mif1", b"avif"), "out_of_scope", "an AVIF picture" + EXPORT),
    "heif": (lambda: family(b"mif1", b"jpeg"), "out_of_scope", "a HEIF picture" + EXPORT),
    "mp4": (lambda: family(b"isom", b"iso2", b"avc1", b"mp41"), "not_image", "a video; it can be left out"),
    "quicktime": (lambda: family(b"qt  "), "not_image", "a video"),
    "old quicktime": (lambda: struct.pack(">I4s", 99, b"moov") + bytes(99), "not_image", "a video"),
    "matroska": (lambda: b"\x1aE\xdf\xa3" + bytes(99), "not_image", "a video"),
    "canon cr3": (lambda: family(b"crx ", b"isom"), "out_of_scope", "a camera's raw file" + EXPORT),
    "canon cr2": (lambda: b"II*\0\x10\0\0\0CR\2\0" + bytes(99), "out_of_scope", "a camera's raw file" + EXPORT),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(99), "out_of_scope", "a JPEG XL" + EXPORT),
    "jpeg xl box": (lambda: b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "out_of_scope", "a JPEG XL" + EXPORT),
    "jpeg xr": (lambda: b"II\xbc\1" + bytes(99), "out_of_scope", "a JPEG XR" + EXPORT),
    "exr": (lambda: b"v/1\1\2\0\0\0" + bytes(99), "out_of_scope", "an OpenEXR picture" + EXPORT),
    "photoshop": (lambda: b"8BPS\0\1" + bytes(99), "out_of_scope", "a Photoshop document" + EXPORT),
    "gif": (lambda: by_pillow("GIF"), "out_of_scope", "a GIF" + EXPORT),
    "bmp": (lambda: by_pillow("BMP"), "out_of_scope", "a BMP" + EXPORT),
    "webp": (lambda: by_pillow("WEBP"), "out_of_scope", "a WebP picture" + EXPORT),
    "icon": (lambda: by_pillow("ICO"), "out_of_scope", "an icon" + EXPORT),
    "tga": (lambda: by_pillow("TGA"), "out_of_scope", "a TGA picture" + EXPORT),
    "pnm": (lambda: by_pillow("PPM"), "out_of_scope", "a PNM picture" + EXPORT),
    "dds": (lambda: by_pillow("DDS", "RGB"), "out_of_scope", "a DDS, QOI or BPG picture" + EXPORT),
    "sgi": (lambda: by_pillow("SGI"), "out_of_scope", "an SGI or Sun picture" + EXPORT),
    "pdf": (lambda: by_pillow("PDF"), "out_of_scope", "a PDF" + EXPORT),
    "postscript": (lambda: by_pillow("EPS"), "out_of_scope", "a PostScript or DjVu document" + EXPORT),
    "nifti": (lambda: nifti(b"n+1\0"), "out_of_scope", "a NIfTI volume" + EXPORT),
    "nifti header": (lambda: nifti(b"ni1\0"), "out_of_scope", "a NIfTI volume" + EXPORT),
    "nifti 2": (
        lambda: struct.pack("<I", 540) + b"n+2\0\r\n\x1a\n" + bytes(540),
        "out_of_scope",
        "a NIfTI volume" + EXPORT,
    ),
    "analyze": (lambda: struct.pack("<I", 348) + bytes(34) + b"r" + bytes(310), "out_of_scope", "an Analyze volume"),
    "nrrd": (lambda: b"NRRD0004\ntype: short\n", "out_of_scope", "an NRRD or MetaImage volume" + EXPORT),
    "word": (lambda: zipped("[Content_Types].xml", "word/document.xml"), "out_of_scope", "an Office document" + EXPORT),
    "excel": (lambda: zipped("xl/workbook.xml", "[Content_Types].xml"), "out_of_scope", "an Office document" + EXPORT),
    "old word": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "out_of_scope", "an old Office document"),
    "npy": (lambda: by_numpy(np.save), "out_of_scope", "NumPy arrays" + EXPORT),
    "npz": (lambda: by_numpy(np.savez), "out_of_scope", "NumPy arrays" + EXPORT),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(99), "out_of_scope", "an HDF5 file" + EXPORT),
    "torch": (lambda: zipped("model/data.pkl"), "out_of_scope", "a PyTorch file" + EXPORT),
    "pickle": (lambda: pickle.dumps(GRAY), "out_of_scope", "a Python pickle" + EXPORT),
    "sqlite": (database, "out_of_scope", "a Parquet table or an SQLite database" + EXPORT),
    "zip": (lambda: zipped("study1/image1.png"), "not_image", "a ZIP archive; unpack it first"),
    "empty zip": (zipped, "not_image", "a ZIP archive; unpack it first"),
    "gzip": (lambda: gzip.compress(b"wrist"), "not_image", "a gzip file; unpack it first"),
    "bzip2": (lambda: bz2.compress(b"wrist"), "not_image", "a bzip2, xz, zstd, LZ4 or compress file; unpack it first"),
    "xz": (lambda: lzma.compress(b"wrist"), "not_image", "a bzip2, xz, zstd, LZ4 or compress file; unpack it first"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c" + bytes(99), "not_image", "a 7z archive; unpack it first"),
    "rar": (lambda: b"Rar!\x1a\7\1\0" + bytes(99), "not_image", "a RAR archive; unpack it first"),
    "tar": (tarred, "not_image", "a tar archive; unpack it first"),
    "iso": (lambda: bytes(32769) + b"CD001" + bytes(99), "not_image", "a disc image (ISO); unpack it first"),
    "avi": (lambda: riff(b"AVI "), "not_image", "a video; it can be left out"),
    "wave": (lambda: riff(b"WAVE"), "not_image", "a sound; it can be left out"),
    "folder's notes": (lambda: b"\0\0\0\1Bud1" + bytes(99), "not_image", ".DS_Store"),
    "property list": (lambda: plistlib.dumps({}, fmt=plistlib.FMT_BINARY), "not_image", "a property list"),
    "program": (lambda: Path("/proc/self/exe").read_bytes()[:4096], "not_image", "a program; it can be left out"),
    "git annex": (
        lambda: b"/annex/objects/SHA256E-s1--2.png\n",
        "not_image",
        "a git-annex pointer, not the file it stands for",
    ),
    "svg": (lambda: b"\xef\xbb\xbf<?xml version='1.0'?><svg/>", "not_image", "a text or web page"),
    "zeros": (lambda: bytes(70_000), "not_image", "zeros only, as an interrupted copy does; copy it again"),
    "lossless jpeg": (
        lambda: jpeg_of(0xC3),
        "unreadable",
        "a lossless JPEG outside of DICOM is not read; store it as DICOM",
    ),
    "jpeg-ls": (lambda: jpeg_of(0xF7), "unreadable", "a JPEG-LS outside of DICOM is not read; store it as DICOM"),
    "jpeg of 12 bits": (lambda: jpeg_of(0xC1, 12), "unreadable", "a JPEG of 12 bits outside of DICOM is not read"),
}


def refusal(data: bytes) -> UnreadableFileError:
    with pytest.raises(UnreadableFileError) as caught:
        decode(io.BytesIO(data))
    assert read_identity(io.BytesIO(data)) is None
    return caught.value


@pytest.mark.parametrize("name", KINDS)
def test_unsupported_file_is_refused_by_its_kind(name: str) -> None:
    make, code, phrases = KINDS[name]
    refused = refusal(make())
    assert (refused.code, phrases in refused.reason) == (code, True), refused
    assert len(refused.reason) < 100
    assert refused.reason.isprintable()
    assert not any(reason in refused.reason for reason in FALSE_REASONS)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow writes no AVIF")
def test_avif_written_by_pillow_is_refused_by_its_kind() -> None:
    assert refusal(by_pillow("AVIF")).reason.startswith("an AVIF picture")


def test_jpeg_comment_does_not_change_the_kind() -> None:
    """A CR2 file is a TIFF with the letters CR at the position of this comment."""
    plain = by_pillow("JPEG")
    commented = plain[:2] + b"\xff\xfe\0\x08CRCR\2\0" + plain[2:]
    assert commented[8:10] == b"CR"
    np.testing.assert_array_equal(decode(io.BytesIO(commented)), decode(io.BytesIO(plain)))


TEXTS = (
    "BM,12,0,0,0",
    "BMI;age",
    "P1\tabnormal",
    "P5 normal",
    "MZ 44 wrist " * 9,
    "ID3,1",
    "PAR1,2",
    "DDS result",
    "PK,1",
    "RIFLE",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_table_is_not_mistaken_for_a_binary_kind(text: str) -> None:
    assert refusal(text.encode()).reason == "its first bytes are not those of an image format"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 12, 64, 400])
def test_random_first_bytes_give_one_reason(size: int) -> None:
    random = np.random.default_rng(size)
    heads = [make()[:size] for make, _, _ in KINDS.values()]
    for data in [*heads, *(random.bytes(size) for _ in range(50))]:
        assert refusal(data).code in ("not_image", "out_of_scope", "unreadable")
