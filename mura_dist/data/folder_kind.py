"""Detect which commands wrote an output folder, by the files of train, predict and evaluate.

    folder -> find_output_kinds -> {kind: file that proves it}, or {}; a run evaluated in place has two kinds

Commands check this before they write, and refuse to overwrite another command's results.
"""

from pathlib import Path
from typing import Literal

OutputKind = Literal["run", "prediction", "evaluation"]

RECIPE = "recipe.toml"
PREDICT_PLAN, PREDICT_SUMMARY = ".parts/plan.json", "predict.json"

MARKERS: dict[OutputKind, tuple[str, ...]] = {
    "run": (RECIPE,),
    "prediction": (PREDICT_SUMMARY, PREDICT_PLAN),  # finished, begun
    "evaluation": ("predictions.csv",),  # of evaluate; score writes none
}


def find_output_kinds(folder: Path) -> dict[OutputKind, str]:
    """Return the kinds of output in a folder, in the order of MARKERS, each with the first of its files that exists."""
    files = {kind: next((name for name in names if (folder / name).is_file()), None) for kind, names in MARKERS.items()}
    return {kind: name for kind, name in files.items() if name is not None}
