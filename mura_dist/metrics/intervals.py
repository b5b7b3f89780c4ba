"""Compute confidence intervals of metrics. NumPy only.

patients -> Clusters -> resamples of whole patients -> Bootstrap: the 95 % percentile interval of any statistic (primary)
Wilson: a rate's interval by formula, also where the bootstrap has none
Fleiss-Cohen-Everitt, DeLong, McNemar: formulas that assume independent studies, reported beside the bootstrap
compute_official_interval: the official scorer's wrong interval, only to reproduce published numbers
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from mura_dist.metrics.classification import compute_agreement, compute_kappa

Z = 1.96  # two-sided 95 % quantile of the normal distribution, rounded as the official scorer rounds it
QUANTILES = (0.025, 0.975)
MAX_UNDEFINED_SHARE = 0.05  # of the resamples in which a metric may be undefined (nothing called abnormal: no PPV)
BOOTSTRAP, WILSON = "bootstrap", "wilson"  # methods of an interval, as metrics.json names them
_MAX_WEIGHTS_PER_CHUNK = 1 << 21  # resamples x studies in memory at once: about 16 MiB an array, a few arrays


@dataclass(frozen=True)
class Interval:
    """A 95 % interval and its method."""

    low: float
    high: float
    kind: str


# ---- bootstrap over patients


@dataclass(frozen=True)
class Clusters:
    """The studies that a bootstrap draws together: those of one patient."""

    index: np.ndarray  # each study's cluster, int64 (n,), 0 to num - 1, in the order of the patients' names
    num: int
    num_patients: int | None  # None: no study names its patient
    description: str  # of what is drawn

    @classmethod
    def from_patients(cls, patient: np.ndarray) -> Self:
        """Cluster studies by patient, object (n,) of str. A study with an unknown patient ("") is its own cluster."""
        unknown = patient == ""
        names = np.where(unknown, [f" {row}" for row in range(len(patient))], patient)
        unique, index = np.unique(names.astype(str), return_inverse=True) if len(names) else (names, np.zeros(0, int))
        description = f"{len(unique)} patients, the clusters"
        if len(unknown) and unknown.all():
            description = f"{len(unique)} studies, clustering unknown: no study names its patient"
        elif unknown.any():
            description += f" ({unknown.sum()} studies name none, each counts as one)"
        num_patients = len(set(patient[~unknown].tolist())) or None if len(patient) else 0
        return cls(index.astype(np.int64), len(unique), num_patients, description)

    def iter_weights(self, resamples: int, seed: int) -> Iterator[np.ndarray]:
        """Yield how often each study is drawn in each resample: float64 (at most R, n), in chunks that fit in memory.

        The draws are raw Philox bits. NumPy does not promise that `Generator`'s methods stay the same across versions.
        """
        bits, num = np.random.Philox(key=seed), np.uint64(self.num)
        chunk = max(1, _MAX_WEIGHTS_PER_CHUNK // len(self.index))
        for start in range(0, resamples, chunk):
            size = min(chunk, resamples - start)
            raw = bits.random_raw(size * self.num).reshape(size, -1)
            drawn = ((raw >> np.uint64(32)) * num >> np.uint64(32)).astype(np.int64)  # (size, num) in 0 .. num - 1
            drawn += np.arange(size)[:, None] * self.num
            count = np.bincount(drawn.ravel(), minlength=size * self.num).reshape(size, -1)
            yield count[:, self.index].astype(np.float64)


Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # weight (R, n) -> name -> (R,)


@dataclass(frozen=True)
class Bootstrap:
    """The values of a statistic in the resamples that have studies of both labels."""

    clusters: Clusters
    resamples: int
    seed: int
    num_dropped: int  # resamples of one class only
    samples: Mapping[str, np.ndarray]  # name -> values (resamples - num_dropped,)

    @classmethod
    def run(cls, clusters: Clusters, label: np.ndarray, statistic: Statistic, *, resamples: int, seed: int) -> Self:
        """Compute a statistic in each resample.

        Args:
            clusters: of the n studies.
            label: 0 or 1, (n,).
            statistic: maps weights (R, n), how often each study is drawn, to named numbers (R,), NaN where undefined.
            resamples: number of resamples.
            seed: 0 to 2**64 - 1.
        """
        chunks: dict[str, list[np.ndarray]] = {}
        num_valid = 0
        for weight in clusters.iter_weights(resamples, seed) if len(label) else ():
            positive = weight @ label
            both = (positive > 0) & (positive < weight.sum(axis=1))
            num_valid += int(both.sum())
            if both.any():
                for name, values in statistic(weight if both.all() else weight[both]).items():
                    chunks.setdefault(name, []).append(values)
        samples = {name: np.concatenate(values) for name, values in chunks.items()}
        return cls(clusters, resamples, seed, resamples - num_valid, samples)

    def method(self) -> str:
        """Describe the method, for reports."""
        return (
            f"95 % percentile bootstrap: {self.resamples} resamples of {self.clusters.description}, seed {self.seed}; "
            f"{self.num_dropped} resamples of one class only dropped"
        )

    def rate_interval(self, name: str, successes: int, trials: int) -> Interval:
        """Return a rate's bootstrap interval, or Wilson's of `successes` in `trials` (not 0) where there is none."""
        interval = self.interval(name)
        if isinstance(interval, str):
            return Interval(*compute_wilson_interval(successes, trials), WILSON)
        return interval

    def interval(self, name: str) -> Interval | str:
        """Return the percentile interval, or the reason why there is none."""
        if problem := self._problem():
            return problem
        values = self.samples[name][np.isfinite(self.samples[name])]
        num_valid = self.resamples - self.num_dropped
        if len(values) < (1 - MAX_UNDEFINED_SHARE) * num_valid:
            return f"undefined in {num_valid - len(values)} of {num_valid} resamples"
        if np.ptp(values) == 0:
            return "every resample gave the same value: a bootstrap cannot see the uncertainty here"
        low, high = np.quantile(values, QUANTILES)
        return Interval(float(low), float(high), BOOTSTRAP)

    def _problem(self) -> str:
        if self.resamples == 0:
            return "resamples is 0"
        if self.clusters.num < 2:
            return f"one {'study' if self.clusters.num_patients is None else 'patient'} only"
        if 2 * self.num_dropped > self.resamples:
            return f"{self.num_dropped} of {self.resamples} resamples had one class only"
        return ""


# ---- formulas that assume independent studies


def compute_fce_standard_error(confusion: np.ndarray) -> float:
    """Compute the asymptotic standard error of kappa (Fleiss, Cohen, Everitt 1969) of a confusion (4,)."""
    n = float(np.sum(confusion))
    share = np.asarray(confusion, dtype=np.float64).reshape(2, 2) / n  # label by call
    by_label, by_call = share.sum(axis=1), share.sum(axis=0)
    kappa, chance = float(compute_kappa(confusion)), float(by_label @ by_call)
    agreeing = sum(share[i, i] * (1 - (by_label[i] + by_call[i]) * (1 - kappa)) ** 2 for i in (0, 1))
    differing = sum(share[i, 1 - i] * (by_call[i] + by_label[1 - i]) ** 2 for i in (0, 1))
    variance = agreeing + (1 - kappa) ** 2 * differing - (kappa - chance * (1 - kappa)) ** 2
    return math.sqrt(max(variance, 0.0) / n) / (1 - chance)


def compute_fce_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Compute the Fleiss-Cohen-Everitt 95 % interval of kappa of a confusion (4,), clipped to [-1, 1]."""
    half_width = Z * compute_fce_standard_error(confusion)
    kappa = float(compute_kappa(confusion))
    return max(kappa - half_width, -1.0), min(kappa + half_width, 1.0)


