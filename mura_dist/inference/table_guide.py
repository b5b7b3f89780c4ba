"""What the columns of predict's tables mean, in the order that the tables have them: the text of OUT/README.txt.

The table of docs/prediction.md is tested against it. Columns keep their names and their order; new ones come last.
"""

import textwrap

from mura_dist.data import gate, mura
from mura_dist.models.card import Card

PREDICTIONS = {
    "path": "the file, relative to the folder given (of several paths: to the deepest folder that holds all); or its pseudonym",
    "study": "the study it belongs to, as in `studies`",
    "study_type": "which bones it shows, or `unknown`",
    "logit": "the model's output: log odds of abnormal, before any calibration",
    "probability": "sigmoid of the logit, 6 significant digits",
    "gate": f"what the model saw looks like: {', '.join(gate.NAMES)}",
}
STUDIES = {
    "study": "the study: its folder, its file, a DICOM study's pseudonym; or a pseudonym of these",
    "study_type": "that of its views; `unknown` where they differ or nothing tells",
    "num_views": "how many radiographs it has in `predictions`",
    "probability": "mean of its views' probabilities, 6 significant digits, more next to a threshold",
    "calibrated_probability": "the same, calibrated on the tune split; empty where no calibration was fitted",
    "threshold": "the study is called where `probability` lies above it, strictly; empty where none was evaluated",
    "call": "1: abnormal, 0: not flagged; empty where there is no threshold, or the model is of drawings",
    "band": "negative, uncertain or positive; empty where none was fitted, or the model is of drawings",
    "gate": "the worst of its views: " + ", ".join(gate.NAMES) + " (worst last)",
    "trained_on": "what the model was trained on: radiographs, or phantoms (drawings)",
}
FAILURES = {
    "path": "the file, or a folder that could not be listed; or its pseudonym",
    "code": "the kind of failure, for programs",
    "reason": "the same in words",
}
TABLES = {"predictions": PREDICTIONS, "studies": STUDIES, "failures": FAILURES}
LINES = {
    "predictions": "a line a radiograph",
    "studies": "a line a study",
    "failures": "a line a file without prediction",
}

DRAWINGS = (
    "THIS MODEL WAS TRAINED ON DRAWINGS (phantoms). No call, no band. What it says of a radiograph means nothing."
)
USES = (
    "To sort studies into flagged and not flagged: `call` of studies. Where it is empty, predict.json says why (`warnings`); "
    "no 0.5 stands in for a threshold.",
    "To see which studies the model is unsure of: `band` of studies.",
    "To read a number as a probability: `calibrated_probability` of studies. It holds for studies like those it was fitted to.",
    "To rank studies, or to cut at a threshold of your own: `probability` of studies.",
    "To find what the model should not be asked about: `gate`. Look at what is not ok before you use its line.",
    "To see what is missing: failures. Every file is in predictions or there.",
)
SHORT = (
    "A probability of studies has 6 significant digits, and more only where 6 would move it across its threshold, an end of its "
    "band or 0.5. Its call and its band were made before it was shortened."
)
FORMULAS = (
    "A path, study or study type that a spreadsheet would take for a formula (it begins with = + - @, a tab or a line end) has a "
    "leading ./ here: the same file."
)
_WIDTH = 120


def readme(card: Card, format: str) -> str:
    """Return the text of OUT/README.txt for tables of `format` (csv or parquet). It names no file and no study."""
    drawings = [DRAWINGS, ""] if card.of_drawings else []
    text = ["Tables of mura-dist predict.", *textwrap.wrap(mura.TERMS, _WIDTH), "", *drawings, "Which column for what:"]
    for use in USES:
        text += textwrap.wrap(use, _WIDTH, initial_indent="- ", subsequent_indent="  ")
    for table, columns in TABLES.items():
        text += ["", f"{table}.{format}: {LINES[table]}"]
        width = max(map(len, columns))
        text += [f"  {column:{width}}  {meaning}" for column, meaning in columns.items()]
    for note in (SHORT, FORMULAS) if format == "csv" else (SHORT,):
        text += ["", *textwrap.wrap(note, _WIDTH)]
    text += [
        "",
        "predict.json: counts, warnings, the model and its versions. It is written last; without it the run is not finished.",
    ]
    return "\n".join(text) + "\n"
