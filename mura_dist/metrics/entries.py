"""Build the entries of one group in metrics.json: values, intervals, and the reason of each that is missing. NumPy only.

StudyGroup -> Entries.from_group -> put_values -> put_bootstrap -> put_asymptotic -> complete(keys) -> a JSON object
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mura_dist.metrics.classification import compute_calibration_error
from mura_dist.metrics.group import StudyGroup
from mura_dist.metrics.intervals import (
    WILSON,
    Bootstrap,
    Interval,
    compute_delong_interval,
    compute_fce_interval,
    compute_official_interval,
    compute_wilson_interval,
)

HEADLINE_METRICS = ("kappa", "auroc", "sensitivity", "specificity")
WILSON_RATES = ("sensitivity", "specificity", "ppv", "npv")
MIN_RARER_LABEL = 10  # studies of the rarer label, below which an asymptotic interval is unreliable
_MIN_WIDTH = 1e-9  # of an interval: narrower ones come from rounding of a width of 0
_UNDEFINED = {"ppv": "nothing was called abnormal", "npv": "everything was called abnormal"}
_SEPARATED = "the probabilities separate the labels, or are all equal: no finite slope"
_NO_PROBABILITIES = "calls only: no probabilities"
_ONE_CLASS = "one class only"


def bound_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the ends of the intervals: NAME_low, NAME_high."""
    return tuple(f"{name}_{end}" for name in names for end in ("low", "high"))


def method_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the intervals' methods, NAME_interval, for the rates in `names`."""
    return tuple(f"{name}_interval" for name in names if name in WILSON_RATES)


ASYMPTOTIC_KEYS = bound_keys(
    ("kappa_fce", "kappa_official", "auroc_delong", *(f"{name}_wilson" for name in WILSON_RATES))
)


@dataclass
class Entries:
    """The values of a group by key, and the reason of each that is missing."""

    values: dict[str, Any]
    reasons: dict[str, str]
    problem: str  # why there are no values at all, or ""

    @classmethod
    def from_group(cls, group: StudyGroup) -> Self:
        """Start with the group's number of studies and of patients."""
        entries = cls({"num_studies": len(group.label)}, {}, group.problem())
        entries.put("num_patients", group.clusters.num_patients, "no study names its patient")
        if entries.problem:
            entries.values |= {"interval_method": f"no interval: {entries.problem}", "num_resamples_dropped": 0}
        return entries

    def put(self, key: str, value: Any, reason: str) -> None:
        """Set a value. None and NaN become None with the reason."""
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        self.values[key] = None if missing else value
        if missing:
            self.reasons[key] = reason

    def put_values(self, values: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        """Set values, (1,) each. A name missing from `values` needs probabilities or a prevalence that there is not."""
        one_class = any(np.isnan(values[name][0]) for name in ("kappa", "auroc") if name in values)
        for name in names:
            reason = (
                _ONE_CLASS
                if one_class or name in HEADLINE_METRICS
                else _UNDEFINED.get(name.removesuffix("_at_prevalence"), _ONE_CLASS)
            )
            if name == "calibration_slope" and not one_class:
                reason = _SEPARATED
            if name.endswith("_at_prevalence") and name not in values:
                reason = self.reasons["prevalence_assumed"]
            elif name not in values:
                reason = _NO_PROBABILITIES
            self.put(name, float(values[name][0]) if name in values else None, reason)

    def put_bootstrap(
        self, bootstrap: Bootstrap, names: Sequence[str], rates: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Set the intervals.

        Args:
            bootstrap: of the values.
            names: of the metrics.
            rates: name -> (successes, trials). Such a rate has Wilson's interval where the bootstrap has none. None for means of
                rates, which have neither a Wilson interval nor an entry NAME_interval.
        """
        self.values |= {"interval_method": bootstrap.method(), "num_resamples_dropped": bootstrap.num_dropped}
        for name in names:
            if self.values[name] is None:
                interval: Interval | str = self.reasons[name]
            elif rates and name in rates:
                interval = bootstrap.rate_interval(name, *rates[name])
            else:
                interval = bootstrap.interval(name)
            self.put_interval(name, interval)
            if rates is not None and name in WILSON_RATES:
                reason = interval if isinstance(interval, str) else ""
                self.put(f"{name}_interval", None if isinstance(interval, str) else interval.kind, reason)

    def put_interval(self, name: str, interval: Interval | str) -> None:
        """Set both ends of an interval, or the reason why there are none."""
        for end in ("low", "high"):
            if isinstance(interval, str):
                self.put(f"{name}_{end}", None, interval)
            else:
                self.put(f"{name}_{end}", getattr(interval, end), "")

    def put_calibration_error(self, label: np.ndarray, probability: np.ndarray | None) -> None:
        """Set the calibration error and its method, where there are probabilities."""
        error, method = (None, None) if probability is None else compute_calibration_error(label, probability)
        self.put("calibration_error", error, _NO_PROBABILITIES)
        self.put("calibration_error_method", method, _NO_PROBABILITIES)

    def put_asymptotic(self, group: StudyGroup) -> None:
        """Set the intervals of ASYMPTOTIC_KEYS."""
        counts = group.counts()
        self.put_interval("kappa_fce", self._asymptotic("kappa", group))
        self.put_interval("auroc_delong", self._asymptotic("auroc", group))
        one_class = self.values["kappa"] is None
        official = _ONE_CLASS if one_class else Interval(*compute_official_interval(counts), "official")
        self.put_interval("kappa_official", official)
        for name, (successes, trials) in group.rate_counts().items():
            interval = Interval(*compute_wilson_interval(successes, trials), WILSON) if trials else self.reasons[name]
            self.put_interval(f"{name}_wilson", interval)

    def _asymptotic(self, name: str, group: StudyGroup) -> Interval | str:
        """Return the asymptotic interval of kappa or AUROC, or the reason why there is none."""
        value, counts = self.values[name], group.counts()
        if value is None:
            return self.reasons[name]
        rarer = int(min(counts[:2].sum(), counts[2:].sum()))
        if rarer < MIN_RARER_LABEL and abs(value) < 1:
            return f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_RARER_LABEL}"
        # An AUROC of 0, equal calls or equal probabilities give a width of 0, which is not certainty.
        no_width = f"{name} is exactly {round(value, 9) + 0.0:g}: its asymptotic standard error is 0"
        if abs(value) == 1:
            return no_width
        if name == "kappa":
            interval = Interval(*compute_fce_interval(counts), "fce")
        else:
            assert group.probability is not None
            interval = Interval(*compute_delong_interval(group.label, group.probability), "delong")
        return no_width if interval.high - interval.low < _MIN_WIDTH else interval

    def complete(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the values with all of `keys` (None where missing), and `reasons`."""
        for key in keys:
            if key not in self.values:
                self.put(key, None, self.problem)
        assert all(self.reasons.values()), self.reasons
        return {**self.values, "reasons": self.reasons}
