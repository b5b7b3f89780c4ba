"""Predictions and labels of studies, as files have them -> the table of studies that is measured, or a refusal.

    predictions: `path/,1` (the official format; a probability in place of 0 or 1), or studies.csv of predict or evaluate
    labels:      `Study,Label`, `Study,Rad1,Rad2,Rad3` (the majority), `path/,label`, or study,label[,patient][,study_type];
                 a label is 0 or 1, 0.0 or 1.0, or a word: normal, negative, abnormal, positive
        -> Predictions, Labels -> joined by study -> studies: study, study_type, patient, label, and what is predicted

A study is known by MURA's key, its path from the split's folder on, wherever the data set lay; one that is not of MURA's
layout by its name. The official scorer took submissions scored per image, studies twice, studies missing and unknown ones:
each is refused here in words of its own. `official_text` writes what it reads.
"""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core.errors import UserError, nearest
from mura_dist.data import mura, table_names
from mura_dist.data.csv_lines import parse_label, parse_number
from mura_dist.data.source import csv_files
from mura_dist.evaluation import table_files
from mura_dist.evaluation.table_files import Table, list_examples, quote_cell
from mura_dist.metrics.classification import is_positive
from mura_dist.metrics.operating_points import PAPER_THRESHOLD, STUDY_COLUMNS
from mura_dist.reports.plurals import pluralize

POOLED = "overall"  # what metrics.json calls all studies together
UNKNOWN = "unknown"  # the study type of a study of which nobody told one
_STUDY = ("study", "path", "img_path", "study_path")  # what the column of studies may be called; Img_Path in the wild
_VALUES = ("probability", "call", "prediction")  # prediction: 0 or 1, or a probability
_OF_PREDICTIONS = (*_STUDY, *_VALUES, *STUDY_COLUMNS, "patient", "label", "exposure", "logit", "gate", "trained_on")
_OF_LABELS = (*_STUDY, "label", "patient", "study_type", "rad1", "rad2", "rad3")
_RADIOLOGIST = "rad"
_IMAGES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jp2", ".j2k", ".dcm", ".dicom", ".tif", ".tiff"),
    *(".bmp", ".gif", ".webp", ".ppm", ".pgm"),
}
_NEAR = 0.7  # how alike a column's name must be to one that is known to be taken for a slip


@dataclass(frozen=True)
class _Kind:
    """What a column of numbers may hold, and the words for it."""

    fits: Callable[[float], bool]
    range: str
    wanted: str
    parse: Callable[[str], float | None] = parse_number


def _parse_binary(cell: str) -> float | None:
    label = parse_label(cell)
    return parse_number(cell) if label is None else label


_UNIT = _Kind(lambda value: 0 <= value <= 1, "[0, 1]", "0 or 1, or a probability")
_BINARY = _Kind(lambda value: value in (0, 1), "0/1", "0 (normal) or 1 (abnormal)", _parse_binary)
_VIEWS = _Kind(lambda value: 1 <= value < 1 << 31 and value % 1 == 0, "1 ..", "a whole number")
_GREY = _Kind(lambda value: 0 <= value <= 255, "[0, 255]", "a grey level")


@dataclass(frozen=True)
class Predictions:
    """`frame`: one line a study, columns study (its key), call (int64), and what the file holds of: study_type, num_views,
    exposure, probability, calibrated_probability, band."""

    name: str
    sha256: str
    frame: pd.DataFrame
    threshold: float | None  # above which a probability is called; None where the file's calls have none, or several
    notes: tuple[str, ...]
    files_are_studies: bool  # as `predict` has it where a directory does not tell studies


@dataclass(frozen=True)
class Labels:
    """`frame`: one line a study, columns study (its key), label (int64), and of the file: patient, study_type ("" unknown)."""

    name: str
    sha256: str
    frame: pd.DataFrame
    notes: tuple[str, ...]


def key_of(text: str) -> str:
    """Return the key of a study: its path from the split's folder on; a name without MURA's layout, without trailing slashes.

    Both as table_names.join_key has them, without blanks at their ends.
    """
    name = table_names.join_key(text).strip()
    return csv_files.study_of(name.replace("\\", "/")) or name.rstrip("/") or name


