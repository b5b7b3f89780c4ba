"""Read CSV files as spreadsheets and people write them.

    bytes -> decode -> find_delimiter -> read_lines: (line number, cells) -> parse_number, parse_label, parse_path

The csv module is used because pandas.read_csv pads short lines, refuses long ones and does not report line numbers.
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
# UTF-32 first: its little-endian byte-order mark begins with UTF-16's.
_ENCODINGS = {
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
    """Decode a file's text: UTF-16 or UTF-32 where it has that byte-order mark, else UTF-8.

    Args:
        data: Content of the file.
        name: Name of the file, for messages.
        errors: Error handler for UTF-8, as of bytes.decode.

    Raises:
        UserError: The bytes are not text in their encoding.
    """
    encoding = next((encoding for mark, encoding in _ENCODINGS.items() if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data:
        raise UserError(f"{name} is not a text file (it holds zero bytes). Save the table as `CSV UTF-8`.")
    try:
        return data.decode(encoding, errors=errors if encoding == "utf-8-sig" else "strict")
    except UnicodeDecodeError as error:
        if encoding != "utf-8-sig":
            raise UserError(
                f"{name} is not {encoding.upper()}, though its byte-order mark says so. Save it as `CSV UTF-8`."
            ) from error
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} line {line} is not UTF-8 (byte {data[error.start]:#04x}). Save it as `CSV UTF-8`."
        ) from error


def find_delimiter(text: str) -> str:
    """Return the one of `,` `;` and tab that splits most of the first lines into columns, or a comma where none does.

    Where `;` or tab ties with the comma, it wins only if all commas are decimal commas (`study;0,73`).
    """
    rows = {delimiter: _first_rows(text, delimiter) for delimiter in DELIMITERS}
    num_split = {delimiter: sum(len(cells) > 1 for cells in rows[delimiter]) for delimiter in DELIMITERS}
    best = max(";\t", key=lambda delimiter: num_split[delimiter])
    if 2 * num_split[best] <= len(rows[best]):  # the character occurs in some names of a single column
        return ","
    decimal = all(parse_number(cell) is not None for cells in rows[best] for cell in cells if "," in cell)
    return best if num_split[best] > num_split[","] or (num_split[best] == num_split[","] and decimal) else ","


def _first_rows(text: str, delimiter: str) -> list[list[str]]:
    # Strict: with the wrong delimiter, text may follow a closing quote.
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    with contextlib.suppress(csv.Error):  # read_lines reports it
        rows.extend(itertools.islice((cells for cells in lines if any(map(str.strip, cells))), _SNIFFED_LINES))
    return rows


def read_lines(
    text: str, name: str, remedy: str, *, strict: bool = False, skipinitialspace: bool = False, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells) of each record of `text` that is not blank. A record over several lines has its last number.

    Args:
        text: Content of the file.
        name: Name of the file, for messages.
        remedy: Last sentence of messages.
        strict: As of csv.reader.
        skipinitialspace: As of csv.reader.
        delimiter: As of csv.reader.

    Raises:
        UserError: A line is not CSV.
    """
    file = io.StringIO(text, newline="")
    reader = csv.reader(file, strict=strict, skipinitialspace=skipinitialspace, delimiter=delimiter)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num} is not CSV ({error}). {remedy}") from error


def parse_number(cell: str) -> float | None:
    """Return a cell's number (decimal point or comma; may be infinite or NaN), or None for other text."""
    text = cell.strip()
    return float(text.replace(",", ".")) if _NUMBER.fullmatch(text) else None


def parse_label(cell: str) -> int | None:
    """Return 1 for `1`, `1.0`, `abnormal`, `Positive` and the like, 0 for their opposites, else None."""
    text = cell.strip().casefold()
    number = parse_number(text)
    return int(number) if number in (0, 1) else _LABELS.get(text)


def parse_path(cell: str) -> str:
    """Return a path with "/" as separator and composed characters (NFC).

    Windows writes backslashes, and macOS stores accents as characters of their own (NFD).
    """
    return unicodedata.normalize("NFC", cell.replace("\\", "/"))
