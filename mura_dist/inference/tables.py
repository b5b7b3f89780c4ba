"""The tables of a prediction run: a line a radiograph, a line a study, a line a failure. As many as there are, in bounded memory.

    parts, read once -> views grouped by study on disk        and once more -> predictions, failures, block by block
    studies, block by block: probabilities averaged over views, calls        -> csv or parquet

Thresholds, calibration and the uncertain band are the card's; where it has none for a study type, the cell is empty. A model of
drawings makes no call and no band. `gate` (gate.py) only tells: a radiograph that does not look like one counts in its study's
mean like any other. Columns: table_guide.py. In CSV no text can become a formula (table_names.py); Parquet has none.
"""

import contextlib
import csv
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pandas as pd

from mura_dist.core import files
from mura_dist.core.errors import RunError, os_reason
from mura_dist.data import gate, table_names
from mura_dist.inference import grouping, scratch_db, table_guide
from mura_dist.metrics import calibration, classification
from mura_dist.metrics.operating_points import PAPER_THRESHOLD
from mura_dist.models.card import Card

NAMES = tuple(table_guide.TABLES)
FORMATS = ("csv", "parquet")
BLOCK = 16_384  # lines made at a time; a row group of Parquet
DIGITS = 6  # significant digits of a probability
_EXACT_DIGITS = 17  # of a float64

ChunkResult = dict[str, Any]
"""{"predictions": [[path, study, study_type, logit, gate], ...], "failures": [[path, code, reason], ...], "notes": {note: number
of files}} of a chunk's files; parts of earlier states have no notes."""
Add = Callable[[pd.DataFrame], None]

_SCHEMA = """
CREATE TABLE study (number INTEGER PRIMARY KEY, name TEXT UNIQUE, type TEXT, gate INTEGER);
CREATE TABLE view (study INTEGER, probability REAL, number INTEGER, PRIMARY KEY (study, probability, number)) WITHOUT ROWID;
"""
_ADD_STUDY = f"""
INSERT INTO study (name, type, gate) VALUES (?, ?, ?)
ON CONFLICT (name) DO UPDATE SET
    type = CASE type WHEN excluded.type THEN type ELSE '{grouping.UNKNOWN}' END, gate = max(gate, excluded.gate)
"""
_ADD_VIEW = "INSERT INTO view SELECT number, ?, ? FROM study WHERE name = ?"


@dataclass
class TableCounts:
    """What the tables hold, counted as they are written."""

    num_radiographs: int = 0
    num_studies: int = 0
    num_calls: int = 0
    num_positive: int = 0
    num_calibrated: int = 0
    failures_by_code: Counter[str] = field(default_factory=Counter)
    studies_by_type: Counter[str] = field(default_factory=Counter)
    studies_by_band: Counter[str] = field(default_factory=Counter)
    unevaluated_by_type: Counter[str] = field(default_factory=Counter)
    radiographs_by_gate: Counter[str] = field(default_factory=Counter)
    radiographs_by_note: Counter[str] = field(default_factory=Counter)

    def count(self, studies: pd.DataFrame) -> None:
        self.num_studies += len(studies)
        self.num_calls += int(studies["call"].notna().sum())
        self.num_positive += int(studies["call"].sum())
        self.num_calibrated += int(studies["calibrated_probability"].notna().sum())
        self.studies_by_type.update(studies["study_type"])
        self.studies_by_band.update(studies["band"].dropna())
        self.unevaluated_by_type.update(studies.loc[studies["threshold"].isna(), "study_type"])


def write(out: Path, parts: Callable[[], Iterable[ChunkResult]], card: Card, format: str, aside: Path) -> TableCounts:
    """The three tables of what `parts()` gives, in its order, into `out`; `aside`: a file for what is too long for memory.

    Raises RunError where a table cannot be put in its place, OSError where the disk is full.
    """
    tally, returns = TableCounts(), dict.fromkeys(NAMES, False)

    def table(name: str) -> contextlib.AbstractContextManager[Add]:
        return _table(out / f"{name}.{format}", returns[name])

    with open_study_accumulator(aside) as studies:
        for rows, failures in _blocks(_count_notes(parts(), tally)):
            studies.add(rows)
            returns["predictions"] |= any("\r" in path + study for path, study, *_ in rows)
            returns["studies"] |= any("\r" in study for _, study, *_ in rows)
            returns["failures"] |= any("\r" in path for path, *_ in failures)
        with table("predictions") as predictions, table("failures") as failed:
            for rows, failures in _blocks(parts()):
                predictions(prediction_frame(rows))
                failed(pd.DataFrame(failures, columns=list(table_guide.FAILURES), dtype="string"))
                tally.num_radiographs += len(rows)
                tally.radiographs_by_gate.update(row[4] for row in rows)
                tally.failures_by_code.update(code for _, code, _ in failures)
        with table("studies") as apply_thresholds:
            for frame in studies.frames(card):
                apply_thresholds(frame)
                tally.count(frame)
    return tally


