"""The option `--study-type`: one study type for all radiographs, or a CSV of path,study_type.

    TYPE | table.csv -> read_override -> check against the study types of MURA and the model -> match with the files

Paths are compared by table_names.join_key, before pseudonyms. No message quotes a path.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

from mura_dist.core.errors import UserError, os_reason
from mura_dist.data import mura, table_names
from mura_dist.data.csv_lines import decode, find_delimiter, read_lines

StudyTypeOverride = str | Mapping[str, str] | None

# Similarity without "XR_" (difflib): HANDS and HAND have 0.89, HEAD and HAND 0.75, FOREFOOT and FOREARM 0.53.
_TYPO, _NEAR = 0.8, 0.7
_FILE_NAME = re.compile(r"[/\\]|\.\w+$")


def read_override(value: str | None) -> StudyTypeOverride:
    """Parse the value of `--study-type`.

    Returns:
        A study type, or the study types of a CSV by `table_names.join_key` of the paths.

    Raises:
        UserError: the file cannot be read, has not the two columns, or gives one path two study types.
    """
    if value is None:
        return None
    if not (_FILE_NAME.search(value) or os.path.isfile(value)):
        return normalize(value)
    try:
        text = decode(Path(value).read_bytes(), value)
        lines = read_lines(text, value, "Name its columns.", strict=True, delimiter=find_delimiter(text))
        header, *rows = [cells for _, cells in lines]
        if any(cells[-1] for cells in rows) and all(len(cells) == len(header) + 1 for cells in rows):
            # R writes row names without a header.
            header = ["", *header]
        path_at, type_at = header.index("path"), header.index("study_type")
        if any(len(cells) > len(header) for cells in rows):
            raise ValueError("a line is longer than the header")
    except OSError as error:
        raise UserError(
            f"--study-type {value}: {os_reason(error)}. Give a study type, or a CSV of path,study_type."
        ) from error
    except ValueError as error:
        raise UserError(
            f"--study-type {value}: not a CSV with the columns path and study_type. Name them in its first line."
        ) from error
    types: dict[str, str] = {}
    for number, cells in enumerate(rows, start=1):
        filled = [*cells, *[""] * (len(header) - len(cells))]
        path, study_type = table_names.join_key(filled[path_at]), normalize(table_names.unescape(filled[type_at]))
        if types.setdefault(path, study_type) != study_type:
            raise UserError(
                f"--study-type {value}: the path of radiograph {number} is both {types[path]} and {study_type}. "
                "Keep one of the lines."
            )
    return types


def normalize(study_type: str) -> str:
    """Return MURA's spelling of a study type: XR_HAND for `hand`, `XR hand` or `xr-hand`. Others stay as written."""
    name = study_type.strip()
    full = f"XR_{_word(name)}"
    return full if full in mura.STUDY_TYPES else name


def check(override: StudyTypeOverride, model_types: Collection[str]) -> list[str]:
    """Check study types against those of MURA and the model.

    Returns:
        One warning per study type that neither has.

    Raises:
        UserError: a study type is probably a typo.
    """
    valid = sorted({*mura.STUDY_TYPES, *model_types})
    names = [override] if isinstance(override, str) else sorted({name for name in (override or {}).values() if name})
    warnings = []
    for name in (name for name in names if name not in valid):
        if typo := _most_similar(name, valid, _TYPO):
            raise UserError(
                f"--study-type {name}: no such study type (did you mean {typo}?). Give one of {', '.join(valid)}, or a name less "
                "similar to them."
            )
        near = _most_similar(name, valid, _NEAR)
        hint = f" (did you mean {near}?)" if near else ""
        warnings.append(f"--study-type {name}: no study type of MURA or of this model{hint}, so no call is made")
    return warnings


def _most_similar(name: str, valid: Collection[str], cutoff: float) -> str | None:
    by_word = {_word(study_type): study_type for study_type in valid}
    matches = get_close_matches(_word(name), list(by_word), n=1, cutoff=cutoff)
    return by_word[matches[0]] if matches else None


def _word(study_type: str) -> str:
    return re.sub(r"^XR[\W_]*", "", study_type.upper())


def match(override: StudyTypeOverride, paths: Iterable[str]) -> list[str]:
    """Compare the paths of a table of study types with the files.

    Args:
        override: Result of `read_override`.
        paths: Printable paths of all files.

    Returns:
        A warning if some of the table's paths are missing, else nothing.

    Raises:
        UserError: none of the table's paths is a file.
    """
    if override is None or isinstance(override, str):
        return []
    missing = set(override).difference(map(table_names.join_key, paths))
    if len(missing) < len(override):
        return [f"--study-type: {len(missing):,} of {len(override):,} paths are not in DIRECTORY"] if missing else []
    raise UserError(
        f"--study-type: none of its {len(override):,} paths is in DIRECTORY. Write them relative to DIRECTORY, with / between "
        "folders."
    )
