"""How long an evaluation's numbers take: MURA's validation set drawn by its counts, 2,000 resamples of patients.

python tools/bench/measure.py [--rounds 5] [--resamples 2000]

In turn: `measure` (every number, overall, by study type, macro mean), `subgroups`, `compare`; and what one would write
instead: a loop over resamples with scikit-learn's kappa and AUROC alone, overall alone. One process, seconds of each round.
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
    """1,199 studies of 783 patients, by study type and label as MURA v1.1 has them; scores of kappa about 0.65."""
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
        study=[f"study{place}" for place in range(len(frame))],
        patient=[f"patient{place:05}" for place in rng.permutation(patients)],
        probability=classification.sigmoid(logits.to_numpy()),
        calibrated_probability=classification.sigmoid(0.9 * logits.to_numpy()),
        num_views=rng.integers(1, 6, len(frame)),
        exposure=rng.normal(60, 20, len(frame)),
    )


def loop(studies: pd.DataFrame, resamples: int) -> None:
    """What one would write: whole patients drawn, two numbers measured."""
    rng = np.random.default_rng(0)
    places = list(studies.groupby("patient").indices.values())
    label, probability = studies["label"].to_numpy(), studies["probability"].to_numpy()
    for _ in range(resamples):
        drawn = np.concatenate([places[place] for place in rng.integers(0, len(places), len(places))])
        cohen_kappa_score(label[drawn], probability[drawn] > 0.5)
        roc_auc_score(label[drawn], probability[drawn])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args()
    studies, other = validation_set(), validation_set(1)
    other = other.assign(label=studies["label"], patient=studies["patient"])
    works: dict[str, Callable[[], object]] = {
        "measure": lambda: compute_metrics(studies, resamples=options.resamples, prevalence=0.1),
        "subgroups": lambda: compute_subgroup_metrics(studies, resamples=options.resamples),
        "compare": lambda: compare_predictions(studies, other, resamples=options.resamples),
        "scikit-learn, kappa and AUROC, overall": lambda: loop(studies, options.resamples),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    print(
        f"{len(studies)} studies of {studies['patient'].nunique()} patients, {options.resamples} resamples, "
        f"{options.rounds} rounds"
    )
    for name, taken in seconds.items():
        print(f"{name:<40} {statistics.median(taken):6.2f} s ({min(taken):.2f} to {max(taken):.2f})")


if __name__ == "__main__":
    main()
