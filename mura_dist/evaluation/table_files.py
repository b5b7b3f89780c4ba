"""Read a table of studies, as a file or a data frame, into text cells; refuse what is not such a table.

    CSV: UTF-8, UTF-16 or Windows-1252; commas, semicolons or tabs; a header or none, CRLF, quotes, trailing commas, empty lines
    Parquet, data frame: the columns as text
        -> Table: header (lower case) or None; (line number, cells) of each row

A first line that is neither data nor a known header is refused.
"""

import contextlib
import hashlib
import importlib.util
import io
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mura_dist.core.errors import UserError, install_remedy, nearest
from mura_dist.data.csv_lines import decode, find_delimiter, parse_label, parse_number, read_lines

TableSource = pd.DataFrame | str | Path
Lines = list[tuple[int, list[str]]]  # (line number, cells)

_MAX_CELL_CHARS = 100  # of a cell quoted in a message
_NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Table:
    """A table as text; all rows have `width` cells."""

    name: str  # the file's name without folders, or the role of a data frame
    sha256: str
    header: tuple[str, ...] | None  # lower case; None where there is none
    lines: Lines
    width: int
    notes: tuple[str, ...] = ()  # decisions that reading it needed

    def column(self, index: int) -> list[str]:
        """Return the cells of a column."""
        return [cells[index] for _, cells in self.lines]

    def find(self, *names: str) -> int | None:
        """Return the index of the first of `names` that is in the header, or None."""
        header = self.header or ()
        return next((header.index(name) for name in names if name in header), None)

    def locate(self, row: int) -> str:
        """Return where a row is in the file, for messages: `labels.csv line 5`."""
        return f"{self.name} line {self.lines[row][0]}"


def read(source: TableSource, role: str, known_columns: Collection[str], *, name: str | None = None) -> Table:
    """Read a table of studies.

    Args:
        source: a CSV or Parquet file, or a data frame.
        role: `predictions` or `labels`, for messages.
        known_columns: names by which a first line is recognized as a header.
        name: what messages call a data frame. By default its role.

    Raises:
        UserError: the file is missing, or is not such a table.
    """
    notes: tuple[str, ...] = ()
    if isinstance(source, pd.DataFrame):
        name, lines, is_header = name or role, _frame_lines(source), True
        sha256 = hashlib.sha256(source.to_csv(index=False).encode()).hexdigest()
    else:
        path = Path(source)
        data, name = _read_bytes(path, role), path.name
        sha256 = hashlib.sha256(data).hexdigest()
        if path.suffix.lower() == ".parquet":
            lines, is_header = _parse_parquet(data, name), True
        else:
            text, notes = _decode_text(data, name)
            lines = _parse_csv(text, name)
            is_header = bool(lines) and _is_header(lines[0], name, role, known_columns)
    if len(lines) <= is_header:
        raise UserError(f"{name} has no rows. It needs one line per study.")
    width = _find_width(lines, is_header)
    rows = [(number, _strip_trailing(cells, width)) for number, cells in lines]
    _check_widths(rows, width, name)
    header = tuple(cell.lower() for cell in rows[0][1]) if is_header else None
    _check_repeated_columns(header, name)
    return Table(name, sha256, header, rows[is_header:], width, notes)


def quote_cell(text: str) -> str:
    """Return a cell for a message: printable (no terminal control codes) and not too long."""
    printable = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return (
        printable if len(printable) <= _MAX_CELL_CHARS else f"...{printable[-_MAX_CELL_CHARS:]}"
    )  # a path's end matters


