"""The tables of a prediction run: a line a radiograph, a line a study, a line a failure.

    rows of the parts -> predictions, failures -> studies: probabilities averaged over views, calls -> csv or parquet

Cells that are empty here (gate, calibrated_probability, band) are the contract's, for what the card does not hold yet.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import atomic, metrics, walk
from .card import Card

NAMES = ("predictions", "studies", "failures")
FORMATS = ("csv", "parquet")


def build(parts: list[dict[str, Any]], card: Card) -> dict[str, pd.DataFrame]:
    """The three tables, by name.

    parts: {"predictions": [[path, study, study_type, logit], ...], "failures": [[path, code, reason], ...]} each.
    """
    rows = [row for part in parts for row in part["predictions"]]
    views = pd.DataFrame(rows, columns=["path", "study", "study_type", "logit"])
    views[["path", "study", "study_type"]] = views[["path", "study", "study_type"]].astype("string")
    views["logit"] = views["logit"].astype(np.float32)
    views["probability"] = metrics.sigmoid(views["logit"].to_numpy())
    views["gate"] = pd.Series(pd.NA, index=views.index, dtype="string")
    rows = [row for part in parts for row in part["failures"]]
    failures = pd.DataFrame(rows, columns=["path", "code", "reason"], dtype="string")
    return {"predictions": views, "studies": _studies(views, card), "failures": failures}


def _studies(views: pd.DataFrame, card: Card) -> pd.DataFrame:
    """A line a study, in the order of its first view. Views that disagree on the study type leave it unknown."""
    groups = views.groupby("study", sort=False)
    types = groups["study_type"]
    studies = pd.DataFrame(
        {
            "study_type": types.first().where(types.nunique() == 1, walk.UNKNOWN),
            "num_views": groups.size(),
            "probability": groups["probability"].mean(),
        }
    ).reset_index()
    thresholds = {key: float(value) for key, value in card.thresholds.items()}
    studies["calibrated_probability"] = np.full(len(studies), np.nan)
    studies["threshold"] = studies["study_type"].map(thresholds).astype(np.float64)
    called = (studies["probability"] > studies["threshold"]).astype("Int64")
    studies["call"] = called.where(studies["threshold"].notna())
    studies["band"] = pd.Series(pd.NA, index=studies.index, dtype="string")
    return studies


def write(path: Path, table: pd.DataFrame) -> None:
    """`table` as CSV or Parquet, by the suffix of `path`."""
    with atomic.replacing(path) as file:
        if path.suffix == ".parquet":
            table.to_parquet(file, index=False)
            return
        # The csv module leaves a bare carriage return unquoted, most readers end a line there: then quote all text.
        returns = any("\r" in text for column in ("path", "study") if column in table for text in table[column])
        table.to_csv(
            file,
            index=False,
            lineterminator="\n",
            encoding="utf-8",
            quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL,
        )
