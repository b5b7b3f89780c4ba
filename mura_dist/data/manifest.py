"""The manifest: the ordered table of all radiographs, whose row identifies a radiograph everywhere else.

    Scan.manifest (scan.py) -> cut_tune (by patient) -> manifest.csv -> rows, labels, weights

Rows are sorted by split, study type, patient, study, view and path, so that they are equal on every machine and file system.
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
"""(column, description of valid values, check) for a loaded manifest."""


@dataclass(frozen=True)
class Manifest:
    """An ordered table of radiographs.

    `frame` has one line per radiograph, indexed by row (0-based, without gaps). Columns: split, study_type, patient, study,
    path (str), view (int64), label (int64, 0 or 1).
    """

    frame: pd.DataFrame

    @classmethod
    def from_radiographs(cls, radiographs: Iterable[Radiograph]) -> Self:
        """Sort radiographs into a manifest."""
        ordered = sorted(radiographs, key=_sort_key)
        lines = [(r.split, r.study_type, r.patient, r.study, r.view, r.label, r.path) for r in ordered]
        # dtype object: pandas' string dtype refuses file names that are not UTF-8.
        frame = pd.DataFrame(lines, columns=list(COLUMNS[1:]), dtype=object)
        return cls(frame.astype({"view": np.int64, "label": np.int64}).rename_axis("row"))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read manifest.csv. Raises UserError where it is not a valid manifest."""
        text = dict.fromkeys(("split", "study_type", "patient", "study", "path"), object)
        try:
            frame = pd.read_csv(path, dtype=text, keep_default_na=False, index_col="row")
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:  # whatever pandas raises
            raise UserError(f"{path} is not a manifest ({error}). Make the shards again.") from error
        if tuple(frame.columns) != COLUMNS[1:] or not np.array_equal(frame.index, np.arange(len(frame))):
            raise UserError(
                f"{path}: columns or rows are not a manifest's ({','.join(COLUMNS)}). Make the shards again."
            )
        for column, limit, is_valid in _LIMITS:
            invalid = frame.index[~is_valid(frame[column])]
            if len(invalid):
                value = frame.loc[invalid[0], column]
                raise UserError(f"{path} row {invalid[0]}: {column} {value!s:.100} ({limit}). Make the shards again.")
        return cls(frame.astype({"view": np.int64, "label": np.int64}))

    def to_csv(self) -> bytes:
        """Return the content of manifest.csv."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(self.frame.itertuples())
        return text.getvalue().encode("utf-8", errors="backslashreplace")

    def save(self, path: Path) -> None:
        """Write manifest.csv."""
        files.write_bytes(path, self.to_csv())

    @property
    def digest(self) -> str:
        """SHA-256 of manifest.csv, in hexadecimal."""
        return hashlib.sha256(self.to_csv()).hexdigest()

    def rows(self, split: str) -> np.ndarray:
        """Return the rows of one split, ascending, int64 (n,)."""
        return self.frame.index[self.frame["split"] == split].to_numpy(dtype=np.int64)


def cut_tune(manifest: Manifest, fraction: float, seed: int, groups: Sequence[Sequence[str]] = ()) -> Manifest:
    """Move a share of the train patients to the split `tune`, proportionally over study types and labels.

    Patients are sorted by (first study type, whether any study is positive, hash of seed and name), and every 1/fraction-th is
    moved. The result depends on no library's random numbers.

    Args:
        manifest: The manifest, without a tune split.
        fraction: Share of the train patients, 0 to 0.5.
        seed: Seed of the hash.
        groups: Patients that stay together. A group counts as one patient. Groups of more than 1/fraction stay in train.

    Raises:
        UserError: The fraction is out of range.
    """
    if not 0 <= fraction <= 0.5:
        raise UserError(f"--tune {fraction}: must lie between 0 (no tune split) and 0.5. The default is 0.1.")
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
    # The middle of each stride, so that 0.1 of 5 patients is one.
    stride = np.floor(np.arange(len(names) + 1) * fraction + 0.5)
    chosen = set(names[np.diff(stride) > 0])
    if fraction > 0 and len(names) > 1 and not chosen:
        chosen = {names[0]}
    frame = manifest.frame.copy()
    frame.loc[unit.index[unit.isin(chosen)], "split"] = "tune"
    return Manifest.from_radiographs(Radiograph(*line) for line in frame[list(_FIELDS)].itertuples(index=False))


def _numbers(values: pd.Series) -> pd.Series:
    return pd.to_numeric(values, errors="coerce")


def _sort_key(radiograph: Radiograph) -> tuple:
    r = radiograph
    return (mura.SPLITS.index(r.split), r.study_type, r.patient, r.study, r.view, os.fsencode(r.path))
