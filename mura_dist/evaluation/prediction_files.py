"""Read predictions and labels of studies, validate them and join them into the table that is measured.

    predictions: `path/,1` (the official format; a probability may replace 0 or 1), or studies.csv of predict or evaluate
    labels:      `Study,Label`, `Study,Rad1,Rad2,Rad3` (the majority), `path/,label`, or study,label[,patient][,study_type];
                 a label is 0 or 1, 0.0 or 1.0, or a word: normal, negative, abnormal, positive
        -> Predictions, Labels -> join -> studies: study, study_type, patient, label, and the columns of the predictions

A study is identified by MURA's key: its path from the split's folder on, wherever the data set is. A study outside MURA's
layout is identified by its name. The official scorer accepted files scored per image and repeated, missing and unknown
studies. Each of these is refused here with its own message. `format_official` writes the official format.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core.errors import UserError, nearest
from mura_dist.data import mura, table_names
from mura_dist.data.csv_lines import parse_label, parse_number
from mura_dist.data.source import csv_files
from mura_dist.evaluation import table_files
from mura_dist.evaluation.table_files import Table, TableSource, list_examples, quote_cell
from mura_dist.metrics.classification import is_positive
from mura_dist.metrics.operating_points import PAPER_THRESHOLD, STUDY_COLUMNS
from mura_dist.reports.plurals import pluralize

OVERALL = "overall"  # the group of all studies in metrics.json
UNKNOWN = "unknown"  # the study type of a study where no table names one
_STUDY_NAMES = ("study", "path", "img_path", "study_path")  # names of the study column; Img_Path is in published files
_VALUE_NAMES = ("probability", "call", "prediction")  # prediction: 0 or 1, or a probability
_PREDICTION_COLUMNS = (
    *(*_STUDY_NAMES, *_VALUE_NAMES, *STUDY_COLUMNS),
    *("patient", "label", "exposure", "logit", "gate", "trained_on"),
)
_LABEL_COLUMNS = (*_STUDY_NAMES, "label", "patient", "study_type", "rad1", "rad2", "rad3")
_RADIOLOGIST = "rad"
_IMAGE_SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".j2k", ".dcm", ".dicom", ".tif", ".tiff"),
    *(".bmp", ".gif", ".webp", ".ppm", ".pgm"),
}
_TYPO_CUTOFF = 0.7  # similarity (difflib) from which an unknown column's name is taken for a misspelt known one


@dataclass(frozen=True)
class _NumberColumn:
    """What a column of numbers may hold, and how messages describe it."""

    accepts: Callable[[float], bool]
    range: str
    expected: str
    parse: Callable[[str], float | None] = parse_number


def _parse_binary(cell: str) -> float | None:
    label = parse_label(cell)
    return parse_number(cell) if label is None else label


_PROBABILITY = _NumberColumn(lambda value: 0 <= value <= 1, "[0, 1]", "0 or 1, or a probability")
_BINARY = _NumberColumn(lambda value: value in (0, 1), "0/1", "0 (normal) or 1 (abnormal)", _parse_binary)
_NUM_VIEWS = _NumberColumn(lambda value: 1 <= value < 1 << 31 and value % 1 == 0, "1 ..", "a whole number")
_GRAY_LEVEL = _NumberColumn(lambda value: 0 <= value <= 255, "[0, 255]", "a gray level")


@dataclass(frozen=True)
class Predictions:
    """The predictions of one table.

    `frame` has one row per study: study (its key), call (int64), and where the table has them study_type, num_views,
    exposure, probability, calibrated_probability and band.
    """

    name: str
    sha256: str
    frame: pd.DataFrame
    threshold: float | None  # of the calls; None where the table's own calls have no threshold, or several
    notes: tuple[str, ...]
    files_are_studies: bool  # a study is named by its file, as `predict` does for a flat folder


@dataclass(frozen=True)
class Labels:
    """The labels of one table.

    `frame` has one row per study: study (its key), label (int64), patient and study_type ("" where unknown).
    """

    name: str
    sha256: str
    frame: pd.DataFrame
    notes: tuple[str, ...]


def study_key(text: str) -> str:
    """Return the key of a study: its path from the split's folder on, or its name without trailing slashes."""
    name = table_names.join_key(text).strip()
    return csv_files.parse_study(name.replace("\\", "/")) or name.rstrip("/") or name