def list_examples(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = len(names) - _NUM_EXAMPLES
    return ", ".join(map(quote_cell, names[:_NUM_EXAMPLES])) + (f" and {more:,} more" if more > 0 else "")


def _read_bytes(path: Path, role: str) -> bytes:
    if path.is_dir():
        example = next((f", perhaps {name}" for name in ("studies.csv", "labels.csv") if (path / name).is_file()), "")
        raise UserError(f"{path} is a folder. Pass the file of {role} in it{example}.")
    if not path.exists():
        raise UserError(f"{path}: no such file. Pass the file of {role} (the order is PREDICTIONS LABELS).")
    return path.read_bytes()


def _decode_text(data: bytes, name: str) -> tuple[str, tuple[str, ...]]:
    """Return (text, notes). Excel's plain CSV is Windows-1252; after a wrong guess the names match no study."""
    try:
        return decode(data, name), ()
    except UserError:
        if (text := _decode_windows(data)) is None:
            raise
        return text, ("not UTF-8: read as Windows-1252",)


def _decode_windows(data: bytes) -> str | None:
    """Decode Windows-1252 if nothing else fits: no UTF-8 characters, no control characters, no undefined bytes."""
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        utf8_text = data.decode("utf-8", errors="ignore")
        if utf8_text.isascii() and all(c.isprintable() or c in "\t\r\n\xa0\xad" for c in text):
            return text
    return None


def _parse_csv(text: str, name: str) -> Lines:
    lines = read_lines(text, name, "Fix the line.", skipinitialspace=True, strict=True, delimiter=find_delimiter(text))
    return [(number, [cell.strip() for cell in cells]) for number, cells in lines]


def _parse_parquet(data: bytes, name: str) -> Lines:
    if importlib.util.find_spec("pyarrow") is None:
        remedy = install_remedy("parquet")
        raise UserError(f"{name}: Parquet needs pyarrow, which is not installed. Run {remedy}, or pass a CSV.")
    try:
        return _frame_lines(pd.read_parquet(io.BytesIO(data)))
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not a Parquet file. Write it again, or pass a CSV.") from error


def _frame_lines(frame: pd.DataFrame) -> Lines:
    """Return the header as line 0 and the rows from line 1 on. A named index counts as the first column."""
    if frame.index.name is not None:
        frame = frame.reset_index()
    rows = frame.astype(object).itertuples(index=False, name=None)
    return list(enumerate([list(map(str, frame.columns)), *([_cell_text(value) for value in row] for row in rows)]))


def _cell_text(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    return str(int(value)) if isinstance(value, bool | np.bool_) else str(value).strip()


def _is_header(line: tuple[int, list[str]], name: str, role: str, known_columns: Collection[str]) -> bool:
    number, cells = line
    if "/" in cells[0] or "\\" in cells[0] or any(parse_number(cell) is not None for cell in cells[1:]):
        return False
    columns = [cell.lower() for cell in cells if cell]
    if set(columns) & set(known_columns):
        return True
    if any(parse_label(cell) is not None for cell in cells[1:]):
        return False
    hint = next((hint for column in columns if (hint := nearest(column, known_columns))), "")
    raise UserError(
        f"{name} line {number}: {quote_cell(','.join(cells))!r} is neither a study's line (study,number) nor a known header of "
        f"{role}{hint}. Columns may be {', '.join(dict.fromkeys(known_columns))}."
    )


def _find_width(lines: Lines, is_header: bool) -> int:
    """Return the number of columns: the header's, else that of most lines, without trailing empty cells."""
    widths = [_trimmed_width(cells) for _, cells in (lines[:1] if is_header else lines)]
    return max(Counter(widths).items(), key=lambda pair: (pair[1], pair[0]))[0]


def _trimmed_width(cells: list[str]) -> int:
    return max((index + 1 for index, cell in enumerate(cells) if cell), default=0)


def _strip_trailing(cells: list[str], width: int) -> list[str]:
    """Return the cells without the empty ones that trailing commas add."""
    return cells[: max(width, _trimmed_width(cells))]


def _check_widths(lines: Lines, width: int, name: str) -> None:
    wrong = [(number, len(cells)) for number, cells in lines if len(cells) != width]
    if wrong:
        number, num_columns = wrong[0]
        more = f" (and {len(wrong) - 1:,} more such lines)" if len(wrong) > 1 else ""
        raise UserError(
            f"{name} line {number}: wrong number of columns, {num_columns} where the table has {width}{more}. Fix the lines, "
            "and quote names that contain a comma."
        )


def _check_repeated_columns(header: tuple[str, ...] | None, name: str) -> None:
    repeated = [cell for cell, count in Counter(header or ()).items() if count > 1 and cell]
    if repeated:
        raise UserError(f"{name}: the header names {list_examples(repeated)} twice. Rename or delete one column.")
