"""How good calls and probabilities are: arrays in, numbers out. NumPy and pandas only.

    rows, probabilities -> study_table (mean over a study's views) -> kappa, auroc ...      intervals.py: how sure they are
                                                                                            measure.py: metrics.json

A confusion is float64 (..., 4): tn, fp, fn, tp. Labels: 1 positive (abnormal), 0 negative (normal).
"""

import numpy as np
import pandas as pd

CELLS = ("tn", "fp", "fn", "tp")


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
    observed, chance = agreement(confusion)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (observed - chance) / (1 - chance)


def agreement(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Observed and chance agreement, (...) each."""
    tn, fp, fn, tp = np.moveaxis(np.asarray(confusion, dtype=np.float64), -1, 0)
    n = tn + fp + fn + tp
    with np.errstate(invalid="ignore", divide="ignore"):
        return (tn + tp) / n, ((tn + fp) * (tn + fn) + (fn + tp) * (fp + tp)) / n**2


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
