"""predict.json: counts, warnings, model, versions and terms of a prediction.

tables.TableCounts, the model, the counts of overlays -> summarize -> standard JSON values
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
    counts: TableCounts, model: OnnxModel, num_overlays: dict[str, int], warnings: list[str], seconds: float
) -> dict[str, Any]:
    """Return the content of predict.json without plan and throughput.

    Args:
        counts: What the tables hold.
        model: Model that predicted.
        num_overlays: As `overlays.overlay_counts` returns it.
        warnings: Warnings to put first.
        seconds: Wall-clock time of the last command.
    """
    card, num_failures = model.card, counts.failures_by_code.total()
    return {
        "num_files": counts.num_radiographs + num_failures,
        "num_radiographs": counts.num_radiographs,
        "num_studies": counts.num_studies,
        "num_calls": counts.num_calls,
        "num_positive": counts.num_positive,
        "num_calibrated": counts.num_calibrated,
        "studies_by_band": {name: counts.studies_by_band[name] for name in BAND_VALUES},
        "num_failures": num_failures,
        "failures_by_code": dict(sorted(counts.failures_by_code.items())),
        "radiographs_by_gate": {name: counts.radiographs_by_gate[name] for name in gate.NAMES},
        "radiographs_by_note": dict(sorted(counts.radiographs_by_note.items())),
        **num_overlays,
        "studies_by_type": dict(sorted(counts.studies_by_type.items())),
        "warnings": [
            *warnings,
            *overlays.withheld_warnings(num_overlays["num_overlays_withheld"]),
            *_warnings(counts, card),
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


def _warnings(counts: TableCounts, card: Card) -> list[str]:
    warnings = []
    if card.trained_on_phantoms:
        warnings.append(
            "the model was trained on drawings (phantoms): its output for a radiograph means nothing. No call, no band"
        )
    for study_type, number in sorted(counts.unevaluated_by_type.items()):
        warnings.append(f"no threshold was evaluated for study type {study_type}: no call for {number} of its studies")
    if card.calibration.reason is not None:
        warnings.append(f"no calibrated probability and no uncertain band: {card.calibration.reason}")
    for name in gate.NAMES:
        if name in gate.MESSAGES and (number := counts.radiographs_by_gate[name]):
            share = f"{number} of {counts.num_radiographs} radiographs"
            warnings.append(f"column gate of predictions is {name} for {share}: {gate.MESSAGES[name]}")
    return warnings
