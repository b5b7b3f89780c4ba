"""The entries of one group in metrics.json: values, their intervals, and the reasons of what is missing. NumPy only.

Group -> Entries.about -> put_values -> put_bootstrap -> put_asymptotic -> whole(keys) -> a JSON object
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from mura_dist.metrics import classification as metrics
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

HEADLINE_METRICS = ("kappa", "auroc", "sensitivity", "specificity")  # the headline
WILSON_RATES = ("sensitivity", "specificity", "ppv", "npv")
MIN_RARER_LABEL = 10  # studies of the rarer label below which an asymptotic interval is not to be trusted
_MIN_WIDTH = 1e-9  # of an interval; no set of studies has one so narrow and not empty
_UNDEFINED = {"ppv": "nothing was called abnormal", "npv": "everything was called abnormal"}
_SEPARATED = "the probabilities separate the labels, or are all equal: no finite slope"
_NO_PROBABILITIES = "calls only: no probabilities were given"
_ONE_CLASS = "one class only"


def bound_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the intervals' ends."""
    return tuple(f"{name}_{end}" for name in names for end in ("low", "high"))


def method_keys(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys that name the method of an interval, of those of `names` that are rates."""
    return tuple(f"{name}_interval" for name in names if name in WILSON_RATES)


ASYMPTOTIC_KEYS = bound_keys(
    ("kappa_fce", "kappa_official", "auroc_delong", *(f"{name}_wilson" for name in WILSON_RATES))
)


@dataclass
class Entries:
    """Values by key, and the reason of each that is missing."""

    values: dict[str, Any]
    reasons: dict[str, str]
    problem: str  # why there are none at all

    @classmethod
    def about(cls, group: StudyGroup) -> Self:
        """Begin with a group's number of studies and of patients."""
        entries = cls({"num_studies": len(group.label)}, {}, group.problem())
        entries.put("num_patients", group.clusters.num_patients, "no study names its patient")
        if entries.problem:
            entries.values |= {"interval_method": f"no interval: {entries.problem}", "num_resamples_dropped": 0}
        return entries

    def put(self, key: str, value: Any, reason: str) -> None:
        """Enter a value, or None with its reason; a NaN is no value."""
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        self.values[key] = None if missing else value
        if missing:
            self.reasons[key] = reason

    def put_values(self, values: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        """Enter values, (1,) each. A name that is not among them has no probabilities, or no prevalence, to come from."""
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
        self, drawn: Bootstrap, names: Sequence[str], rates: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Enter the intervals; Wilson's for a rate (name -> successes, trials) that the bootstrap gives none for.

        `rates` None: of means of rates, which have no Wilson interval, and no `NAME_interval` either.
        """
        self.values |= {"interval_method": drawn.method(), "num_resamples_dropped": drawn.dropped}
        for name in names:
            if self.values[name] is None:
                interval: Interval | str = self.reasons[name]
            elif rates and name in rates:
                interval = drawn.rate_interval(name, *rates[name])
            else:
                interval = drawn.interval(name)
            self.put_interval(name, interval)
            if rates is not None and name in WILSON_RATES:
                reason = interval if isinstance(interval, str) else ""
                self.put(f"{name}_interval", None if isinstance(interval, str) else interval.kind, reason)

    def put_interval(self, name: str, interval: Interval | str) -> None:
        """Enter an interval's ends, or the reason why there are none."""
        for end in ("low", "high"):
            if isinstance(interval, str):
                self.put(f"{name}_{end}", None, interval)
            else:
                self.put(f"{name}_{end}", getattr(interval, end), "")

    def put_calibration_error(self, label: np.ndarray, probability: np.ndarray | None) -> None:
        """Enter the calibration error and its method, where there are probabilities."""
        error, method = (None, None) if probability is None else metrics.compute_calibration_error(label, probability)
        self.put("calibration_error", error, _NO_PROBABILITIES)
        self.put("calibration_error_method", method, _NO_PROBABILITIES)

    def put_asymptotic(self, group: StudyGroup) -> None:
        """Enter the intervals beside the bootstrap's: ASYMPTOTIC."""
        counts = group.counts()
        self.put_interval("kappa_fce", self._asymptotic("kappa", group))
        self.put_interval("auroc_delong", self._asymptotic("auroc", group))
        official = (
            _ONE_CLASS if self.values["kappa"] is None else Interval(*compute_official_interval(counts), "official")
        )
        self.put_interval("kappa_official", official)
        for name, (successes, trials) in group.rate_counts().items():
            there = Interval(*compute_wilson_interval(successes, trials), WILSON) if trials else self.reasons[name]
            self.put_interval(f"{name}_wilson", there)

    def _asymptotic(self, name: str, group: StudyGroup) -> Interval | str:
        """Return the interval by formula of kappa or AUROC, or the reason why there is none."""
        value, counts = self.values[name], group.counts()
        if value is None:
            return self.reasons[name]
        rarer = int(min(counts[:2].sum(), counts[2:].sum()))
        if rarer < MIN_RARER_LABEL and abs(value) < 1:
            return f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_RARER_LABEL}"
        # Also of an AUROC of 0, of calls that are all one, of probabilities all equal: no width, which is no certainty.
        no_width = f"{name} is exactly {round(value, 9) + 0.0:g}: its asymptotic standard error is 0"
        if abs(value) == 1:
            return no_width
        if name == "kappa":
            interval = Interval(*compute_fce_interval(counts), "fce")
        else:
            assert group.probability is not None
            interval = Interval(*compute_delong_interval(group.label, group.probability), "delong")
        return no_width if interval.high - interval.low < _MIN_WIDTH else interval

    def whole(self, keys: Sequence[str]) -> dict[str, Any]:
        """Return the values with every one of `keys`, and `reasons`."""
        for key in keys:
            if key not in self.values:
                self.put(key, None, self.problem)
        assert all(self.reasons.values()), self.reasons
        return {**self.values, "reasons": self.reasons}
