"""What kind of output folder a folder is, by the files that train, predict and evaluate leave in it.

    folder -> find_output_kinds -> {kind: the file that shows it}, or {}: a run that was evaluated in place is of two kinds

A command asks before it writes, and refuses to write over another command's results.
"""

from pathlib import Path
from typing import Literal

Kind = Literal["run", "prediction", "evaluation"]

RECIPE = "recipe.toml"
PREDICT_PLAN, PREDICT_SUMMARY = ".parts/plan.json", "predict.json"

MARKERS: dict[Kind, tuple[str, ...]] = {
    "run": (RECIPE,),
    "prediction": (PREDICT_SUMMARY, PREDICT_PLAN),  # finished, begun
    "evaluation": ("predictions.csv",),  # of evaluate; score leaves none
}


def find_output_kinds(folder: Path) -> dict[Kind, str]:
    """Look for what each kind of output folder holds; returns the kinds found, each with its file, in the order of MARKERS."""
    files = {kind: next((name for name in names if (folder / name).is_file()), None) for kind, names in MARKERS.items()}
    return {kind: name for kind, name in files.items() if name is not None}