def compute_wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """Compute Wilson's 95 % score interval of a proportion (Wilson 1927); NaN for 0 trials."""
    if trials == 0:
        return math.nan, math.nan
    if 2 * successes > trials:  # the mirror image, so that both ends are exact where all are successes, too
        low, high = compute_wilson_interval(trials - successes, trials)
        return 1.0 - high, 1.0 - low
    share, extra = successes / trials, Z * Z / trials
    center = (share + extra / 2) / (1 + extra)
    half_width = Z * math.sqrt(share * (1 - share) / trials + extra / (4 * trials)) / (1 + extra)
    return (max(0.0, center - half_width) if successes else 0.0), min(1.0, center + half_width)


def compute_delong_covariance(label: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUROC of k scores of the same studies and their covariance (DeLong et al. 1988).

    By midranks, in O(n log n) (Sun and Xu 2014). Needs two studies of each label.

    Args:
        label: 0 or 1, (n,).
        scores: (k, n).

    Returns:
        AUROC (k,), covariance (k, k).
    """
    positive, negative = scores[:, label == 1], scores[:, label == 0]
    m, n = positive.shape[1], negative.shape[1]
    ranks = np.stack([_compute_midranks(np.concatenate([p, q])) for p, q in zip(positive, negative, strict=True)])
    above = (ranks[:, :m] - np.stack([_compute_midranks(row) for row in positive])) / n  # (k, m): negatives below
    below = 1 - (ranks[:, m:] - np.stack([_compute_midranks(row) for row in negative])) / m  # (k, n)
    covariance = np.cov(above).reshape(len(scores), -1) / m + np.cov(below).reshape(len(scores), -1) / n
    return above.mean(axis=1), covariance


def _compute_midranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 1 on; equal values share their mean rank."""
    _, index, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[index]


def compute_delong_interval(label: np.ndarray, probability: np.ndarray) -> tuple[float, float]:
    """Compute DeLong's 95 % interval of AUROC, clipped to [0, 1]."""
    area, covariance = compute_delong_covariance(label, probability[None])
    half_width = Z * math.sqrt(max(float(covariance[0, 0]), 0.0))
    return max(float(area[0]) - half_width, 0.0), min(float(area[0]) + half_width, 1.0)


def compute_two_sided_p_value(z: float) -> float:
    """Return the probability that a standard normal is at least as far from 0."""
    return math.erfc(abs(z) / math.sqrt(2))


def compute_mcnemar_p_value(num_first: int, num_second: int) -> float:
    """Compute the exact two-sided p-value of McNemar's test (1947) from the two counts of discordant studies."""
    total = num_first + num_second
    tail = sum(math.comb(total, k) for k in range(min(num_first, num_second) + 1))
    return min(1.0, 2 * tail / 2**total)


# ---- wrong


def compute_official_interval(confusion: np.ndarray) -> tuple[float, float]:
    """Compute the official scorer's interval of kappa of a confusion (4,).

    It is too narrow: it uses a variance in place of a standard error.
    """
    observed, chance = compute_agreement(confusion)
    half_width = Z * observed * (1 - observed) / (np.sum(confusion) * (1 - chance) ** 2)
    kappa = compute_kappa(confusion)
    return float(kappa - half_width), float(kappa + half_width)
