"""The manifest: the ordered table of all radiographs. A radiograph's row in it is its identity everywhere else.

    Scan.manifest (scan.py) -> cut_tune (by patient) -> manifest.csv -> rows, labels, weights

Rows are sorted by split, study type, patient, study, view and path, so they are the same on every machine and file system.
"""

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.mura import Radiograph

COLUMNS = ("row", "split", "study_type", "patient", "study", "view", "label", "path")
_FIELDS = ("split", "study_type", "patient", "study", "view", "label", "path")
_MAX_VIEW = 10**18  # mura.parse reads at most 18 digits
_LIMITS: tuple[tuple[str, str, Callable[[pd.Series], pd.Series]], ...] = (
    ("split", f"one of {', '.join(mura.SPLITS)}", lambda values: values.isin(mura.SPLITS)),
    ("label", "0 or 1", lambda values: _numbers(values).isin((0, 1))),
    (
        "view",
        "a whole number from 0 on",
        lambda values: _numbers(values).between(0, _MAX_VIEW) & (_numbers(values) % 1 == 0),
    ),
    *((name, "not empty", lambda values: values != "") for name in ("study_type", "patient", "study", "path")),
)
"""(column, what its values must be, whether they are) of a manifest that was loaded."""


@dataclass(frozen=True)
class Manifest:
    """`frame`: one line a radiograph, indexed by row (0-based, without gaps).

    Columns: split, study_type, patient, study, path (str), view (int64), label (int64, 0 or 1).
    """

    frame: pd.DataFrame

    @classmethod
    def from_radiographs(cls, radiographs: Iterable[Radiograph]) -> Self:
        ordered = sorted(radiographs, key=_place)
        lines = [(r.split, r.study_type, r.patient, r.study, r.view, r.label, r.path) for r in ordered]
        # dtype object: pandas' own strings refuse what a file's name may hold, bytes that are not UTF-8.
        frame = pd.DataFrame(lines, columns=list(COLUMNS[1:]), dtype=object)
        return cls(frame.astype({"view": np.int64, "label": np.int64}).rename_axis("row"))

    @classmethod
    def load(cls, path: Path) -> Self:
        text = dict.fromkeys(("split", "study_type", "patient", "study", "path"), object)
        try:
            frame = pd.read_csv(path, dtype=text, keep_default_na=False, index_col="row")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:  # pandas has no kind of its own
            raise UserError(f"{path} is not a manifest ({error}); make the shards again") from error
        if tuple(frame.columns) != COLUMNS[1:] or not np.array_equal(frame.index, np.arange(len(frame))):
            raise UserError(
                f"{path}: columns or rows are not a manifest's ({','.join(COLUMNS)}); make the shards again"
            )
        for column, limit, fits in _LIMITS:
            strange = frame.index[~fits(frame[column])]
            if len(strange):
                value = frame.loc[strange[0], column]
                raise UserError(f"{path} row {strange[0]}: {column} {value!s:.100} ({limit}); make the shards again")
        return cls(frame.astype({"view": np.int64, "label": np.int64}))

    def to_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.frame.itertuples())
        return text.getvalue().encode("utf-8", errors="backslashreplace")

    def save(self, path: Path) -> None:
        files.write_bytes(path, self.to_csv())

    @property
    def digest(self) -> str:
        """SHA-256 of manifest.csv: which radiographs, labels and splits these are."""
        return hashlib.sha256(self.to_csv()).hexdigest()

    def rows(self, split: str) -> np.ndarray:
        """The rows of one split, ascending: int64 (n,)."""
        return self.frame.index[self.frame["split"] == split].to_numpy(dtype=np.int64)


def cut_tune(manifest: Manifest, fraction: float, seed: int, groups: Sequence[Sequence[str]] = ()) -> Manifest:
    """Move `fraction` of the train patients, whole, to the split `tune`, proportionally over study types and labels.

    Patients are sorted by (their first study type, whether any study is positive, a hash of seed and name), and every
    1/fraction-th is taken: the choice depends on no library's random numbers. The patients of one of `groups` count as one, so
    that they stay together; a group of more than 1/fraction patients stays in train.
    """
    if not 0 <= fraction <= 0.5:
        raise UserError(f"--tune {fraction}: must lie between 0 (no tune split) and 0.5; the default is 0.1")
    train = manifest.frame[manifest.frame["split"] == "train"]
    name_of = {patient: group[0] for group in groups for patient in group}
    unit = pd.Series([name_of.get(name, name) for name in train["patient"]], index=train.index, dtype=object)
    patients = train.groupby(unit, sort=True).agg(
        study_type=("study_type", "min"), positive=("label", "max"), num=("patient", "nunique")
    )
    patients = patients[(patients["num"] == 1) | (patients["num"] * fraction <= 1)]
    patients["hash"] = [
        hashlib.sha256(f"{seed}:{name}".encode(errors="replace")).hexdigest() for name in patients.index
    ]
    names = patients.sort_values(["study_type", "positive", "hash"]).index.to_numpy()
    # The middle of each stride, so that a fraction of 0.1 of 5 patients still takes one.
    place = np.floor(np.arange(len(names) + 1) * fraction + 0.5)
    chosen = set(names[np.diff(place) > 0])
    if fraction > 0 and len(names) > 1 and not chosen:
        chosen = {names[0]}
    frame = manifest.frame.copy()
    frame.loc[unit.index[unit.isin(chosen)], "split"] = "tune"
    return Manifest.from_radiographs(Radiograph(*line) for line in frame[list(_FIELDS)].itertuples(index=False))


def _numbers(values: pd.Series) -> pd.Series:
    return pd.to_numeric(values, errors="coerce")


def _place(radiograph: Radiograph) -> tuple:
    r = radiograph
    return (mura.SPLITS.index(r.split), r.study_type, r.patient, r.study, r.view, os.fsencode(r.path))
