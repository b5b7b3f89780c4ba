"""What is known of a set of studies: metrics.json, and its words for terminal and page. NumPy and pandas only.

    studies (label, probability, patient, study type) -> measure -> metrics.json (overall, by study type)

Every metric's `_low` and `_high` are of one kind: a 95 % percentile bootstrap over whole patients, since the studies of
one patient are not independent. Two others stand beside kappa's: `kappa_fce_*` (Fleiss, Cohen, Everitt 1969, as if
studies were independent) and `kappa_official_*`, the official scorer's, which takes a variance for a standard error and
is far too narrow; it is there to reproduce published numbers. What cannot be had is None, and `reasons` says why.

A confusion is float64 (..., 4): tn, fp, fn, tp. Labels: 1 positive (abnormal), 0 negative (normal).
"""

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from .intervals import Z, fce_standard_error, official_interval
from .metrics import CELLS, auroc, confusion, kappa

METRICS = ("kappa", "auroc", "sensitivity", "specificity")
QUANTILES = (0.025, 0.975)
MIN_FCE_CLASS = 10  # studies of the rarer label below which the asymptotic interval is not to be trusted
_CELLS_AT_ONCE = 1 << 21  # resamples x studies held in memory at once: about 16 MiB an array, a handful of arrays
_KEYS = (
    *("num_studies", "num_patients", "kappa", "kappa_low", "kappa_high", "interval_method", "num_resamples_dropped"),
    *("kappa_fce_low", "kappa_fce_high", "kappa_official_low", "kappa_official_high"),
    *("auroc", "auroc_low", "auroc_high", "sensitivity", "sensitivity_low", "sensitivity_high"),
    *("specificity", "specificity_low", "specificity_high", "confusion", "reasons"),
)