def format_official(studies: pd.DataFrame) -> str:
    """Return `studies` (columns study, call) in the official format.

    A line is `MURA-v1.1/valid/XR_WRIST/patient11185/study1_positive/,1`.
    """
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for study, call in zip(studies["study"], studies["call"], strict=True):
        prefix = "MURA-v1.1/" if csv_files.parse_study(study) == study else ""
        lines.writerow([table_names.escape_formula(f"{prefix}{study}/"), int(call)])
    return text.getvalue()


# ---- predictions


def read_predictions(source: TableSource, threshold: float | None = None, *, name: str | None = None) -> Predictions:
    """Read the predictions of a file or a data frame.

    Args:
        source: a CSV or Parquet file, or a data frame.
        threshold: makes the calls from the probabilities. None: the table's own calls, else those at 0.5.
        name: what messages call a data frame. By default `predictions`.

    Raises:
        UserError: the table is not one of predictions per study, or the threshold is not between 0 and 1.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(
            f"--threshold {threshold:g} is not between 0 and 1. Pass a probability; the default is {PAPER_THRESHOLD:g}."
        )
    table = table_files.read(source, "predictions", _PREDICTION_COLUMNS, name=name)
    if table.header is None:
        _check_width(table, (2,), "study,0 or 1, or a probability")
    else:
        _check_predictions_header(table)
    keys = _study_keys(table)
    names_studies = table.find("study") is not None  # `join` checks whether the labels name them alike
    _check_images(table, keys, names_studies)
    _check_unique(table, keys)
    probability, call = _values(table, keys)
    call, cutoff, note = _calls(table, keys, probability, call, threshold)
    columns = {"study": pd.Series(keys, dtype=object), **_optional_columns(table, keys)}
    columns |= {key: values for key, values in (("probability", probability), ("call", call)) if values is not None}
    return Predictions(
        name=table.name,
        sha256=table.sha256,
        frame=pd.DataFrame(columns),
        threshold=cutoff,
        notes=(*table.notes, *_unread_columns(table, _PREDICTION_COLUMNS), *_phantom_note(table), note),
        files_are_studies=names_studies and any(_is_image(key) for key in keys),
    )


def _check_predictions_header(table: Table) -> None:
    if table.find("path") is not None and table.find("study", "logit", "gate") is not None:
        raise UserError(
            f"{table.name} has one line per radiograph, not per study. Pass studies.csv, which is in the same folder."
        )
    value = table.find(*_VALUE_NAMES)
    if value is None and (table.find("label") is not None or _radiologist_columns(table)):
        raise UserError(
            f"{table.name} holds labels, not predictions ({','.join(table.header or ())}). Check that the order is PREDICTIONS "
            "LABELS, and name the column of predictions probability, call or prediction."
        )
    _require_column(table, "study", _STUDY_NAMES)
    if value is None:
        _require_column(table, "probability, call or prediction", _VALUE_NAMES)


def _values(table: Table, keys: list[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return (probability float64 (n,), call int64 (n,)), None where missing.

    A column of only 0 and 1 holds calls, unless it is named probability.
    """
    probability_named, call = table.find("probability"), table.find("call")
    index = 1 if table.header is None else table.find("probability", "prediction")
    values = None if index is None else np.array(_valid_numbers(table, index, keys, _PROBABILITY, "prediction"))
    if call is not None and all(table.column(call)):
        return values, np.array(_valid_numbers(table, call, keys, _BINARY, "call")).astype(np.int64)
    if values is not None and probability_named is None and set(values.tolist()) <= {0.0, 1.0}:
        return None, values.astype(np.int64)
    if values is None:
        assert call is not None
        _valid_numbers(table, call, keys, _BINARY, "call")  # raises: a call is empty
    return values, None


def _calls(
    table: Table, keys: list[str], probability: np.ndarray | None, call: np.ndarray | None, threshold: float | None
) -> tuple[np.ndarray, float | None, str]:
    """Return the calls int64 (n,), their threshold (None where unknown), and a note on where they come from."""
    if call is not None and (probability is None or threshold is None):
        origin = "the file's own calls" if probability is not None else "calls only, no probabilities"
        return call, _table_threshold(table), origin + ("" if threshold is None else ": --threshold changes nothing")
    assert probability is not None
    index, cutoff = table.find("call"), PAPER_THRESHOLD if threshold is None else threshold
    num_empty = 0 if index is None else table.column(index).count("")
    reason = f"{num_empty:,} of {len(keys):,} studies have no call in the file: " if num_empty else ""
    return is_positive(probability, cutoff).astype(np.int64), cutoff, f"{reason}calls are probability > {cutoff:g}"


