"""What is known of a set of studies: metrics.json, and its words for terminal and page. NumPy and pandas only.

    studies (label, probability or call, patient, study type) -> measure -> metrics.json (overall, by study type, macro)

Every `_low` and `_high` without another name in it is a 95 % percentile bootstrap over whole patients, since the studies of one
patient are not independent. A rate for which the bootstrap has none (all right, all wrong, too few) has Wilson's instead, and
`NAME_interval` says which. Others stand beside it (`INTERVAL_KINDS`). What is missing is None, and `reasons` says why.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.metrics import classification as metrics
from mura_dist.metrics.classification import CELLS
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
)  # measured again after calibration
RATES = ("sensitivity", "specificity")
CURVE_THRESHOLDS = tuple(percent / 100 for percent in range(1, 100))  # the thresholds of `curves`
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
    """metrics.json's core: {"overall": {...}, "by_study_type": {...}, "macro": {...}}, standard JSON values only.

    studies: columns study_type, patient, label and probability (in 0 .. 1), as `study_table` gives them; those without a label
    are left out. `call` (0 or 1), if it is there, is taken as it is, else a call is probability > threshold, strictly; with
    calls the probabilities may be missing. `calibrated_probability` is measured beside. prevalence: share of abnormal studies
    for which PPV and NPV are worked out too. The same input gives the same numbers on every machine.
    """
    assert resamples >= 0, resamples
    assert 0 <= seed < 2**64, seed
    task = _Task(threshold, resamples, seed, prevalence)
    names = sorted(set(studies["study_type"].astype(str)))  # of those without a label too: nothing is passed over
    studies = sort_studies(studies)
    by_type = {name: task.group(studies[studies["study_type"] == name]) for name in names}
    return {
        "overall": task.group(studies),
        "by_study_type": by_type,
        "macro": task.macro(studies, by_type),
        "interval_kinds": INTERVAL_KINDS,
    }


def compute_subgroup_metrics(
    studies: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """The headline numbers by what should not matter: {"num_views": {"1": {...}}, "exposure": {"darkest third ...": {...}}}.

    studies: as for `measure`; columns num_views and exposure (mean grey level, 0 .. 255), where they are there.
    """
    task = _Task(threshold, resamples, seed, None)
    studies = sort_studies(studies)
    by = {"num_views": _by_views, "exposure": _by_exposure}
    return {
        name: {word: task.headline(studies[chosen]) for word, chosen in split(studies[name]).items() if chosen.any()}
        for name, split in by.items()
        if name in studies
    }


def compute_threshold_curves(
    studies: pd.DataFrame, *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """What sensitivity and specificity would be at another threshold, by study type: columns, one number a threshold of CURVE.

    studies: as for `measure`, with probabilities. A study type that has not both labels is left out. Every number has its
    `_low` and `_high`, and `_interval`: the method of both. To be looked at, not to choose by: these are the studies that
    are reported.
    """
    studies = sort_studies(studies)
    groups = {str(name): StudyGroup.of(part, 0.5) for name, part in studies.groupby("study_type", sort=True)}
    return {
        name: _curve(group, resamples, seed)
        for name, group in groups.items()
        if not group.problem() and 0 < group.label.sum() < len(group.label)
    }


def _by_views(num_views: pd.Series) -> dict[str, pd.Series]:
    return {**{str(num): num_views == num for num in (1, 2, 3)}, "4 or more": num_views >= 4}


def _by_exposure(exposure: pd.Series) -> dict[str, pd.Series]:
    """Thirds of these very studies, as far as their exposures differ."""
    low, high = exposure.quantile([1 / 3, 2 / 3])
    return {
        f"darkest third (below {low:.1f})": exposure < low,
        "middle third": (exposure >= low) & (exposure < high),
        f"brightest third (from {high:.1f})": exposure >= high,
    }


def _curve(group: StudyGroup, resamples: int, seed: int) -> dict[str, Any]:
    assert group.probability is not None
    called = metrics.is_positive(group.probability[:, None], np.array(CURVE_THRESHOLDS))  # (n, thresholds)
    right = {"sensitivity": (group.label[:, None] == 1) & called, "specificity": (group.label[:, None] == 0) & ~called}
    of = {"sensitivity": group.label == 1, "specificity": group.label == 0}

    def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
        each = {name: (weight @ right[name]) / (weight @ of[name])[:, None] for name in RATES}  # (R, thresholds)
        return {f"{name} {place}": value for name in RATES for place, value in enumerate(each[name].T)}

    drawn = Bootstrap.of(group.clusters, group.label, statistic, resamples=resamples, seed=seed)
    here = statistic(group.ones())
    found: dict[str, Any] = {
        "num_studies": len(group.label),
        "num_patients": group.clusters.num_patients,
        "num_abnormal": int(group.label.sum()),
        "interval_method": drawn.method(),
        "threshold": list(CURVE_THRESHOLDS),
    }
    for name in RATES:
        trials = int(of[name].sum())
        successes = right[name].sum(axis=0)
        places = range(len(CURVE_THRESHOLDS))
        intervals = [drawn.rate_interval(f"{name} {place}", int(successes[place]), trials) for place in places]
        found[name] = [_short(here[f"{name} {place}"][0]) for place in places]
        for end in ("low", "high"):
            found[f"{name}_{end}"] = [_short(getattr(interval, end)) for interval in intervals]
        found[f"{name}_interval"] = [interval.kind for interval in intervals]
    return found


def _short(value: float) -> float:
    """A share to four digits: a curve travels in the model's file."""
    return round(float(value), 4)


