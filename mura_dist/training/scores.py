"""Hold the logits of rows, and compute the probabilities of their studies. No torch.

rows, logits -> Scores -> study_scores -> a table with one line per study
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mura_dist.data.shards.reader import Shards
from mura_dist.metrics import classification


@dataclass(frozen=True)
class Scores:
    """The logits of a model.

    Attributes:
        rows: Rows with a valid sample, int64 (n,).
        logit: Their logits, float32 (n,).
        corrupt: Rows whose sample is corrupt, int64.
    """

    rows: np.ndarray
    logit: np.ndarray
    corrupt: np.ndarray

    @classmethod
    def from_split(cls, rows: np.ndarray, logit: np.ndarray, valid: np.ndarray) -> "Scores":
        """Return the scores of all rows of a split. `valid`: bool (n,), False if the sample is corrupt."""
        return cls(rows[valid], logit[valid], rows[~valid])

    def select_rows(self, rows: np.ndarray) -> "Scores":
        """Return the scores of some rows only."""
        is_selected = np.isin(self.rows, rows)
        return Scores(self.rows[is_selected], self.logit[is_selected], self.corrupt[np.isin(self.corrupt, rows)])


def study_scores(shards: Shards, scores: Scores) -> pd.DataFrame:
    """Return a table with one line per study: the mean probability over its views, see `classification.build_study_table`."""
    return classification.build_study_table(scores.rows, classification.sigmoid(scores.logit), shards.manifest.frame)
