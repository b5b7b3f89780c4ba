"""Evaluate a run or a model list: every radiograph of a split exactly once, on any number of ranks.

    rows -> micro-batches over ranks, padded by a mask -> logits -> gathered by row -> results.write
    tune's rows, in the same pass -> studies -> calibration.fit -> thresholds: applied to and measured on the split's studies

The tune split is scored too, to fit calibration, thresholds and the uncertain band, which are never fitted to the reported
split. On MURA that is about 3,700 radiographs beside valid's 3,197. An exported model (exported.py) has its thresholds in its
card.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath, sha256
from mura_dist.data.class_weights import compute_class_weights
from mura_dist.data.loaders.loader import BatchLoader, RowTargets
from mura_dist.data.shards.reader import Shards
from mura_dist.distributed import process_group
from mura_dist.distributed.process_group import World
from mura_dist.evaluation import results, saliency
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, SplitScores
from mura_dist.metrics import calibration
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds
from mura_dist.models.target import Target
from mura_dist.training import mlflow_process
from mura_dist.training.metrics_log import read
from mura_dist.training.scores import Scores, study_scores
from mura_dist.training.stamp import Stamp
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
    """Evaluate a run's checkpoint, or the ensemble of a list, on a split. All ranks call it; rank 0 writes.

    Args:
        target: a run or a model list.
        shards_folder: the shards to evaluate on.
        options: the split, the output folder and so on.
        which: the run's checkpoint: best, last or a step.
        log: called with each line of progress.
        progress: called with the number of radiographs done and of all radiographs.

    Returns:
        The content of metrics.json on rank 0, {} on the others.

    Raises:
        UserError: a member of the list has changed, the shards do not fit, or the output folder holds other results.
    """
    weights, split = ModelWeights.from_target(target, which), options.split
    results.check_out(options.out, target)
    settings, data = weights.settings, weights.data()
    shards = Shards.open(shards_folder, files.expand_user(settings.mirror) if settings.mirror else None)
    rows = shards.rows(split)
    shards.check_tars(split)
    if data["size"] != shards.size:
        raise UserError(
            f"{shards_folder} has radiographs of {shards.size} px, {target.name} was trained on {data['size']} px. Convert with "
            f"--size {data['size']}."
        )
    tune = _tune_rows(weights, shards)
    if isinstance(tune, str):
        if options.operating_point not in (None, PAPER_OPERATING_POINT):
            raise UserError(
                f"--operating-point {options.operating_point}: nothing can be fitted: {tune}. Or pass --operating-point "
                f"{PAPER_OPERATING_POINT}."
            )
        tune_rows = np.zeros(0, np.int64)
    else:
        tune_rows = tune
    scored_rows = np.union1d(rows, tune_rows)
    with process_group.join(settings.collective_timeout_s) as world:
        stamp = _stamp(target, weights, shards, options, world) if world.is_first else None
        unchanged = results.load_unchanged(stamp, options.out, log) if stamp else None
        if world.any(unchanged is not None):
            _send_to_mlflow(target, options.out, world, log)
            return unchanged or {}
        started, earlier = time.perf_counter(), results.load_scores(stamp) if stamp else None
        is_scored = world.any(earlier is not None)
        if is_scored and not world.is_first:
            return {}
        model = weights.load_model().to(world.device)
        targets = RowTargets.from_shards(shards)
        loader = BatchLoader.from_settings(settings, shards, targets, world.device)
        tune_note = f", and tune to fit on: {len(tune_rows)}" if len(tune_rows) and split != "tune" else ""
        log(f"evaluating {weights.name} on {split}: {len(rows)} radiographs{tune_note}")
        if earlier:
            log("the model, the shards and the code are those of the last evaluation, so its logits are used again")
            row_scores, seconds = earlier
        else:
            row_scores = score_rows(model, scored_rows, loader, world, progress=progress)
            seconds = time.perf_counter() - started
        if stamp is None:
            return {}
    if isinstance(tune, str):
        thresholds = FittedThresholds(reason=tune)
    else:
        thresholds = _fit(weights, shards, row_scores.select_rows(tune), split)
    split_scores = SplitScores(row_scores.select_rows(rows), thresholds, seconds, len(scored_rows))
    metrics = results.write(shards, _subject(target, weights, model, shards, split), split_scores, options, log)
    results.write_stamp(stamp, options.out, row_scores, seconds)
    _send_to_mlflow(target, options.out, world, log)
    return metrics


def _send_to_mlflow(target: Target, out: Path, world: World, log: Callable[[str], None]) -> None:
    """Send what a run's server does not have yet, if the run's own evaluation is in its folder. Only rank 0 sends."""
    if world.is_first and target.kind == "run" and out.resolve() == target.path.resolve():
        mlflow_process.send_remaining(target.path, log)


def _stamp(target: Target, weights: ModelWeights, shards: Shards, options: EvaluateOptions, world: World) -> Stamp:
    """Return the stamp of this evaluation."""
    history = target.path / "metrics.jsonl"  # of a run, for its report
    model = {"members": weights.inputs(), "ranks": world.size, "device": world.device.type}
    context = {
        "target": target.name,
        "list": [member.model_dump() for member in weights.members],
        "history_sha256": sha256(history) if history.is_file() else None,
    }
    return results.make_stamp(model, shards, (options.split, "tune"), options, context)


def _subject(
    target: Target, weights: ModelWeights, model: torch.nn.Module, shards: Shards, split: str
) -> EvaluationSubject:
    data = weights.data()
    run_name = "" if weights.members else f"{weights.runs[0].folder.resolve().name} "
    return EvaluationSubject(
        title=f"{target.name}: {weights.name} on {split}",
        name=f"{run_name}{weights.name}",
        forward=_forward_function(model),
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
    """Return the forward function of a network in eval mode, on the GPU where there is one."""

    def forward(images: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.inference_mode():
            logit, cells = module.to(device)(torch.from_numpy(images).to(device))
        return logit.cpu().numpy(), cells.cpu().numpy()

    return forward


def _tune_rows(weights: ModelWeights, shards: Shards) -> np.ndarray | str:
    """Return the rows to fit on, or why there are none."""
    if weights.data()["manifest_sha256"] != shards.index["manifest"]["sha256"]:
        return (
            "these are not the shards the model was trained on: it may have seen their tune split; evaluate on its own"
        )
    try:
        rows = shards.rows("tune")
    except UserError:
        return "the shards have no tune split; convert with --tune 0.1 and train on them"
    shards.check_tars("tune")
    return rows


def _fit(weights: ModelWeights, shards: Shards, scores: Scores, split: str) -> FittedThresholds:
    """Fit calibration, thresholds and the band on the tune studies."""
    notes = []
    if split == "tune":
        notes.append("fitted on the reported split: optimistic")
    if len(scores.corrupt):
        notes.append(f"corrupt radiographs of tune, skipped: {len(scores.corrupt)}")
    studies, shift = study_scores(shards, scores), compute_odds_shift(weights, shards)
    study_types = weights.data()["study_types"]
    return calibration.fit(studies, shift, study_types, num_damaged=len(scores.corrupt), notes=notes)


def compute_odds_shift(weights: ModelWeights, shards: Shards) -> dict[str, float]:
    """Compute the shift of each study type's log odds by the weighted loss: log(w1 / w0), 0 where it was not weighted.

    For an ensemble whose members differ in loss_weights, the shift is the mean over members.
    """
    frame = shards.manifest.frame
    train, names = frame.loc[shards.rows("train")], sorted(set(frame["study_type"]))
    study_type, label = train["study_type"].to_numpy(), train["label"].to_numpy()
    tables = [compute_class_weights(run.settings.loss_weights, study_type, label, names) for run in weights.runs]
    return {name: float(np.mean([np.log(table[name][1] / table[name][0]) for table in tables])) for name in names}
