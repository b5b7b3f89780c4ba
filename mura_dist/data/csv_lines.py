"""A CSV file as people save one -> (number, cells) of its lines that are not blank; and what a cell says.

    bytes -> decode -> find_delimiter -> read_lines -> parse_number, parse_label, parse_path

By the csv module: pandas.read_csv pads a short line as if it ended in empty cells, refuses a line longer than the first, and
does not tell on which line of the file a row or an error is. Messages need all three.
"""

import codecs
import contextlib
import csv
import io
import itertools
import re
import unicodedata
from collections.abc import Iterator

from mura_dist.core.errors import UserError

DELIMITERS = ",;\t"
_SNIFFED_LINES = 100
# UTF-32 first: its little-endian mark begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NUMBER = re.compile(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_LABELS = {
    **dict.fromkeys(("abnormal", "positive", "pos", "true", "yes"), 1),
    **dict.fromkeys(("normal", "negative", "neg", "false", "no"), 0),
}


def decode(data: bytes, name: str, *, errors: str = "strict") -> str:
    """Return the text of a file: UTF-16 or UTF-32 where a byte-order mark says so, else UTF-8.

    Args:
        data: the file's bytes.
        name: the file's name, for messages.
        errors: what becomes of bytes that are not UTF-8, as bytes.decode has it.

    Raises:
        UserError: where the bytes are no text, or not of their encoding.
    """
    encoding = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data:
        raise UserError(f"{name} is not a text file (it holds zero bytes); save the table as `CSV UTF-8`")
    try:
        return data.decode(encoding, errors=errors if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise UserError(
                f"{name} is not {encoding.upper()}, as its first bytes say; save it as `CSV UTF-8`"
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} line {line} is not UTF-8 (byte {data[error.start]:#04x}); save it as `CSV UTF-8`"
        ) from error


def find_delimiter(text: str) -> str:
    """Return which of `,` `;` and tab cuts most of the first lines of `text` into columns; a comma where none does.

    Where several cut as many lines, a comma gives way only if it stands in decimal numbers alone: `study;0,73`.
    """
    rows = {mark: _first_rows(text, mark) for mark in DELIMITERS}
    cut = {mark: sum(len(cells) > 1 for cells in rows[mark]) for mark in DELIMITERS}
    mark = max(";\t", key=lambda mark: cut[mark])
    if 2 * cut[mark] <= len(rows[mark]):  # in some names of a single column
        return ","
    decimal = all(parse_number(cell) is not None for cells in rows[mark] for cell in cells if "," in cell)
    return mark if cut[mark] > cut[","] or (cut[mark] == cut[","] and decimal) else ","


def _first_rows(text: str, delimiter: str) -> list[list[str]]:
    # Strict: under a wrong delimiter, text may follow a closing quote.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # read_lines says where
        rows.extend(itertools.islice((cells for cells in lines if any(map(str.strip, cells))), _SNIFFED_LINES))
    return rows


def read_lines(
    text: str, name: str, remedy: str, *, strict: bool = False, skipinitialspace: bool = False, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yield (number, cells) of each line of `text` that is not blank; the number is that of its last line in the file.

    Args:
        name: the file's, and `remedy`: what to do; both for the message about a line that is no CSV.
        strict, skipinitialspace, delimiter: as csv.reader has them.

    Raises:
        UserError: where a line is no CSV.
    """
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, strict=strict, skipinitialspace=skipinitialspace, delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is no CSV ({error}); {remedy}") from error


def parse_number(cell: str) -> float | None:
    """Return a cell's number, with a decimal point or comma, which may be infinite or NaN; None where it is none."""
    word = cell.strip()
    return float(word.replace(",", ".")) if _NUMBER.fullmatch(word) else None


def parse_label(cell: str) -> int | None:
    """Return 1 for `1`, `1.0`, `1,0` and words such as `abnormal` or `Positive`, 0 for their opposites, else None."""
    word = cell.strip().casefold()
    number = parse_number(word)
    return int(number) if number in (0, 1) else _LABELS.get(word)


def parse_path(cell: str) -> str:
    """Return a path with "/" between its parts, where Windows wrote it too, in composed characters (NFC).

    macOS stores a name's accents as characters of their own. Two spellings of one name are equal only after this.
    """
    return unicodedata.normalize("NFC", cell.replace("\\", "/"))
