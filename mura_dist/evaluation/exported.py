"""Evaluate an ONNX file.

    ONNX file, folder of shards -> inference's Model, Shards -> evaluate.evaluate_scores -> what an evaluation writes

Nothing is fitted: calibration and thresholds are those of the card.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mura_dist.core.errors import Refusal
from mura_dist.core.storage import Where
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import saliency
from mura_dist.evaluation.evaluate import Asked, evaluate_scores
from mura_dist.inference.onnx_model import Model
from mura_dist.models.target import Target


def evaluate_onnx(
    target: Target,
    shards_folder: Where,
    *,
    split: str,
    out: Path,
    asked: Asked,
    provider: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate an exported model on a split; writes into `out` and returns metrics.json's content."""
    path = target.path
    shards, model = Shards.open(shards_folder), Model.load(path, provider)
    if shards.size != model.size:
        raise Refusal(
            f"{shards_folder} has radiographs of {shards.size} px, {path} wants {model.size}; "
            f"convert with --size {model.size}"
        )
    card = model.card
    facts = {
        "title": f"{path.name} on {split}",
        "checkpoint": card.checkpoint,
        "members": [member.model_dump() for member in card.members],
        "selected_on": card.selected_on,
        "trained_on": card.trained_on.kind,
        "settings": card.recipe,
    }
    name = f"{path.name} {card.checkpoint}"
    return evaluate_scores(
        target,
        model.logits,
        shards,
        split=split,
        out=out,
        facts=facts,
        points=card.calibration,
        asked=replace(asked, operating_point=asked.operating_point or card.operating_point),
        shown=saliency.CamModel(name, model.outputs, card.trained_on.kind, max(1, len(card.members))),
        say=say,
    )
