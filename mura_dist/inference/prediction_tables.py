"""Prediction of a directory from Python: the command's tables as pandas frames.

predict_directory(directory, model=..., out=...) -> PredictionTables
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from mura_dist.data import table_names
from mura_dist.inference import table_guide
from mura_dist.inference.predict import PredictOptions, Progress, predict

_INTEGERS, _FLOATS = ("num_views", "call"), ("logit", "probability", "calibrated_probability", "threshold")


@dataclass(frozen=True)
class PredictionTables:
    """The tables of a finished prediction. Each is read when it is first used.

    Attributes:
        out: Folder of the tables.
        format: csv or parquet.
        summary: Content of predict.json; None on ranks other than the first.
    """

    out: Path
    format: str
    summary: dict[str, Any] | None

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """One line per radiograph: path, study, study_type, logit, probability, gate."""
        return self._read("predictions")

    @cached_property
    def studies(self) -> pd.DataFrame:
        """One line per study: probability, calibrated_probability, threshold, call, band and more."""
        return self._read("studies")

    @cached_property
    def failures(self) -> pd.DataFrame:
        """One line per file that is no readable radiograph: path, code, reason."""
        return self._read("failures")

    def _read(self, table: str) -> pd.DataFrame:
        path = self.out / f"{table}.{self.format}"
        if self.format == "parquet":
            return pd.read_parquet(path)
        columns = table_guide.TABLES[table]
        types = {name: "Int64" if name in _INTEGERS else "float64" if name in _FLOATS else "string" for name in columns}
        empty = {name: [""] for name in columns if types[name] != "string"}  # a study called NA is no missing value
        frame = pd.read_csv(path, dtype=types, encoding="utf-8", keep_default_na=False, na_values=empty)
        for name in set(columns) & {"path", "study"}:
            frame[name] = frame[name].map(table_names.unescape).astype("string")
        if "band" in frame:
            frame["band"] = frame["band"].replace("", pd.NA)
        return frame


def predict_directory(
    directory: Path | str | Sequence[Path | str],
    *,
    model: Path | str,
    out: Path | str,
    log: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> PredictionTables:
    """Predict every radiograph below a directory into tables in `out`. The same call resumes.

    Args:
        directory: Folder, or several files and folders.
        model: The file that `mura-dist export` wrote.
        out: Folder to write predictions, studies and failures to.
        log: Called with each line of an autotune.
        progress: Called with the numbers of finished files and of all files.
        **options: Fields of `mura_dist.inference.predict.PredictOptions`, such as study_type, provider, format, workers.

    Returns:
        The three tables, read on first use, and the summary.

    Raises:
        UserError: an input, an option or the model is wrong.
        RunError: files could not be read for a fault of the disk, or a table could not be written.
        StopRequestedError: SIGINT or SIGTERM asked to stop. The same call resumes.
    """
    inputs = [directory] if isinstance(directory, Path | str) else list(directory)
    chosen = PredictOptions(**options)
    summary = predict(Path(model), inputs, Path(out), chosen, log=log, progress=progress)
    return PredictionTables(Path(out), chosen.format, summary)