def _optional_columns(table: Table, keys: list[str]) -> dict[str, Any]:
    """Return the optional columns of studies.csv. An empty or incomplete column counts as missing."""
    columns: dict[str, Any] = {}
    for name in ("study_type", "band"):
        if (index := table.find(name)) is not None and any(table.column(index)):
            columns[name] = pd.Series(_names(table, index), dtype=object)
    for name, column in (("num_views", _NUM_VIEWS), ("exposure", _GRAY_LEVEL)):
        values = _numbers(table, table.find(name))
        if values and all(map(column.accepts, values)):
            columns[name] = np.array(values).astype(np.int64 if column is _NUM_VIEWS else np.float64)
    if (index := table.find("calibrated_probability")) is not None and all(table.column(index)):
        values = _valid_numbers(table, index, keys, _PROBABILITY, "calibrated probability")
        columns["calibrated_probability"] = np.array(values, dtype=np.float64)
    return columns


def _phantom_note(table: Table) -> list[str]:
    """Return the note on a model trained on phantoms, according to the column trained_on."""
    index = table.find("trained_on")
    drawn = index is not None and "phantoms" in table.column(index)
    return ["the model was trained on drawings (phantoms)"] if drawn else []


def _table_threshold(table: Table) -> float | None:
    """Return the table's threshold if it has one for all studies."""
    thresholds = set(_numbers(table, table.find("threshold")))
    return thresholds.pop() if len(thresholds) == 1 and all(map(_PROBABILITY.accepts, thresholds)) else None


# ---- labels


def read_labels(source: TableSource, *, files_are_studies: bool = False) -> Labels:
    """Read the labels of a file or a data frame.

    Args:
        source: a CSV or Parquet file, or a data frame.
        files_are_studies: accept studies that are named by an image file.

    Raises:
        UserError: the table is not one of labels per study.
    """
    table = table_files.read(source, "labels", _LABEL_COLUMNS)
    if table.header is None:
        _check_width(table, (2, 4), "study,label, or study and the labels of three radiologists")
    else:
        _check_labels_header(table)
    keys = _study_keys(table)
    _check_images(table, keys, files_are_studies)
    label = _labels(table, keys)
    _check_labeled_once(table, keys, label)
    frame = pd.DataFrame({"study": pd.Series(keys, dtype=object), "label": np.array(label, dtype=np.int64)})
    for name in ("patient", "study_type"):
        index = table.find(name)
        frame[name] = pd.Series("" if index is None else _names(table, index), index=frame.index, dtype=object)
    return Labels(table.name, table.sha256, frame, (*table.notes, *_unread_columns(table, _LABEL_COLUMNS)))


def _check_labels_header(table: Table) -> None:
    if table.find("label") is None and not _radiologist_columns(table):
        if table.find(*_VALUE_NAMES) is not None:
            raise UserError(
                f"{table.name} holds predictions, not labels. Check that the order is PREDICTIONS LABELS, and name the column of "
                "labels label."
            )
        _require_column(table, "label", ("label",))
    _require_column(table, "study", _STUDY_NAMES)
    if table.find("label") is not None and _radiologist_columns(table):
        raise UserError(
            f"{table.name} has a column label and radiologists' columns. Delete the ones that are not the truth."
        )


def _radiologist_columns(table: Table) -> list[int]:
    """Return the indexes of the columns Rad1, Rad2, ..., or those of a table of four columns without a header."""
    if table.header is None:
        return [1, 2, 3] if table.width == 4 else []
    return [
        index
        for index, name in enumerate(table.header)
        if name.startswith(_RADIOLOGIST) and name.removeprefix(_RADIOLOGIST).isdecimal()
    ]


def _labels(table: Table, keys: list[str]) -> list[int]:
    """Return the label of each row, 0 or 1: the column label, or the radiologists' majority."""
    if not (raters := _radiologist_columns(table)):
        index = 1 if table.header is None else table.find("label")
        assert index is not None
        return [int(value) for value in _valid_numbers(table, index, keys, _BINARY, "label")]
    ratings = [_valid_numbers(table, index, keys, _BINARY, "radiologist's label") for index in raters]
    votes = np.sum(ratings, axis=0)
    tied = [key for key, num in zip(keys, votes.tolist(), strict=True) if 2 * num == len(raters)]
    if tied:
        raise UserError(
            f"{table.name}: {_num_studies(tied)} on which {len(raters)} radiologists are evenly split ({list_examples(tied)}). "
            "Pass an odd number of radiologists, or labels."
        )
    return [int(2 * num > len(raters)) for num in votes.tolist()]


