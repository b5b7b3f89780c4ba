"""What is known of a set of studies: metrics.json, and its words for terminal and page. NumPy and pandas only.

    studies (label, probability or call, patient, study type) -> measure -> metrics.json (overall, by study type, macro)

Every `_low` and `_high` without another name in it is of one kind: a 95 % percentile bootstrap over whole patients, since the
studies of one patient are not independent. Others stand beside it (`INTERVAL_KINDS`). What cannot be had is None, and
`reasons` says why.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from mura_dist.metrics import classification as metrics
from mura_dist.metrics.classification import CELLS
from mura_dist.metrics.intervals import Bootstrap, Clusters, delong_interval, fce_interval, official_interval, wilson

METRICS = ("kappa", "auroc", "sensitivity", "specificity")  # the headline
OF_CALLS = ("kappa", "sensitivity", "specificity", "ppv", "npv", "f1", "balanced_accuracy")
OF_PROBABILITIES = ("auroc", "average_precision", "brier", "calibration_intercept", "calibration_slope")
CALIBRATED = ("auroc", "brier", "calibration_intercept", "calibration_slope")  # measured again after calibration
WILSON = ("sensitivity", "specificity", "ppv", "npv")
RATES = ("sensitivity", "specificity")
CURVE = tuple(percent / 100 for percent in range(1, 100))  # the thresholds of `curves`
MIN_OF_A_CLASS = 10  # studies of the rarer label below which an asymptotic interval is not to be trusted
_NO_WIDTH = 1e-9  # of an interval; no set of studies has one so narrow and not empty
INTERVAL_KINDS = {
    "low_high": "95 % percentile bootstrap over whole patients (where patients are unknown: over studies)",
    "fce": "Fleiss-Cohen-Everitt, of kappa; assumes independent studies",
    "delong": "DeLong, of AUROC; assumes independent studies",
    "wilson": "Wilson's score interval; assumes independent studies",
    "official": "the official scorer's, of kappa: a variance in place of a standard error, far too narrow; not to be used",
}
_UNDEFINED = {"ppv": "nothing was called abnormal", "npv": "everything was called abnormal"}
_SEPARATED = "the probabilities separate the labels, or are all equal: no finite slope"
_NO_PROBABILITIES = "calls only: no probabilities were given"
_ONE_CLASS = "one class only"


def measure(
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
    studies = _in_order(studies)
    by_type = {name: task.group(studies[studies["study_type"] == name]) for name in names}
    return {
        "overall": task.group(studies),
        "by_study_type": by_type,
        "macro": task.macro(studies, by_type),
        "interval_kinds": INTERVAL_KINDS,
    }


def subgroups(
    studies: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """The headline numbers by what should not matter: {"num_views": {"1": {...}}, "exposure": {"darkest third ...": {...}}}.

    studies: as for `measure`; columns num_views and exposure (mean grey level, 0 .. 255), where they are there.
    """
    task = _Task(threshold, resamples, seed, None)
    studies = _in_order(studies)
    by = {"num_views": _by_views, "exposure": _by_exposure}
    return {
        name: {word: task.headline(studies[chosen]) for word, chosen in split(studies[name]).items() if chosen.any()}
        for name, split in by.items()
        if name in studies
    }


def curves(studies: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """What sensitivity and specificity would be at another threshold, by study type: columns, one number a threshold of CURVE.

    studies: as for `measure`, with probabilities. A study type that has not both labels is left out. Every number has its
    `_low` and `_high`, None where a bootstrap cannot give them. To be looked at, not to choose by: these are the studies
    that are reported.
    """
    studies = _in_order(studies)
    groups = {str(name): Group.of(part, 0.5) for name, part in studies.groupby("study_type", sort=True)}
    return {
        name: _curve(group, resamples, seed)
        for name, group in groups.items()
        if not group.problem() and 0 < group.label.sum() < len(group.label)
    }


def _in_order(studies: pd.DataFrame) -> pd.DataFrame:
    """The labelled ones, in an order of their own: floating point sums then do not depend on the caller's."""
    labelled = studies[studies["label"].notna()]
    keys = [key for key in ("probability", "call", "calibrated_probability") if key in labelled]
    by = labelled[["study_type", "label", *keys]].assign(patient=_names(labelled["patient"])).reset_index(drop=True)
    return labelled.iloc[by.sort_values(["patient", "study_type", "label", *keys], kind="stable").index]


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


