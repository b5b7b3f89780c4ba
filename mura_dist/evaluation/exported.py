"""Evaluate an ONNX file in one process, without torch.

    ONNX file, folder of shards -> logits of the split's radiographs -> results.write

Nothing is fitted: calibration and thresholds come from the card. Only rank 0 works.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data.shards.reader import CorruptSampleError, Shards
from mura_dist.distributed import environment
from mura_dist.evaluation import results
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, SplitScores
from mura_dist.inference.engine import SessionConfig
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.models.target import Target
from mura_dist.training.scores import Scores

_BATCH = 16


def evaluate_onnx(
    target: Target,
    shards_folder: StoragePath,
    options: EvaluateOptions,
    *,
    provider: str = "cpu",
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate an exported model on a split.

    Args:
        target: the ONNX file.
        shards_folder: the shards to evaluate on.
        options: the split, the output folder and so on.
        provider: the ONNX Runtime execution provider.
        log: called with each line of progress.
        progress: called with the number of radiographs done and of all radiographs.

    Returns:
        The content of metrics.json on rank 0, {} on the others.

    Raises:
        UserError: the shards do not fit, or the output folder holds other results.
    """
    if not environment.is_first():
        return {}
    if (num_ranks := environment.world_size()) > 1:
        log(f"an ONNX file is evaluated by one process; {num_ranks - 1} of {num_ranks} ranks are idle")
    path = target.path
    shards, model = Shards.open(shards_folder), OnnxModel.load(path, provider, SessionConfig(_BATCH))
    if shards.size != model.size:
        raise UserError(
            f"{shards_folder} has radiographs of {shards.size} px, {path} takes {model.size} px. Convert with "
            f"--size {model.size}."
        )
    results.check_out(options.out, target)
    rows, started = shards.rows(options.split), time.perf_counter()
    shards.check_tars(options.split)
    described = {"sha256": model.sha256, "provider": model.provider}
    stamp = results.make_stamp(described, shards, (options.split,), options, {"target": path.name})
    if (unchanged := results.load_unchanged(stamp, options.out, log)) is not None:
        return unchanged
    earlier = results.load_scores(stamp)
    scores, seconds = earlier or (_scores(model, shards, rows, log, progress), time.perf_counter() - started)
    card = model.card
    subject = EvaluationSubject(
        title=f"{path.name} on {options.split}",
        name=f"{path.name} {card.checkpoint}",
        forward=model.outputs,
        checkpoint=card.checkpoint,
        trained_on=card.trained_on.kind,
        selected_on=card.selected_on,
        settings=card.recipe,
        members=[member.model_dump() for member in card.members],
    )
    options = replace(options, operating_point=options.operating_point or card.operating_point)
    metrics = results.write(shards, subject, SplitScores(scores, card.calibration, seconds), options, log)
    results.write_stamp(stamp, options.out, scores, seconds)
    return metrics


def _scores(
    model: OnnxModel,
    shards: Shards,
    rows: np.ndarray,
    log: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> Scores:
    """Compute the logit of each row; log and skip corrupt samples."""
    blank = np.zeros((shards.size, shards.size), np.uint8)
    logit, valid = [], np.ones(len(rows), bool)
    for batch in np.array_split(np.arange(len(rows)), -(-len(rows) // _BATCH)):
        images = []
        for index in batch.tolist():
            try:
                images.append(shards.read_pixels(int(rows[index])))
            except CorruptSampleError as error:
                log(f"{error}; skipped")
                images.append(blank)
                valid[index] = False
        logit.append(model.logits(np.stack(images)[:, None]))
        progress(int(batch[-1]) + 1, len(rows))
    return Scores.from_split(rows, np.concatenate(logit), valid)
