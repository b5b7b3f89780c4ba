"""What `--study-type` says: one study type for all radiographs, or a table of them; and whether it can be meant so.

    TYPE | table.csv (path,study_type) -> read -> check against what model and MURA know -> match with the files

Paths match as the tables have them (table_names.join_key), whatever the run calls them in public. No message quotes a path.
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

# Share of letters in common, "XR_" left aside: HANDS and HAND have 0.89, HEAD and HAND 0.75, FOREFOOT and FOREARM 0.53.
_TYPO, _NEAR = 0.8, 0.7
_FILE_NAME = re.compile(r"[/\\]|\.\w+$")


def read_override(given: str | None) -> StudyTypeOverride:
    """A study type, or the CSV of path,study_type that lies there, as a dict by the paths' keys. Raises UserError."""
    if given is None:
        return None
    if not (_FILE_NAME.search(given) or os.path.isfile(given)):
        return normalize(given)
    try:
        text = decode(Path(given).read_bytes(), given)
        lines = read_lines(text, given, "name its columns", strict=True, delimiter=find_delimiter(text))
        header, *rows = [cells for _, cells in lines]
        if any(cells[-1] for cells in rows) and all(len(cells) == len(header) + 1 for cells in rows):
            # Row names have no header where R writes the table.
            header = ["", *header]
        path_at, type_at = header.index("path"), header.index("study_type")
        if any(len(cells) > len(header) for cells in rows):
            raise ValueError("a line is longer than the header")
    except OSError as error:
        raise UserError(
            f"--study-type {given}: {os_reason(error)}; give a study type, or a CSV of path,study_type"
        ) from error
    except ValueError as error:
        raise UserError(
            f"--study-type {given}: not a CSV with the columns path and study_type; its first line names them"
        ) from error
    types: dict[str, str] = {}
    for number, cells in enumerate(rows, start=1):
        filled = [*cells, *[""] * (len(header) - len(cells))]
        path, study_type = table_names.join_key(filled[path_at]), normalize(table_names.unescape(filled[type_at]))
        if types.setdefault(path, study_type) != study_type:
            raise UserError(
                f"--study-type {given}: the path of radiograph {number} is both {types[path]} and {study_type}; "
                "leave one of the lines"
            )
    return types


def normalize(study_type: str) -> str:
    """Return MURA's study type: `hand`, `XR hand`, `xr-hand` and `XR_HAND` are one. What MURA does not know stays as written."""
    name = study_type.strip()
    full = f"XR_{_word(name)}"
    return full if full in mura.STUDY_TYPES else name


def check(given: StudyTypeOverride, known: Collection[str]) -> list[str]:
    """Warnings, a line each study type that neither MURA nor the model (`known`) has. Raises UserError for a likely typo."""
    everything = sorted({*mura.STUDY_TYPES, *known})
    asked = [given] if isinstance(given, str) else sorted({name for name in (given or {}).values() if name})
    warnings = []
    for name in (name for name in asked if name not in everything):
        if typo := _alike(name, everything, _TYPO):
            raise UserError(
                f"--study-type {name}: no such study type (did you mean {typo}?); there are {', '.join(everything)}, and "
                "others under names less like them"
            )
        near = _alike(name, everything, _NEAR)
        hint = f" (did you mean {near}?)" if near else ""
        warnings.append(f"--study-type {name} is known neither to MURA nor to this model{hint}: no call is made")
    return warnings


def _alike(name: str, known: Collection[str], cutoff: float) -> str | None:
    by_word = {_word(one): one for one in known}
    found = get_close_matches(_word(name), list(by_word), n=1, cutoff=cutoff)
    return by_word[found[0]] if found else None


def _word(study_type: str) -> str:
    return re.sub(r"^XR[\W_]*", "", study_type.upper())


def match(given: StudyTypeOverride, paths: Iterable[str]) -> list[str]:
    """A warning where lines of the table name no file; UserError where none of them does. paths: as the tables have them."""
    if given is None or isinstance(given, str):
        return []
    missing = set(given).difference(map(table_names.join_key, paths))
    if len(missing) < len(given):
        return [f"--study-type: {len(missing):,} of {len(given):,} paths are not in DIRECTORY"] if missing else []
    raise UserError(
        f"--study-type: none of its {len(given):,} paths is in DIRECTORY; write them relative to it, with / between "
        "their parts"
    )