@dataclass(frozen=True)
class Group:
    """Labelled studies as arrays (n,): what is measured of them, under how often each counts."""

    label: np.ndarray  # int64
    call: np.ndarray  # bool
    probability: np.ndarray | None  # float64; None: calls only
    calibrated: np.ndarray | None
    clusters: Clusters

    @classmethod
    def of(cls, studies: pd.DataFrame, threshold: float) -> Self:
        """studies: all labelled, in any order."""
        label = studies["label"].to_numpy(dtype=np.int64)
        probability = _floats(studies, "probability")
        calibrated = _floats(studies, "calibrated_probability")
        if calibrated is not None and not np.isfinite(calibrated).all():
            calibrated = None
        if "call" in studies:
            call = studies["call"].to_numpy(dtype=np.int64) == 1
        else:
            assert probability is not None, "studies have neither probabilities nor calls"
            call = metrics.is_positive(probability, threshold)
        return cls(label, call, probability, calibrated, Clusters.of(_names(studies["patient"])))

    def problem(self) -> str:
        """Why nothing at all can be measured; "" where something can."""
        if not len(self.label):
            return "no labelled studies"
        lost = 0 if self.probability is None else int((~np.isfinite(self.probability)).sum())
        return f"{lost} of {len(self.label)} studies have no finite probability" if lost else ""

    def values(self, weight: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
        """weight (R, n) -> the numbers of `names`, (R,) each; those of probabilities left out where there are none."""
        found = {key: value for key, value in self._of_calls(weight).items() if key in names}
        if self.probability is not None:
            found |= _of_probabilities(self.label, self.probability, weight, names)
        return found

    def _of_calls(self, weight: np.ndarray) -> dict[str, np.ndarray]:
        return metrics.of_calls(metrics.confusion(self.label, self.call, weight))

    def counts(self) -> np.ndarray:
        """The confusion, (4,)."""
        return metrics.confusion(self.label, self.call)

    def ones(self) -> np.ndarray:
        return np.ones((1, len(self.label)))


def _curve(group: Group, resamples: int, seed: int) -> dict[str, Any]:
    assert group.probability is not None
    called = metrics.is_positive(group.probability[:, None], np.array(CURVE))  # (n, thresholds)
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
        "threshold": list(CURVE),
    }
    for name in RATES:
        intervals = [drawn.interval(f"{name} {place}") for place in range(len(CURVE))]
        found[name] = [_short(here[f"{name} {place}"][0]) for place in range(len(CURVE))]
        for end, bound in enumerate(("low", "high")):
            found[f"{name}_{bound}"] = [None if isinstance(one, str) else _short(one[end]) for one in intervals]
    return found


def _short(value: float) -> float:
    """A share to four digits: a curve travels in the model's file."""
    return round(float(value), 4)


def _floats(studies: pd.DataFrame, name: str) -> np.ndarray | None:
    return studies[name].to_numpy(dtype=np.float64) if name in studies else None


def _names(patient: pd.Series) -> np.ndarray:
    """object (n,) of str, "" where unknown."""
    return patient.astype(object).where(patient.notna(), "").astype(str).to_numpy(dtype=object)


