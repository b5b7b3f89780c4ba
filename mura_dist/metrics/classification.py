"""Compute metrics of calls and probabilities: arrays in, numbers out. NumPy and pandas only.

    rows, probabilities -> build_study_table (mean over a study's views) -> compute_kappa, compute_auroc, ...
    intervals.py: confidence intervals           summary.py: metrics.json

A confusion is float64 (..., 4): tn, fp, fn, tp. Labels: 1 positive (abnormal), 0 negative (normal). `weight` (R, n) counts each
of n studies in each of R resamples. A function with `weight` returns (R,), without it a number. What is undefined (one class
only, nothing called positive) is NaN.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

ArrayOrFloat = float | np.ndarray | pd.Series

CELLS = ("tn", "fp", "fn", "tp")
LOGIT_LIMIT = 30.0  # probabilities within 1e-13 of 0 or 1: a float64 mean of probabilities resolves no more
NUM_BINS, MIN_BIN_STUDIES = 10, 5  # of the calibration error and its plot
_CONVERGED = 1e-6  # Newton's method converges quadratically: after a step this small the error is about its square


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Return the probability of a logit, float64, without overflow."""
    return np.exp(-np.logaddexp(0.0, -logit.astype(np.float64)))


def logit_to_probability(logit: float) -> float:
    """Return the probability of one logit."""
    return float(sigmoid(np.array(logit)))


def logit(probability: np.ndarray) -> np.ndarray:
    """Return the log odds of a probability, float64, clipped to +-LOGIT_LIMIT."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(probability) - np.log1p(-probability), -LOGIT_LIMIT, LOGIT_LIMIT)


def build_study_table(rows: np.ndarray, probability: np.ndarray, manifest_frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per study with the mean probability over its views.

    Args:
        rows: the radiographs' manifest rows, int64 (n,), each once, in any order.
        probability: of the radiographs, float64 (n,).
        manifest_frame: indexed by row.

    Returns:
        Columns study, study_type, patient, label, num_views, probability, in the manifest's order. The mean is over the
        views in `rows`. One NaN among them makes the study's probability NaN.
    """
    assert rows.shape == probability.shape, (rows.shape, probability.shape)
    assert len(np.unique(rows)) == len(rows), "a row came twice"
    order = np.argsort(rows)
    views = manifest_frame.loc[rows[order]]
    code, study = pd.factorize(views["study"])
    first_views = views.iloc[np.unique(code, return_index=True)[1]]
    num_views = np.bincount(code, minlength=len(study))
    table = first_views[["study", "study_type", "patient", "label"]].reset_index(drop=True)
    return table.assign(num_views=num_views, probability=compute_study_probability(code, probability[order]))


