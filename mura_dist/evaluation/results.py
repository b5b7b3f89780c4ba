"""Measure the scores of a split and write the results of an evaluation.

    EvaluationSubject, SplitScores -> studies -> metrics -> tables, report, gallery

Writes into a folder (a run's, or --out): metrics.json, predictions.csv, predictions-official.csv (the official format),
studies.csv, report.html, report.json, pictures/, and optionally the gallery (LOCAL ONLY: it holds radiographs).
"""

import contextlib
import math
from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core import files
from mura_dist.core.errors import RunError, UserError
from mura_dist.data import gate, mura
from mura_dist.data.folder_kind import find_output_kinds
from mura_dist.data.shards.reader import CorruptSampleError, Shards
from mura_dist.evaluation import gallery, prediction_files
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, SplitScores
from mura_dist.metrics import calibration, classification
from mura_dist.metrics.operating_points import (
    PAPER_OPERATING_POINT,
    PAPER_THRESHOLD,
    STUDY_COLUMNS,
    FittedThresholds,
    thresholds_at,
)
from mura_dist.metrics.summary import compute_metrics, compute_subgroup_metrics, compute_threshold_curves
from mura_dist.models.target import Target
from mura_dist.reports import evaluation
from mura_dist.training.run import environment
from mura_dist.training.scores import Scores, study_scores
from mura_dist.training.stamp import Stamp

STAMP = ".evaluate.json"
_FILES = ("metrics.json", "predictions.csv", "predictions-official.csv", "studies.csv", "report.html", "report.json")
SPLIT_ROLES = {
    "train": "fits the weights",
    "tune": "chooses: learning-rate drops, the checkpoint, calibration, thresholds, the uncertain band",
    "valid": "is only reported",
}


def check_out(out: Path, target: Target) -> None:
    """Refuse an output folder that holds other results. The folder of the evaluated run is allowed.

    Raises:
        UserError: `out` is a file, another run, or holds predictions.
    """
    if target.kind == "run" and out.resolve() == target.path.resolve():
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Pass a folder.")
    kinds = find_output_kinds(out)
    for kind, content in (("run", "is a run, whose report"), ("prediction", "holds predictions, whose tables")):
        if kind in kinds:
            raise UserError(f"--out {out} {content} would be overwritten. Pass another folder.")


def make_stamp(
    model: dict[str, Any], shards: Shards, splits: tuple[str, ...], options: EvaluateOptions, context: dict[str, Any]
) -> Stamp:
    """Return the stamp of an evaluation. Reads the tars of `splits`.

    Args:
        model: JSON value that identifies the model and how it is computed.
        shards: the shards.
        splits: splits whose radiographs are scored.
        options: the options.
        context: JSON value that identifies what the report and the gallery say beside the scores.
    """
    scoring = {"model": model, "shards": shards.digest(*splits), "split": options.split}
    report = {key: value for key, value in asdict(options).items() if key != "out"} | context
    return Stamp(options.out / STAMP, {"scoring": scoring, "report": report})


def load_unchanged(stamp: Stamp, out: Path, log: Callable[[str], None]) -> dict[str, Any] | None:
    """Return metrics.json if `out` holds this evaluation already, else None."""
    if stamp.find() is None:
        return None
    log(f"nothing changed since the last evaluation: {out} stays as it is")
    metrics: dict[str, Any] = files.parse_json((out / "metrics.json").read_bytes(), dict[str, Any])
    return metrics


def load_scores(stamp: Stamp) -> tuple[Scores, float] | None:
    """Return the scores of the last evaluation and their seconds, or None if it scored anything else."""
    result = stamp.find_result_of("scoring")
    if result is None:
        return None
    rows, logit, corrupt = (
        np.frombuffer(b64decode(result[name]), dtype)
        for name, dtype in (("rows", np.int64), ("logit", np.float32), ("corrupt", np.int64))
    )
    return Scores(rows, logit, corrupt), result["seconds"]


def write_stamp(stamp: Stamp, out: Path, scores: Scores, seconds: float) -> None:
    """Write the stamp after all results, with the scores of all radiographs that were scored."""
    encoded = {
        name: b64encode(array.tobytes()).decode()
        for name, array in (("rows", scores.rows), ("logit", scores.logit), ("corrupt", scores.corrupt))
    }
    outputs = [*(out / name for name in _FILES), *sorted((out / "pictures").glob("*.svg")), *gallery.list_files(out)]
    stamp.write(outputs, encoded | {"seconds": seconds})


