"""Measure the scores of a split, and write what an evaluation leaves behind.

    EvaluationSubject, SplitScores -> studies -> metrics -> tables, report, gallery

Writes into a folder (a run's, or --out): metrics.json, predictions.csv, predictions-official.csv (the official format),
studies.csv, report.html, report.json, pictures/; then, where it is wanted, the gallery (LOCAL ONLY: it holds radiographs).
"""

import contextlib
import math
from collections.abc import Callable
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

SPLIT_ROLES = {
    "train": "fits the weights",
    "tune": "chooses: learning-rate drops, the checkpoint, calibration, thresholds, the uncertain band",
    "valid": "is only reported",
}


def check_out(out: Path, target: Target) -> None:
    """Refuse, before anything is measured, to write over what somebody else wrote; the run that is evaluated may be."""
    if target.kind == "run" and out.resolve() == target.path.resolve():
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    kinds = find_output_kinds(out)
    for kind, what in (("run", "is a run, whose report"), ("prediction", "holds predictions, whose tables")):
        if kind in kinds:
            raise UserError(f"--out {out} {what} would be overwritten; give another folder")


def write(
    shards: Shards,
    subject: EvaluationSubject,
    split_scores: SplitScores,
    options: EvaluateOptions,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and write everything an evaluation leaves behind; metrics.json last, but for the gallery, which is apart."""
    scores, out = split_scores.scores, options.out
    if not len(scores.rows):
        raise RunError(
            f"{shards.folder}: every sample of split {options.split!r} is damaged; `mura-dist verify` names them"
        )
    looks = gate_inputs(shards, scores.rows)
    studies = _studies(shards, split_scores, looks, options.operating_point or PAPER_OPERATING_POINT)
    metrics = _metrics(shards, subject, split_scores, options, studies)
    _write_tables(out, shards, scores, studies, looks["gate"], subject.trained_on)
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


def _studies(shards: Shards, split_scores: SplitScores, looks: pd.DataFrame, operating_point: str) -> pd.DataFrame:
    """A line a study, with the exposure, the threshold of its study type and the call."""
    points = split_scores.points
    studies = add_exposures(shards, looks, calibration.apply(points, study_scores(shards, split_scores.scores)))
    cut = studies["study_type"].map(_thresholds(studies, points, operating_point)).astype(np.float64)
    calls = classification.is_positive(studies["probability"], cut)
    return studies.assign(threshold=cut, call=calls.astype(np.int64))


def _metrics(
    shards: Shards,
    subject: EvaluationSubject,
    split_scores: SplitScores,
    options: EvaluateOptions,
    studies: pd.DataFrame,
) -> dict[str, Any]:
    """metrics.json's content."""
    points, operating_point = split_scores.points, options.operating_point or PAPER_OPERATING_POINT
    return compute_metrics(studies, prevalence=options.prevalence) | {
        "subgroups": compute_subgroup_metrics(studies),
        "curves": compute_threshold_curves(studies),
        "calibration": points.model_dump(mode="json"),
        "operating_points": calibration.compute_operating_points(points, studies),
        "split": options.split,
        "operating_point": operating_point,
        "threshold": PAPER_THRESHOLD if operating_point == PAPER_OPERATING_POINT else None,  # of all study types
        "thresholds": _thresholds(studies, points, operating_point),
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
    """What the report says beside the metrics."""
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


def gate_inputs(shards: Shards, rows: np.ndarray) -> pd.DataFrame:
    """By row: grey, the mean level 0 to 255, and gate's verdict. It reads the pixels once more; NaN and "" if damaged since."""
    looks = []
    for row in rows.tolist():
        looks.append((math.nan, ""))
        with contextlib.suppress(CorruptSampleError):
            image = shards.read_pixels(row)
            looks[-1] = image.mean(), gate.classify(image)
    return pd.DataFrame(looks, columns=["grey", "gate"], index=rows)


def add_exposures(shards: Shards, looks: pd.DataFrame, studies: pd.DataFrame) -> pd.DataFrame:
    """`studies` with exposure: the mean grey level over a study's views, 0 to 255."""
    by_study = looks["grey"].groupby(shards.manifest.frame.loc[looks.index, "study"]).mean()
    return studies.assign(exposure=studies["study"].map(by_study).astype(np.float64))


def _thresholds(studies: pd.DataFrame, points: FittedThresholds, name: str) -> dict[str, float]:
    """Each study type's. UserError where the operating point was not fitted for one of them."""
    counts = {str(key): int(num) for key, num in studies["study_type"].value_counts().sort_index().items()}
    return (
        dict.fromkeys(counts, PAPER_THRESHOLD) if name == PAPER_OPERATING_POINT else thresholds_at(points, name, counts)
    )


def _write_tables(
    out: Path, shards: Shards, found: Scores, studies: pd.DataFrame, verdicts: pd.Series, trained_on: str
) -> None:
    frame = shards.manifest.frame.loc[found.rows]
    predictions = frame[["path", "study", "study_type"]].assign(
        logit=found.logit, probability=classification.sigmoid(found.logit), gate=verdicts
    )
    ranks = verdicts.map({name: rank for rank, name in enumerate(("", *gate.NAMES))})
    worst = ranks.groupby(frame["study"]).max()
    told = studies[[*STUDY_COLUMNS, "label", "patient", "exposure"]].assign(
        gate=[("", *gate.NAMES)[worst[study]] for study in studies["study"]], trained_on=trained_on
    )
    for name, table in (("predictions", predictions), ("studies", told)):
        text = table.to_csv(index=False, lineterminator="\n")
        files.write_text(out / f"{name}.csv", text)
    files.write_text(out / "predictions-official.csv", prediction_files.format_official(studies))
