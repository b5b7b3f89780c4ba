r"""Write names of files and studies to CSV, and read them back, so that no spreadsheet takes them for a formula.

    name -> escape_formula -> cell          cell -> unescape -> name          cell -> join_key -> joined with another table

A spreadsheet evaluates a cell that begins with one of FORMULA, quoted or not. `./` before a relative path names the same file.
macOS writes an umlaut as two characters (NFD), other systems as one (NFC).
"""

import unicodedata

import pandas as pd

FORMULA = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20")  # the last four: full width, evaluated by East Asian versions
_CURRENT_FOLDER = "./"


def escape_formula(name: str) -> str:
    """Return the CSV cell of a name, with a leading `./` where a spreadsheet would evaluate it."""
    return f"{_CURRENT_FOLDER}{name}" if name.startswith(FORMULA) else name


def escape_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """Apply `escape_formula` to all texts of a frame. Numeric columns are unchanged."""
    texts = [str(column) for column in frame if not pd.api.types.is_numeric_dtype(frame[column].dtype)]
    return frame.assign(
        **{column: pd.Series(map(_cell, frame[column].tolist()), frame.index, object) for column in texts}
    )


def _cell(value: object) -> object:
    return escape_formula(value) if isinstance(value, str) else value


def unescape(cell: str) -> str:
    """Return the name of a CSV cell, without a leading `./`."""
    return cell.removeprefix(_CURRENT_FOLDER) or cell


def join_key(cell: str) -> str:
    """Return the key by which tables are joined: the name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", unescape(cell))