def _count_notes(parts: Iterable[ChunkResult], tally: TableCounts) -> Iterator[ChunkResult]:
    for part in parts:
        tally.radiographs_by_note.update(part.get("notes", {}))
        yield part


def _blocks(parts: Iterable[ChunkResult]) -> Iterator[tuple[list[Any], list[Any]]]:
    """(predictions, failures) of some parts at a time; at least once."""
    rows: list[Any] = []
    failures: list[Any] = []
    for part in parts:
        rows += part["predictions"]
        failures += part["failures"]
        if len(rows) + len(failures) >= BLOCK:
            yield rows, failures
            rows, failures = [], []
    yield rows, failures


def prediction_frame(rows: list[Any]) -> pd.DataFrame:
    """Lines of predictions.csv; rows: [path, study, study_type, logit, gate] each."""
    views = pd.DataFrame(rows, columns=["path", "study", "study_type", "logit", "gate"])
    text = ["path", "study", "study_type", "gate"]
    views[text] = views[text].astype("string")
    views["logit"] = views["logit"].astype(np.float32)
    views["probability"] = shorten(classification.sigmoid(views["logit"].to_numpy()))
    return views[list(table_guide.PREDICTIONS)]


def shorten(probability: np.ndarray, *thresholds: np.ndarray) -> np.ndarray:
    """Round to DIGITS significant digits, or to as many more as it takes not to move across a threshold.

    Args:
        probability: (n,) float64.
        thresholds: (n,) float64 each, NaN where there is none. What lies above one, strictly, stays above it.

    Returns:
        (n,) float64, whose shortest text has these digits.
    """
    sides = [classification.is_positive(probability, threshold) for threshold in thresholds]
    short = _round(probability, DIGITS)
    for digits in range(DIGITS + 1, _EXACT_DIGITS + 1):
        moved = np.zeros(len(short), bool)
        for side, threshold in zip(sides, thresholds, strict=True):
            moved |= classification.is_positive(short, threshold) != side
        if not moved.any():
            break
        short[moved] = _round(probability[moved], digits)
    return short


def _round(probability: np.ndarray, digits: int) -> np.ndarray:
    return np.array([float(f"{value:.{digits}g}") for value in probability.tolist()], dtype=np.float64)


# ---- studies


@contextlib.contextmanager
def open_study_accumulator(path: Path) -> Iterator["StudyAccumulator"]:
    """Views on disk, which come in any order and lie by study: a study's views may be anywhere in the walk."""
    with files.scratch(path, mode=files.PRIVATE) as scratch, scratch_db.create(scratch, _SCHEMA) as database:
        yield StudyAccumulator(database)


class StudyAccumulator:
    def __init__(self, database: sqlite3.Connection) -> None:
        self._database, self._num_views = database, 0

    def add(self, rows: list[Any]) -> None:
        """rows: [path, study, study_type, logit, gate] each."""
        probability = classification.sigmoid(np.array([row[3] for row in rows], np.float32)).tolist()
        self._database.executemany(_ADD_STUDY, [(*row[1:3], gate.NAMES.index(row[4])) for row in rows])
        views = [(one, self._num_views + place, rows[place][1]) for place, one in enumerate(probability)]
        self._database.executemany(_ADD_VIEW, views)
        self._num_views += len(rows)

    def frames(self, card: Card) -> Iterator[pd.DataFrame]:
        """A line a study, in the order of its first view. Views that disagree on the study type leave it unknown."""
        [(last,)] = self._database.execute("SELECT coalesce(max(number), 0) FROM study")
        for first in range(1, max(last, 1) + 1, BLOCK):
            some = "BETWEEN ? AND ?", (first, first + BLOCK - 1)
            rows = self._database.execute(
                f"SELECT name, type, gate FROM study WHERE number {some[0]} ORDER BY number", some[1]
            )
            heads = [(name, study_type, gate.NAMES[worst]) for name, study_type, worst in rows]
            views = self._database.execute(f"SELECT study, probability FROM view WHERE study {some[0]}", some[1])
            found = np.fromiter(views, [("study", np.int64), ("probability", np.float64)])
            yield apply_thresholds(heads, found["study"] - first, found["probability"], card)


