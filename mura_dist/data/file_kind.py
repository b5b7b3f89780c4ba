"""Detect a file's format by its first bytes: one of Pillow's readers, or the reason why it is no radiograph.

    bytes -> pillow_reader -> "PNG", "JPEG", "TIFF" or "JPEG2000"; else UnreadableFileError with the kind and the remedy

The file's name is ignored. dicom.py recognizes a DICOM before this.
"""

import re

from mura_dist.data.grayscale import Code, UnreadableFileError

HEAD_BYTES = 1 << 16

_READERS = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  ": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
}

# First bytes of a file: {kind: regular expression}. The first match decides.
_PICTURES = {
    "a HEIC picture, as phones take them": rb".{4}ftyp(?!avi[fs])(?:.{4}){0,8}(?:hei[cxms]|hev[cxms])",
    "an AVIF picture": rb".{4}ftyp(?:.{4}){0,8}avi[fso]",
    "a HEIF picture": rb".{4}ftyp(?:mif|msf|mia)",
    "a camera's raw file": rb"II\*\x00.{4}CR|.{4}ftypcrx |IIR[OS]|MMOR|IIU\x00|FUJIFILMCCD-RAW|FOVb|\x00MRM",
    "a GIF": rb"GIF8",
    "a BMP": rb"BM.{4}\x00\x00\x00\x00",
    "a WebP picture": rb"RIFF.{4}WEBP",
    "an icon": rb"\x00\x00[\x01\x02]\x00[^\x00]|icns\x00",
    "a TGA picture": rb"\x00\x00[\x02\x03\x0a\x0b]\x00{5}",
    "a JPEG XL": rb"\xff\x0a|\x00\x00\x00\x0cJXL ",
    "a JPEG XR": rb"II\xbc",
    "a JBIG2 picture": rb"\x97JB2\r\n\x1a\n",
    "an OpenEXR picture": rb"v/1\x01",
    "a Radiance HDR picture": rb"#\?R(?:ADIANCE|GBE)",
    "a Photoshop document": rb"8BPS",
    "a GIMP document": rb"gimp xcf",
    "a PNM picture": rb"P[1-6Ff]\s+[#\d]|P7\n[A-Z#]",
    "an MNG or JNG picture": rb"\x8a[MJ]NG|\x8bJNG",
    "a DDS, QOI or BPG picture": rb"DDS \x7c|qoif|BPG\xfb",
    "an SGI or Sun picture": rb"\x01\xda[\x00\x01][\x01\x02]|\x59\xa6\x6a\x95",
    "a FITS picture": rb"SIMPLE  =",
    "a Windows metafile": rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF",
    "a NIfTI volume": rb".{344}n[+i]1\x00|.{4}n[+i]2\x00",
    "an Analyze volume's header": rb"(?:\x5c\x01\x00\x00|\x00\x00\x01\x5c).{34}r",
    "an NRRD or MetaImage volume": rb"NRRD000|ObjectType =|NDims =",
    "a PDF": rb"(?:\xef\xbb\xbf)?\s{0,99}%PDF-",
    "a PostScript or DjVu document": rb"%!PS|\xc5\xd0\xd3\xc6|AT&TFORM",
    "an Office document": rb"PK\x03\x04.{26}(?:\[Content_Types\]|_rels/|docProps/|word/|xl/|ppt/|mimetypeapplication/vnd\.oasis)",
    "an old Office document, an Outlook message or Thumbs.db": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "an RTF document": rb"\{\\rtf",
}
_ARRAYS = {
    "NumPy arrays": rb"\x93NUMPY|PK\x03\x04.{26}[^/\x00]{1,99}\.npy",
    "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    "a MATLAB file": rb"MATLAB [57]\.\d MAT-file",
    "a NetCDF file": rb"CDF[\x01\x02\x05]",
    "a PyTorch file": rb"PK\x03\x04.{26}[^\x00]{1,99}/data\.pkl",
    "a Python pickle": rb"\x80[\x02-\x05][\x95c\]}(]",
    "a Parquet table or an SQLite database": rb"PAR1[\x00-\x1f]|SQLite format 3\x00",
}
_ARCHIVES = {
    "a ZIP archive": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
    "a gzip file": rb"\x1f\x8b",
    "a bzip2, xz, zstd, LZ4 or compress file": rb"BZh[1-9]|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|\x04\x22\x4d\x18|\x1f\x9d",
    "a 7z archive": rb"7z\xbc\xaf\x27\x1c",
    "a RAR archive": rb"Rar!\x1a\x07",
    "a CAB archive": rb"MSCF\x00\x00\x00\x00",
    "a tar archive": rb".{257}ustar",
    "a disc image (ISO)": rb".{32769}CD001",
}
_UNRELATED = {
    "macOS's AppleDouble companion of a file, not the file itself": rb"\x00\x05\x16[\x00\x07]",
    "macOS's notes about a folder (.DS_Store)": rb"\x00\x00\x00\x01Bud1",
    "a shortcut to a file, not the file itself": rb"book\x00\x00\x00\x00mark|L\x00\x00\x00\x01\x14\x02\x00",
    "a property list": rb"bplist0",
    "a program": rb"MZ.{26}\x00{8}|\x7fELF|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|#!/",
    "a video": rb".{4}(?:ftyp|moov|mdat|wide|pnot)|RIFF.{4}AVI |\x1aE\xdf\xa3|\x00\x00\x01[\xb3\xba]|FLV\x01|0&\xb2u\x8ef",
    "a sound": rb"RIFF.{4}WAVE|OggS|ID3[\x02-\x04]|fLaC\x00",
    "a RIFF file": rb"RIFF",
    "a text or web page": rb"(?:\xef\xbb\xbf)?\s{0,99}<",
}
_POINTERS = {
    "a Git LFS pointer, not the file it stands for": rb"version https://git-lfs",
    "a git-annex pointer, not the file it stands for": rb"/annex/objects/|(?:\.\./)*\.git/annex/objects/",
}
_REFUSED: tuple[tuple[Code, str, dict[str, bytes]], ...] = (
    ("out_of_scope", "export the radiograph as DICOM or PNG", _PICTURES),
    ("out_of_scope", "export the radiograph as DICOM or PNG", _ARRAYS),
    ("not_image", "unpack it first", _ARCHIVES),
    ("not_image", "it can be left out", _UNRELATED),
    ("not_image", "fetch that file first", _POINTERS),
)

