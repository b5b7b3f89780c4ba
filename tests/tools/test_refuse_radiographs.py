"""tools/hooks/refuse_radiographs.py: which files a commit may not contain."""

import base64
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import dicoms
from helpers.commands import ROOT
from helpers.tools import tool
from PIL import Image

HOOK = ROOT / "tools" / "hooks" / "refuse_radiographs.py"
hook = tool("hooks/refuse_radiographs")
PIXELS = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) % 251


def picture(format: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS.astype(np.uint8)).save(stream, format)
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, PIXELS)
    return stream.getvalue()


def page() -> bytes:
    return b'<img src="data:image/png;base64,' + base64.b64encode(picture("PNG")) + b'">'


def refusal(folder: Path, name: str, content: bytes) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return str(hook.refusal(file, name))


@pytest.fixture(scope="module")
def dicom() -> bytes:
    """A DICOM file of drawn pixels, with its preamble."""
    return dicoms.dicom(PIXELS, bits=16)


@pytest.mark.parametrize("name", ["a.dcm", "docs/a.png", "tests/data/IM0001", "notes.txt"])
def test_dicom_is_refused_anywhere_by_content(name: str, dicom: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, name, dicom) == "a DICOM file"


def test_dicom_without_preamble_is_refused(dicom: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, "bare", dicom[132:]) == "a DICOM file"
    implicit = (
        b"\x08\0\x16\0\x1a\0\0\0" + b"1.2.840.10008.5.1.4.1.1.7\0" + b"\x08\0\x18\0\x04\0\0\0" + b"1.2\0" + bytes(99)
    )
    assert refusal(tmp_path, "implicit", implicit) == "a DICOM file"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "JPEG2000", "GIF", "BMP", "WEBP"])
def test_pictures_are_refused_outside_docs(format: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, "tests/picture.dat", picture(format)).startswith("a picture outside docs/ (")
    assert refusal(tmp_path, "docs/picture.dat", picture(format)) == ""


def test_arrays_and_pages_with_pictures_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train/0.npy", array()) == "a picture outside docs/ (NumPy array)"
    assert refusal(tmp_path, "runs/gallery.html", page()) == "a page with an embedded picture outside docs/"


def test_archives_are_refused_for_a_member(dicom: bytes, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, content in (("0.cls", b"1"), ("0.npy", array())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    assert refusal(tmp_path, "shards/train-000000.tar", archive.getvalue()).startswith("holds 0.npy, a picture")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as folder:
        folder.writestr("study/IM0", dicom)
    assert refusal(tmp_path, "docs/study.zip", archive.getvalue()) == "holds study/IM0, a DICOM file"


@pytest.mark.parametrize("content", [b"", b"text\n", b"BMI\n", b"\x08\0\0\0", b"PK\x03\x04 cut short", bytes(4096)])
def test_files_without_radiographs_pass(content: bytes, tmp_path: Path) -> None:
    assert refusal(tmp_path, "file", content) == ""


def test_command_names_each_refused_file_and_the_remedy(dicom: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "b.txt").write_bytes(dicom)
    command = [sys.executable, "-I", HOOK]
    result = subprocess.run([*command, "a.txt", "b.txt"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == (
        "refuse_radiographs: b.txt: a DICOM file. Remove it from the commit: git rm --cached 'b.txt'\n"
    )
    assert (
        subprocess.run([*command, "a.txt", "missing"], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    )


def test_this_repository_holds_no_radiograph() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in tracked.split("\0") if name]
    assert {name: reason for name in names if (reason := hook.refusal(ROOT / name, name))} == {}