def official_text(studies: pd.DataFrame) -> str:
    """`MURA-v1.1/valid/XR_WRIST/patient11185/study1_positive/,1`: the official format, a line a study; columns study, call."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for study, call in zip(studies["study"], studies["call"], strict=True):
        above = "MURA-v1.1/" if csv_files.study_of(study) == study else ""
        lines.writerow([table_names.escape_formula(f"{above}{study}/"), int(call)])
    return text.getvalue()


# ---- predictions


def read_predictions(path: Path, threshold: float | None = None) -> Predictions:
    """What `path` predicts. `threshold`: cuts probabilities, calls of the file's own or not; None: its calls, else 0.5."""
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"--threshold {threshold:g}: must lie between 0 and 1; the default is {PAPER_THRESHOLD:g}")
    sheet = table_files.read(path, "predictions", _OF_PREDICTIONS)
    if sheet.header is None:
        _check_width(sheet, (2,), "study,0 or 1, or a probability")
    else:
        _check_predictions_header(sheet)
    keys = _keys(sheet)
    files = sheet.find("study") is not None  # said to be studies; `joined` sees whether the labels say so too
    _check_images(sheet, keys, files)
    _check_once(sheet, keys)
    probability, call = _values(sheet, keys)
    call, cut, note = _calls(sheet, keys, probability, call, threshold)
    columns = {"study": pd.Series(keys, dtype=object), **_extras(sheet, keys)}
    columns |= {name: values for name, values in (("probability", probability), ("call", call)) if values is not None}
    return Predictions(
        name=sheet.name,
        sha256=sheet.sha256,
        frame=pd.DataFrame(columns),
        threshold=cut,
        notes=(*sheet.notes, *_not_read(sheet, _OF_PREDICTIONS), *_drawings(sheet), note),
        files_are_studies=files and any(_is_image(key) for key in keys),
    )


def _check_predictions_header(sheet: Table) -> None:
    if sheet.find("path") is not None and sheet.find("study", "logit", "gate") is not None:
        raise UserError(f"{sheet.name} has a line a radiograph, not a study; give studies.csv, which lies beside it")
    value = sheet.find(*_VALUES)
    if value is None and (sheet.find("label") is not None or _radiologists(sheet)):
        raise UserError(
            f"{sheet.name} holds labels, not predictions ({','.join(sheet.header or ())}); the order is PREDICTIONS LABELS, and "
            "a column of predictions is named probability, call or prediction"
        )
    _require(sheet, "study", _STUDY)
    if value is None:
        _require(sheet, "probability, call or prediction", _VALUES)


