"""Evaluate a run or a model list: every radiograph of a split exactly once, whatever the number of ranks.

    rows -> micro-batches over ranks, padded by mask -> logits -> gathered *by row* -> results.write
    tune's rows, in the same pass -> studies -> calibration.fit -> points: applied to the split's studies, measured there

Tune is scored too, to fit calibration, thresholds and the uncertain band, which are never fitted to what is reported. It costs
as much again: of MURA's valid 3,197 radiographs, with tune about 3,700 more. An exported model (exported.py) has its points in
its card.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data.class_weights import compute_class_weights
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import process_group
from mura_dist.evaluation import results, saliency
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, SplitScores
from mura_dist.metrics import calibration
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds
from mura_dist.models.target import Target
from mura_dist.training import mlflow_process
from mura_dist.training.metrics_log import read
from mura_dist.training.scores import Scores, study_scores
from mura_dist.training.validation import score_rows
from mura_dist.training.weights import ModelWeights


def evaluate_target(
    target: Target,
    shards_folder: StoragePath,
    options: EvaluateOptions,
    *,
    which: str = "best",
    log: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint, or a list's ensemble, on a split; returns metrics.json's content.

    Called by all ranks; the first one writes, the others return {}. progress: called with the number of radiographs done and
    that of all. Raises UserError where a member of the list is not what it was, or the output folder is another run.
    """
    weights, split = ModelWeights.from_target(target, which), options.split
    results.check_out(options.out, target)
    settings, data = weights.settings, weights.data()
    shards = Shards.open(shards_folder, files.expand_user(settings.mirror) if settings.mirror else None)
    rows = shards.rows(split)
    shards.check_tars(split)
    if data["size"] != shards.size:
        raise UserError(
            f"{shards_folder} has radiographs of {shards.size} px, {target.name} was trained on {data['size']}; "
            f"convert with --size {data['size']}"
        )
    tune = _tune_rows(weights, shards)
    if isinstance(tune, str):
        if options.operating_point not in (None, PAPER_OPERATING_POINT):
            raise UserError(f"--operating-point {options.operating_point}: nothing can be fitted: {tune}")
        also = np.zeros(0, np.int64)
    else:
        also = tune
    started = time.perf_counter()
    with process_group.join(settings.collective_timeout_s) as world:
        model = weights.load_model().to(world.device)
        targets = RowTargets.from_shards(shards)
        loading = BatchLoader.from_settings(settings, shards, targets, world.device)
        with_tune = f", and tune to fit on: {len(also)}" if len(also) and split != "tune" else ""
        log(f"evaluating {weights.name} on {split}: {len(rows)} radiographs{with_tune}")
        row_scores = score_rows(model, np.union1d(rows, also), loading, world, progress=progress)
        if not world.is_first:
            return {}
    points = (
        FittedThresholds(reason=tune)
        if isinstance(tune, str)
        else _fit(weights, shards, row_scores.select_rows(tune), split)
    )
    seconds, num_scored = time.perf_counter() - started, len(np.union1d(rows, also))
    split_scores = SplitScores(row_scores.select_rows(rows), points, seconds, num_scored)
    metrics = results.write(shards, _subject(target, weights, model, shards, split), split_scores, options, log)
    if target.kind == "run" and options.out.resolve() == target.path.resolve():
        mlflow_process.send_remaining(target.path, log)
    return metrics


def _subject(
    target: Target, weights: ModelWeights, model: torch.nn.Module, shards: Shards, split: str
) -> EvaluationSubject:
    data = weights.data()
    run_name = "" if weights.members else f"{weights.runs[0].folder.resolve().name} "
    return EvaluationSubject(
        title=f"{target.name}: {weights.name} on {split}",
        name=f"{run_name}{weights.name}",
        outputs=_forward_function(model),
        checkpoint=weights.name,
        trained_on=data["holds"],
        selected_on=weights.settings.select_on,
        settings=weights.recipe(),
        members=[member.model_dump() for member in weights.members],
        weights_sha256=weights.digests(),
        same_data=data["manifest_sha256"] == shards.index["manifest"]["sha256"],
        history=[] if weights.members else read(target.path / "metrics.jsonl"),
    )


def _forward_function(module: torch.nn.Module) -> saliency.ForwardFunction:
    """Return the outputs of a network in eval mode, computed on the GPU where there is one."""

    def outputs(images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.inference_mode():
            logit, cells = module.to(device)(torch.from_numpy(images).to(device))
        return logit.cpu().numpy(), cells.cpu().numpy()

    return outputs


def _tune_rows(weights: ModelWeights, shards: Shards) -> np.ndarray | str:
    """The rows to fit on, or why there are none."""
    if weights.data()["manifest_sha256"] != shards.index["manifest"]["sha256"]:
        return "these are not the shards the model was trained on: it may have learnt from their tune split; evaluate on its own"
    try:
        rows = shards.rows("tune")
    except UserError:
        return "the shards have no tune split; convert with --tune 0.1 and train on that"
    shards.check_tars("tune")
    return rows


def _fit(weights: ModelWeights, shards: Shards, found: Scores, split: str) -> FittedThresholds:
    """Everything that is fitted, on tune's studies alone."""
    notes = []
    if split == "tune":
        notes.append("fitted on what is reported here: optimistic")
    if len(found.corrupt):
        notes.append(f"damaged radiographs of tune, left out: {len(found.corrupt)}")
    studies, shift = study_scores(shards, found), compute_odds_shift(weights, shards)
    study_types = weights.data()["study_types"]
    return calibration.fit(studies, shift, study_types, num_damaged=len(found.corrupt), notes=notes)


def compute_odds_shift(weights: ModelWeights, shards: Shards) -> dict[str, float]:
    """Compute by how much the weighted loss moves the log odds of each study type: log(w1/w0), 0 where it was not weighted.

    For an ensemble whose members differ in loss_weights, it is the mean over members.
    """
    frame = shards.manifest.frame
    train, names = frame.loc[shards.rows("train")], sorted(set(frame["study_type"]))
    study_type, label = train["study_type"].to_numpy(), train["label"].to_numpy()
    tables = [compute_class_weights(run.settings.loss_weights, study_type, label, names) for run in weights.runs]
    return {name: float(np.mean([np.log(table[name][1] / table[name][0]) for table in tables])) for name in names}
