"""Test the sentences about files that give no picture: each code has a problem and a remedy in plain words."""

import re
from pathlib import Path
from typing import get_args

import pytest

from mura_dist.data import gate, radiograph
from mura_dist.data.grayscale import Code
from mura_dist.inference.page import failures, study
from mura_dist.inference.page.guard import UPLOADS_FULL

SIDE = 32


def test_every_code_and_verdict_has_text() -> None:
    assert set(failures.FAILURE_TEXTS) == {*get_args(Code), "decoder", "model"}
    assert set(failures.GATE_TEXTS) == set(gate.NAMES) - {"ok"}


@pytest.mark.parametrize("code", sorted(failures.FAILURE_TEXTS))
@pytest.mark.parametrize("reason", ["its header has no usable Rows", "a ZIP archive; unpack it first"])
def test_failure_sentence_has_problem_and_one_remedy(code: str, reason: str) -> None:
    problem, remedy = failures.FAILURE_TEXTS[code]
    text = failures.failure_sentence(code, reason)
    assert text.startswith(problem)
    assert reason in text
    assert (remedy in text) == (";" not in reason)
    assert not re.search(r"\.\.|\. \.|;\.", text)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "this is not a picture. Choose a PNG, JPEG, TIFF or DICOM file. (Detail: the file is empty.)"),
        (b"PK\x03\x04" + bytes(40), "this is not a picture: a ZIP archive; unpack it first."),
        (b"\x89PNG\r\n\x1a\n123", "this picture is corrupt or incomplete. Save or export it again. (Detail: "),
        (
            b"\0\0\0\x18ftypheic" + bytes(40),
            "this type of file is not supported: a HEIC picture, as phones take them; export the radiograph as DICOM or PNG.",
        ),
        (
            b"P5\n9 9\n255\n",
            "this type of file is not supported: a PNM picture; export the radiograph as DICOM or PNG.",
        ),
    ],
)
def test_failure_sentence_of_invalid_files(data: bytes, text: str) -> None:
    upload = study.UploadReader(SIDE)(data)
    assert upload.image is None
    assert failures.failure_sentence(upload.code, upload.failure).startswith(text)


@pytest.mark.shared
def test_hostile_files_get_readable_messages(shared: Path) -> None:
    """No message contains a library's error, a path or a hexadecimal number."""
    reader, codes = study.UploadReader(SIDE), set()
    for path in sorted(
        path for path in (shared / "hostile").rglob("*") if path.is_file() and path.stat().st_size < 1 << 20
    ):
        upload = reader(path.read_bytes())
        if upload.image is None:
            codes.add(upload.code)
            text = failures.failure_sentence(upload.code, upload.failure)
            assert re.match("this (is not a picture|type of file is not supported|picture is corrupt|file )", text), (
                path.name
            )
            assert not re.search(r"Traceback|Error|Exception|0x[0-9a-f]|/tmp|None\b", text), text
    assert codes >= {"not_image", "out_of_scope", "unreadable", "too_large"}


def test_messages_name_the_limits() -> None:
    assert f"over {study.MAX_UPLOAD_MB} MB" in failures.UPLOAD_REFUSED
    assert f"more than {study.MAX_FILES} files" in failures.UPLOAD_REFUSED
    assert "try it again in a minute" in failures.UPLOAD_REFUSED
    assert "in a minute" in UPLOADS_FULL
    assert f"The limit is {radiograph.MAX_PIXELS // 1_000_000} million pixels" in failures.FAILURE_TEXTS["too_large"][1]
