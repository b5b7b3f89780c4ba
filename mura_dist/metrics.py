"""How good the calls are: probabilities in, numbers out. NumPy and pandas only.

    rows, probabilities -> study_table (mean over a study's views) -> measure -> metrics.json (overall, by study type)

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

METRICS = ("kappa", "auroc", "sensitivity", "specificity")
CELLS = ("tn", "fp", "fn", "tp")
Z = 1.96  # two-sided 95 % of the normal distribution, as the official scorer rounds it
QUANTILES = (0.025, 0.975)
MIN_FCE_CLASS = 10  # studies of the rarer label below which the asymptotic interval is not to be trusted
_CELLS_AT_ONCE = 1 << 21  # resamples x studies held in memory at once: about 16 MiB an array, a handful of arrays
_KEYS = (
    *("num_studies", "num_patients", "kappa", "kappa_low", "kappa_high", "interval_method", "num_resamples_dropped"),
    *("kappa_fce_low", "kappa_fce_high", "kappa_official_low", "kappa_official_high"),
    *("auroc", "auroc_low", "auroc_high", "sensitivity", "sensitivity_low", "sensitivity_high"),
    *("specificity", "specificity_low", "specificity_high", "confusion", "reasons"),
)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Probability of a logit, float64; no overflow at any finite logit."""
    return np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))


def study_table(rows: np.ndarray, probability: np.ndarray, manifest_frame: pd.DataFrame) -> pd.DataFrame:
    """One line a study, in the manifest's order: study, study_type, patient, label, num_views, probability.

    rows int64 (n,), each once, in any order; probability float64 (n,), a view's; manifest_frame is indexed by row. A
    study's probability is the mean over those of its views that are in `rows`; one NaN among them makes it NaN.
    """
    assert rows.shape == probability.shape, (rows.shape, probability.shape)
    assert len(np.unique(rows)) == len(rows), "a row came twice"
    order = np.argsort(rows)
    views = manifest_frame.loc[rows[order]]
    code, study = pd.factorize(views["study"])
    first = views.iloc[np.unique(code, return_index=True)[1]]
    num_views = np.bincount(code, minlength=len(study))
    # Not groupby.mean: it skips NaN, and a study whose network diverged would look sound.
    mean = np.bincount(code, weights=probability[order], minlength=len(study)) / num_views
    table = first[["study", "study_type", "patient", "label"]].reset_index(drop=True)
    return table.assign(num_views=num_views, probability=mean)


def confusion(label: np.ndarray, call: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """label, call (n,) 0 or 1; weight (R, n) or None -> tn, fp, fn, tp float64 (R, 4), or (4,) without weights."""
    cell = np.eye(4)[2 * label.astype(np.int64) + call.astype(np.int64)]  # (n, 4)
    return cell.sum(axis=0) if weight is None else weight @ cell


def kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa: (..., 4) -> (...). NaN where labels and calls are all of one class."""
    agreement, chance = _agreement(confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (agreement - chance) / (1 - chance)


def _agreement(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and chance agreement, (...) each."""
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    n = tn + fp + fn + tp
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tn + tp) / n, ((tn + fp) * (tn + fn) + (fn + tp) * (fp + tp)) / n**2


def fce_standard_error(confusion: np.ndarray) -> float:
    """Kappa's asymptotic standard error (Fleiss, Cohen, Everitt 1969), studies taken as independent. confusion (4,)."""
    n = float(np.sum(confusion))
    share = np.asarray(confusion, dtype=np.float64).reshape(2, 2) / n  # label by call
    by_label, by_call = share.sum(axis=1), share.sum(axis=0)
    value, chance = float(kappa(confusion)), float(by_label @ by_call)
    agreeing = sum(share[i, i] * (1 - (by_label[i] + by_call[i]) * (1 - value)) ** 2 for i in (0, 1))
    differing = sum(share[i, 1 - i] * (by_call[i] + by_label[1 - i]) ** 2 for i in (0, 1))
    variance = agreeing + (1 - value) ** 2 * differing - (value - chance * (1 - value)) ** 2
    return math.sqrt(max(variance, 0.0) / n) / (1 - chance)


def official_interval(confusion: np.ndarray) -> tuple[float, float]:
    """The official scorer's interval of kappa, too narrow: a variance in place of a standard error. confusion (4,)."""
    agreement, chance = _agreement(confusion)
    half = Z * agreement * (1 - agreement) / (np.sum(confusion) * (1 - chance) ** 2)
    value = kappa(confusion)
    return float(value - half), float(value + half)


def auroc(label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, ties counted half; NaN where one class has no weight.

    label, probability (n,), weight (R, n) -> (R,), or () without weights.
    """
    order = np.argsort(probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=-np.inf))  # of runs of equal probabilities
    weights = np.ones((1, len(label))) if weight is None else weight
    weights = weights[:, order]
    positive = np.add.reduceat(weights * label[order], starts, axis=1)  # (R, runs)
    negative = np.add.reduceat(weights, starts, axis=1) - positive
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return area[0] if weight is None else area


def roc(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve's corners, (0, 0) to (1, 1): false and true positive rate, float64 (k,) each. Needs both labels."""
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
    true, false = np.cumsum(label[order])[ends], np.cumsum(1 - label[order])[ends]
    return np.append(0, false) / false[-1], np.append(0, true) / true[-1]


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