def _of_probabilities(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    how: dict[str, tuple[Callable[..., np.ndarray], bool]] = {  # from probabilities, or from their logits
        "auroc": (metrics.auroc, False),
        "average_precision": (metrics.average_precision, False),
        "brier": (metrics.brier, False),
        "calibration_intercept": (metrics.calibration_intercept, True),
        "calibration_slope": (metrics.calibration_slope, True),
    }
    logits = metrics.logit(probability)
    return {
        name: function(label, logits if of_logits else probability, weight)
        for name, (function, of_logits) in how.items()
        if name in names
    }


@dataclass(frozen=True)
class _Task:
    threshold: float
    resamples: int
    seed: int
    prevalence: float | None

    def bootstrap(self, group: Group, statistic: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> Bootstrap:
        return Bootstrap.of(group.clusters, group.label, statistic, resamples=self.resamples, seed=self.seed)

    def headline(self, studies: pd.DataFrame) -> dict[str, Any]:
        """METRICS of some studies, with intervals."""
        group = Group.of(studies, self.threshold)
        found = _Found.about(group)
        if not found.problem:
            found.put_values(group.values(group.ones(), METRICS), METRICS)
            found.put_bootstrap(self.bootstrap(group, lambda weight: group.values(weight, METRICS)), METRICS)
        return found.whole((*METRICS, *_bounds(METRICS), "interval_method", "num_resamples_dropped"))

    def group(self, studies: pd.DataFrame) -> dict[str, Any]:
        """Everything of some studies: metrics.json's `overall`, or one study type's."""
        group = Group.of(studies, self.threshold)
        found, names = _Found.about(group), (*OF_CALLS, *OF_PROBABILITIES)
        extra = ("ppv_at_prevalence", "npv_at_prevalence")
        found.put("prevalence_assumed", self.prevalence, "no prevalence was asked for")
        if not found.problem:
            found.values["confusion"] = dict(zip(CELLS, map(int, group.counts()), strict=True))
            found.values["prevalence"] = float(group.label.mean())
            self._measure(found, group, names, extra)
        bounds = _bounds((*names, *extra))
        keys = (*names, *extra, *bounds, *_ASYMPTOTIC, "confusion", "prevalence", "prevalence_assumed")
        rest = (
            "calibration_error",
            "calibration_error_method",
            "calibrated",
            "interval_method",
            "num_resamples_dropped",
        )
        return found.whole((*keys, *rest))

    def _measure(self, found: "_Found", group: Group, names: Sequence[str], extra: Sequence[str]) -> None:
        def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
            values = group.values(weight, names)
            if self.prevalence is not None:
                rates = values["sensitivity"], values["specificity"]
                values |= dict(zip(extra, metrics.at_prevalence(*rates, self.prevalence), strict=True))
            return values

        found.put_values(statistic(group.ones()), (*names, *extra))
        drawn = self.bootstrap(group, statistic)
        found.put_bootstrap(drawn, (*names, *extra))
        _put_asymptotic(found, group)
        _put_calibration_error(found, group.label, group.probability)
        found.put("calibrated", self._calibrated(group), "no calibrated probability for all of these studies")

    def _calibrated(self, group: Group) -> dict[str, Any] | None:
        """The same of calibrated probabilities, as far as calibration changes it."""
        calibrated = group.calibrated
        if calibrated is None:
            return None
        found = _Found({}, {}, "")
        found.put_values(_of_probabilities(group.label, calibrated, group.ones(), CALIBRATED), CALIBRATED)
        drawn = self.bootstrap(group, lambda weight: _of_probabilities(group.label, calibrated, weight, CALIBRATED))
        found.put_bootstrap(drawn, CALIBRATED)
        _put_calibration_error(found, group.label, calibrated)
        del found.values["interval_method"], found.values["num_resamples_dropped"]
        return found.whole((*CALIBRATED, *_bounds(CALIBRATED), "calibration_error", "calibration_error_method"))

    def macro(self, studies: pd.DataFrame, by_type: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """The unweighted mean over the study types that have both labels; its interval from resamples of all patients."""
        names = [name for name, group in by_type.items() if group["kappa"] is not None]
        kept = studies[studies["study_type"].isin(names)]
        found = _Found({}, {}, "" if names else "no study type has studies of both labels")
        found.values["method"] = "unweighted mean over study types"
        found.values["num_study_types"] = len(names)
        found.values["left_out"] = sorted(set(by_type) - set(names))
        if names:
            group = Group.of(kept, self.threshold)
            places = [np.flatnonzero(kept["study_type"].to_numpy() == name) for name in names]
            parts = [Group.of(kept.iloc[place], self.threshold) for place in places]

            def statistic(weight: np.ndarray) -> dict[str, np.ndarray]:
                each = [part.values(weight[:, place], METRICS) for part, place in zip(parts, places, strict=True)]
                return {name: np.mean([one[name] for one in each], axis=0) for name in each[0]}

            found.put_values(statistic(group.ones()), METRICS)
            found.put_bootstrap(self.bootstrap(group, statistic), METRICS)
        return found.whole((*METRICS, *_bounds(METRICS), "interval_method", "num_resamples_dropped"))


_ASYMPTOTIC = tuple(
    f"{kind}_{end}"
    for kind in ("kappa_fce", "kappa_official", "auroc_delong", *(f"{name}_wilson" for name in WILSON))
    for end in ("low", "high")
)


def _bounds(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}_{end}" for name in names for end in ("low", "high"))


@dataclass
class _Found:
    """Numbers as they are found, and why others are not."""

    values: dict[str, Any]
    reasons: dict[str, str]
    problem: str  # why there are none at all

    @classmethod
    def about(cls, group: Group) -> Self:
        found = cls({"num_studies": len(group.label)}, {}, group.problem())
        found.put("num_patients", group.clusters.num_patients, "no study names its patient")
        if found.problem:
            found.values |= {"interval_method": f"no interval: {found.problem}", "num_resamples_dropped": 0}
        return found

    def put(self, key: str, value: Any, reason: str) -> None:
        """A value, or None with its reason: a NaN is no value."""
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        self.values[key] = None if missing else value
        if missing:
            self.reasons[key] = reason

    def put_values(self, values: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        """values: (1,) each. A name that is not among them has no probabilities, or no prevalence, to come from."""
        one_class = any(np.isnan(values[name][0]) for name in ("kappa", "auroc") if name in values)
        for name in names:
            reason = (
                _ONE_CLASS
                if one_class or name in METRICS
                else _UNDEFINED.get(name.removesuffix("_at_prevalence"), _ONE_CLASS)
            )
            if name == "calibration_slope" and not one_class:
                reason = _SEPARATED
            if name.endswith("_at_prevalence") and name not in values:
                reason = self.reasons["prevalence_assumed"]
            elif name not in values:
                reason = _NO_PROBABILITIES
            self.put(name, float(values[name][0]) if name in values else None, reason)

    def put_bootstrap(self, drawn: Bootstrap, names: Sequence[str]) -> None:
        self.values |= {"interval_method": drawn.method(), "num_resamples_dropped": drawn.dropped}
        for name in names:
            found = self.reasons[name] if self.values[name] is None else drawn.interval(name)
            if isinstance(found, str):
                self.put_interval(name, None, found)
            else:
                self.put_interval(name, found, "")

    def put_interval(self, name: str, bounds: tuple[float, float] | None, reason: str) -> None:
        for key, value in zip(_bounds((name,)), bounds or (None, None), strict=True):
            self.put(key, value, reason)

    def whole(self, keys: Sequence[str]) -> dict[str, Any]:
        """With every one of `keys`, and `reasons`."""
        for key in keys:
            if key not in self.values:
                self.put(key, None, self.problem)
        assert all(self.reasons.values()), self.reasons
        return {**self.values, "reasons": self.reasons}


def _put_calibration_error(found: _Found, label: np.ndarray, probability: np.ndarray | None) -> None:
    error, method = (None, None) if probability is None else metrics.calibration_error(label, probability)
    found.put("calibration_error", error, _NO_PROBABILITIES)
    found.put("calibration_error_method", method, _NO_PROBABILITIES)


def _put_asymptotic(found: _Found, group: Group) -> None:
    """The intervals beside the bootstrap's: _ASYMPTOTIC."""
    counts, value, area = group.counts(), found.values["kappa"], found.values["auroc"]
    rarer = int(min(counts[:2].sum(), counts[2:].sum()))
    few = f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_OF_A_CLASS}"
    for name, number, interval in (
        ("kappa_fce", value, lambda: fce_interval(counts)),
        ("auroc_delong", area, lambda: delong_interval(group.label, _there(group.probability))),
    ):
        metric = name.partition("_")[0]
        bounds, reason = None, found.reasons.get(metric, "")
        if number is not None:
            reason = few if rarer < MIN_OF_A_CLASS and abs(number) < 1 else ""
            bounds = None if reason or abs(number) == 1 else interval()
            # Also of an AUROC of 0, of calls that are all one, of probabilities all equal: no width, which is no certainty.
            if not reason and (bounds is None or bounds[1] - bounds[0] < _NO_WIDTH):
                bounds = None
                reason = f"{metric} is exactly {round(number, 9) + 0.0:g}: its asymptotic standard error is 0"
        found.put_interval(name, bounds, reason)
    found.put_interval("kappa_official", None if value is None else official_interval(counts), _ONE_CLASS)
    tn, fp, fn, tp = counts
    pairs = {"sensitivity": (tp, tp + fn), "specificity": (tn, tn + fp), "ppv": (tp, tp + fp), "npv": (tn, tn + fn)}
    for name in WILSON:
        found.put_interval(f"{name}_wilson", wilson(*pairs[name]), found.reasons.get(name, "") or "none")


def _there(probability: np.ndarray | None) -> np.ndarray:
    assert probability is not None
    return probability


# ---- words


def groups(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every group of a metrics.json by its name, `overall` first."""
    return {"overall": metrics["overall"], **metrics["by_study_type"]}


def absences(group: dict[str, Any], names: tuple[str, ...] = METRICS) -> list[str]:
    """What of `names` is missing, a sentence a reason: `kappa, auroc: one class only`. An interval is named once."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        spoken = name.replace("_", " ")
        for key, what in ((name, spoken), (f"{name}_low", f"{spoken}'s interval")):
            reason = group["reasons"].get(key, "")
            if reason and spoken not in by_reason.setdefault(reason, []):
                by_reason[reason].append(what)
    return [f"{', '.join(found)}: {reason}" for reason, found in by_reason.items()]


def number(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 3) + 0.0:.3f}"  # + 0: no -0.000


def with_interval(group: dict[str, Any], name: str) -> str:
    """`0.705 [0.608, 0.803]`; without brackets where there is no interval, `-` where there is no number."""
    value, low, high = (group[key] for key in (name, f"{name}_low", f"{name}_high"))
    return number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"


def summary_table(metrics: dict[str, Any]) -> str:
    """A plain-text table for the terminal, at most 100 columns: overall, each study type, below what is missing."""
    form = "{:<16} {:>7}  {:<23} {:<23} {:>11} {:>11}"
    lines = [form.format("", "studies", "kappa [95 %]", "AUROC [95 %]", "sensitivity", "specificity")]
    notes = [f"Intervals: {metrics['overall']['interval_method']}."]
    for name, group in groups(metrics).items():
        rates = [number(group[key]) for key in ("sensitivity", "specificity")]
        intervals = [with_interval(group, key) for key in ("kappa", "auroc")]
        lines.append(form.format(name[:16], group["num_studies"], *intervals, *rates))
        notes += [f"{name}: {text}" for text in absences(group)]
    return "\n".join([line.rstrip() for line in lines] + [part for note in notes for part in textwrap.wrap(note, 100)])
