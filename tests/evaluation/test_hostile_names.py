"""Test that names of runs, models, patients and files are shown as text in reports and galleries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.markup import check_names_are_text, renamed_shards

from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import results
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, GalleryOptions, SplitScores
from mura_dist.metrics.operating_points import FittedThresholds
from mura_dist.training.scores import Scores


def forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and maps of 4 x 4 cells for images of 64 px."""
    cells = (images[:, 0].astype(np.float64).reshape(-1, 4, 16, 4, 16).mean(axis=(2, 4)) - 60) / 4
    return cells.mean(axis=(1, 2)), cells


def subject(rename: Callable[[str], str]) -> EvaluationSubject:
    """Return a model, with two ensemble members, whose texts are all renamed."""
    member: dict[str, Any] = {
        "checkpoint": rename("step-1"),
        "architecture": rename("tiny"),
        "select_loss": 0.5,
        "sha256": rename("a"),
    }
    return EvaluationSubject(
        title=rename("title"),
        name=rename("name"),
        forward=forward,
        checkpoint=rename("step-1"),
        trained_on=rename("radiographs"),
        selected_on=rename("tune"),
        settings={"seed": 3, rename("key"): rename("value"), "pretrained": rename("x.pth"), "list": [rename("one")]},
        members=[{"run": rename("a"), **member}, {"run": rename("b"), **member}],
        weights_sha256=[rename("0")],
        history=[
            {"kind": "step", "step": 10, "epoch": 0, "loss": 0.9, "learning_rate": 1e-3, rename("more"): rename("text")}
        ],
    )


@pytest.mark.slow
def test_names_are_escaped_in_report_and_gallery(shard_folder: Path, tmp_path: Path) -> None:
    def write(rename: Callable[[str], str], out: Path) -> list[Path]:
        shards = Shards.open(renamed_shards(shard_folder, out / "shards", rename))
        rows = shards.rows("train")
        logit = forward(np.stack([shards.read_pixels(row) for row in rows])[:, None])[0]
        scores = SplitScores(Scores(rows, logit, np.array([], np.int64)), FittedThresholds(), 1.0)
        options = EvaluateOptions(out, "train", gallery=GalleryOptions(num_studies=8, num_sampled=8))
        results.write(shards, subject(rename), scores, options)
        return [out / "report.html", out / "gallery.html", *sorted((out / "pictures").glob("*.svg"))]

    check_names_are_text(write, tmp_path)