_OF_MACRO = (*HEADLINE_METRICS, *bound_keys(HEADLINE_METRICS), "interval_method", "num_resamples_dropped")
_HEADLINE = (*_OF_MACRO, *method_keys(HEADLINE_METRICS))


@dataclass(frozen=True)
class _Task:
    threshold: float
    resamples: int
    seed: int
    prevalence: float | None

    def bootstrap(self, group: StudyGroup, statistic: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Bootstrap:
        return Bootstrap.of(group.clusters, group.label, statistic, resamples=self.resamples, seed=self.seed)

    def headline(self, studies: pd.DataFrame) -> dict[str, Any]:
        """HEADLINE_METRICS of some studies, with intervals."""
        group = StudyGroup.of(studies, self.threshold)
        entries = Entries.about(group)
        if not entries.problem:
            entries.put_values(group.values(group.ones(), HEADLINE_METRICS), HEADLINE_METRICS)
            drawn = self.bootstrap(group, lambda weight: group.values(weight, HEADLINE_METRICS))
            entries.put_bootstrap(drawn, HEADLINE_METRICS, group.rate_counts())
        return entries.whole(_HEADLINE)

    def group(self, studies: pd.DataFrame) -> dict[str, Any]:
        """Everything of some studies: metrics.json's `overall`, or one study type's."""
        group = StudyGroup.of(studies, self.threshold)
        entries, names = Entries.about(group), (*CALL_METRICS, *PROBABILITY_METRICS)
        extra = ("ppv_at_prevalence", "npv_at_prevalence")
        entries.put("prevalence_assumed", self.prevalence, "no prevalence was asked for")
        if not entries.problem:
            entries.values["confusion"] = dict(zip(CELLS, map(int, group.counts()), strict=True))
            entries.values["prevalence"] = float(group.label.mean())
            self._measure(entries, group, names, extra)
        intervals = (*bound_keys((*names, *extra)), *method_keys(names), *ASYMPTOTIC_KEYS)
        keys = (*names, *extra, *intervals, "confusion", "prevalence", "prevalence_assumed")
        rest = (
            "calibration_error",
            "calibration_error_method",
            "calibrated",
            "interval_method",
            "num_resamples_dropped",
        )
        return entries.whole((*keys, *rest))

    def _measure(self, entries: Entries, group: StudyGroup, names: Sequence[str], extra: Sequence[str]) -> None:
        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            values = group.values(weight, names)
            if self.prevalence is not None:
                rates = values["sensitivity"], values["specificity"]
                values |= dict(zip(extra, metrics.compute_predictive_values(*rates, self.prevalence), strict=True))
            return values

        entries.put_values(statistic(group.ones()), (*names, *extra))
        drawn = self.bootstrap(group, statistic)
        entries.put_bootstrap(drawn, (*names, *extra), group.rate_counts())
        entries.put_asymptotic(group)
        entries.put_calibration_error(group.label, group.probability)
        entries.put("calibrated", self._calibrated(group), "no calibrated probability for all of these studies")

    def _calibrated(self, group: StudyGroup) -> dict[str, Any] | None:
        """The same of calibrated probabilities, as far as calibration changes it."""
        calibrated = group.calibrated
        if calibrated is None:
            return None
        entries = Entries({}, {}, "")
        entries.put_values(
            compute_probability_metrics(group.label, calibrated, group.ones(), CALIBRATED_METRICS), CALIBRATED_METRICS
        )
        drawn = self.bootstrap(
            group, lambda weight: compute_probability_metrics(group.label, calibrated, weight, CALIBRATED_METRICS)
        )
        entries.put_bootstrap(drawn, CALIBRATED_METRICS)
        entries.put_calibration_error(group.label, calibrated)
        del entries.values["interval_method"], entries.values["num_resamples_dropped"]
        return entries.whole(
            (*CALIBRATED_METRICS, *bound_keys(CALIBRATED_METRICS), "calibration_error", "calibration_error_method")
        )

    def macro(self, studies: pd.DataFrame, by_type: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The unweighted mean over the study types that have both labels; its interval from resamples of all patients."""
        names = [name for name, group in by_type.items() if group["kappa"] is not None]
        kept = studies[studies["study_type"].isin(names)]
        entries = Entries({}, {}, "" if names else "no study type has studies of both labels")
        entries.values["method"] = "unweighted mean over study types"
        entries.values["num_study_types"] = len(names)
        entries.values["left_out"] = sorted(set(by_type) - set(names))
        if names:
            group = StudyGroup.of(kept, self.threshold)
            places = [np.flatnonzero(kept["study_type"].to_numpy() == name) for name in names]
            parts = [StudyGroup.of(kept.iloc[place], self.threshold) for place in places]

            def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
                each = [
                    part.values(weight[:, place], HEADLINE_METRICS) for part, place in zip(parts, places, strict=True)
                ]
                return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}

            entries.put_values(statistic(group.ones()), HEADLINE_METRICS)
            entries.put_bootstrap(self.bootstrap(group, statistic), HEADLINE_METRICS)
        return entries.whole(_OF_MACRO)


# ---- words


def metrics_by_group(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every group of a metrics.json by its name, `overall` first."""
    return {"overall": metrics["overall"], **metrics["by_study_type"]}


def describe_missing(group: dict[str, Any], names: tuple[str, ...] = HEADLINE_METRICS) -> list[str]:
    """What of `names` is missing, a sentence a reason: `kappa, auroc: one class only`. An interval is named once."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        spoken = name.replace("_", " ")
        for key, what in ((name, spoken), (f"{name}_low", f"{spoken}'s interval")):
            reason = group["reasons"].get(key, "")
            if reason and spoken not in by_reason.setdefault(reason, []):
                by_reason[reason].append(what)
    return [f"{', '.join(found)}: {reason}" for reason, found in by_reason.items()]


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0: no -0.000


def format_with_interval(group: dict[str, Any], name: str) -> str:
    """`0.705 [0.608, 0.803]`; without brackets where there is no interval, `-` where there is no number."""
    value, low, high = (group[key] for key in (name, f"{name}_low", f"{name}_high"))
    return (
        format_number(value)
        if low is None or high is None
        else f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"
    )


def format_summary_table(metrics: dict[str, Any]) -> str:
    """Return a plain-text table for the terminal, at most 100 columns: overall, each study type, notes of a line each."""
    form = "{:<16} {:>7}  {:<23} {:<23} {:>11} {:>11}"
    lines = [form.format("", "studies", "kappa [95 %]", "AUROC [95 %]", "sensitivity", "specificity")]
    for name, group in metrics_by_group(metrics).items():
        rates = [format_number(group[key]) for key in ("sensitivity", "specificity")]
        intervals = [format_with_interval(group, key) for key in ("kappa", "auroc")]
        lines.append(form.format(name[:16], group["num_studies"], *intervals, *rates).rstrip())
    method = textwrap.wrap(f"Intervals: {metrics['overall']['interval_method']}.", 100)
    return "\n".join([*lines, *method, *describe_interval_gaps(metrics)])


def describe_interval_gaps(metrics: dict[str, Any]) -> list[str]:
    """Return a line on the headline numbers without a bootstrap interval, and a line on those that are missing, if any."""
    cells = [(group, name) for group in metrics_by_group(metrics).values() for name in HEADLINE_METRICS]
    missing = sum(group[name] is None for group, name in cells)
    bare = sum(group[name] is not None and not _bootstrapped(group, name) for group, name in cells)
    notes = []
    if bare:
        have = "number has" if bare == 1 else "numbers have"
        notes.append(f"{bare} {have} no bootstrap interval: too few studies, or all right or all wrong; see the report")
    if missing:
        notes.append(f"{missing} {'number is' if missing == 1 else 'numbers are'} missing (-): see the report")
    return notes


def _bootstrapped(group: dict[str, Any], name: str) -> bool:
    return group[f"{name}_low"] is not None and group.get(f"{name}_interval") != WILSON