def compute_study_probability(code: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Compute the mean probability over each study's views.

    The result is bit-identical in any order of the views, because evaluate and predict compare it with thresholds.

    Args:
        code: each view's study, int64 (n,), 0 to k - 1.
        probability: of the views, float64 (n,).

    Returns:
        float64 (k,).
    """
    order = np.lexsort((probability, code))
    # Not groupby.mean: it skips NaN, and would hide a network that diverged.
    return np.bincount(code[order], weights=probability[order]) / np.bincount(code)


# ---- metrics of calls


def is_positive(probability: ArrayOrFloat, threshold: ArrayOrFloat) -> np.ndarray:
    """Call positive what is strictly above its threshold; NaN is never positive.

    Args:
        probability: of studies, or any score on the threshold's scale.
        threshold: one for all, or of a shape that broadcasts with `probability`; NaN where there is none.

    Returns:
        bool, of the broadcast shape.
    """
    return np.asarray(probability) > np.asarray(threshold)


def compute_confusion(label: np.ndarray, call: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Count tn, fp, fn, tp.

    Args:
        label: 0 or 1, (n,).
        call: 0 or 1, (n,).
        weight: (R, n).

    Returns:
        float64 (R, 4), or (4,) without weights.
    """
    cell = np.eye(4)[2 * label.astype(np.int64) + call.astype(np.int64)]  # (n, 4)
    return cell.sum(axis=0) if weight is None else weight @ cell


def compute_kappa(confusion: np.ndarray) -> np.ndarray:
    """Compute Cohen's kappa (Cohen 1960): (..., 4) -> (...). NaN where labels and calls are all of one class."""
    observed, chance = compute_agreement(confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed - chance) / (1 - chance)


def compute_agreement(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the observed agreement and the agreement by chance, (...) each."""
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    n = tn + fp + fn + tp
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tn + tp) / n, ((tn + fp) * (tn + fn) + (fn + tp) * (fp + tp)) / n**2


def compute_call_metrics(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Compute kappa, sensitivity, specificity, ppv, npv, f1 and balanced_accuracy: (..., 4) -> (...) each.

    Kappa is NaN where all labels are equal. It would be 0 whatever the calls.
    """
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        metrics = {
            "sensitivity": tp / (tp + fn),
            "specificity": tn / (tn + fp),
            "ppv": tp / (tp + fp),
            "npv": tn / (tn + fn),
            "f1": 2 * tp / (2 * tp + fp + fn),
        }
    metrics["balanced_accuracy"] = (metrics["sensitivity"] + metrics["specificity"]) / 2
    kappa = np.where(np.isnan(metrics["balanced_accuracy"]), np.nan, compute_kappa(confusion))
    return {"kappa": kappa, **metrics}


def compute_predictive_values(
    sensitivity: np.ndarray, specificity: np.ndarray, prevalence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Compute PPV and NPV at a prevalence of abnormal studies by Bayes' rule."""
    tp, fp = sensitivity * prevalence, (1 - specificity) * (1 - prevalence)
    tn, fn = specificity * (1 - prevalence), (1 - sensitivity) * prevalence
    with np.errstate(invalid="ignore", divide="ignore"):
        return tp / (tp + fp), tn / (tn + fn)


# ---- metrics of probabilities


def compute_auroc(label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Compute the area under the ROC curve, ties counted half; NaN where one class has no weight."""
    positive, negative = _weigh_tied_runs(label, probability, weight)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (positive * below).sum(axis=1) / (positive.sum(axis=1) * negative.sum(axis=1))
    return area[0] if weight is None else area


def compute_average_precision(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Compute average precision: the sum over thresholds of precision x increase of recall, without interpolation.

    NaN where one class has no weight. scikit-learn's average_precision_score has the same definition.
    """
    positive, negative = (counts[:, ::-1] for counts in _weigh_tied_runs(label, probability, weight))  # highest first
    tp, fp = np.cumsum(positive, axis=1), np.cumsum(negative, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(tp > 0, tp / (tp + fp), 0.0)
        area = (precision * positive).sum(axis=1) / tp[:, -1]
    area = np.where(fp[:, -1] > 0, area, np.nan)
    return area[0] if weight is None else area


def _weigh_tied_runs(
    label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weight of positives and of negatives in each run of equal probabilities, lowest first: (R, runs) each."""
    order = np.argsort(probability, kind="stable")
    starts = np.flatnonzero(np.diff(probability[order], prepend=-np.inf))
    weights = (np.ones((1, len(label))) if weight is None else weight)[:, order]
    positive = np.add.reduceat(weights * label[order], starts, axis=1)
    return positive, np.add.reduceat(weights, starts, axis=1) - positive


def compute_roc_curve(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve from (0, 0) to (1, 1): false and true positive rate, float64 (k,) each. Needs both labels."""
    tp, fp = _count_at_or_above(label, probability)
    return np.append(0, fp) / fp[-1], np.append(0, tp) / tp[-1]


def compute_pr_curve(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision at each threshold, highest first, float64 (k,) each. Needs both labels."""
    tp, fp = _count_at_or_above(label, probability)
    return tp / tp[-1], tp / (tp + fp)


def _count_at_or_above(label: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of positives and of negatives at or above each distinct probability, highest first."""
    order = np.argsort(-probability, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(probability[order])), len(order) - 1)
    return np.cumsum(label[order])[ends], np.cumsum(1 - label[order])[ends]


def compute_brier_score(label: np.ndarray, probability: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Compute the Brier score (Brier 1950): the mean squared difference of probability and label. 0 is perfect."""
    squared = (probability - label) ** 2
    if weight is None:
        return squared.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return weight @ squared / weight.sum(axis=1)


# ---- calibration


class CalibrationBins(NamedTuple):
    """Studies in bins of equal number, by probability: float64 (k,) each."""

    probability: np.ndarray  # mean of the bin's probabilities
    share: np.ndarray  # share of abnormal studies
    num: np.ndarray


def bin_by_quantile(label: np.ndarray, probability: np.ndarray) -> CalibrationBins:
    """Return at most NUM_BINS bins of at least MIN_BIN_STUDIES studies, if there are as many.

    Equal probabilities are in one bin.
    """
    num_bins = max(1, min(NUM_BINS, len(label) // MIN_BIN_STUDIES))
    ordered = np.sort(probability)
    edges = ordered[np.arange(1, num_bins) * len(ordered) // num_bins]  # the lowest of each bin but the first
    index = np.unique(np.searchsorted(edges, probability, side="right"), return_inverse=True)[1]
    num = np.bincount(index)
    return CalibrationBins(
        np.bincount(index, probability) / num, np.bincount(index, label) / num, num.astype(np.float64)
    )


def compute_calibration_error(label: np.ndarray, probability: np.ndarray) -> tuple[float, str]:
    """Compute the expected calibration error over bins of equal number, and describe the binning.

    It is the mean over studies of |mean probability - share of abnormal studies| of the study's bin (Naeini et al. 2015).
    """
    bins = bin_by_quantile(label, probability)
    error = float((bins.num * np.abs(bins.probability - bins.share)).sum() / len(label))
    return error, f"{len(bins.num)} bins of equal number of studies"


def compute_calibration_intercept(
    label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Compute calibration in the large: a of P(abnormal) = sigmoid(a + logit), by maximum likelihood (Cox 1958).

    0 is calibrated. Above 0 the probabilities are too low.
    """
    weights = np.ones((1, len(label))) if weight is None else weight
    positive = weights @ label
    with np.errstate(invalid="ignore", divide="ignore"):
        log_odds = np.log(positive) - np.log(weights.sum(axis=1) - positive)  # of the share of abnormal studies
    intercept = np.full(len(weights), np.nan)
    both = np.isfinite(log_odds)
    if both.any():
        intercept[both] = _solve_intercept(positive[both], logits, weights[both], log_odds[both])
    return intercept[0] if weight is None else intercept


def _solve_intercept(positive: np.ndarray, x: np.ndarray, weights: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """Solve sum(weight x sigmoid(a + x)) = positive (R,) for a (R,).

    The root is between the solutions for all x equal to the largest and to the smallest. Newton's method; a bisection replaces
    a step that leaves that bracket.
    """
    low, high = log_odds - x.max(), log_odds - x.min()
    root = np.clip(log_odds - weights.mean(axis=0) @ x / weights.mean(axis=0).sum(), low, high)
    for _ in range(200):
        p = _fast_sigmoid(root[:, None] + x)
        excess = (weights * p).sum(axis=1) - positive
        low, high = np.where(excess <= 0, root, low), np.where(excess >= 0, root, high)
        step = excess / np.maximum((weights * p * (1 - p)).sum(axis=1), 1e-300)
        updated = root - step
        updated = np.where((updated >= low) & (updated <= high), updated, (low + high) / 2)
        largest_step, root = np.abs(updated - root).max(), updated
        if largest_step < _CONVERGED:
            break
    return root


def compute_calibration_slope(label: np.ndarray, logits: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Compute b of P(abnormal) = sigmoid(a + b logit), by maximum likelihood (Cox 1958).

    1 is calibrated. Below 1 the probabilities are too extreme. NaN where the logits separate the labels (b is infinite then),
    or are all equal.
    """
    weights = np.ones((1, len(label))) if weight is None else weight
    slope = np.full(len(weights), np.nan)
    overlap = ~_are_separated(label, logits, weights)
    if overlap.any():
        slope[overlap] = fit_logistic(label, logits, weights[overlap])[1]
    return slope[0] if weight is None else slope


def _are_separated(label: np.ndarray, logits: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return whether the logits of the two labels share at most one value: bool (R,)."""
    ends = {}
    for value in (0, 1):
        mask = (weights > 0) & (label == value)
        ends[value] = np.where(mask, logits, np.inf).min(axis=1), np.where(mask, logits, -np.inf).max(axis=1)
    return (ends[0][1] <= ends[1][0]) | (ends[1][1] <= ends[0][0])


def fit_logistic(target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit sigmoid(a + b x) by maximum likelihood, with Newton's method.

    Args:
        target: 0 to 1, (n,).
        x: (n,).
        weights: (R, n). A maximum must exist: the x of the two labels overlap.

    Returns:
        a, b, (R,) each.
    """
    # A resample's fit is near the fit of the mean weights: from there a few plain Newton steps suffice, if they converge.
    start = _fit_with_line_search(target, x, weights.mean(axis=0, keepdims=True))
    parameters = np.repeat(start, len(weights), axis=0)
    for _ in range(8):
        step = _newton_step(parameters, target, x, weights)
        parameters = parameters + np.clip(step, -10, 10)
        unfinished = ~(np.abs(step).max(axis=1) < _CONVERGED)
        if not unfinished.any():
            break
    if unfinished.any():
        parameters[unfinished] = _fit_with_line_search(target, x, weights[unfinished])
    return parameters[:, 0], parameters[:, 1]


def _fit_with_line_search(target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the same fit, (R, 2): each Newton step is halved until the likelihood does not fall."""
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
        step[worse] = 0  # the precision of float64 is reached
        parameters, best = parameters + step, np.maximum(value, best)
        if np.abs(step).max() < _CONVERGED:
            break
    return parameters


def _log_likelihood(parameters: np.ndarray, target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the log likelihood, (R,)."""
    z = parameters[:, :1] + parameters[:, 1:] * x  # (R, n)
    return (weights * (target * z - np.logaddexp(0, z))).sum(axis=1)


def _newton_step(parameters: np.ndarray, target: np.ndarray, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the Newton step of the log likelihood, (R, 2)."""
    p = _fast_sigmoid(parameters[:, :1] + parameters[:, 1:] * x)
    powers = np.stack([np.ones_like(x), x, x * x], axis=1)
    weighted_p = weights * p
    h00, h01, h11 = (weighted_p @ powers - (weighted_p * p) @ powers).T  # of weight p (1 - p)
    g0, g1 = (weights @ (target[:, None] * powers[:, :2]) - weighted_p @ powers[:, :2]).T
    determinant = np.maximum(h00 * h11 - h01**2, 1e-300)
    return np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=1) / determinant[:, None]


def _fast_sigmoid(z: np.ndarray) -> np.ndarray:
    """Return the sigmoid: three times as fast as `sigmoid`, but less exact where the result is near 1e-16 or below."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))
