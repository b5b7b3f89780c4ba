r"""Names of files and studies in tables that people open: never a formula in a spreadsheet, joined whatever program wrote them.

    name -> cell -> a CSV          a CSV's cell -> name          a CSV's cell -> key -> joined with another table's

A spreadsheet computes a cell that begins with one of FORMULA, quoted or not. `./` before a relative path names the same file.
macOS writes an umlaut as two characters (NFD), other systems as one (NFC): `join_key` is NFC.
"""

import unicodedata

import pandas as pd

FORMULA = (*"=+-@\t\r\n", *"\uff1d\uff0b\uff0d\uff20")  # the last four: full width, as East Asian versions take them
_HERE = "./"


def escape_formula(name: str) -> str:
    """Return `name` as a CSV has it: with a leading `./` where a spreadsheet would take it for a formula."""
    return f"{_HERE}{name}" if name.startswith(FORMULA) else name


def escape_formulas(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with `escape_formula` of each text in it. Numbers stay as they are."""
    texts = [str(column) for column in frame if not pd.api.types.is_numeric_dtype(frame[column].dtype)]
    return frame.assign(
        **{column: pd.Series(map(_cell, frame[column].tolist()), frame.index, object) for column in texts}
    )


def _cell(value: object) -> object:
    return escape_formula(value) if isinstance(value, str) else value


def unescape(cell: str) -> str:
    """Return the name that a CSV's cell holds: without a leading `./`, which no name of ours has."""
    return cell.removeprefix(_HERE) or cell


def join_key(cell: str) -> str:
    """Return what a file or a study is joined by: its name in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", unescape(cell))
