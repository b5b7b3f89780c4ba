"""A table as people save one -> its cells as text, or a refusal that says what the file is instead.

    CSV: UTF-8, UTF-16 or Windows-1252; commas, semicolons or tabs; a header or none, CRLF, quotes, trailing commas, empty lines
    Parquet: its columns as text
        -> Sheet: header (lower case) or None; (number, cells) of each line

A first line that is neither data nor a header that is known is refused.
"""

import contextlib
import hashlib
import importlib.util
import io
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mura_dist.core.errors import UserError, install_remedy, nearest
from mura_dist.data.csv_lines import decode, find_delimiter, parse_label, parse_number, read_lines

_MAX_SHOWN = 100  # characters of a cell in a message
_EXAMPLES = 3


@dataclass(frozen=True)
class Table:
    """`name`: the file's, without folders. `header`: lower case, None where the file has none. All lines are as wide.
    `notes`: what had to be decided to read it."""

    name: str
    sha256: str
    header: tuple[str, ...] | None
    lines: list[tuple[int, list[str]]]
    width: int
    notes: tuple[str, ...] = ()

    def column(self, place: int) -> list[str]:
        return [cells[place] for _, cells in self.lines]

    def find(self, *names: str) -> int | None:
        """The place of the first of `names` that the header has."""
        header = self.header or ()
        return next((header.index(name) for name in names if name in header), None)

    def at(self, line: int) -> str:
        """`labels.csv line 5`: where the line of this place lies in the file."""
        return f"{self.name} line {self.lines[line][0]}"


def read(path: Path, what: str, known: Collection[str]) -> Table:
    """The table at `path`. what: `predictions` or `labels`, for messages; known: names of columns that make a header."""
    data = _read_bytes(path, what)
    sha256 = hashlib.sha256(data).hexdigest()
    notes: tuple[str, ...] = ()
    if path.suffix.lower() == ".parquet":
        lines = _parse_parquet(data, path.name)
        is_header = True
    else:
        text, notes = _decode_text(data, path.name)
        lines = _parse_csv(text, path.name)
        is_header = bool(lines) and _is_header(lines[0], path.name, what, known)
    if len(lines) <= is_header:
        raise UserError(f"{path.name} has no rows; one line a study is needed")
    width = _find_width(lines, is_header)
    rows = [(number, _strip_trailing(cells, width)) for number, cells in lines]
    _check_widths(rows, width, path.name)
    header = tuple(cell.lower() for cell in rows[0][1]) if is_header else None
    _check_repeats(header, path.name)
    return Table(path.name, sha256, header, rows[is_header:], width, notes)


def quote_cell(text: str) -> str:
    """A cell as a message has it: nothing that steers a terminal, not too long."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return safe if len(safe) <= _MAX_SHOWN else f"...{safe[-_MAX_SHOWN:]}"  # of a path the end tells more


def list_examples(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = len(names) - _EXAMPLES
    return ", ".join(map(quote_cell, names[:_EXAMPLES])) + (f" and {more:,} more" if more > 0 else "")


def _read_bytes(path: Path, what: str) -> bytes:
    if path.is_dir():
        inside = next((f", perhaps {name}" for name in ("studies.csv", "labels.csv") if (path / name).is_file()), "")
        raise UserError(f"{path} is a folder; give the file of {what} in it{inside}")
    if not path.exists():
        raise UserError(f"{path}: no such file; give the file of {what} (the order is PREDICTIONS LABELS)")
    return path.read_bytes()


def _decode_text(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """(text, notes). Excel's plain CSV is in Windows' own characters; a wrong guess joins no name, and is refused then."""
    try:
        return decode(data, name), ()
    except UserError:
        if (text := _windows_text(data)) is None:
            raise
        return text, ("not UTF-8: read as Windows-1252",)


def _windows_text(data: bytes) -> str | None:
    """Decode Windows-1252 where it is nothing else: no character of UTF-8 in it, no control character, no byte it lacks."""
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        of_utf8 = data.decode("utf-8", errors="ignore")
        if of_utf8.isascii() and all(c.isprintable() or c in "\t\r\n\xa0\xad" for c in text):
            return text
    return None


def _parse_csv(text: str, name: str) -> list[tuple[int, list[str]]]:
    lines = read_lines(text, name, "mend the line", skipinitialspace=True, strict=True, delimiter=find_delimiter(text))
    return [(number, [cell.strip() for cell in cells]) for number, cells in lines]


def _parse_parquet(data: bytes, name: str) -> list[tuple[int, list[str]]]:
    if importlib.util.find_spec("pyarrow") is None:
        remedy = install_remedy("parquet")
        raise UserError(f"{name}: Parquet needs pyarrow, which is not installed; {remedy}, or give CSV")
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a Parquet file; write it again, or give CSV") from error
    rows = frame.astype(object).itertuples(index=False, name=None)
    cells = [["" if pd.isna(value) else str(value).strip() for value in row] for row in rows]
    return list(enumerate([list(map(str, frame.columns)), *cells]))  # row 1 is the first below the header


def _is_header(line: tuple[int, list[str]], name: str, what: str, known: Collection[str]) -> bool:
    at, cells = line
    if "/" in cells[0] or "\\" in cells[0] or any(parse_number(cell) is not None for cell in cells[1:]):
        return False
    words = [cell.lower() for cell in cells if cell]
    if set(words) & set(known):
        return True
    if any(parse_label(cell) is not None for cell in cells[1:]):
        return False
    near = next((found for word in words if (found := nearest(word, known))), "")
    raise UserError(
        f"{name} line {at}: {quote_cell(','.join(cells))!r} is neither a study's line (study,number) nor a header that is known for "
        f"{what}{near}; columns may be {', '.join(dict.fromkeys(known))}"
    )


def _find_width(lines: list[tuple[int, list[str]]], is_header: bool) -> int:
    """How many columns the table has: the header's, else most lines', without what trailing commas add."""
    widths = [_trimmed_width(cells) for _, cells in (lines[:1] if is_header else lines)]
    return max(Counter(widths).items(), key=lambda pair: (pair[1], pair[0]))[0]


def _trimmed_width(cells: list[str]) -> int:
    return max((place + 1 for place, cell in enumerate(cells) if cell), default=0)


def _strip_trailing(cells: list[str], width: int) -> list[str]:
    """Without the empty cells that trailing commas add."""
    return cells[: max(width, _trimmed_width(cells))]


def _check_widths(lines: list[tuple[int, list[str]]], width: int, name: str) -> None:
    odd = [(number, len(cells)) for number, cells in lines if len(cells) != width]
    if odd:
        number, found = odd[0]
        others = f" (and {len(odd) - 1:,} more such lines)" if len(odd) > 1 else ""
        raise UserError(
            f"{name} line {number}: wrong number of columns, {found} where the table has {width}{others}; mend the lines, "
            "and quote names that hold a comma"
        )


def _check_repeats(header: tuple[str, ...] | None, name: str) -> None:
    twice = [cell for cell, count in Counter(header or ()).items() if count > 1 and cell]
    if twice:
        raise UserError(f"{name}: the header names {list_examples(twice)} twice; each column needs a name of its own")