def _check_labeled_once(table: Table, keys: list[str], label: list[int]) -> None:
    labels_by_study: dict[str, set[int]] = defaultdict(set)
    for key, value in zip(keys, label, strict=True):
        labels_by_study[key].add(value)
    conflicting = [key for key, values in labels_by_study.items() if len(values) > 1]
    if conflicting:
        raise UserError(
            f"{table.name}: {_num_studies(conflicting)} with both labels ({list_examples(conflicting)}). Delete the wrong lines."
        )
    _check_unique(table, keys)


# ---- join


def join(predictions: Predictions, labels: Labels) -> pd.DataFrame:
    """Join predictions and labels by study.

    Returns:
        One row per study, in the order of the labels: study, study_type, patient (None where unknown), label, and the
        columns of the predictions.

    Raises:
        UserError: the tables do not name the same studies, or a study type is called `overall`.
    """
    _check_same_studies(predictions, labels)
    renamed = predictions.frame.rename(columns={"study_type": "predicted_type"})
    frame = labels.frame.merge(renamed, on="study", validate="1:1")
    parsed = [mura.parse(f"{study}/image1.png") for study in frame["study"]]
    predicted_types = frame["predicted_type"] if "predicted_type" in frame else [""] * len(frame)
    path_types = [radiograph.study_type if radiograph else "" for radiograph in parsed]
    types = zip(frame["study_type"], path_types, predicted_types, strict=True)
    patients = zip(frame["patient"], [radiograph.patient if radiograph else "" for radiograph in parsed], strict=True)
    frame["study_type"] = pd.Series([next(filter(None, names), UNKNOWN) for names in types], dtype=object)
    if reserved := frame.loc[frame["study_type"] == OVERALL, "study"].tolist():
        raise UserError(
            f"{labels.name}: {_num_studies(reserved)} of study type {OVERALL!r} ({list_examples(reserved)}), the name of the "
            "group of all studies. Give that study type another name."
        )
    frame["patient"] = pd.Series([next(filter(None, names), None) for names in patients], dtype=object)
    columns = [name for name in predictions.frame if name not in ("study", "study_type")]
    return frame[["study", "study_type", "patient", "label", *columns]]


def common_split(studies: pd.DataFrame) -> str | None:
    """Return the split in the names of all studies, or None where they name several or none."""
    parsed = [mura.parse(f"{study}/image1.png") for study in studies["study"]]
    splits = {radiograph.split if radiograph else None for radiograph in parsed}
    return splits.pop() if len(splits) == 1 else None


def _check_same_studies(predictions: Predictions, labels: Labels) -> None:
    predicted, labeled = predictions.frame["study"], labels.frame["study"]
    missing, unknown = _difference(labeled, predicted), _difference(predicted, labeled)
    if predictions.files_are_studies:
        _refuse_images(predictions.name, [key for key in unknown if _is_image(key)], len(predicted))
    if len(missing) == len(labeled):
        raise UserError(
            f"{predictions.name} and {labels.name} have no study in common: the first is {quote_cell(predicted.iloc[0])!r} in "
            f"the one, {quote_cell(labeled.iloc[0])!r} in the other. Name studies alike in both."
        )
    if missing:
        raise UserError(
            f"{predictions.name}: {_num_studies(missing)} missing of the {len(labeled):,} of {labels.name} "
            f"({list_examples(missing)}). Predict every study: a score without the missing ones would be biased."
        )
    if unknown:
        raise UserError(
            f"{predictions.name}: {_num_studies(unknown)} unknown to {labels.name} ({list_examples(unknown)}). Label or delete "
            "them."
        )


def _difference(studies: Iterable[str], excluded: Iterable[str]) -> list[str]:
    """Return the studies that are not in `excluded`, in order."""
    excluded = set(excluded)
    return [study for study in studies if study not in excluded]


# ---- checks of both tables


def _study_keys(table: Table) -> list[str]:
    index = 0 if table.header is None else table.find(*_STUDY_NAMES)
    assert index is not None
    names = table.column(index)
    blank = [row for row, name in enumerate(names) if not name.strip("/\\")]
    if blank:
        raise UserError(
            f"{table.locate(blank[0])} names no study ({len(blank):,} such lines). Name it, or delete the line."
        )
    return [study_key(name) for name in names]