def measure(studies: pd.DataFrame, *, threshold: float = 0.5, resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """metrics.json's content: {"overall": {...}, "by_study_type": {name: {...}}}, standard JSON values only.

    studies: columns study_type, patient, label, probability, as `study_table` gives them; those without a label are
    left out. The call is probability > threshold, strictly. The same input gives the same numbers on every machine.
    """
    assert resamples >= 0, resamples
    assert 0 <= seed < 2**64, seed
    return {
        "overall": _measure_group(studies, threshold, resamples, seed),
        "by_study_type": {
            str(name): _measure_group(part, threshold, resamples, seed)
            for name, part in studies.groupby("study_type", sort=True)
        },
    }


@dataclass(frozen=True)
class _Group:
    """Labelled studies as arrays (n,). `cluster` numbers what is drawn: patients, or studies where none is known."""

    label: np.ndarray  # int64
    probability: np.ndarray  # float64
    call: np.ndarray  # bool
    cluster: np.ndarray  # int64, 0 .. num_clusters - 1
    num_clusters: int
    num_patients: int | None  # None: no study names one
    drawn: str  # what the clusters are, in words

    @classmethod
    def of(cls, studies: pd.DataFrame, threshold: float) -> Self:
        studies = studies[studies["label"].notna()]
        patient = (
            studies["patient"].astype(object).where(studies["patient"].notna(), "").astype(str).to_numpy(dtype=object)
        )
        unknown = patient == ""
        # Those without a patient are patients of their own.
        names = np.where(unknown, [f" {place}" for place in range(len(patient))], patient)
        cluster, unique = pd.factorize(names, sort=True)
        num_patients = len(set(patient[~unknown]))
        drawn = f"{len(unique)} patients, the clusters"
        if unknown.all() and len(unknown):
            drawn = f"{len(unique)} studies, clustering unknown: no study names its patient"
        elif unknown.any():
            drawn += f" ({unknown.sum()} studies name none, each counts as one)"
        probability = studies["probability"].to_numpy(dtype=np.float64)
        label = studies["label"].to_numpy(dtype=np.int64)
        known = num_patients or None if len(label) else 0
        return cls(label, probability, probability > threshold, cluster, len(unique), known, drawn)


def _measure_group(studies: pd.DataFrame, threshold: float, resamples: int, seed: int) -> dict[str, Any]:
    group = _Group.of(studies, threshold)
    found: dict[str, Any] = dict.fromkeys(_KEYS)
    reasons: dict[str, str] = {}
    found |= {"num_studies": len(group.label), "num_patients": group.num_patients, "reasons": reasons}
    if group.num_patients is None:
        reasons["num_patients"] = "no study names its patient"
    problem = _problem(group)
    if problem:
        found |= {"interval_method": f"no interval: {problem}", "num_resamples_dropped": 0}
    else:
        counts = confusion(group.label, group.call)
        found["confusion"] = dict(zip(CELLS, map(int, counts), strict=True))
        _put(found, METRICS, _values(group, None), "one class only")
        _put_bootstrap(found, group, resamples, seed)
        _put_asymptotic(found, counts)
    for key in _KEYS:
        if found[key] is None:
            reasons.setdefault(key, problem)
    assert all(reasons.values()), reasons
    return found


def _problem(group: _Group) -> str:
    """Why nothing at all can be measured; "" where something can."""
    if not len(group.label):
        return "no labelled studies"
    lost = int((~np.isfinite(group.probability)).sum())
    return f"{lost} of {len(group.label)} studies have no finite probability" if lost else ""


def _put(found: dict[str, Any], keys: tuple[str, ...], values: np.ndarray, reason: str) -> None:
    """Numbers under their keys; None and the reason where they are not numbers."""
    for key, value in zip(keys, values.tolist(), strict=True):
        found[key] = value if math.isfinite(value) else None
        if found[key] is None:
            found["reasons"][key] = reason


def _values(group: _Group, weight: np.ndarray | None) -> np.ndarray:
    """The four METRICS: weight (R, n) -> (R, 4), or None -> (4,). NaN where a class is missing."""
    counts = confusion(group.label, group.call, weight)
    tn, fp, fn, tp = np.moveaxis(counts, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rates = tp / (tp + fn), tn / (tn + fp)
    area = auroc(group.label, group.probability, weight)
    # Kappa is 0 whatever the calls where all labels are equal: that is no measurement.
    value = np.where(np.isnan(area), np.nan, kappa(counts))
    return np.stack([value, area, *rates], axis=-1)


def _put_bootstrap(found: dict[str, Any], group: _Group, resamples: int, seed: int) -> None:
    drawn = [_values(group, weight) for weight in _resample(group, resamples, seed)]
    values = np.concatenate([np.zeros((0, len(METRICS))), *drawn])  # (R, 4)
    kept = values[np.isfinite(values).all(axis=1)]
    dropped = resamples - len(kept)
    found["num_resamples_dropped"] = dropped
    found["interval_method"] = (
        f"95 % percentile bootstrap: {resamples} resamples of {group.drawn}, seed {seed}; "
        f"{dropped} resamples of one class only dropped"
    )
    reason = _no_interval(group, resamples, dropped)
    bounds = np.full((2, len(METRICS)), np.nan) if reason else np.quantile(kept, QUANTILES, axis=0)
    if not reason:
        bounds[:, np.ptp(kept, axis=0) == 0] = np.nan
    for column, name in enumerate(METRICS):
        same = "every resample gave the same value: too few errors for a bootstrap to see the uncertainty"
        why = found["reasons"].get(name) or reason or same
        _put(found, (f"{name}_low", f"{name}_high"), bounds[:, column], why)


def _no_interval(group: _Group, resamples: int, dropped: int) -> str:
    if resamples == 0:
        return "no resamples were asked for"
    if group.num_clusters < 2:
        return f"one {'study' if group.num_patients is None else 'patient'} only"
    if 2 * dropped > resamples:
        return f"{dropped} of {resamples} resamples had one class only"
    return ""


def _resample(group: _Group, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each study came, resample by resample: float64 (at most R, n), in chunks that fit in memory.

    Raw Philox bits, not `Generator`'s methods: NumPy does not promise the latter across versions.
    """
    bits = np.random.Philox(key=seed)
    clusters = np.uint64(group.num_clusters)
    chunk = max(1, _CELLS_AT_ONCE // len(group.label))
    for start in range(0, resamples, chunk):
        num = min(chunk, resamples - start)
        raw = bits.random_raw(num * group.num_clusters).reshape(num, -1)
        taken = ((raw >> np.uint64(32)) * clusters >> np.uint64(32)).astype(
            np.int64
        )  # (num, clusters) in 0 .. clusters - 1
        taken += np.arange(num)[:, None] * group.num_clusters
        count = np.bincount(taken.ravel(), minlength=num * group.num_clusters).reshape(num, -1)
        yield count[:, group.cluster].astype(np.float64)


def _put_asymptotic(found: dict[str, Any], counts: np.ndarray) -> None:
    """kappa_fce_* and kappa_official_*."""
    none = np.full(2, np.nan)
    value, rarer = found["kappa"], int(min(counts[:2].sum(), counts[2:].sum()))
    official = none if value is None else np.array(official_interval(counts))
    _put(found, ("kappa_official_low", "kappa_official_high"), official, "one class only")
    reason = ""
    if value is None:
        reason = "one class only"
    elif abs(value) == 1:
        reason = f"kappa is exactly {value:g}: its asymptotic standard error is 0"
    elif rarer < MIN_FCE_CLASS:
        reason = f"{rarer} studies of the rarer label; the asymptotic interval needs {MIN_FCE_CLASS}"
    half = 0.0 if reason else Z * fce_standard_error(counts)
    asymptotic = none if reason else np.clip([value - half, value + half], -1, 1)
    _put(found, ("kappa_fce_low", "kappa_fce_high"), asymptotic, reason)


def groups(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every group of a metrics.json by its name, `overall` first."""
    return {"overall": metrics["overall"], **metrics["by_study_type"]}


def absences(group: dict[str, Any], names: tuple[str, ...] = METRICS) -> list[str]:
    """What of `names` is missing, a sentence a reason: `kappa, auroc: one class only`. An interval is named once."""
    by_reason: dict[str, list[str]] = {}
    for name in names:
        for key, what in ((name, name), (f"{name}_low", f"{name}'s interval")):
            reason = group["reasons"].get(key, "")
            if reason and name not in by_reason.setdefault(reason, []):
                by_reason[reason].append(what)
    return [f"{', '.join(found)}: {reason}" for reason, found in by_reason.items()]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


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