# JPEG's frame markers: processes that neither Pillow nor libjpeg decodes, then all.
_JPEG_PROCESSES = {
    **dict.fromkeys((0xC3, 0xCB), "lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    0xF7: "JPEG-LS",
}
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def pillow_reader(data: bytes) -> str:
    """Return the name of Pillow's reader for a file's content, by its first HEAD_BYTES.

    Raises:
        UnreadableFileError: No reader fits. The reason names the detected format.
    """
    reader = next((name for signature, name in _READERS.items() if data.startswith(signature)), "")
    if reader == "JPEG" and (variant := _jpeg_variant(data)):
        raise UnreadableFileError(
            "unreadable", f"a {variant} outside of DICOM is not read; store it as DICOM, PNG or plain JPEG"
        )
    if reader and not (reader == "TIFF" and data[8:10] == b"CR"):  # Canon's raw files are TIFFs of a preview
        return reader
    head = data[:HEAD_BYTES]
    for code, remedy, kinds in _REFUSED:
        for kind, opening in kinds.items():
            if re.match(opening, head, re.DOTALL):
                raise UnreadableFileError(code, f"{kind}; {remedy}")
    if not data:
        raise UnreadableFileError("not_image", "the file is empty")
    if not head.strip(b"\0"):
        raise UnreadableFileError("not_image", "it begins with zeros only, as an interrupted copy does; copy it again")
    raise UnreadableFileError("not_image", "its first bytes are not those of an image format")


def _jpeg_variant(data: bytes) -> str:
    """Return the name of an unsupported JPEG variant, or "" for others and corrupt headers."""
    offset = 2
    while data[offset : offset + 1] == b"\xff":
        marker = int.from_bytes(data[offset + 1 : offset + 2], "big")
        if marker in _JPEG_FRAMES:
            precision = int.from_bytes(data[offset + 4 : offset + 5], "big")
            return _JPEG_PROCESSES.get(marker, "JPEG of 12 bits" if precision == 12 else "")
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return ""
