"""The tables of a prediction, in bounded memory: one line per radiograph, per study and per failure.

    chunk results, first pass -> views grouped by study on disk      second pass -> predictions, failures, block by block
    studies, block by block: mean probabilities over views, calls                -> csv or parquet

Thresholds, calibration and the uncertain band come from the card. A cell is empty if the card has no value for the study type. A
model trained on drawings makes no call and no band. `gate` changes no number: an image that looks unlike a radiograph counts in
its study's mean. Columns: table_guide.py. No text of a CSV is a formula (table_names.py). Parquet has no formulas.
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
BLOCK = 16_384  # lines in memory; a row group of Parquet
DIGITS = 6  # significant digits of a probability
_EXACT_DIGITS = 17  # of a float64

ChunkResult = dict[str, Any]
"""{"predictions": [[path, study, study_type, logit, gate], ...], "failures": [[path, code, reason], ...], "notes": {note: number
of files}, "overlays": counts} of a chunk's files. Results of earlier versions have no notes."""
AddFrame = Callable[[pd.DataFrame], None]

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
    """Counts of what the tables hold."""

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

    def add_studies(self, studies: pd.DataFrame) -> None:
        """Count the lines of a block of studies.csv."""
        self.num_studies += len(studies)
        self.num_calls += int(studies["call"].notna().sum())
        self.num_positive += int(studies["call"].sum())
        self.num_calibrated += int(studies["calibrated_probability"].notna().sum())
        self.studies_by_type.update(studies["study_type"])
        self.studies_by_band.update(studies["band"].dropna())
        self.unevaluated_by_type.update(studies.loc[studies["threshold"].isna(), "study_type"])


def write(
    out: Path, load_results: Callable[[], Iterable[ChunkResult]], card: Card, format: str, scratch_path: Path
) -> TableCounts:
    """Write the three tables.

    Args:
        out: Folder of the tables.
        load_results: Returns the chunks' results in order. It is called twice.
        card: Card of the model that predicted.
        format: One of FORMATS.
        scratch_path: Temporary file for what may not fit into memory.

    Raises:
        RunError: a table cannot be replaced.
        OSError: the disk is full.
    """
    counts, has_return = TableCounts(), dict.fromkeys(NAMES, False)

    def open_table(name: str) -> contextlib.AbstractContextManager[AddFrame]:
        return _open_table(out / f"{name}.{format}", has_return[name])

    with open_study_accumulator(scratch_path) as accumulator:
        for rows, failures in _blocks(_count_notes(load_results(), counts)):
            accumulator.add(rows)
            has_return["predictions"] |= any("\r" in path + study for path, study, *_ in rows)
            has_return["studies"] |= any("\r" in study for _, study, *_ in rows)
            has_return["failures"] |= any("\r" in path for path, *_ in failures)
        with open_table("predictions") as add_predictions, open_table("failures") as add_failures:
            for rows, failures in _blocks(load_results()):
                add_predictions(prediction_frame(rows))
                add_failures(pd.DataFrame(failures, columns=list(table_guide.FAILURES), dtype="string"))
                counts.num_radiographs += len(rows)
                counts.radiographs_by_gate.update(row[4] for row in rows)
                counts.failures_by_code.update(code for _, code, _ in failures)
        with open_table("studies") as add_studies:
            for frame in accumulator.frames(card):
                add_studies(frame)
                counts.add_studies(frame)
    return counts


def _count_notes(results: Iterable[ChunkResult], counts: TableCounts) -> Iterator[ChunkResult]:
    for result in results:
        counts.radiographs_by_note.update(result.get("notes", {}))
        yield result