def _names(table: Table, index: int) -> list[str]:
    return [table_names.unescape(cell) for cell in table.column(index)]


def _check_width(table: Table, widths: tuple[int, ...], meaning: str) -> None:
    if table.width not in widths:
        expected = " or ".join(map(str, widths))
        raise UserError(
            f"{table.name}: wrong number of columns, {table.width} ({expected} without a header: {meaning}). Delete the other "
            "columns, or add a header."
        )


def _require_column(table: Table, column: str, names: Sequence[str]) -> None:
    if table.find(*names) is None:
        hint = next((hint for cell in table.header or () if (hint := nearest(cell, names))), "")
        header = ",".join(map(quote_cell, table.header or ()))
        raise UserError(f"{table.name}: no column {column} in its header {header}{hint}. Add or rename it.")


def _unread_columns(table: Table, columns: Sequence[str]) -> list[str]:
    """Return the note on columns that are not used; refuse one that looks like a misspelt known column."""
    raters = {index for index in _radiologist_columns(table) if table.header is not None}
    unread = [
        name for index, name in enumerate(table.header or ()) if name and name not in columns and index not in raters
    ]
    for name in unread:
        if matches := get_close_matches(name, set(columns) - set(table.header or ()), n=1, cutoff=_TYPO_CUTOFF):
            raise UserError(
                f"{table.name}: unknown column {quote_cell(name)!r} (did you mean {matches[0]}?). Rename or delete it."
            )
    return [f"columns not read: {', '.join(map(quote_cell, unread))}"] if unread else []


def _is_image(key: str) -> bool:
    return PurePosixPath(key.replace("\\", "/")).suffix.lower() in _IMAGE_SUFFIXES


def _check_images(table: Table, keys: list[str], files_are_studies: bool) -> None:
    """Refuse lines per image. An image in MURA's layout is never a study; outside it a file may be a study."""
    images = [key for key in keys if _is_image(key)]
    if files_are_studies:
        images = [key for key in images if mura.parse(key.replace("\\", "/"))]
    _refuse_images(table.name, images, len(keys))


def _refuse_images(name: str, images: list[str], num_lines: int) -> None:
    if images:
        raise UserError(
            f"{name}: {len(images):,} of {num_lines:,} lines name an image, not a study ({list_examples(images)}). Write one "
            "line per study: its path without the file, and as its probability the mean over its views."
        )


def _check_unique(table: Table, keys: list[str]) -> None:
    lines_by_study: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        lines_by_study[key].append(table.lines[row][0])
    repeated = {key: lines for key, lines in lines_by_study.items() if len(lines) > 1}
    if repeated:
        key, lines = next(iter(repeated.items()))
        unicode_hint = "; names are compared in Unicode's composed form, NFC" if not key.isascii() else ""
        raise UserError(
            f"{table.name}: {_num_studies(list(repeated))} more than once ({list_examples(list(repeated))}; the first on lines "
            f"{', '.join(map(str, lines[:3]))}{unicode_hint}). Keep one line of each."
        )


def _numbers(table: Table, index: int | None, parse: Callable[[str], float | None] = parse_number) -> list[float]:
    """Return a column's numbers, NaN where a cell holds none; [] where there is no such column."""
    cells = [] if index is None else table.column(index)
    return [math.nan if (value := parse(cell)) is None else value for cell in cells]


def _valid_numbers(table: Table, index: int, keys: list[str], column: _NumberColumn, title: str) -> list[float]:
    """Return a column's numbers; raise UserError on the first that the column does not accept."""
    cells, values = table.column(index), _numbers(table, index, column.parse)
    invalid = [row for row, value in enumerate(values) if not column.accepts(value)]
    if not invalid:
        return values
    cell, names = cells[invalid[0]], [keys[row] for row in invalid]
    problem = (
        f"{quote_cell(cell)!r} is {'not a number' if math.isnan(values[invalid[0]]) else 'outside ' + column.range}"
    )
    swapped = title == "label" and all(map(_PROBABILITY.accepts, values))
    hint = " If these are predictions: the order is PREDICTIONS LABELS." if swapped else ""
    raise UserError(
        f"{table.locate(invalid[0])}: {title} {problem if cell else 'is empty'} ({_num_studies(names)} of {len(keys):,} so: "
        f"{list_examples(names)}). Make it {column.expected}.{hint}"
    )


def _num_studies(names: Sequence[str]) -> str:
    return pluralize(len(names), "study")
