"""predict.json: what a prediction counted, what to be warned of, which model and versions computed it, and the terms.

tables.Tally, the model, the counts of overlays -> summarize -> standard JSON values
"""

import platform
from typing import Any

import numpy as np
import pandas as pd
import PIL

from mura_dist import __version__
from mura_dist.data import gate, mura
from mura_dist.inference import overlays
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.tables import TableCounts
from mura_dist.metrics.operating_points import BAND_VALUES
from mura_dist.models.card import Card


def summarize(
    tally: TableCounts, model: OnnxModel, num_overlays: dict[str, int], warnings: list[str], seconds: float
) -> dict[str, Any]:
    """Put predict.json together, but for the plan. `seconds` are those of the last command; `warnings` come first."""
    card, num_failures = model.card, tally.failures_by_code.total()
    return {
        "num_files": tally.num_radiographs + num_failures,
        "num_radiographs": tally.num_radiographs,
        "num_studies": tally.num_studies,
        "num_calls": tally.num_calls,
        "num_positive": tally.num_positive,
        "num_calibrated": tally.num_calibrated,
        "studies_by_band": {name: tally.studies_by_band[name] for name in BAND_VALUES},
        "num_failures": num_failures,
        "failures_by_code": dict(sorted(tally.failures_by_code.items())),
        "radiographs_by_gate": {name: tally.radiographs_by_gate[name] for name in gate.NAMES},
        "radiographs_by_note": dict(sorted(tally.radiographs_by_note.items())),
        **num_overlays,
        "studies_by_type": dict(sorted(tally.studies_by_type.items())),
        "warnings": [
            *warnings,
            *overlays.withheld_warnings(num_overlays["num_overlays_withheld"]),
            *_warnings(tally, card),
        ],
        "seconds": round(seconds, 3),
        "model": {
            "sha256": model.sha256,
            "size": card.size,
            "trained_on": card.trained_on.model_dump(mode="json"),
            "selected_on": card.selected_on,
            "checkpoint": card.checkpoint,
            "version": card.version,
        },
        "provider": model.provider,
        "versions": {
            "mura_dist": __version__,
            "python": platform.python_version(),
            "engine": model.engine.version,
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "pillow": PIL.__version__,
        },
        "terms": mura.TERMS,
        "licence": card.licence,
    }


def _warnings(tally: TableCounts, card: Card) -> list[str]:
    warnings = []
    if card.of_drawings:
        warnings.append(
            "the model was trained on drawings (phantoms): what it says of a radiograph means nothing; no call, no band"
        )
    for study_type, number in sorted(tally.unevaluated_by_type.items()):
        warnings.append(f"no threshold was evaluated for study type {study_type}: no call for {number} of its studies")
    if card.calibration.reason is not None:
        warnings.append(f"no calibrated probability, no uncertain band: {card.calibration.reason}")
    for name in gate.NAMES:
        if name in gate.MESSAGES and (number := tally.radiographs_by_gate[name]):
            many = f"{number} of {tally.num_radiographs} radiographs"
            warnings.append(f"column gate of predictions says {name} of {many}: {gate.MESSAGES[name]}")
    return warnings