def _blocks(results: Iterable[ChunkResult]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield (predictions, failures) of about BLOCK lines; one pair at least."""
    rows: list[Any] = []
    failures: list[Any] = []
    for result in results:
        rows += result["predictions"]
        failures += result["failures"]
        if len(rows) + len(failures) >= BLOCK:
            yield rows, failures
            rows, failures = [], []
    yield rows, failures


def prediction_frame(rows: list[Any]) -> pd.DataFrame:
    """Return lines of predictions.csv from rows [path, study, study_type, logit, gate]."""
    views = pd.DataFrame(rows, columns=["path", "study", "study_type", "logit", "gate"])
    text = ["path", "study", "study_type", "gate"]
    views[text] = views[text].astype("string")
    views["logit"] = views["logit"].astype(np.float32)
    views["probability"] = shorten(classification.sigmoid(views["logit"].to_numpy()))
    return views[list(table_guide.PREDICTIONS)]


def shorten(probability: np.ndarray, *thresholds: np.ndarray) -> np.ndarray:
    """Round to DIGITS significant digits, or to more if a probability would otherwise cross a threshold.

    Args:
        probability: (n,) float64.
        *thresholds: (n,) float64 each, NaN for no threshold. A probability strictly above a threshold stays above it.

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
    """Create a StudyAccumulator in the temporary file `path`, which is deleted after the block."""
    with files.scratch(path, mode=files.PRIVATE) as scratch, scratch_db.create(scratch, _SCHEMA) as database:
        yield StudyAccumulator(database)


class StudyAccumulator:
    """Views grouped by study, on disk. The views of a study may come in any order."""

    def __init__(self, database: sqlite3.Connection) -> None:
        """Use an empty database with the tables of _SCHEMA."""
        self._database, self._num_views = database, 0

    def add(self, rows: list[Any]) -> None:
        """Add rows [path, study, study_type, logit, gate]."""
        probability = classification.sigmoid(np.array([row[3] for row in rows], np.float32)).tolist()
        self._database.executemany(_ADD_STUDY, [(*row[1:3], gate.NAMES.index(row[4])) for row in rows])
        views = [(value, self._num_views + index, rows[index][1]) for index, value in enumerate(probability)]
        self._database.executemany(_ADD_VIEW, views)
        self._num_views += len(rows)

    def frames(self, card: Card) -> Iterator[pd.DataFrame]:
        """Yield lines of studies.csv in the order of each study's first view.

        The study type is unknown if the views of a study differ.
        """
        [(last,)] = self._database.execute("SELECT coalesce(max(number), 0) FROM study")
        for first in range(1, max(last, 1) + 1, BLOCK):
            bounds = first, first + BLOCK - 1
            query = "SELECT name, type, gate FROM study WHERE number BETWEEN ? AND ? ORDER BY number"
            rows = self._database.execute(query, bounds)
            heads = [(name, study_type, gate.NAMES[worst]) for name, study_type, worst in rows]
            rows = self._database.execute("SELECT study, probability FROM view WHERE study BETWEEN ? AND ?", bounds)
            views = np.fromiter(rows, [("study", np.int64), ("probability", np.float64)])
            yield apply_thresholds(heads, views["study"] - first, views["probability"], card)


def apply_thresholds(
    heads: Sequence[tuple[str, str, str]], code: np.ndarray, probability: np.ndarray, card: Card, *, drawn: bool = False
) -> pd.DataFrame:
    """Return lines of studies.csv: mean probabilities, calibrated probabilities, calls and bands.

    Calls and bands are computed before the probabilities are shortened.

    Args:
        heads: (study, study_type, gate) of k studies.
        code: (n,) int64, the study of each view in 0 .. k - 1.
        probability: (n,) float64 of the views.
        card: Card of the model that predicted.
        drawn: The views are drawings, so that a model trained on drawings may call them.
    """
    studies = pd.DataFrame(heads, columns=["study", "study_type", "gate"], dtype="string")
    studies["num_views"] = pd.array(np.bincount(code, minlength=len(heads)), dtype="Int64")
    studies["probability"] = classification.compute_study_probability(code, probability)
    studies = calibration.apply(card.calibration, studies)
    studies["threshold"] = studies["study_type"].map(dict(card.thresholds)).astype(np.float64)
    studies["call"] = classification.is_positive(studies["probability"], studies["threshold"])
    calls = drawn or not card.trained_on_phantoms
    studies["call"] = studies["call"].astype("Int64").where(calls & studies["threshold"].notna())
    band = studies["band"].astype("string")
    studies["band"] = band.where(calls & (band != ""))
    studies["calibrated_probability"] = shorten(studies["calibrated_probability"].to_numpy(np.float64))
    studies["probability"] = shorten(studies["probability"].to_numpy(np.float64), *_thresholds(studies, card))
    studies["trained_on"] = pd.array([card.trained_on.kind] * len(studies), dtype="string")
    return studies[list(table_guide.STUDIES)]


def _thresholds(studies: pd.DataFrame, card: Card) -> list[np.ndarray]:
    """Return the thresholds of each study, (n,) float64 each.

    They are its own threshold, the ends of its band, and the paper's threshold, which `score` uses for a study without a call.
    """
    bands = card.calibration.bands
    ends = ({name: getattr(band, end) for name, band in bands.items()} for end in ("low", "high"))
    mapped = [studies["study_type"].map(values).to_numpy(np.float64, na_value=np.nan) for values in ends]
    return [studies["threshold"].to_numpy(np.float64), *mapped, np.full(len(studies), PAPER_THRESHOLD)]


# ---- files


@contextlib.contextmanager
def replacing_table(path: Path) -> Iterator[None]:
    """Raise RunError if another program keeps the block from replacing `path`."""
    try:
        yield
    except (PermissionError, IsADirectoryError) as error:
        raise RunError(
            f"{path} cannot be written ({os_reason(error)}). Close the program that has it open, or make its folder writable. "
            "The predictions are safe. The same command resumes."
        ) from error


@contextlib.contextmanager
def _open_table(path: Path, has_return: bool) -> Iterator[AddFrame]:
    """Open a table, which replaces `path` after the block. The block has to add a frame.

    Args:
        path: File of the table.
        has_return: A text contains a bare carriage return.
    """
    with replacing_table(path), files.replacing(path) as file:
        if path.suffix == ".parquet":
            with contextlib.closing(_ParquetWriter(file)) as parquet:
                yield parquet.add
        else:
            yield _CsvWriter(file, has_return).add


class _CsvWriter:
    def __init__(self, file: IO[bytes], has_return: bool) -> None:
        self._file, self._has_header = file, False
        # The csv module leaves a bare carriage return unquoted, and most readers end a line there. Then quote all text.
        self._quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL

    def add(self, frame: pd.DataFrame) -> None:
        header, self._has_header = not self._has_header, True
        options: dict[str, Any] = {"lineterminator": "\n", "encoding": "utf-8", "quoting": self._quoting}
        table_names.escape_formulas(frame).to_csv(self._file, index=False, header=header, **options)


class _ParquetWriter:
    """A writer of one row group per frame."""

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
