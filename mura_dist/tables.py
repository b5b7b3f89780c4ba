"""The tables of a prediction run: a line a radiograph, a line a study, a line a failure.

    rows of the parts -> predictions, failures -> studies: probabilities averaged over views, calls -> csv or parquet

Thresholds, calibration and the uncertain band are the card's; where it has none for a study type, the cell is empty. So is
`gate`, which the contract names and nothing fills yet.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import atomic, calibration, metrics, walk
from .card import Card
from .points import STUDIES

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
    code, names = pd.factorize(views["study"])
    types = views["study_type"].groupby(code)
    studies = pd.DataFrame(
        {
            "study": names,
            "study_type": types.first().where(types.nunique() == 1, walk.UNKNOWN),
            "num_views": types.size(),
            "probability": metrics.study_mean(code, views["probability"].to_numpy()),
        }
    )
    studies = calibration.apply(card.calibration, studies)
    studies["threshold"] = studies["study_type"].map(dict(card.thresholds)).astype(np.float64)
    called = (studies["probability"] > studies["threshold"]).astype("Int64")
    studies["call"] = called.where(studies["threshold"].notna())
    band = studies["band"].astype("string")
    studies["band"] = band.where(band != "")
    return studies[list(STUDIES)]


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
