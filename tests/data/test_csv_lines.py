"""csv_lines.py: what pandas.read_csv does not keep of a file: widths, numbers of lines, where it breaks."""

import pytest

from mura_dist.core.errors import Refusal
from mura_dist.data.csv_lines import read_lines


def test_lines_keep_their_width_and_their_number() -> None:
    text = '\n , \na, 1\r\nb\rc,,\n"d\ne",2\n\n"f""g",3'
    lines = [(3, ["a", " 1"]), (4, ["b"]), (5, ["c", "", ""]), (7, ["d\ne", "2"]), (9, ['f"g', "3"])]
    assert list(read_lines(text, "t.csv", "fix it")) == lines
    assert list(read_lines("", "t.csv", "fix it")) == []


def test_quotes_are_read_as_the_caller_has_it() -> None:
    assert list(read_lines('"a"b, "c"', "t.csv", "fix it")) == [(1, ["ab", ' "c"'])]
    assert list(read_lines('a, "c"', "t.csv", "fix it", strict=True, skipinitialspace=True)) == [(1, ["a", "c"])]
    with pytest.raises(Refusal, match=r"^t\.csv line 2 is no CSV \(',' expected after '\"'\); fix it$"):
        list(read_lines('a,1\n"a"b,1', "t.csv", "fix it", strict=True))
    with pytest.raises(Refusal, match=r"^t\.csv line 3 is no CSV \(unexpected end of data\); fix it$"):
        list(read_lines('a,1\n"a,1\nb,1', "t.csv", "fix it", strict=True))
    with pytest.raises(
        Refusal, match=r"^t\.csv line 1 is no CSV \(field larger than field limit \(131072\)\); fix it$"
    ):
        list(read_lines("x" * 200_000, "t.csv", "fix it"))


def test_lines_before_a_broken_one_come_first() -> None:
    lines = read_lines('a,1\n"b', "t.csv", "fix it", strict=True)
    assert next(lines) == (1, ["a", "1"])
    with pytest.raises(Refusal, match=r"^t\.csv line 2 "):
        next(lines)
