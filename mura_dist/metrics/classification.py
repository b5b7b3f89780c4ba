"""How good calls and probabilities are: arrays in, numbers out. NumPy and pandas only.

    rows, probabilities -> study_table (mean over a study's views) -> kappa, auroc ...      intervals.py: how sure they are
                                                                                            summary.py: metrics.json

A confusion is float64 (..., 4): tn, fp, fn, tp. Labels: 1 positive (abnormal), 0 negative (normal). Where a function takes
`weight` (R, n), how often each of n studies counts in each of R resamples, it gives (R,); without, a number. What is not
defined (one class only, nothing called positive) is NaN.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

ArrayOrFloat = float | np.ndarray | pd.Series

CELLS = ("tn", "fp", "fn", "tp")
LOGIT_LIMIT = 30.0  # a probability of 1e-13 or 1 - 1e-13: beyond, a float64 mean of probabilities says nothing more
NUM_BINS, MIN_BIN_STUDIES = 10, 5  # of the calibration error and its picture
_CONVERGED = 1e-6  # a step of Newton's that was this small leaves an error of its square


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Probability of a logit, float64; no overflow at any finite logit."""
    return np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))


def logit_to_probability(logit: float) -> float:
    """A view's, of its logit."""
    return float(sigmoid(np.array(logit)))


def logit(probability: np.ndarray) -> np.ndarray:
    """Log odds of a probability, float64, within +-LOGIT_LIMIT."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probability) - np.log1p(-probability), -LOGIT_LIMIT, LOGIT_LIMIT)


def build_study_table(rows: np.ndarray, probability: np.ndarray, manifest_frame: pd.DataFrame) -> pd.DataFrame:
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
    table = first[["study", "study_type", "patient", "label"]].reset_index(drop=True)
    return table.assign(num_views=num_views, probability=compute_study_probability(code, probability[order]))


def compute_study_probability(code: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """A study's probability, the mean over its views: code int64 (n,) 0 .. k - 1, probability float64 (n,) -> float64 (k,).

    The same to the last bit in whatever order the views come: it is compared with thresholds, in evaluate and in predict.
    """
    order = np.lexsort((probability, code))
    # Not groupby.mean: it skips NaN, and a study whose network diverged would look sound.
    return np.bincount(code[order], weights=probability[order]) / np.bincount(code)


# ---- of calls


def is_positive(probability: ArrayOrFloat, threshold: ArrayOrFloat) -> np.ndarray:
    """Call positive what lies above its threshold, strictly; NaN is never positive.

    Args:
        probability: of studies, or any score that is compared with a threshold of its own scale.
        threshold: one for all, or of a shape that broadcasts with `probability`; NaN where there is none.

    Returns:
        bool, of the shape that both broadcast to.
    """
    return np.asarray(probability) > np.asarray(threshold)


def compute_confusion(label: np.ndarray, call: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """label, call (n,) 0 or 1; weight (R, n) or None -> tn, fp, fn, tp float64 (R, 4), or (4,) without weights."""
    cell = np.eye(4)[2 * label.astype(np.int64) + call.astype(np.int64)]  # (n, 4)
    return cell.sum(axis=0) if weight is None else weight @ cell


def compute_kappa(confusion: np.ndarray) -> np.ndarray:
    """Cohen's kappa: (..., 4) -> (...). NaN where labels and calls are all of one class."""
    observed, chance = compute_agreement(confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed - chance) / (1 - chance)


