"""How sure a number is. NumPy only.

patients -> Clusters -> resamples (whole patients) -> Bootstrap: any statistic's 95 % percentile interval    the primary one
Wilson: a rate's, by a formula that takes studies as independent            beside it, and where the bootstrap has none
fce, DeLong, McNemar: formulas that take studies as independent                                   to stand beside it
official_interval: the official scorer's, wrong                              to reproduce published numbers, for nothing else
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from mura_dist.metrics.classification import compute_agreement, compute_kappa

Z = 1.96  # two-sided 95 % of the normal distribution, as the official scorer rounds it
QUANTILES = (0.025, 0.975)
MAX_UNDEFINED_SHARE = (
    0.05  # share of the resamples in which a number may be undefined (nothing called abnormal: no PPV)
)
BOOTSTRAP, WILSON = "bootstrap", "wilson"  # kinds of an interval, as metrics.json names them
_MAX_WEIGHTS_PER_CHUNK = (
    1 << 21
)  # resamples x studies held in memory at once: about 16 MiB an array, a handful of arrays


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, and the method it was computed by."""

    low: float
    high: float
    kind: str


# ---- the bootstrap over patients


@dataclass(frozen=True)
class Clusters:
    """Which studies are drawn together: those of a patient. `index` int64 (n,): 0 .. num - 1, by the patients' names."""

    index: np.ndarray
    num: int
    num_patients: int | None  # None: no study names one
    words: str  # what is drawn

    @classmethod
    def of(cls, patient: np.ndarray) -> Self:
        """patient: object (n,) of str; "" where unknown, then the study is a patient of its own."""
        unknown = patient == ""
        names = np.where(unknown, [f" {place}" for place in range(len(patient))], patient)
        unique, index = np.unique(names.astype(str), return_inverse=True) if len(names) else (names, np.zeros(0, int))
        words = f"{len(unique)} patients, the clusters"
        if len(unknown) and unknown.all():
            words = f"{len(unique)} studies, clustering unknown: no study names its patient"
        elif unknown.any():
            words += f" ({unknown.sum()} studies name none, each counts as one)"
        known = len(set(patient[~unknown].tolist())) or None if len(patient) else 0
        return cls(index.astype(np.int64), len(unique), known, words)

    def resamples(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """How often each study came, resample by resample: float64 (at most R, n), in chunks that fit in memory.

        Raw Philox bits, not `Generator`'s methods: NumPy does not promise the latter across versions.
        """
        bits, num = np.random.Philox(key=seed), np.uint64(self.num)
        chunk = max(1, _MAX_WEIGHTS_PER_CHUNK // len(self.index))
        for start in range(0, resamples, chunk):
            many = min(chunk, resamples - start)
            raw = bits.random_raw(many * self.num).reshape(many, -1)
            drawn = ((raw >> np.uint64(32)) * num >> np.uint64(32)).astype(np.int64)  # (many, num) in 0 .. num - 1
            drawn += np.arange(many)[:, None] * self.num
            count = np.bincount(drawn.ravel(), minlength=many * self.num).reshape(many, -1)
            yield count[:, self.index].astype(np.float64)


Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # weight (R, n) -> name -> (R,)


@dataclass(frozen=True)
class Bootstrap:
    """What a statistic's numbers were in the resamples that had studies of both labels: `drawn`, name -> (kept,)."""

    clusters: Clusters
    resamples: int
    seed: int
    dropped: int  # resamples of one class only
    drawn: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, clusters: Clusters, label: np.ndarray, statistic: Statistic, *, resamples: int, seed: int) -> Self:
        """label (n,) 0 or 1; statistic: from how often each study came to numbers, NaN where undefined."""
        parts: dict[str, list[np.ndarray]] = {}
        kept = 0
        for weight in clusters.resamples(resamples, seed) if len(label) else ():
            positive = weight @ label
            both = (positive > 0) & (positive < weight.sum(axis=1))
            kept += int(both.sum())
            if both.any():
                for name, values in statistic(weight if both.all() else weight[both]).items():
                    parts.setdefault(name, []).append(values)
        drawn = {name: np.concatenate(values) for name, values in parts.items()}
        return cls(clusters, resamples, seed, resamples - kept, drawn)

    def method(self) -> str:
        return (
            f"95 % percentile bootstrap: {self.resamples} resamples of {self.clusters.words}, seed {self.seed}; "
            f"{self.dropped} resamples of one class only dropped"
        )

    def rate_interval(self, name: str, successes: int, trials: int) -> Interval:
        """Return a rate's interval: the bootstrap's, or Wilson's of `successes` in `trials` (not 0) where that has none."""
        interval = self.interval(name)
        return Interval(*compute_wilson_interval(successes, trials), WILSON) if isinstance(interval, str) else interval

    def interval(self, name: str) -> Interval | str:
        """Return the percentile interval, or the reason why there is none."""
        if problem := self._problem():
            return problem
        values = self.drawn[name][np.isfinite(self.drawn[name])]
        kept = self.resamples - self.dropped
        if len(values) < (1 - MAX_UNDEFINED_SHARE) * kept:
            return f"undefined in {kept - len(values)} of {kept} resamples"
        if np.ptp(values) == 0:
            return "every resample gave the same value: a bootstrap cannot see the uncertainty here"
        low, high = np.quantile(values, QUANTILES)
        return Interval(float(low), float(high), BOOTSTRAP)

    def _problem(self) -> str:
        if self.resamples == 0:
            return "no resamples were asked for"
        if self.clusters.num < 2:
            return f"one {'study' if self.clusters.num_patients is None else 'patient'} only"
        if 2 * self.dropped > self.resamples:
            return f"{self.dropped} of {self.resamples} resamples had one class only"
        return ""


# ---- as if studies were independent


def compute_fce_standard_error(confusion: np.ndarray) -> float:
    """Kappa's asymptotic standard error (Fleiss, Cohen, Everitt 1969), studies taken as independent. confusion (4,)."""
    n = float(np.sum(confusion))
    share = np.asarray(confusion, dtype=np.float64).reshape(2, 2) / n  # label by call
    by_label, by_call = share.sum(axis=1), share.sum(axis=0)
    value, chance = float(compute_kappa(confusion)), float(by_label @ by_call)
    agreeing = sum(share[i, i] * (1 - (by_label[i] + by_call[i]) * (1 - value)) ** 2 for i in (0, 1))
    differing = sum(share[i, 1 - i] * (by_call[i] + by_label[1 - i]) ** 2 for i in (0, 1))
    variance = agreeing + (1 - value) ** 2 * differing - (value - chance * (1 - value)) ** 2
    return math.sqrt(max(variance, 0.0) / n) / (1 - chance)


def compute_fce_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Kappa's, clipped to [-1, 1]. confusion (4,)."""
    half = Z * compute_fce_standard_error(confusion)
    value = float(compute_kappa(confusion))
    return max(value - half, -1.0), min(value + half, 1.0)


def compute_wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share; of no trials, NaN."""
    if trials == 0:
        return math.nan, math.nan
    if 2 * successes > trials:  # by the mirror image, so that both ends are exact where all are successes, too
        low, high = compute_wilson_interval(trials - successes, trials)
        return 1.0 - high, 1.0 - low
    share, extra = successes / trials, Z * Z / trials
    middle = (share + extra / 2) / (1 + extra)
    half = Z * math.sqrt(share * (1 - share) / trials + extra / (4 * trials)) / (1 + extra)
    return (max(0.0, middle - half) if successes else 0.0), min(1.0, middle + half)


def compute_delong_covariance(label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of k scores of the same studies and their covariance (DeLong et al. 1988): (k, n) -> (k,), (k, k).

    Needs two studies of each label. By midranks (Sun and Xu 2014), so that n log n steps do.
    """
    positive, negative = scores[:, label == 1], scores[:, label == 0]
    m, n = positive.shape[1], negative.shape[1]
    all_ranks = np.stack([_compute_midranks(np.concatenate([p, q])) for p, q in zip(positive, negative, strict=True)])
    above = (
        all_ranks[:, :m] - np.stack([_compute_midranks(row) for row in positive])
    ) / n  # (k, m): share of negatives below
    below = 1 - (all_ranks[:, m:] - np.stack([_compute_midranks(row) for row in negative])) / m  # (k, n)
    covariance = np.cov(above).reshape(len(scores), -1) / m + np.cov(below).reshape(len(scores), -1) / n
    return above.mean(axis=1), covariance


def _compute_midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 on, equal values sharing their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def compute_delong_interval(label: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """AUROC's, clipped to [0, 1]."""
    area, covariance = compute_delong_covariance(label, probability[None])
    half = Z * math.sqrt(max(float(covariance[0, 0]), 0.0))
    return max(float(area[0]) - half, 0.0), min(float(area[0]) + half, 1.0)


def compute_two_sided_p_value(z: float) -> float:
    """Probability of a standard normal at least as far from 0."""
    return math.erfc(abs(z) / math.sqrt(2))


def compute_mcnemar_p_value(one: int, other: int) -> float:
    """Exact two-sided p-value of `one` against `other` discordant studies, if either is as likely."""
    total = one + other
    tail = sum(math.comb(total, k) for k in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**total)


# ---- wrong


def compute_official_interval(confusion: np.ndarray) -> tuple[float, float]:
    """The official scorer's interval of kappa, too narrow: a variance in place of a standard error. confusion (4,)."""
    observed, chance = compute_agreement(confusion)
    half = Z * observed * (1 - observed) / (np.sum(confusion) * (1 - chance) ** 2)
    value = compute_kappa(confusion)
    return float(value - half), float(value + half)