def apply_thresholds(
    heads: Sequence[tuple[str, str, str]], code: np.ndarray, probability: np.ndarray, card: Card, *, drawn: bool = False
) -> pd.DataFrame:
    """Lines of studies.csv. heads: k of (study, study_type, gate); of the views: code (n,) int64 in 0 .. k - 1, probability (n,).

    Calls and bands are of the probabilities before they are shortened. drawn: the views are known to be drawings, so that a model
    of drawings may call them.
    """
    studies = pd.DataFrame(heads, columns=["study", "study_type", "gate"], dtype="string")
    studies["num_views"] = pd.array(np.bincount(code, minlength=len(heads)), dtype="Int64")
    studies["probability"] = classification.compute_study_probability(code, probability)
    studies = calibration.apply(card.calibration, studies)
    studies["threshold"] = studies["study_type"].map(dict(card.thresholds)).astype(np.float64)
    studies["call"] = classification.is_positive(studies["probability"], studies["threshold"])
    calls = drawn or not card.of_drawings
    studies["call"] = studies["call"].astype("Int64").where(calls & studies["threshold"].notna())
    band = studies["band"].astype("string")
    studies["band"] = band.where(calls & (band != ""))
    studies["calibrated_probability"] = shorten(studies["calibrated_probability"].to_numpy(np.float64))
    studies["probability"] = shorten(studies["probability"].to_numpy(np.float64), *_thresholds(studies, card))
    studies["trained_on"] = pd.array([card.trained_on.kind] * len(studies), dtype="string")
    return studies[list(table_guide.STUDIES)]


def _thresholds(studies: pd.DataFrame, card: Card) -> list[np.ndarray]:
    """Return what a study's probability is compared with, (n,) float64 each: its threshold, the ends of its band, and the paper's
    threshold, by which `score` calls where the table has no call."""
    bands = card.calibration.bands
    ends = ({name: getattr(band, end) for name, band in bands.items()} for end in ("low", "high"))
    mapped = [studies["study_type"].map(values).to_numpy(np.float64, na_value=np.nan) for values in ends]
    return [studies["threshold"].to_numpy(np.float64), *mapped, np.full(len(studies), PAPER_THRESHOLD)]


# ---- files


@contextlib.contextmanager
def replacing_table(path: Path) -> Iterator[None]:
    """For a block that replaces `path`: raises RunError where another program does not let go of it."""
    try:
        yield
    except (PermissionError, IsADirectoryError) as error:
        raise RunError(
            f"{path} cannot be written ({os_reason(error)}): close the program that holds it, or make its folder writable; "
            "the predictions are kept, the same command goes on"
        ) from error


@contextlib.contextmanager
def _table(path: Path, returns: bool) -> Iterator[Add]:
    """A table that is `path` when the block ends well: frames are added, one at least. `returns`: text holds a bare one."""
    with replacing_table(path), files.replacing(path) as file:
        if path.suffix == ".parquet":
            with contextlib.closing(_Parquet(file)) as parquet:
                yield parquet.add
        else:
            yield _Csv(file, returns).add


class _Csv:
    def __init__(self, file: IO[bytes], returns: bool) -> None:
        self._file, self._begun = file, False
        # The csv module leaves a bare carriage return unquoted, most readers end a line there: then quote all text.
        self._quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL

    def add(self, frame: pd.DataFrame) -> None:
        header, self._begun = not self._begun, True
        how: dict[str, Any] = {"lineterminator": "\n", "encoding": "utf-8", "quoting": self._quoting}
        table_names.escape_formulas(frame).to_csv(self._file, index=False, header=header, **how)


class _Parquet:
    """A row group a frame."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._writer = file, cast(Any, None)

    def add(self, frame: pd.DataFrame) -> None:
        from pyarrow import Table, parquet

        table = Table.from_pandas(frame, preserve_index=False)
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