def compute_agreement(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and chance agreement, (...) each."""
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    n = tn + fp + fn + tp
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tn + tp) / n, ((tn + fp) * (tn + fn) + (fn + tp) * (fp + tp)) / n**2


def compute_call_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """(..., 4) -> kappa, sensitivity, specificity, ppv, npv, f1, balanced_accuracy, (...) each.

    Kappa is NaN where all labels are equal: it would be 0 whatever the calls, which is no measurement.
    """
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }
    found["balanced_accuracy"] = (found["sensitivity"] + found["specificity"]) / 2
    return {"kappa": np.where(np.isnan(found["balanced_accuracy"]), np.nan, compute_kappa(confusion)), **found}


def compute_predictive_values(
    sensitivity: np.ndarray, specificity: np.ndarray, prevalence: float
) -> tuple[np.ndarray, np.ndarray]:
    """PPV and NPV where `prevalence` of the studies are abnormal, by Bayes from rates that do not depend on it."""
    right, wrong = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    well, missed = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return right / (right + wrong), well / (well + missed)


# ---- of probabilities


def compute_auroc(label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve, ties counted half; NaN where one class has no weight."""
    positive, negative = _weigh_tied_runs(label, probability, weight)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return area[0] if weight is None else area


def compute_average_precision(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """The sum over thresholds of precision x gained recall, no line drawn between them; NaN where one class has no weight."""
    positive, negative = (part[:, ::-1] for part in _weigh_tied_runs(label, probability, weight))  # highest first
    true, false = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(true > 0, true / (true + false), 0.0)
        area = (precision * positive).sum(axis=1) / true[:, -1]
    area = np.where(false[:, -1] > 0, area, np.nan)
    return area[0] if weight is None else area


def _weigh_tied_runs(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives in each run of equal probabilities, lowest first: (R, runs) each."""
    order = np.argsort(probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=-np.inf))
    weights = (np.ones((1, len(label))) if weight is None else weight)[:, order]
    positive = np.add.reduceat(weights * label[order], starts, axis=1)
    return positive, np.add.reduceat(weights, starts, axis=1) - positive


def compute_roc_curve(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve's corners, (0, 0) to (1, 1): false and true positive rate, float64 (k,) each. Needs both labels."""
    true, false = _count_at_or_above(label, probability)
    return np.append(0, false) / false[-1], np.append(0, true) / true[-1]


def compute_pr_curve(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at each threshold, highest first, float64 (k,) each. Needs both labels."""
    true, false = _count_at_or_above(label, probability)
    return true / true[-1], true / (true + false)


def _count_at_or_above(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many positives and negatives lie at or above each probability there is, highest first."""
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
    return np.cumsum(label[order])[ends], np.cumsum(1 - label[order])[ends]


def compute_brier_score(label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Mean squared difference of probability and label: 0 is perfect, 0.25 is 1/2 said of everything."""
    squared = (probability - label) ** 2
    if weight is None:
        return squared.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return weight @ squared / weight.sum(axis=1)


# ---- calibration


class CalibrationBins(NamedTuple):
    """Studies in bins of equal number, by probability: float64 (k,) each."""

    probability: np.ndarray  # mean of the bin's probabilities
    share: np.ndarray  # of abnormal ones among them
    num: np.ndarray


def bin_by_quantile(label: np.ndarray, probability: np.ndarray) -> CalibrationBins:
    """At most NUM_BINS bins, of MIN_IN_BIN studies or more where there are as many; equal probabilities stay together."""
    count = max(1, min(NUM_BINS, len(label) // MIN_BIN_STUDIES))
    ordered = np.sort(probability)
    edges = ordered[np.arange(1, count) * len(ordered) // count]  # each bin's lowest, but for the first
    place = np.unique(np.searchsorted(edges, probability, side="right"), return_inverse=True)[1]
    num = np.bincount(place)
    return CalibrationBins(
        np.bincount(place, probability) / num, np.bincount(place, label) / num, num.astype(np.float64)
    )


def compute_calibration_error(label: np.ndarray, probability: np.ndarray) -> tuple[float, str]:
    """Mean over studies of |mean probability - share abnormal| of a study's bin, and the binning in words."""
    bins = bin_by_quantile(label, probability)
    error = float((bins.num * np.abs(bins.probability - bins.share)).sum() / len(label))
    return error, f"{len(bins.num)} bins of equal number of studies"


def compute_calibration_intercept(
    label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Calibration in the large: a of P(abnormal) = sigmoid(a + logit), by maximum likelihood. 0 is right, above 0: too low."""
    weights = np.ones((1, len(label))) if weight is None else weight
    positive = weights @ label
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.log(positive) - np.log(weights.sum(axis=1) - positive)  # log odds of abnormal
    found = np.full(len(weights), np.nan)
    both = np.isfinite(share)
    if both.any():
        found[both] = _solve_intercept(positive[both], logits, weights[both], share[both])
    return found[0] if weight is None else found


def _solve_intercept(positive: np.ndarray, x: np.ndarray, weights: np.ndarray, share: np.ndarray) -> np.ndarray:
    """a (R,) where the sum of weight x sigmoid(a + x) is `positive` (R,).

    If all x were the largest or the smallest, it would be `share` less that: the root lies in between. Newton's method, with a
    bisection wherever its step would leave that bracket.
    """
    low, high = share - x.max(), share - x.min()
    found = np.clip(share - weights.mean(axis=0) @ x / weights.mean(axis=0).sum(), low, high)
    for _ in range(200):
        p = _fast_sigmoid(found[:, None] + x)
        excess = (weights * p).sum(axis=1) - positive
        low, high = np.where(excess <= 0, found, low), np.where(excess >= 0, found, high)
        step = excess / np.maximum((weights * p * (1 - p)).sum(axis=1), 1e-300)
        after = found - step
        after = np.where((after >= low) & (after <= high), after, (low + high) / 2)
        moved, found = np.abs(after - found).max(), after
        if moved < _CONVERGED:
            break
    return found


def compute_calibration_slope(label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """b of P(abnormal) = sigmoid(a + b logit), by maximum likelihood: 1 is right, below 1: too extreme.

    NaN where the logits separate the labels (b is infinite then), or all are equal.
    """
    weights = np.ones((1, len(label))) if weight is None else weight
    found = np.full(len(weights), np.nan)
    overlap = ~_are_separated(label, logits, weights)
    if overlap.any():
        found[overlap] = fit_logistic(label, logits, weights[overlap])[1]
    return found[0] if weight is None else found


def _are_separated(label: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether at most one value of the logits is between, or common to, the labels: bool (R,)."""
    there = weights > 0
    ends = {}
    for value in (0, 1):
        chosen = there & (label == value)
        ends[value] = np.where(chosen, logits, np.inf).min(axis=1), np.where(chosen, logits, -np.inf).max(axis=1)
    return (ends[0][1] <= ends[1][0]) | (ends[1][1] <= ends[0][0])


def fit_logistic(target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a, b (R,) each of sigmoid(a + b x), fitted to `target` (n,) in 0 .. 1 by maximum likelihood under `weights` (R, n).

    The caller sees to it that a maximum exists: one x at least lies among those of the other label.
    """
    # A resample's fit lies near that of their mean: from there Newton's plain steps arrive in a few, wherever they do.
    start = _fit_with_line_search(target, x, weights.mean(axis=0, keepdims=True))
    parameters = np.repeat(start, len(weights), axis=0)
    for _ in range(8):
        step = _newton_step(parameters, target, x, weights)
        parameters = parameters + np.clip(step, -10, 10)
        far = ~(np.abs(step).max(axis=1) < _CONVERGED)
        if not far.any():
            break
    if far.any():
        parameters[far] = _fit_with_line_search(target, x, weights[far])
    return parameters[:, 0], parameters[:, 1]


def _fit_with_line_search(target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same, (R, 2): each of Newton's steps is halved until the likelihood does not fall."""
    parameters = np.zeros((len(weights), 2))
    best = _log_likelihood(parameters, target, x, weights)
    for _ in range(100):
        step = _newton_step(parameters, target, x, weights)
        for _ in range(40):
            value = _log_likelihood(parameters + step, target, x, weights)
            worse = ~(value >= best)
            if not worse.any():
                break
            step[worse] /= 2
        step[worse] = 0  # as near as float64 comes
        parameters, best = parameters + step, np.maximum(value, best)
        if np.abs(step).max() < _CONVERGED:
            break
    return parameters


def _log_likelihood(parameters: np.ndarray, target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log likelihood, (R,)."""
    z = parameters[:, :1] + parameters[:, 1:] * x  # (R, n)
    return (weights * (target * z - np.logaddexp(0, z))).sum(axis=1)


def _newton_step(parameters: np.ndarray, target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Newton's step of the log likelihood, (R, 2)."""
    p = _fast_sigmoid(parameters[:, :1] + parameters[:, 1:] * x)
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    first = weights * p
    h00, h01, h11 = (first @ powers - (first * p) @ powers).T  # of weight p (1 - p)
    g0, g1 = (weights @ (target[:, None] * powers[:, :2]) - first @ powers[:, :2]).T
    determinant = np.maximum(h00 * h11 - h01**2, 1e-300)
    return np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / determinant[:, None]


def _fast_sigmoid(z: np.ndarray) -> np.ndarray:
    """Three times as fast as `sigmoid`, and less exact where the result is near 1e-16 or below."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))
