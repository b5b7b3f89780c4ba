"""A file of predictions scored against a file of labels: the same numbers and the same report as an evaluation's.

    predictions, labels -> prediction_files.py (reads, refuses) -> studies -> inverted? -> measure [-> compare with a second file]
        -> out: studies.csv, report.html, pictures/, metrics.json (last)

Nothing here knows a model: whoever has a line a study can be scored, by what program the lines were made.
"""

import platform
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core import files as atomic
from mura_dist.core.errors import UserError
from mura_dist.data import mura, table_names
from mura_dist.data.folder_kind import find_output_kinds
from mura_dist.evaluation import prediction_files
from mura_dist.evaluation.prediction_files import Labels, Predictions
from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions
from mura_dist.metrics.summary import (
    compute_metrics,
    compute_subgroup_metrics,
    format_number,
    format_with_interval,
    metrics_by_group,
)

LogFunction = Callable[[str], None]
RESAMPLES, SEED = 2000, 0
MIN_KAPPA = -0.2  # below it, and sure to be below 0: labels, or calls, are taken to be inverted
_WIDTH = 100


def score(
    predictions: Path,
    labels: Path,
    *,
    against: Path | None = None,
    threshold: float | None = None,
    prevalence: float | None = None,
    allow_inverted: bool = False,
    out: Path | None = None,
    log: LogFunction = lambda line: None,
) -> dict[str, Any]:
    """metrics.json's content; with `out` a folder of report and tables too. Raises UserError.

    against: a second file of predictions of the same studies, to compare with. threshold: of both, over their own calls.
    prevalence: share of abnormal studies for which predictive values are computed too.
    """
    if prevalence is not None and not 0 < prevalence < 1:
        raise UserError(
            f"--prevalence {prevalence:g}: must lie between 0 and 1, both left out; it is a share, 0.4 is 40 %"
        )
    _check_out(out, [predictions, labels, *([against] if against else [])])
    started = time.perf_counter()
    ours = prediction_files.read_predictions(predictions, threshold)
    truth = prediction_files.read_labels(labels, files_are_studies=ours.files_are_studies)
    theirs = prediction_files.read_predictions(against, threshold) if against else None
    files = (ours, theirs) if theirs else (ours,)
    sides = [prediction_files.join(file, truth) for file in files]
    if not allow_inverted:
        for file, studies in zip(files, sides, strict=True):
            _check_not_inverted(file.name, studies)
    draw = (
        _import_report_writer() if out is not None else None
    )  # what a page needs may be missing: said before the numbers are made
    log(f"{ours.name} against {truth.name}: {len(sides[0]):,} studies, {RESAMPLES:,} resamples")
    measured = compute_metrics(sides[0], resamples=RESAMPLES, seed=SEED, prevalence=prevalence)
    measured["subgroups"] = compute_subgroup_metrics(sides[0], resamples=RESAMPLES, seed=SEED)
    measured |= _file_entries(files, truth, sides[0])
    if theirs:
        measured["comparison"] = compare_predictions(*sides, resamples=RESAMPLES, seed=SEED)
    if out is not None and draw is not None:
        _write(out, measured, sides[0], draw, time.perf_counter() - started)
    return measured


def default_report_folder(predictions: Path) -> Path:
    """Where a report goes if nobody says: beside the predictions, under their name."""
    return predictions.parent / f"{predictions.stem}-score"


def format_comparison(comparison: dict[str, Any], name: str, other: str) -> str:
    """A comparison as a table of plain text, at most 100 columns; the confirmatory line first."""
    form = "{:<16} {:<6} {:>7} {:>7}  {}"
    lines, missing = [form.format("", "", "A", "B", "A - B [95 %]")], defaultdict(list)
    for group, found in metrics_by_group(comparison).items():
        for key, word in (("kappa", "kappa"), ("auroc", "AUROC")):
            if (reason := found["reasons"].get(key) or found["reasons"].get(f"{key}_low")) is not None:
                missing[f"{word}{'' if found[key] is None else ', interval'}: {reason}"].append(group)
            if (values := found[key]) is not None:
                one = {key: values["difference"], f"{key}_low": values["low"], f"{key}_high": values["high"]}
                role = "  confirmatory" if (group, key) == ("overall", "kappa") else ""
                cells = format_number(values["a"]), format_number(values["b"]), format_with_interval(one, key) + role
                lines.append(form.format(group[:16], word, *cells))
    notes = [
        f"A is {name}, B is {other}.",
        f"Intervals: {comparison['overall']['interval_method']}.",
        f"Confirmatory: {comparison['confirmatory']}. Exploratory: {comparison['exploratory']}.",
        *(f"{', '.join(names)}: {reason}" for reason, names in missing.items()),
        f"It {comparison['note']}.",
    ]
    return "\n".join([*lines, *(part for note in notes for part in textwrap.wrap(note, _WIDTH))])


