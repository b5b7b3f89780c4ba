"""The meaning of the columns of predict's tables, in their order: the text of OUT/README.txt.

A test compares docs/prediction.md with it. Columns keep their names and their order. New columns come last.
"""

import textwrap

from mura_dist.data import gate, mura
from mura_dist.models.card import Card

PREDICTIONS = {
    "path": "the file, relative to the input folder (several inputs: to the deepest folder with all of them), or its pseudonym",
    "study": "the study of the radiograph, as in `studies`",
    "study_type": "the body part, such as `XR_WRIST`, or `unknown`",
    "logit": "output of the model: log odds of abnormal, not calibrated",
    "probability": "sigmoid of the logit, 6 significant digits",
    "gate": f"what the image looks like to the model: {', '.join(gate.NAMES)}",
}
STUDIES = {
    "study": "the study: its folder, its file or the pseudonym of a DICOM study; or a pseudonym of these",
    "study_type": "study type of its views; `unknown` if they differ or none has one",
    "num_views": "number of its radiographs in `predictions`",
    "probability": "mean of its views' probabilities, 6 significant digits, more close to a threshold",
    "calibrated_probability": "the probability after calibration on the tune split; empty if no calibration was fitted",
    "threshold": "the study is called abnormal if `probability` is above it; empty if none was evaluated",
    "call": "1: abnormal, 0: not flagged; empty without a threshold, and for a model trained on drawings",
    "band": "negative, uncertain or positive; empty if none was fitted, and for a model trained on drawings",
    "gate": "worst value of its views: " + ", ".join(gate.NAMES) + " (worst last)",
    "trained_on": "training data of the model: radiographs, or phantoms (drawings)",
}
FAILURES = {
    "path": "the file, or a folder that could not be listed, or its pseudonym",
    "code": "kind of failure, for programs",
    "reason": "reason of the failure, for people",
}
TABLES = {"predictions": PREDICTIONS, "studies": STUDIES, "failures": FAILURES}
LINES = {
    "predictions": "one line per radiograph",
    "studies": "one line per study",
    "failures": "one line per file without a prediction",
}

DRAWINGS = "THIS MODEL WAS TRAINED ON DRAWINGS (phantoms). No call, no band. Its output for a radiograph means nothing."
USES = (
    "To sort studies into flagged and not flagged: `call` of studies. If it is empty, `warnings` of predict.json has the reason. "
    "No default of 0.5 replaces a missing threshold.",
    "To see which studies the model is unsure of: `band` of studies.",
    "To use a number as a probability: `calibrated_probability` of studies. It is valid for studies like those it was fitted to.",
    "To rank studies, or to apply a threshold of your own: `probability` of studies.",
    "To find images that the model was not trained for: `gate`. Look at an image that is not ok before you use its line.",
    "To see what is missing: failures. Every file is in predictions or in failures.",
)
SHORT = (
    "A probability of studies has 6 significant digits. It has more only if rounding would move it across its threshold, an end "
    "of its band or 0.5. The call and the band were computed before rounding."
)
FORMULAS = (
    "A path, study or study type that a spreadsheet would read as a formula (it begins with = + - @, a tab or a line end) has a "
    "leading ./ here. It is the same file."
)
_WIDTH = 120


def readme(card: Card, format: str) -> str:
    """Return the text of OUT/README.txt for tables of `format`, csv or parquet. It contains no name of a file or study."""
    drawings = [DRAWINGS, ""] if card.trained_on_phantoms else []
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
        "predict.json: counts, warnings, the model and versions. It is written last. Without it the prediction is incomplete.",
    ]
    return "\n".join(text) + "\n"
