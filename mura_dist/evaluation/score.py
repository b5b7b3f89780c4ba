"""Score predictions against labels: the same numbers and the same report as an evaluation of a model.

    predictions, labels -> prediction_files.py (reads and validates) -> studies -> compute_metrics [-> compare_predictions]
        -> out: studies.csv, report.html, pictures/, metrics.json (last)

No model is needed. The predictions may come from any program.
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
from mura_dist.evaluation.table_files import TableSource
from mura_dist.metrics.classification import compute_confusion, compute_kappa
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
MIN_KAPPA = -0.2  # predictions below it, with an upper bound below 0, are taken to be inverted
_WIDTH = 100


def evaluate_predictions(
    predictions: TableSource,
    labels: TableSource,
    *,
    against: TableSource | None = None,
    threshold: float | None = None,
    prevalence: float | None = None,
    allow_inverted: bool = False,
    out: str | Path | None = None,
    log: LogFunction = lambda line: None,
) -> dict[str, Any]:
    """Compute kappa, AUROC and the other metrics of predictions, each with its 95 % interval.

    `mura-dist score` is this function on the command line.

    Args:
        predictions: one row per study, as a data frame or as the path of a CSV or Parquet file. Columns: study, and
            probability (of being abnormal, 0 to 1) or call (0 or 1). Optional: study_type, num_views, exposure, band,
            calibrated_probability.
        labels: the same studies, as a data frame or a path. Columns: study and label (1 abnormal, 0 normal). Optional:
            patient (the intervals resample patients) and study_type. Both are derived from a study's path in MURA's layout.
        against: a second table of predictions of the same studies, to compare with the first.
        threshold: probability above which a study is called abnormal. It replaces the calls of the tables. By default the
            tables' calls count, else 0.5.
        prevalence: share of abnormal studies to compute predictive values for.
        allow_inverted: score calls even if they are surely worse than chance.
        out: folder for the report, the table of studies and metrics.json. By default nothing is written.
        log: called with each line of progress.

    Returns:
        The content of metrics.json. `overall` and each study type in `by_study_type` hold `kappa`, `kappa_low`, `kappa_high`
        and so on. What is undefined is None, and `reasons` says why. With `against` there is a `comparison`.

    Raises:
        UserError: a table or an option is invalid, or the predictions look inverted.
    """
    if prevalence is not None and not 0 < prevalence < 1:
        raise UserError(f"--prevalence {prevalence:g} is not between 0 and 1 (exclusive). Pass a share: 0.4 is 40 %.")
    out = None if out is None else Path(out)
    _check_out(out, [source for source in (predictions, labels, against) if isinstance(source, str | Path)])
    started = time.perf_counter()
    first = prediction_files.read_predictions(predictions, threshold)
    truth = prediction_files.read_labels(labels, files_are_studies=first.files_are_studies)
    second = None if against is None else prediction_files.read_predictions(against, threshold, name="against")
    tables = (first, second) if second else (first,)
    joined = [prediction_files.join(table, truth) for table in tables]
    if not allow_inverted:
        for table, studies in zip(tables, joined, strict=True):
            _check_not_inverted(table.name, studies)
    write_report = _import_report_writer() if out is not None else None  # a missing package shows before the metrics
    log(f"{first.name} against {truth.name}: {len(joined[0]):,} studies, {RESAMPLES:,} resamples")
    metrics = compute_metrics(joined[0], resamples=RESAMPLES, seed=SEED, prevalence=prevalence)
    metrics["subgroups"] = compute_subgroup_metrics(joined[0], resamples=RESAMPLES, seed=SEED)
    metrics |= _file_entries(tables, truth, joined[0])
    if second:
        metrics["comparison"] = compare_predictions(*joined, resamples=RESAMPLES, seed=SEED)
    if out is not None and write_report is not None:
        _write(out, metrics, joined[0], write_report, time.perf_counter() - started)
    return metrics


def default_report_folder(predictions: Path) -> Path:
    """Return the default folder of a report: `NAME-score` beside NAME.csv."""
    return predictions.parent / f"{predictions.stem}-score"


def format_comparison(comparison: dict[str, Any], name_a: str, name_b: str) -> str:
    """Return a comparison as a plain-text table of at most 100 columns, the confirmatory line first."""
    form = "{:<16} {:<6} {:>7} {:>7}  {}"
    lines, missing = [form.format("", "", "A", "B", "A - B [95 %]")], defaultdict(list)
    for group, entry in metrics_by_group(comparison).items():
        for key, title in (("kappa", "kappa"), ("auroc", "AUROC")):
            if (reason := entry["reasons"].get(key) or entry["reasons"].get(f"{key}_low")) is not None:
                missing[f"{title}{'' if entry[key] is None else ', interval'}: {reason}"].append(group)
            if (values := entry[key]) is not None:
                difference = {key: values["difference"], f"{key}_low": values["low"], f"{key}_high": values["high"]}
                role = "  confirmatory" if (group, key) == ("overall", "kappa") else ""
                cells = (
                    format_number(values["a"]),
                    format_number(values["b"]),
                    format_with_interval(difference, key) + role,
                )
                lines.append(form.format(group[:16], title, *cells))
    notes = [
        f"A is {name_a}, B is {name_b}.",
        f"Intervals: {comparison['overall']['interval_method']}.",
        f"Confirmatory: {comparison['confirmatory']}. Exploratory: {comparison['exploratory']}.",
        *(f"{', '.join(names)}: {reason}" for reason, names in missing.items()),
        f"It {comparison['note']}.",
    ]
    return "\n".join([*lines, *(line for note in notes for line in textwrap.wrap(note, _WIDTH))])


# ---- checks


def _check_out(out: Path | None, inputs: Sequence[str | Path]) -> None:
    """Refuse an output folder that holds an input file or another command's results."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file. Pass a folder.")
    for name in ("studies.csv", "metrics.json", "report.html"):
        if any((out / name).exists() and Path(path).exists() and Path(path).samefile(out / name) for path in inputs):
            raise UserError(f"--out {out}: its {name} is an input and would be overwritten. Pass another folder.")
    for kind, file in find_output_kinds(out).items():
        content = "is a run" if kind == "run" else "holds another command's results"
        raise UserError(f"--out {out} {content} ({file}), which a score would overwrite. Pass another folder.")


