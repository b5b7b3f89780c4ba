"""Refuse a commit that contains radiographs, as a hook of pre-commit (.pre-commit-config.yaml).

    python3 tools/hooks/refuse_radiographs.py FILE ...      exit status 1 if a file is refused, with one line for each

Refused by content, whatever the file's name: DICOM anywhere; pictures, NumPy arrays and HTML with embedded pictures
outside docs/. Archives are refused if a member is. Only the standard library is used.
"""

import io
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PICTURE_FOLDER = "docs/"
DRAWN_ARCHIVES = {"tests/data/v0.1.0.tar.xz"}  # its only picture is the curves of a run on drawings
HEAD_BYTES = 2048
MAX_TEXT_BYTES = 64 << 20
_PICTURES = {
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "TIFF": re.compile(rb"II[*+]\0|MM\0[*+]"),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  \r\n|\xff\x4f\xff\x51"),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM.{4}\0\0\0\0", re.DOTALL),
    "WebP": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "HEIF": re.compile(rb".{4}ftyp(?:heic|heix|mif1|msf1|avif)", re.DOTALL),
    "NumPy array": re.compile(rb"\x93NUMPY"),
}
_EMBEDDED_PICTURE = re.compile(rb"data:image/[a-z0-9.+-]+;base64,[A-Za-z0-9+/]{200}")
_ZIP = re.compile(rb"PK\x03\x04")
_VALUE_REPRESENTATIONS = set(
    "AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()  # noqa: SIM905
)


def main(paths: list[str]) -> int:
    """Print one line for each refused file. Return 1 if there is any, else 0."""
    refusals = [(path, reason) for path in paths if (reason := refusal(Path(path), path))]
    for path, reason in refusals:
        print(f"refuse_radiographs: {path}: {reason}. Remove it from the commit: git rm --cached '{path}'")
    return 1 if refusals else 0


def refusal(file: Path, name: str) -> str:
    """Return why a file is refused, or an empty text.

    Args:
        file: The file to read. A link or a missing file is not refused.
        name: Its path in the repository, with slashes.
    """
    if file.is_symlink() or not file.is_file():
        return ""
    with file.open("rb") as stream:
        if reason := _content_refusal(stream, name):
            return reason
    if name in DRAWN_ARCHIVES:
        return ""
    return next((f"holds {member}, {reason}" for member, reason in _member_refusals(file, name)), "")


def is_dicom(head: bytes) -> bool:
    """Return whether a file that begins with `head` is DICOM, with or without its preamble."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 16 or head[:2] not in (b"\x02\0", b"\x08\0") or head[3:4] != b"\0":
        return False
    if head[4:6].decode("latin-1") in _VALUE_REPRESENTATIONS:
        return True
    # Implicit value representation: the next element follows the value and has the same group.
    length = int.from_bytes(head[4:8], "little")
    return length < len(head) - 12 and head[8 + length : 10 + length] == head[:2]


def _content_refusal(stream: IO[bytes], name: str) -> str:
    head = stream.read(HEAD_BYTES)
    if is_dicom(head):
        return "a DICOM file"
    if name.startswith(PICTURE_FOLDER):
        return ""
    for kind, signature in _PICTURES.items():
        if signature.match(head):
            return f"a picture outside {PICTURE_FOLDER} ({kind})"
    if b"\0" not in head and _EMBEDDED_PICTURE.search(head + stream.read(MAX_TEXT_BYTES)):
        return f"a page with an embedded picture outside {PICTURE_FOLDER}"
    return ""


def _member_refusals(file: Path, name: str) -> Iterator[tuple[str, str]]:
    for member, content in _members(file):
        if reason := _content_refusal(io.BytesIO(content), f"{name}/{member}"):
            yield member, reason


def _members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the first bytes of each file in a zip or tar archive, compressed or not."""
    with file.open("rb") as stream:
        is_zip = bool(_ZIP.match(stream.read(4)))
    try:
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        with archive.open(info) as member:
                            yield info.filename, member.read(HEAD_BYTES)
        else:
            with tarfile.open(file) as tar:
                for entry in tar:
                    if entry.isfile() and (extracted := tar.extractfile(entry)):
                        yield entry.name, extracted.read(HEAD_BYTES)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError):
        return  # no archive, or one that nothing can read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
