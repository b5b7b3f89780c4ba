"""Compute metrics.json from studies, and format it for the terminal. NumPy and pandas only.

    studies (label, probability or call, patient, study type) -> compute_metrics -> metrics.json (overall, by study type, macro)

`_low` and `_high` without another name in the key are a 95 % percentile bootstrap over whole patients, since the studies of one
patient are not independent. A rate for which the bootstrap has no interval (all right, all wrong, too few) has Wilson's instead,
and `NAME_interval` says which. INTERVAL_KINDS lists the others. A missing value is None, and `reasons` says why.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.metrics.classification import CELLS, compute_predictive_values, is_positive
from mura_dist.metrics.entries import ASYMPTOTIC_KEYS, HEADLINE_METRICS, Entries, bound_keys, method_keys
from mura_dist.metrics.group import StudyGroup, compute_probability_metrics, sort_studies
from mura_dist.metrics.intervals import WILSON, Bootstrap

CALL_METRICS = ("kappa", "sensitivity", "specificity", "ppv", "npv", "f1", "balanced_accuracy")
PROBABILITY_METRICS = ("auroc", "average_precision", "brier", "calibration_intercept", "calibration_slope")
CALIBRATED_METRICS = (
    "auroc",
    "brier",
    "calibration_intercept",
    "calibration_slope",
)  # also of calibrated probabilities
RATES = ("sensitivity", "specificity")
CURVE_THRESHOLDS = tuple(percent / 100 for percent in range(1, 100))
INTERVAL_KINDS = {
    "low_high": "as NAME_interval says, where there is one: bootstrap, or wilson where a rate has no bootstrap interval",
    "bootstrap": "95 % percentile bootstrap over whole patients (where patients are unknown: over studies)",
    "fce": "Fleiss-Cohen-Everitt, of kappa; assumes independent studies",
    "delong": "DeLong, of AUROC; assumes independent studies",
    "wilson": "Wilson's score interval; assumes independent studies",
    "official": "the official scorer's, of kappa: a variance in place of a standard error, far too narrow; not to be used",
}


def compute_metrics(
    studies: pd.DataFrame,
    *,
    threshold: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
    prevalence: float | None = None,
) -> dict[str, Any]:
    """Compute the core of metrics.json. The same input gives the same numbers on every machine.

    Args:
        studies: columns study_type, patient, label and probability (0 to 1), as `classification.build_study_table` returns
            them. Studies without a label are ignored. An optional column call (0 or 1) holds the calls; then probabilities may
            be missing. An optional column calibrated_probability is measured too.
        threshold: without a column call, a call is probability > threshold.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap, 0 to 2**64 - 1.
        prevalence: share of abnormal studies to compute PPV and NPV for.

    Returns:
        {"overall": {...}, "by_study_type": {...}, "macro": {...}, "interval_kinds": {...}} of JSON values.
    """
    assert resamples >= 0, resamples
    assert 0 <= seed < 2**64, seed
    measurement = _Measurement(threshold, resamples, seed, prevalence)
    names = sorted(set(studies["study_type"].astype(str)))  # also types whose studies all have no label
    studies = sort_studies(studies)
    by_type = {name: measurement.group(studies[studies["study_type"] == name]) for name in names}
    return {
        "overall": measurement.group(studies),
        "by_study_type": by_type,
        "macro": measurement.macro(studies, by_type),
        "interval_kinds": INTERVAL_KINDS,
    }


def compute_subgroup_metrics(
    studies: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute the headline metrics by properties that should not matter.

    Args:
        studies: as for `compute_metrics`, with the optional columns num_views and exposure (mean gray level, 0 to 255).
        threshold: as for `compute_metrics`.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        {"num_views": {"1": {...}}, "exposure": {"darkest third ...": {...}}}.
    """
    measurement = _Measurement(threshold, resamples, seed, None)
    studies = sort_studies(studies)
    splits = {"num_views": _split_by_views, "exposure": _split_by_exposure}
    return {
        column: {
            title: measurement.headline(studies[mask]) for title, mask in split(studies[column]).items() if mask.any()
        }
        for column, split in splits.items()
        if column in studies
    }


