"""Hold the logits of some rows, and compute the probabilities of their studies. No torch.

rows, logits -> Scores -> study_scores -> a table with one line a study
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mura_dist.data.shards.reader import Shards
from mura_dist.metrics import classification


@dataclass(frozen=True)
class Scores:
    """What a model says of some rows: `rows` int64 (n,), `logit` float32 (n,), and the rows whose samples are corrupt, int64."""

    rows: np.ndarray
    logit: np.ndarray
    corrupt: np.ndarray

    @classmethod
    def from_split(cls, rows: np.ndarray, logit: np.ndarray, sound: np.ndarray) -> "Scores":
        """Return the scores of all rows of a split. `sound`: bool (n,), False where the sample is corrupt."""
        return cls(rows[sound], logit[sound], rows[~sound])

    def select_rows(self, rows: np.ndarray) -> "Scores":
        """Return the scores of some rows only."""
        there = np.isin(self.rows, rows)
        return Scores(self.rows[there], self.logit[there], self.corrupt[np.isin(self.corrupt, rows)])


def study_scores(shards: Shards, scores: Scores) -> pd.DataFrame:
    """Return a line a study: the mean probability over its views, as `classification.build_study_table` has it."""
    return classification.build_study_table(scores.rows, classification.sigmoid(scores.logit), shards.manifest.frame)
