"""Test csv_lines.py: line numbers and widths, encodings, delimiters, quotes, numbers, labels and paths of CSV files."""

import math

import pytest

from mura_dist.core.errors import UserError
from mura_dist.data.csv_lines import decode, find_delimiter, parse_label, parse_number, parse_path, read_lines


def test_lines_keep_width_and_line_number() -> None:
    text = '\n , \na, 1\r\nb\rc,,\n"d\ne",2\n\n"f""g",3'
    lines = [(3, ["a", " 1"]), (4, ["b"]), (5, ["c", "", ""]), (7, ["d\ne", "2"]), (9, ['f"g', "3"])]
    assert list(read_lines(text, "t.csv", "Fix it.")) == lines
    assert list(read_lines("", "t.csv", "Fix it.")) == []


def test_quoting_follows_the_callers_option() -> None:
    assert list(read_lines('"a"b, "c"', "t.csv", "Fix it.")) == [(1, ["ab", ' "c"'])]
    assert list(read_lines('a, "c"', "t.csv", "Fix it.", strict=True, skipinitialspace=True)) == [(1, ["a", "c"])]
    with pytest.raises(UserError, match=r"^t\.csv line 2 is not CSV \(',' expected after '\"'\). Fix it\.$"):
        list(read_lines('a,1\n"a"b,1', "t.csv", "Fix it.", strict=True))
    with pytest.raises(UserError, match=r"^t\.csv line 3 is not CSV \(unexpected end of data\). Fix it\.$"):
        list(read_lines('a,1\n"a,1\nb,1', "t.csv", "Fix it.", strict=True))
    with pytest.raises(
        UserError, match=r"^t\.csv line 1 is not CSV \(field larger than field limit \(131072\)\). Fix it\.$"
    ):
        list(read_lines("x" * 200_000, "t.csv", "Fix it."))


def test_lines_before_a_malformed_line_are_yielded() -> None:
    lines = read_lines('a,1\n"b', "t.csv", "Fix it.", strict=True)
    assert next(lines) == (1, ["a", "1"])
    with pytest.raises(UserError, match=r"^t\.csv line 2 "):
        next(lines)


# ---- bytes, delimiters, cells


def test_byte_order_mark_selects_the_encoding() -> None:
    text = "M\u00fcller,1\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode(text.encode(encoding), "t.csv") == text
    for encoding in ("utf-16-be", "utf-32-be"):
        assert decode(("\ufeff" + text).encode(encoding), "t.csv") == text
    assert decode(b"", "t.csv") == ""
    assert decode(b"a\xff", "t.csv", errors="surrogateescape") == "a\udcff"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,1\nM\xfcller,1", r"^t\.csv line 2 is not UTF-8 \(byte 0xfc\). Save it as `CSV UTF-8`\.$"),
        (
            "a,1".encode("utf-16-le"),
            r"^t\.csv is not a text file \(it holds zero bytes\). Save the table as `CSV UTF-8`\.$",
        ),
        (
            "a,1".encode("utf-16")[:-1],
            r"^t\.csv is not UTF-16, though its byte-order mark says so. Save it as `CSV UTF-8`\.$",
        ),
        (
            b"\xff\xfe\0\0\xff\xff\xff\xff",
            r"^t\.csv is not UTF-32, though its byte-order mark says so. Save it as `CSV UTF-8`\.$",
        ),
    ],
)
def test_binary_content_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(data, "t.csv")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("header", ["study{0}probability\n", ""])
@pytest.mark.parametrize("name", ["train/a", "a", '"a;b"', '"a,b"', '"a\tb"'])
@pytest.mark.parametrize("number", ["0", "0.5", "0,5"])
def test_delimiter_is_detected_from_the_lines(mark: str, header: str, name: str, number: str) -> None:
    """The csv module writes the file. It quotes a cell that contains the delimiter."""
    cell = f'"{number}"' if mark in number else number
    assert find_delimiter(header.format(mark) + f"{name}{mark}{cell}\n\n" * 3) == mark


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("", ","),
        ("train/a\ntrain/b\n", ","),  # one column
        ("train/a\ntrain/b;c\n", ","),  # a semicolon in one of its names
        ("Doe; Jane/,1\nRoe; Jane/,0\n", ","),  # a semicolon in each name
        ("study;label\nDoe, Jane;1\nRoe, Jane;0\n", ";"),  # a comma in each name
        ("what is this\na;1\nb;0\n", ";"),
        ('a;1\n"' + "x" * 200_000, ";"),  # what breaks later
    ],
)
def test_delimiter_character_inside_a_name_is_not_a_delimiter(text: str, mark: str) -> None:
    assert find_delimiter(text) == mark
    if "x" not in text:
        assert {len(cells) for _, cells in read_lines(text, "t.csv", "Fix it.", delimiter=mark)} <= {1, 2}


def test_number_accepts_decimal_point_or_comma() -> None:
    for text in ("0.25", "0,25", " .25", ",25", "25e-2", "2,5E-1"):
        assert parse_number(text) == 0.25
    assert parse_number("-inf") == -math.inf
    assert math.isnan(parse_number("NaN") or 0)
    for text in ("", ".", ",", "1,2,3", "1.2,3", "1_0", "0x1", "one"):
        assert parse_number(text) is None


def test_label_accepts_number_or_word() -> None:
    for text in ("1", "1.0", "1,0", "1.", "01", "+1", "1e0", " 1 ", "abnormal", "Positive", "POS", "True", "yes"):
        assert parse_label(text) == 1, text
    for text in ("0", "0.0", "0,0", "-0", "0E+00", "normal", "NEGATIVE", "neg", "FALSE", "No"):
        assert parse_label(text) == 0, text
    for text in ("", "2", "-1", "0.5", "1.01", "nan", "inf", "fracture", "not normal", "0 1", "10", "1_0"):
        assert parse_label(text) is None, text


def test_path_is_normalized() -> None:
    """Windows separators and the decomposed characters of macOS are normalized."""
    assert parse_path("MURA-v1.1\\train/XR_HAND\\patient1\\") == "MURA-v1.1/train/XR_HAND/patient1/"
    assert parse_path("Mu\u0308ller") == parse_path("M\u00fcller") == "M\u00fcller"
    assert parse_path("a\udcff") == "a\udcff"