# ---- gates


def _check_out(out: Path | None, read: list[Path]) -> None:
    """Nothing that somebody else wrote is written over, least of all what is read."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; give a folder")
    for name in ("studies.csv", "metrics.json", "report.html"):
        if any((out / name).exists() and path.exists() and path.samefile(out / name) for path in read):
            raise UserError(f"--out {out}: its {name} would be written over, which is read here; give another folder")
    for kind, file in find_output_kinds(out).items():
        what = "is a run" if kind == "run" else "holds another command's results"
        raise UserError(f"--out {out} {what} ({file}); a score would write over them, give another folder")


def _check_not_inverted(name: str, studies: pd.DataFrame) -> None:
    """Kappa far below chance, and surely below it: 1 meant normal, in one file or the other."""
    value = float(
        classification.compute_kappa(
            classification.compute_confusion(studies["label"].to_numpy(), studies["call"].to_numpy())
        )
    )
    high = _kappa_upper_bound(studies) if value < MIN_KAPPA else None  # NaN, of one class, is not below
    if high is not None and high < 0:
        raise UserError(
            f"{name}: kappa is {value:.3f}, at most {high:.3f} (95 %), far below chance: it looks inverted; 1 must mean abnormal "
            "in both files, or give --allow-inverted if the calls are meant as they are"
        )


def _kappa_upper_bound(studies: pd.DataFrame) -> float | None:
    """Kappa's upper bound: the bootstrap's over patients, else the asymptotic one, else None: not sure of anything."""
    group = compute_metrics(studies, resamples=RESAMPLES, seed=SEED)["overall"]
    bounds = (group["kappa_high"], group["kappa_fce_high"])
    return next((float(bound) for bound in bounds if bound is not None), None)


# ---- words and files


def _file_entries(files: Sequence[Predictions], labels: Labels, studies: pd.DataFrame) -> dict[str, Any]:
    """What metrics.json says beside the numbers. File names without folders: those may hold a person's name."""
    used: dict[str, Predictions | Labels] = dict(zip(("predictions", "against"), files, strict=False)) | {
        "labels": labels
    }
    notes = [f"{file.name}: {note}" for file in used.values() for note in file.notes]
    return {
        "split": prediction_files.common_split(studies),
        "threshold": files[0].threshold,
        "selected_on": None,
        "note": "; ".join(notes) or None,
        **{what: {"file": file.name, "sha256": file.sha256} for what, file in used.items()},
        "terms": mura.TERMS,
    }


def _import_report_writer() -> Callable[..., Path]:
    from mura_dist.reports import evaluation

    return evaluation.write


def _write(
    out: Path, measured: dict[str, Any], studies: pd.DataFrame, draw: Callable[..., Path], seconds: float
) -> None:
    """Everything a score leaves behind; metrics.json last."""
    context = {
        "title": f"{measured['predictions']['file']} against {measured['labels']['file']}",
        **{
            key: measured[key]
            for key in ("split", "threshold", "selected_on", "note", "predictions", "labels", "terms")
        },
        "licence": mura.LICENSE,
        "environment": {"python": platform.python_version(), "numpy": np.__version__, "pandas": pd.__version__},
        "settings": {"resamples": RESAMPLES, "seed": SEED},
        "seconds": seconds,
    }
    atomic.write_text(
        out / "studies.csv", table_names.escape_formulas(studies).to_csv(index=False, lineterminator="\n")
    )
    draw(out, metrics=measured, studies=studies, context=context)
    atomic.write_json(out / "metrics.json", measured)
