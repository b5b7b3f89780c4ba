"""Measure the time of an evaluation's metrics on a synthetic validation set of MURA's size.

python tools/bench/measure.py [--rounds 5] [--resamples 2000]

Each round times `measure` (every metric, overall, by study type, macro mean), `subgroups`, `compare`, and a loop over the
resamples with scikit-learn's kappa and AUROC, overall only. It prints the median seconds, with minimum and maximum. All run
in one process.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from mura_dist.data import mura
from mura_dist.metrics import classification
from mura_dist.metrics.comparison import compare_predictions
from mura_dist.metrics.summary import compute_metrics, compute_subgroup_metrics


def validation_set(seed: int = 0) -> pd.DataFrame:
    """Return 1,199 studies of 783 patients with the counts of MURA v1.1. Their random scores have a kappa of about 0.65."""
    rng = np.random.default_rng(seed)
    pairs = [
        (name, label)
        for name, counts in mura.STUDIES_V1_1["valid"].items()
        for label in (0, 1)
        for _ in range(counts[label])
    ]
    frame = pd.DataFrame(pairs, columns=["study_type", "label"])
    patients = np.concatenate([np.arange(783), rng.integers(0, 783, len(frame) - 783)])
    logits = 2.6 * frame["label"] - 1.4 + rng.normal(0, 1.5, len(frame))
    return frame.assign(
        study=[f"study{index}" for index in range(len(frame))],
        patient=[f"patient{index:05}" for index in rng.permutation(patients)],
        probability=classification.sigmoid(logits.to_numpy()),
        calibrated_probability=classification.sigmoid(0.9 * logits.to_numpy()),
        num_views=rng.integers(1, 6, len(frame)),
        exposure=rng.normal(60, 20, len(frame)),
    )


def bootstrap_loop(studies: pd.DataFrame, resamples: int) -> None:
    """Bootstrap over patients, with kappa and AUROC of each resample by scikit-learn."""
    rng = np.random.default_rng(0)
    rows_of_patient = list(studies.groupby("patient").indices.values())
    label, probability = studies["label"].to_numpy(), studies["probability"].to_numpy()
    for _ in range(resamples):
        drawn = np.concatenate(
            [rows_of_patient[index] for index in rng.integers(0, len(rows_of_patient), len(rows_of_patient))]
        )
        cohen_kappa_score(label[drawn], probability[drawn] > 0.5)
        roc_auc_score(label[drawn], probability[drawn])


def main() -> None:
    """Time each call in turn and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args()
    studies, second_studies = validation_set(), validation_set(1)
    second_studies = second_studies.assign(label=studies["label"], patient=studies["patient"])
    calls: dict[str, Callable[[], object]] = {
        "measure": lambda: compute_metrics(studies, resamples=options.resamples, prevalence=0.1),
        "subgroups": lambda: compute_subgroup_metrics(studies, resamples=options.resamples),
        "compare": lambda: compare_predictions(studies, second_studies, resamples=options.resamples),
        "scikit-learn, kappa and AUROC, overall": lambda: bootstrap_loop(studies, options.resamples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    print(
        f"{len(studies)} studies of {studies['patient'].nunique()} patients, {options.resamples} resamples, "
        f"{options.rounds} rounds"
    )
    for name, times_s in seconds.items():
        print(f"{name:<40} {statistics.median(times_s):6.2f} s ({min(times_s):.2f} to {max(times_s):.2f})")


if __name__ == "__main__":
    main()