def _check_not_inverted(name: str, studies: pd.DataFrame) -> None:
    """Refuse a kappa that is far, and surely, below chance: in one of the tables 1 means normal."""
    kappa = float(compute_kappa(compute_confusion(studies["label"].to_numpy(), studies["call"].to_numpy())))
    high = _kappa_upper_bound(studies) if kappa < MIN_KAPPA else None  # a NaN, of one class, is not below
    if high is not None and high < 0:
        raise UserError(
            f"{name} looks inverted: kappa is {kappa:.3f}, at most {high:.3f} (95 %), far below chance. Make 1 mean abnormal in "
            "both files, or pass --allow-inverted if the calls are correct as they are."
        )


def _kappa_upper_bound(studies: pd.DataFrame) -> float | None:
    """Return the bootstrap's upper bound of kappa, else the asymptotic one, else None."""
    group = compute_metrics(studies, resamples=RESAMPLES, seed=SEED)["overall"]
    bounds = (group["kappa_high"], group["kappa_fce_high"])
    return next((float(bound) for bound in bounds if bound is not None), None)


# ---- output


def _file_entries(tables: Sequence[Predictions], labels: Labels, studies: pd.DataFrame) -> dict[str, Any]:
    """Return metrics.json's entries about the inputs. A folder may hold a person's name, so only file names are written."""
    inputs: dict[str, Predictions | Labels] = dict(zip(("predictions", "against"), tables, strict=False)) | {
        "labels": labels
    }
    notes = [f"{table.name}: {note}" for table in inputs.values() for note in table.notes]
    return {
        "split": prediction_files.common_split(studies),
        "threshold": tables[0].threshold,
        "selected_on": None,
        "note": "; ".join(notes) or None,
        **{role: {"file": table.name, "sha256": table.sha256} for role, table in inputs.items()},
        "terms": mura.TERMS,
    }


def _import_report_writer() -> Callable[..., Path]:
    from mura_dist.reports import evaluation

    return evaluation.write


def _write(
    out: Path, metrics: dict[str, Any], studies: pd.DataFrame, write_report: Callable[..., Path], seconds: float
) -> None:
    """Write the table of studies, the report, then metrics.json."""
    context = {
        "title": f"{metrics['predictions']['file']} against {metrics['labels']['file']}",
        **{
            key: metrics[key] for key in ("split", "threshold", "selected_on", "note", "predictions", "labels", "terms")
        },
        "licence": mura.LICENSE,
        "environment": {"python": platform.python_version(), "numpy": np.__version__, "pandas": pd.__version__},
        "settings": {"resamples": RESAMPLES, "seed": SEED},
        "seconds": seconds,
    }
    table = table_names.escape_formulas(studies).to_csv(index=False, lineterminator="\n")
    atomic.write_text(out / "studies.csv", table)
    write_report(out, metrics=metrics, studies=studies, context=context)
    atomic.write_json(out / "metrics.json", metrics)
