"""Write the gallery of an evaluation: radiographs, their maps, and how stable the maps are. LOCAL ONLY, apart from the report.

    studies -> gallery_studies: choose_studies, read_study -> gallery_picture -> gallery/*.png, one per study
                                                           -> gallery_page    -> gallery.html, gallery/page-2.html, ...
    radiographs, a seeded sample -> saliency.compute_stability ----------------> the pages, gallery.json (last)

All maps of all galleries use one scale of logits (heatmap.py), so that two maps can be compared.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core import files
from mura_dist.data import mura
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import gallery_page, saliency
from mura_dist.evaluation.gallery_picture import draw_picture
from mura_dist.evaluation.gallery_studies import (
    KIND_STREAMS,
    GalleryStudy,
    choose_studies,
    read_pixels,
    read_study,
    shuffle_rows,
)
from mura_dist.evaluation.subject import EvaluationSubject, GalleryOptions
from mura_dist.reports import heatmap, local_only

_GALLERY_FILES = re.compile(
    rf"(?:{'|'.join(KIND_STREAMS)})-\d+\.png|page-\d+\.html"
)  # the files that `write` puts into the folder


def write(
    out: Path,
    shards: Shards,
    studies: pd.DataFrame,
    rows: np.ndarray,
    *,
    subject: EvaluationSubject,
    options: GalleryOptions,
    metrics: Mapping[str, Any],
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `out`/gallery.html, its further pages, gallery/*.png and gallery.json in place of earlier ones.

    Args:
        out: the folder.
        shards: hold the radiographs.
        studies: as classification.build_study_table returns it, with `call`.
        rows: the evaluated radiographs, int64 (n,).
        subject: the model.
        options: what to show.
        metrics: the content of metrics.json, of which split, threshold and note are shown.
        log: called with a line on what was written.

    Returns:
        The content of gallery.json.
    """
    clear(out)
    started = time.perf_counter()
    chosen = choose_studies(studies, options.num_studies, options.seed)
    selection = [
        read_study(shards, dict(studies.loc[index]), rows, name, call, subject.forward) for name, index, call in chosen
    ]
    numbers = measure_stability(subject, shards, rows, options)
    for study in selection:
        files.write_bytes(out / "gallery" / f"{study.name}.png", local_only.png(draw_picture(study)))
    content = _content(selection, numbers, shards, subject, options, metrics)
    for number, text in enumerate(gallery_page.render_pages(selection, content), start=1):
        files.write_text(out / gallery_page.page_path(number), text)
    content["seconds"] = round(time.perf_counter() - started, 1)
    files.write_json(out / "gallery.json", content)
    log(
        f"gallery ({local_only.MARK}): {len(selection)} studies, maps of {numbers['num_sampled']} radiographs, "
        f"{content['seconds']} s"
    )
    return content


def paths(out: Path) -> tuple[Path, Path, Path]:
    """Return what `write` creates: the numbers, the first page, and the folder of pictures and further pages."""
    return out / "gallery.json", out / "gallery.html", out / "gallery"


def clear(out: Path) -> None:
    """Delete what `write` created, and nothing else in those places."""
    for path in list_files(out):
        path.unlink(missing_ok=True)
    *_, folder = paths(out)
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        shutil.rmtree(folder)


def list_files(out: Path) -> list[Path]:
    """Return the existing files that `write` created."""
    *single, folder = paths(out)
    entries = sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []
    pictures = [path for path in entries if _GALLERY_FILES.fullmatch(path.name)]
    return [path for path in single if os.path.lexists(path)] + pictures


# ---- gallery.json


def measure_stability(
    subject: EvaluationSubject, shards: Shards, rows: np.ndarray, options: GalleryOptions
) -> dict[str, Any]:
    """Measure the stability of the maps of a seeded sample of `rows`, see saliency.py."""
    sample = [
        (row, pixels)
        for row in np.sort(shuffle_rows(rows, options.seed, len(KIND_STREAMS))[: options.num_sampled]).tolist()
        if (pixels := read_pixels(shards, row)) is not None
    ]
    images = np.stack([pixels for _, pixels in sample])  # (n, S, S)
    patients = shards.manifest.frame.loc[[row for row, _ in sample], "patient"].tolist()
    _, cells = saliency.compute_maps(subject.forward, images)
    stability = saliency.compute_stability(subject.forward, images, cells, patients, options.seed)
    return {
        "num_sampled": len(sample),
        "num_cells": list(cells.shape[1:]),
        "stability": {"note": describe_stability_bias(subject.settings), "correlation": saliency.CORRELATION_TEXT}
        | stability,
    }


def describe_stability_bias(settings: dict[str, Any]) -> str:
    """Describe how the training's augmentation biases the stability."""
    flip, rotate_deg = settings.get("flip"), settings.get("rotate_deg")
    in_settings = isinstance(flip, bool) and isinstance(rotate_deg, int | float)
    if not in_settings or (flip and rotate_deg):
        return "optimistic: the model was trained on both"
    if flip or rotate_deg:
        return f"optimistic: the model was trained on {'mirrored' if flip else 'rotated'} radiographs"
    return "the model was trained on neither"


def _content(
    studies: Sequence[GalleryStudy],
    numbers: dict[str, Any],
    shards: Shards,
    subject: EvaluationSubject,
    options: GalleryOptions,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of gallery.json: JSON values, and no path except a study's key."""
    h, w = numbers["num_cells"]
    return {
        "what": local_only.WHY,
        "title": subject.title,
        "checkpoint": subject.checkpoint,
        "model": subject.name,
        "num_networks": max(1, len(subject.members)),
        "split": metrics.get("split"),
        "threshold": metrics.get("threshold"),
        "trained_on": subject.trained_on,
        "measured_on": shards.trained_on,
        "note": metrics.get("note"),
        "seed": options.seed,
        "scale": {
            "edges_logit": list(heatmap.EDGES),
            "of": "a cell's logit, on either side of 0; the same for all maps",
        },
        "map": {
            "cells": [h, w],
            "cell_px": [shards.size / h, shards.size / w],
            "caveat": map_caveat(h, w, shards.size),
        },
        "num_sampled": numbers["num_sampled"],
        "stability": numbers["stability"],
        "studies": [_study_entry(study) for study in studies],
        "terms": mura.TERMS,
        "licence": mura.LICENSE,
    }


def _study_entry(study: GalleryStudy) -> dict[str, Any]:
    return {
        "file": f"gallery/{study.name}.png",
        "kind": study.kind,
        "study": study.study,
        "study_type": study.study_type,
        "label": study.label,
        "call": study.call,
        "probability": study.probability,
        "views": [{"view": view.number, "logit": view.logit, "probability": view.probability} for view in study.views],
        "num_damaged": study.num_corrupt,
    }


def map_caveat(h: int, w: int, size: int) -> str:
    """Return the caveat about maps of h x w cells of radiographs of `size` pixels a side."""
    return (
        f"A class activation map has {h} x {w} cells here, each of {size / h:g} x {size / w:g} pixels: it does not outline a "
        "lesion. On MURA such maps were measured to localize poorly: AUPRC 0.44 to 0.59, where radiologists reach 0.82. "
        "A colored cell changed this model's output. The cause may be metal, plaster or a marker next to the bone."
    )