def write(
    shards: Shards,
    subject: EvaluationSubject,
    split_scores: SplitScores,
    options: EvaluateOptions,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure a split and write all results: metrics.json after the tables and the report, the gallery last.

    Returns:
        The content of metrics.json.

    Raises:
        RunError: every sample of the split is corrupt.
    """
    scores, out = split_scores.scores, options.out
    if not len(scores.rows):
        raise RunError(
            f"{shards.folder}: every sample of split {options.split!r} is corrupt. Run `mura-dist verify`, which lists them."
        )
    appearance = measure_appearance(shards, scores.rows)
    studies = _studies(shards, split_scores, appearance, options.operating_point or PAPER_OPERATING_POINT)
    metrics = _metrics(shards, subject, split_scores, options, studies)
    _write_tables(out, shards, scores, studies, appearance["gate"], subject.trained_on)
    evaluation.write(out, metrics=metrics, studies=studies, context=_context(shards, subject, split_scores))
    files.write_json(out / "metrics.json", metrics)
    if options.gallery is None:
        gallery.clear(out)
    else:
        with contextlib.nullcontext() if options.shared else files.private(*gallery.paths(out)):
            gallery.write(
                out, shards, studies, scores.rows, subject=subject, options=options.gallery, metrics=metrics, log=log
            )
    return metrics


def _studies(shards: Shards, split_scores: SplitScores, appearance: pd.DataFrame, operating_point: str) -> pd.DataFrame:
    """Return one row per study, with the exposure, the threshold of its study type and the call."""
    fitted = split_scores.thresholds
    studies = calibration.apply(fitted, study_scores(shards, split_scores.scores))
    studies = add_exposures(shards, appearance, studies)
    threshold = studies["study_type"].map(_thresholds(studies, fitted, operating_point)).astype(np.float64)
    calls = classification.is_positive(studies["probability"], threshold)
    return studies.assign(threshold=threshold, call=calls.astype(np.int64))


def _metrics(
    shards: Shards,
    subject: EvaluationSubject,
    split_scores: SplitScores,
    options: EvaluateOptions,
    studies: pd.DataFrame,
) -> dict[str, Any]:
    """Return the content of metrics.json."""
    fitted, operating_point = split_scores.thresholds, options.operating_point or PAPER_OPERATING_POINT
    return compute_metrics(studies, prevalence=options.prevalence) | {
        "subgroups": compute_subgroup_metrics(studies),
        "curves": compute_threshold_curves(studies),
        "calibration": fitted.model_dump(mode="json"),
        "operating_points": calibration.compute_operating_points(fitted, studies),
        "split": options.split,
        "operating_point": operating_point,
        "threshold": PAPER_THRESHOLD if operating_point == PAPER_OPERATING_POINT else None,  # of all study types
        "thresholds": _thresholds(studies, fitted, operating_point),
        "selected_on": subject.selected_on,
        "note": _note(options.split, subject.selected_on),
        "checkpoint": subject.checkpoint,
        "members": subject.members,
        "weights_sha256": subject.weights_sha256,
        "trained_on": subject.trained_on,
        "measured_on": shards.trained_on,
        "manifest_sha256": shards.index["manifest"]["sha256"],
        "num_unreadable": len(shards.index["unreadable"]),
        "num_damaged": len(split_scores.scores.corrupt),
        "terms": mura.TERMS,
    }


def _context(shards: Shards, subject: EvaluationSubject, split_scores: SplitScores) -> dict[str, Any]:
    """Return what the report says beside the metrics."""
    roles = (
        SPLIT_ROLES
        if subject.selected_on != "valid"
        else SPLIT_ROLES | {"valid": "chooses, and is reported: optimistic"}
    )
    return {
        "title": subject.title,
        "history": subject.history,
        "settings": subject.settings,
        "same_data": subject.same_data,
        "num_scored": split_scores.num_scored,
        "seconds": split_scores.seconds,
        "licence": mura.LICENSE,
        "environment": environment(),
        "roles": {name: roles.get(name, "") for name in shards.index["splits"]},
        "conversion": {key: shards.index[key] for key in ("size", "encoding", "defects", "unreadable", "splits")},
    }


def _note(split: str, selected_on: str | None) -> str | None:
    if split == "train":
        return "optimistic: this split fitted the model"
    return "optimistic: this split chose the model" if split == selected_on else None


def measure_appearance(shards: Shards, rows: np.ndarray) -> pd.DataFrame:
    """Return the mean gray level (0 to 255) and the gate's verdict of each row, by reading the pixels once more.

    A sample that has become corrupt has NaN and "".
    """
    appearance = []
    for row in rows.tolist():
        appearance.append((math.nan, ""))
        with contextlib.suppress(CorruptSampleError):
            image = shards.read_pixels(row)
            appearance[-1] = image.mean(), gate.classify(image)
    return pd.DataFrame(appearance, columns=["gray", "gate"], index=rows)


def add_exposures(shards: Shards, appearance: pd.DataFrame, studies: pd.DataFrame) -> pd.DataFrame:
    """Add exposure to studies: the mean gray level over a study's views, 0 to 255."""
    by_study = appearance["gray"].groupby(shards.manifest.frame.loc[appearance.index, "study"]).mean()
    return studies.assign(exposure=studies["study"].map(by_study).astype(np.float64))


def _thresholds(studies: pd.DataFrame, fitted: FittedThresholds, operating_point: str) -> dict[str, float]:
    """Return the threshold of each study type; raise UserError where the operating point was not fitted for one."""
    counts = {str(key): int(num) for key, num in studies["study_type"].value_counts().sort_index().items()}
    if operating_point == PAPER_OPERATING_POINT:
        return dict.fromkeys(counts, PAPER_THRESHOLD)
    return thresholds_at(fitted, operating_point, counts)


def _write_tables(
    out: Path, shards: Shards, scores: Scores, studies: pd.DataFrame, verdicts: pd.Series, trained_on: str
) -> None:
    frame = shards.manifest.frame.loc[scores.rows]
    predictions = frame[["path", "study", "study_type"]].assign(
        logit=scores.logit, probability=classification.sigmoid(scores.logit), gate=verdicts
    )
    ranks = verdicts.map({name: rank for rank, name in enumerate(("", *gate.NAMES))})
    worst = ranks.groupby(frame["study"]).max()
    study_table = studies[[*STUDY_COLUMNS, "label", "patient", "exposure"]].assign(
        gate=[("", *gate.NAMES)[worst[study]] for study in studies["study"]], trained_on=trained_on
    )
    for name, table in (("predictions", predictions), ("studies", study_table)):
        text = table.to_csv(index=False, lineterminator="\n")
        files.write_text(out / f"{name}.csv", text)
    files.write_text(out / "predictions-official.csv", prediction_files.format_official(studies))