def _values(sheet: Table, keys: list[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(probability float64 (n,), call int64 (n,)): what there is. A column of 0 and 1 holds calls, unless named probability."""
    named, call = sheet.find("probability"), sheet.find("call")
    place = 1 if sheet.header is None else sheet.find("probability", "prediction")
    values = None if place is None else np.array(_checked(sheet, place, keys, _UNIT, "prediction"))
    if call is not None and all(sheet.column(call)):
        return values, np.array(_checked(sheet, call, keys, _BINARY, "call")).astype(np.int64)
    if values is not None and named is None and set(values.tolist()) <= {0.0, 1.0}:
        return None, values.astype(np.int64)
    if values is None:
        assert call is not None
        _checked(sheet, call, keys, _BINARY, "call")  # one is empty: refused
    return values, None


def _calls(
    sheet: Table, keys: list[str], probability: np.ndarray | None, call: np.ndarray | None, threshold: float | None
) -> tuple[np.ndarray, float | None, str]:
    """(calls int64 (n,), the threshold they were made by if that is known, what is to be said of them)."""
    if call is not None and (probability is None or threshold is None):
        only = "the file's own calls" if probability is not None else "calls only, no probabilities"
        return call, _own_threshold(sheet), only + ("" if threshold is None else ": --threshold changes nothing")
    assert probability is not None
    place, cut = sheet.find("call"), PAPER_THRESHOLD if threshold is None else threshold
    empty = 0 if place is None else sheet.column(place).count("")
    why = f"{empty:,} of {len(keys):,} studies have no call in the file: " if empty else ""
    return is_positive(probability, cut).astype(np.int64), cut, f"{why}calls are probability > {cut:g}"


def _extras(sheet: Table, keys: list[str]) -> dict[str, Any]:
    """What studies.csv has beside the prediction; a column that is empty, or not whole, is as if it were not there."""
    columns: dict[str, Any] = {}
    for name in ("study_type", "band"):
        if (place := sheet.find(name)) is not None and any(sheet.column(place)):
            columns[name] = pd.Series(_names(sheet, place), dtype=object)
    for name, kind in (("num_views", _VIEWS), ("exposure", _GREY)):
        values = _numbers(sheet, sheet.find(name))
        if values and all(map(kind.fits, values)):
            columns[name] = np.array(values).astype(np.int64 if kind is _VIEWS else np.float64)
    if (place := sheet.find("calibrated_probability")) is not None and all(sheet.column(place)):
        found = _checked(sheet, place, keys, _UNIT, "calibrated probability")
        columns["calibrated_probability"] = np.array(found, dtype=np.float64)
    return columns


def _drawings(sheet: Table) -> list[str]:
    """The note of a model of drawings, where column trained_on tells of one."""
    place = sheet.find("trained_on")
    drawn = place is not None and "phantoms" in sheet.column(place)
    return ["the model was trained on drawings (phantoms)"] if drawn else []


def _own_threshold(sheet: Table) -> float | None:
    """The file's, where it has one for all studies."""
    told = set(_numbers(sheet, sheet.find("threshold")))
    return told.pop() if len(told) == 1 and all(map(_UNIT.fits, told)) else None


# ---- labels


def read_labels(path: Path, *, files_are_studies: bool = False) -> Labels:
    """What `path` says the studies are. `files_are_studies`: a study may be named by an image file."""
    sheet = table_files.read(path, "labels", _OF_LABELS)
    if sheet.header is None:
        _check_width(sheet, (2, 4), "study,label, or study and the labels of three radiologists")
    else:
        _check_labels_header(sheet)
    keys = _keys(sheet)
    _check_images(sheet, keys, files_are_studies)
    label = _label(sheet, keys)
    _check_labelled_once(sheet, keys, label)
    frame = pd.DataFrame({"study": pd.Series(keys, dtype=object), "label": np.array(label, dtype=np.int64)})
    for name in ("patient", "study_type"):
        place = sheet.find(name)
        frame[name] = pd.Series("" if place is None else _names(sheet, place), index=frame.index, dtype=object)
    return Labels(sheet.name, sheet.sha256, frame, (*sheet.notes, *_not_read(sheet, _OF_LABELS)))


def _check_labels_header(sheet: Table) -> None:
    if sheet.find("label") is None and not _radiologists(sheet):
        if sheet.find(*_VALUES) is not None:
            raise UserError(f"{sheet.name} holds predictions, not labels; the order is PREDICTIONS LABELS")
        _require(sheet, "label", ("label",))
    _require(sheet, "study", _STUDY)
    if sheet.find("label") is not None and _radiologists(sheet):
        raise UserError(
            f"{sheet.name} has a column label and radiologists' too; leave out the one that is not the truth"
        )


def _radiologists(sheet: Table) -> list[int]:
    """The places of the columns Rad1, Rad2, ...; those of a table of four columns without a header."""
    if sheet.header is None:
        return [1, 2, 3] if sheet.width == 4 else []
    return [
        place
        for place, name in enumerate(sheet.header)
        if name.startswith(_RADIOLOGIST) and name.removeprefix(_RADIOLOGIST).isdecimal()
    ]


def _label(sheet: Table, keys: list[str]) -> list[int]:
    """0 or 1 a line: the label's, or what most radiologists say."""
    if not (raters := _radiologists(sheet)):
        place = 1 if sheet.header is None else sheet.find("label")
        assert place is not None
        return [int(value) for value in _checked(sheet, place, keys, _BINARY, "label")]
    told = [_checked(sheet, place, keys, _BINARY, "radiologist's label") for place in raters]
    votes = np.sum(told, axis=0)
    split = [key for key, num in zip(keys, votes.tolist(), strict=True) if 2 * num == len(raters)]
    if split:
        raise UserError(
            f"{sheet.name}: {_studies(split)} on which {len(raters)} radiologists are evenly split ({list_examples(split)}); a majority "
            "needs an odd number of them"
        )
    return [int(2 * num > len(raters)) for num in votes.tolist()]


def _check_labelled_once(sheet: Table, keys: list[str], label: list[int]) -> None:
    seen: dict[str, set[int]] = defaultdict(set)
    for key, value in zip(keys, label, strict=True):
        seen[key].add(value)
    both = [key for key, values in seen.items() if len(values) > 1]
    if both:
        raise UserError(
            f"{sheet.name}: {_studies(both)} with both labels ({list_examples(both)}); only one can be true, mend the others"
        )
    _check_once(sheet, keys)


# ---- joined


def join(predictions: Predictions, labels: Labels) -> pd.DataFrame:
    """One line a study, in the labels' order: study, study_type, patient (None: unknown), label, and what is predicted."""
    _check_same(predictions, labels)
    frame = labels.frame.merge(predictions.frame.rename(columns={"study_type": "told"}), on="study", validate="1:1")
    parsed = [mura.parse(f"{study}/image1.png") for study in frame["study"]]
    told = frame["told"] if "told" in frame else [""] * len(frame)
    types = zip(frame["study_type"], [part.study_type if part else "" for part in parsed], told, strict=True)
    patients = zip(frame["patient"], [part.patient if part else "" for part in parsed], strict=True)
    frame["study_type"] = pd.Series([next(filter(None, names), UNKNOWN) for names in types], dtype=object)
    if taken := frame.loc[frame["study_type"] == POOLED, "study"].tolist():
        raise UserError(
            f"{labels.name}: {_studies(taken)} of study type {POOLED!r} ({list_examples(taken)}), which is the name of all studies "
            "together; give that study type another name"
        )
    frame["patient"] = pd.Series([next(filter(None, names), None) for names in patients], dtype=object)
    rest = [name for name in predictions.frame if name not in ("study", "study_type")]
    return frame[["study", "study_type", "patient", "label", *rest]]


def common_split(studies: pd.DataFrame) -> str | None:
    """The split that all studies name; None where they name several, or none."""
    parsed = [mura.parse(f"{study}/image1.png") for study in studies["study"]]
    splits = {part.split if part else None for part in parsed}
    return splits.pop() if len(splits) == 1 else None


def _check_same(predictions: Predictions, labels: Labels) -> None:
    ours, theirs = predictions.frame["study"], labels.frame["study"]
    if predictions.files_are_studies:
        _refuse_images(predictions.name, [key for key in _without(ours, set(theirs)) if _is_image(key)], len(ours))
    missing, unknown = _without(theirs, set(ours)), _without(ours, set(theirs))
    if len(missing) == len(theirs):
        raise UserError(
            f"{predictions.name} and {labels.name} have no study in common: the first is {quote_cell(ours.iloc[0])!r} in the one, "
            f"{quote_cell(theirs.iloc[0])!r} in the other; name studies alike in both"
        )
    if missing:
        raise UserError(
            f"{predictions.name}: {_studies(missing)} missing of the {len(theirs):,} of {labels.name} ({list_examples(missing)}); "
            "predict every study, or a score is of the easy ones"
        )
    if unknown:
        raise UserError(
            f"{predictions.name}: {_studies(unknown)} unknown to {labels.name} ({list_examples(unknown)}); label them, or leave them out"
        )


def _without(studies: Iterable[str], others: set[str]) -> list[str]:
    return [study for study in studies if study not in others]


# ---- checks of both


def _keys(sheet: Table) -> list[str]:
    place = 0 if sheet.header is None else sheet.find(*_STUDY)
    assert place is not None
    names = sheet.column(place)
    blank = [line for line, name in enumerate(names) if not name.strip("/\\")]
    if blank:
        raise UserError(f"{sheet.at(blank[0])} names no study ({len(blank):,} such lines); name it, or delete the line")
    return [key_of(name) for name in names]


def _names(sheet: Table, place: int) -> list[str]:
    return [table_names.unescape(cell) for cell in sheet.column(place)]


def _check_width(sheet: Table, widths: tuple[int, ...], meaning: str) -> None:
    if sheet.width not in widths:
        wanted = " or ".join(map(str, widths))
        raise UserError(
            f"{sheet.name}: wrong number of columns, {sheet.width}; without a header it must have {wanted} ({meaning}); with "
            "more, give it a header"
        )


def _require(sheet: Table, what: str, names: Sequence[str]) -> None:
    if sheet.find(*names) is None:
        near = next((found for cell in sheet.header or () if (found := nearest(cell, names))), "")
        raise UserError(
            f"{sheet.name}: no column {what} in its header {','.join(map(quote_cell, sheet.header or ()))}{near}; add it"
        )


def _not_read(sheet: Table, known: Sequence[str]) -> list[str]:
    """The note of columns that are not used; one that looks like a slip for a known one is refused, not lost in silence."""
    raters = {place for place in _radiologists(sheet) if sheet.header is not None}
    others = [
        name for place, name in enumerate(sheet.header or ()) if name and name not in known and place not in raters
    ]
    for name in others:
        if near := get_close_matches(name, set(known) - set(sheet.header or ()), n=1, cutoff=_NEAR):
            raise UserError(
                f"{sheet.name}: column {quote_cell(name)!r} (did you mean {near[0]}?); rename it, or leave it out"
            )
    return [f"columns not read: {', '.join(map(quote_cell, others))}"] if others else []


def _is_image(key: str) -> bool:
    return PurePosixPath(key.replace("\\", "/")).suffix.lower() in _IMAGES


def _check_images(sheet: Table, keys: list[str], files_are_studies: bool) -> None:
    """Lines of images, not of studies. A name of MURA's layout is one always; another may be a study of one file."""
    images = [key for key in keys if _is_image(key)]
    if files_are_studies:
        images = [key for key in images if mura.parse(key.replace("\\", "/"))]
    _refuse_images(sheet.name, images, len(keys))


def _refuse_images(name: str, images: list[str], of: int) -> None:
    if images:
        raise UserError(
            f"{name}: {len(images):,} of {of:,} lines name an image, not a study ({list_examples(images)}); give a line a "
            "study: its path without the file, its probability the mean over its views"
        )


def _check_once(sheet: Table, keys: list[str]) -> None:
    places: dict[str, list[int]] = defaultdict(list)
    for line, key in enumerate(keys):
        places[key].append(sheet.lines[line][0])
    twice = {key: lines for key, lines in places.items() if len(lines) > 1}
    if twice:
        key, lines = next(iter(twice.items()))
        composed = "; names are compared in Unicode's composed form, NFC" if not key.isascii() else ""
        raise UserError(
            f"{sheet.name}: {_studies(list(twice))} more than once ({list_examples(list(twice))}; the first on lines "
            f"{', '.join(map(str, lines[:3]))}{composed}); leave one line of each"
        )


def _numbers(sheet: Table, place: int | None, parse: Callable[[str], float | None] = parse_number) -> list[float]:
    """A column's numbers, NaN where a cell is none; [] where there is no such column."""
    cells = [] if place is None else sheet.column(place)
    return [math.nan if (value := parse(cell)) is None else value for cell in cells]


def _checked(sheet: Table, place: int, keys: list[str], kind: _Kind, what: str) -> list[float]:
    """A column's numbers, all of which fit; else a refusal that names the first that does not."""
    cells, values = sheet.column(place), _numbers(sheet, place, kind.parse)
    bad = [line for line, value in enumerate(values) if not kind.fits(value)]
    if not bad:
        return values
    cell, names = cells[bad[0]], [keys[line] for line in bad]
    wrong = f"{quote_cell(cell)!r} is {'not a number' if math.isnan(values[bad[0]]) else 'outside ' + kind.range}"
    swapped = what == "label" and all(map(_UNIT.fits, values))
    raise UserError(
        f"{sheet.at(bad[0])}: {what} {wrong if cell else 'is empty'} ({_studies(names)} of {len(keys):,} so: {list_examples(names)}); "
        f"it must be {kind.wanted}{'; are these predictions? the order is PREDICTIONS LABELS' if swapped else ''}"
    )


def _studies(names: Sequence[str]) -> str:
    return pluralize(len(names), "study")
