"""Test the values of --study-type: a study type in any spelling, or a table of paths and study types."""

from pathlib import Path

import pytest

from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.inference import study_types


def test_table_with_bom_blank_lines_and_extra_columns(tmp_path: Path) -> None:
    path = tmp_path / "types.csv"
    path.write_bytes(
        '\ufeffnumber,path,study_type\r\n1," a, b.png",hand\r\n,,\r\n2,c.png\r\n\r\n3,d.png,Knee \r\n'.encode()
    )
    assert study_types.read_override(str(path)) == {" a, b.png": "XR_HAND", "c.png": "", "d.png": "Knee"}
    path.write_text("path,study_type\n")
    assert study_types.read_override(str(path)) == {}


def test_table_with_row_names_from_r(tmp_path: Path) -> None:
    """`write.table(..., sep = ",")` writes no header for the row names."""
    path = tmp_path / "types.csv"
    path.write_text('"path","study_type"\n"1","a.png","hand"\n"2","b.png","XR_WRIST"\n')
    assert study_types.read_override(str(path)) == {"a.png": "XR_HAND", "b.png": "XR_WRIST"}


def test_table_from_excel(tmp_path: Path) -> None:
    path = tmp_path / "types.csv"
    expected = {"Mü/a.png": "XR_HAND", "=1.png": "XR_WRIST"}
    for delimiter, encoding in ((",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-16")):
        lines = ["path,study_type", "Mu\u0308/a.png,hand", "./=1.png,XR_WRIST"]
        path.write_bytes("\r\n".join(line.replace(",", delimiter) for line in lines).encode(encoding))
        assert study_types.read_override(str(path)) == expected
    assert study_types.match(expected, ["=1.png", "Mu\u0308/a.png"]) == []  # macOS decomposes names
    path.write_text("path,study_type\nM\xfc,hand\nMu\u0308,wrist\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is both XR_HAND and XR_WRIST\. Keep one"):
        study_types.read_override(str(path))


INVALID_TABLES = {
    "empty": b"",
    "blank": b"\n",
    "another column": b"study_type,paths\nhand,a.png\n",
    "no header": b"a.png,hand\n",
    "bars": b"path|study_type\n",
    "an open quote": b'path,study_type\n"a.png,hand\n',
    "a longer line": b"path,study_type\na.png,hand,\n",
    "Latin-1": b"path,study_type\n\xff,hand\n",
    "half a UTF-16": "path,study_type\n".encode("utf-16")[:-1],
}


@pytest.mark.parametrize("data", INVALID_TABLES.values(), ids=INVALID_TABLES)
def test_invalid_table_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "types.csv"
    path.write_bytes(data)
    with pytest.raises(UserError) as refusal:
        study_types.read_override(str(path))
    wrong = "not a CSV with the columns path and study_type. Name them in its first line."
    assert str(refusal.value) == f"--study-type {path}: {wrong}"


def test_path_with_two_study_types_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "types.csv"
    path.write_text("path,study_type\na,hand\nb,wrist\na,XR_HAND\nb,hand\n")
    with pytest.raises(
        UserError, match=r"types\.csv: the path of radiograph 4 is both XR_WRIST and XR_HAND\. Keep one of"
    ):
        study_types.read_override(str(path))


def test_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "types.csv"
    path.mkdir()
    with pytest.raises(
        UserError, match=r"^--study-type .*: is a directory\. Give a study type, or a CSV of path,study_type\.$"
    ):
        study_types.read_override(str(path))


@pytest.mark.parametrize("study_type", mura.STUDY_TYPES)
def test_study_type_has_many_spellings(study_type: str, tmp_path: Path) -> None:
    """Case, surrounding blanks, and the XR_ prefix with any separator make no difference."""
    word = study_type.removeprefix("XR_")
    spellings = [study_type, word, f"XR {word}", f"XR-{word}", f"XR{word}", f"  {word} "]
    for spelling in [form(text) for text in spellings for form in (str.upper, str.lower, str.title)]:
        assert study_types.read_override(spelling) == study_type
        (tmp_path / "types.csv").write_text(f"path,study_type\na.png,{spelling}\n")
        assert study_types.read_override(str(tmp_path / "types.csv")) == {"a.png": study_type}
        assert study_types.check(study_type, ()) == []


@pytest.mark.parametrize("option_value", ["types.cvs", "no/types.csv", "types.txt", "tables/hand"])
def test_missing_file_is_refused(option_value: str) -> None:
    with pytest.raises(
        UserError, match=rf"^--study-type {option_value}: no such file or directory\. Give a study type, or a CSV"
    ):
        study_types.read_override(option_value)