def compute_threshold_curves(
    studies: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compute sensitivity and specificity at each of CURVE_THRESHOLDS, by study type.

    The curves are for reading, not for choosing a threshold: these are the reported studies.

    Args:
        studies: as for `compute_metrics`, with probabilities.
        resamples: number of bootstrap resamples.
        seed: of the bootstrap.

    Returns:
        Study type -> columns, one number per threshold. Each rate has `_low`, `_high` and `_interval` (the method). A study
        type without both labels is omitted.
    """
    studies = sort_studies(studies)
    groups = {
        str(name): StudyGroup.from_studies(group, 0.5) for name, group in studies.groupby("study_type", sort=True)
    }
    return {
        name: _curve(group, resamples, seed)
        for name, group in groups.items()
        if not group.problem() and 0 < group.label.sum() < len(group.label)
    }


def _split_by_views(num_views: pd.Series) -> dict[str, pd.Series]:
    return {**{str(num): num_views == num for num in (1, 2, 3)}, "4 or more": num_views >= 4}


def _split_by_exposure(exposure: pd.Series) -> dict[str, pd.Series]:
    """Split into thirds of these studies, as far as their exposures differ."""
    low, high = exposure.quantile([1 / 3, 2 / 3])
    return {
        f"darkest third (below {low:.1f})": exposure < low,
        "middle third": (exposure >= low) & (exposure < high),
        f"brightest third (from {high:.1f})": exposure >= high,
    }


def _curve(group: StudyGroup, resamples: int, seed: int) -> dict[str, Any]:
    assert group.probability is not None
    call = is_positive(group.probability[:, None], np.array(CURVE_THRESHOLDS))  # (n, thresholds)
    trials = {"sensitivity": group.label == 1, "specificity": group.label == 0}
    successes = {
        "sensitivity": trials["sensitivity"][:, None] & call,
        "specificity": trials["specificity"][:, None] & ~call,
    }

    def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
        rates = {
            name: (weight @ successes[name]) / (weight @ trials[name])[:, None] for name in RATES
        }  # (R, thresholds)
        return {f"{name} {index}": values for name in RATES for index, values in enumerate(rates[name].T)}

    bootstrap = Bootstrap.run(group.clusters, group.label, statistic, resamples=resamples, seed=seed)
    values = statistic(group.unit_weight())
    indexes = range(len(CURVE_THRESHOLDS))
    curve: dict[str, Any] = {
        "num_studies": len(group.label),
        "num_patients": group.clusters.num_patients,
        "num_abnormal": int(group.label.sum()),
        "interval_method": bootstrap.method(),
        "threshold": list(CURVE_THRESHOLDS),
    }
    for name in RATES:
        num_trials, num_successes = int(trials[name].sum()), successes[name].sum(axis=0)
        intervals = [
            bootstrap.rate_interval(f"{name} {index}", int(num_successes[index]), num_trials) for index in indexes
        ]
        curve[name] = [_round(values[f"{name} {index}"][0]) for index in indexes]
        for end in ("low", "high"):
            curve[f"{name}_{end}"] = [_round(getattr(interval, end)) for interval in intervals]
        curve[f"{name}_interval"] = [interval.kind for interval in intervals]
    return curve


def _round(value: float) -> float:
    """Round a share to four digits: curves are stored in the model's file."""
    return round(float(value), 4)


_MACRO_KEYS = (*HEADLINE_METRICS, *bound_keys(HEADLINE_METRICS), "interval_method", "num_resamples_dropped")
_HEADLINE_KEYS = (*_MACRO_KEYS, *method_keys(HEADLINE_METRICS))
_PREVALENCE_METRICS = ("ppv_at_prevalence", "npv_at_prevalence")
_GROUP_METRICS = (*CALL_METRICS, *PROBABILITY_METRICS)
_GROUP_KEYS = (
    *(*_GROUP_METRICS, *_PREVALENCE_METRICS),
    *(*bound_keys((*_GROUP_METRICS, *_PREVALENCE_METRICS)), *method_keys(_GROUP_METRICS), *ASYMPTOTIC_KEYS),
    *("confusion", "prevalence", "prevalence_assumed", "calibration_error", "calibration_error_method", "calibrated"),
    *("interval_method", "num_resamples_dropped"),
)


@dataclass(frozen=True)
class _Measurement:
    threshold: float
    resamples: int
    seed: int
    prevalence: float | None

    def bootstrap(self, group: StudyGroup, statistic: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Bootstrap:
        return Bootstrap.run(group.clusters, group.label, statistic, resamples=self.resamples, seed=self.seed)

    def headline(self, studies: pd.DataFrame) -> dict[str, Any]:
        """Compute HEADLINE_METRICS of some studies, with intervals."""
        group = StudyGroup.from_studies(studies, self.threshold)
        entries = Entries.from_group(group)
        if not entries.problem:
            entries.put_values(group.values(group.unit_weight(), HEADLINE_METRICS), HEADLINE_METRICS)
            bootstrap = self.bootstrap(group, lambda weight: group.values(weight, HEADLINE_METRICS))
            entries.put_bootstrap(bootstrap, HEADLINE_METRICS, group.rate_counts())
        return entries.complete(_HEADLINE_KEYS)

    def group(self, studies: pd.DataFrame) -> dict[str, Any]:
        """Compute all metrics of some studies: metrics.json's `overall`, or the entry of a study type."""
        group = StudyGroup.from_studies(studies, self.threshold)
        entries = Entries.from_group(group)
        entries.put("prevalence_assumed", self.prevalence, "no prevalence was given")
        if not entries.problem:
            entries.values["confusion"] = dict(zip(CELLS, map(int, group.counts()), strict=True))
            entries.values["prevalence"] = float(group.label.mean())
            self._measure(entries, group)
        return entries.complete(_GROUP_KEYS)

    def _measure(self, entries: Entries, group: StudyGroup) -> None:
        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            values = group.values(weight, _GROUP_METRICS)
            if self.prevalence is not None:
                predictive = compute_predictive_values(values["sensitivity"], values["specificity"], self.prevalence)
                values |= dict(zip(_PREVALENCE_METRICS, predictive, strict=True))
            return values

        names = (*_GROUP_METRICS, *_PREVALENCE_METRICS)
        entries.put_values(statistic(group.unit_weight()), names)
        entries.put_bootstrap(self.bootstrap(group, statistic), names, group.rate_counts())
        entries.put_asymptotic(group)
        entries.put_calibration_error(group.label, group.probability)
        entries.put("calibrated", self._calibrated(group), "no calibrated probability for all of these studies")

    def _calibrated(self, group: StudyGroup) -> dict[str, Any] | None:
        """Compute CALIBRATED_METRICS of the calibrated probabilities."""
        calibrated = group.calibrated
        if calibrated is None:
            return None

        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            return compute_probability_metrics(group.label, calibrated, weight, CALIBRATED_METRICS)

        entries = Entries({}, {}, "")
        entries.put_values(statistic(group.unit_weight()), CALIBRATED_METRICS)
        entries.put_bootstrap(self.bootstrap(group, statistic), CALIBRATED_METRICS)
        entries.put_calibration_error(group.label, calibrated)
        del entries.values["interval_method"], entries.values["num_resamples_dropped"]
        keys = (*CALIBRATED_METRICS, *bound_keys(CALIBRATED_METRICS), "calibration_error", "calibration_error_method")
        return entries.complete(keys)

    def macro(self, studies: pd.DataFrame, by_type: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Compute the unweighted mean over the study types that have both labels, with its interval over all patients."""
        names = [name for name, group in by_type.items() if group["kappa"] is not None]
        entries = Entries({}, {}, "" if names else "no study type has studies of both labels")
        entries.values["method"] = "unweighted mean over study types"
        entries.values["num_study_types"] = len(names)
        entries.values["left_out"] = sorted(set(by_type) - set(names))
        if names:
            studies = studies[studies["study_type"].isin(names)]
            group = StudyGroup.from_studies(studies, self.threshold)
            indexes = [np.flatnonzero(studies["study_type"].to_numpy() == name) for name in names]
            types = [StudyGroup.from_studies(studies.iloc[index], self.threshold) for index in indexes]

            def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
                values_by_type = [
                    study_type.values(weight[:, index], HEADLINE_METRICS)
                    for study_type, index in zip(types, indexes, strict=True)
                ]
                metrics = values_by_type[0]
                return {name: np.mean([values[name] for values in values_by_type], axis=0) for name in metrics}

            entries.put_values(statistic(group.unit_weight()), HEADLINE_METRICS)
            entries.put_bootstrap(self.bootstrap(group, statistic), HEADLINE_METRICS)
        return entries.complete(_MACRO_KEYS)


# ---- text


def metrics_by_group(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every group of a metrics.json by name, `overall` first."""
    return {"overall": metrics["overall"], **metrics["by_study_type"]}


def describe_missing(group: dict[str, Any], names: Sequence[str] = HEADLINE_METRICS) -> list[str]:
    """Describe which of `names` are missing, one line per reason: `kappa, auroc: one class only`."""
    metrics_by_reason: dict[str, list[str]] = {}
    for name in names:
        title = name.replace("_", " ")
        for key, description in ((name, title), (f"{name}_low", f"{title}'s interval")):
            reason = group["reasons"].get(key, "")
            if reason and title not in metrics_by_reason.setdefault(reason, []):
                metrics_by_reason[reason].append(description)
    return [f"{', '.join(descriptions)}: {reason}" for reason, descriptions in metrics_by_reason.items()]


def format_number(value: float | None) -> str:
    """Return a number with three decimals, or `-` for None."""
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0: no -0.000


def format_with_interval(group: dict[str, Any], name: str) -> str:
    """Return `0.705 [0.608, 0.803]`, without brackets where there is no interval, `-` where there is no number."""
    value, low, high = (group[key] for key in (name, f"{name}_low", f"{name}_high"))
    number = format_number(value)
    return number if low is None or high is None else f"{number} [{format_number(low)}, {format_number(high)}]"


def format_summary_table(metrics: dict[str, Any]) -> str:
    """Return a plain-text table for the terminal, at most 100 columns: overall, each study type, one line per note."""
    form = "{:<16} {:>7}  {:<23} {:<23} {:>11} {:>11}"
    lines = [form.format("", "studies", "kappa [95 %]", "AUROC [95 %]", "sensitivity", "specificity")]
    for name, group in metrics_by_group(metrics).items():
        rates = [format_number(group[key]) for key in ("sensitivity", "specificity")]
        intervals = [format_with_interval(group, key) for key in ("kappa", "auroc")]
        lines.append(form.format(name[:16], group["num_studies"], *intervals, *rates).rstrip())
    method = textwrap.wrap(f"Intervals: {metrics['overall']['interval_method']}.", 100)
    return "\n".join([*lines, *method, *describe_interval_gaps(metrics)])


def describe_interval_gaps(metrics: dict[str, Any]) -> list[str]:
    """Describe how many headline numbers have no bootstrap interval, and how many are missing; one line each."""
    cells = [(group, name) for group in metrics_by_group(metrics).values() for name in HEADLINE_METRICS]
    num_missing = sum(group[name] is None for group, name in cells)
    num_without = sum(group[name] is not None and not _has_bootstrap(group, name) for group, name in cells)
    notes = []
    if num_without:
        verb = "number has" if num_without == 1 else "numbers have"
        notes.append(
            f"{num_without} {verb} no bootstrap interval: too few studies, or all right or all wrong; see the report"
        )
    if num_missing:
        notes.append(f"{num_missing} {'number is' if num_missing == 1 else 'numbers are'} missing (-): see the report")
    return notes


def _has_bootstrap(group: dict[str, Any], name: str) -> bool:
    return group[f"{name}_low"] is not None and group.get(f"{name}_interval") != WILSON
