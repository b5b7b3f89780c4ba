"""From rows to metrics: every radiograph of a split exactly once, whatever the number of ranks.

    rows -> micro-batches over ranks, padded by mask -> logits -> gathered *by row* -> studies -> metrics -> report, gallery
    tune's rows, in the same pass -> studies -> calibration.fit -> points: applied to the split's studies, measured there

Of a run or a model list tune is scored too, to fit calibration, thresholds and the uncertain band, which are never fitted to
what is reported. It costs as much again: of MURA's valid 3,197 radiographs, with tune about 3,700 more. An exported model
has its points in its card; nothing is fitted.

Writes into a folder (a run's, or --out): metrics.json, predictions.csv, predictions-official.csv (the official format),
studies.csv, report.html, report.json, pictures/; then, where it is wanted, the gallery (LOCAL ONLY: it holds radiographs).
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.core import files
from mura_dist.core.errors import Failure, Refusal
from mura_dist.core.storage import Where
from mura_dist.data import gate, mura
from mura_dist.data.class_weights import class_weights
from mura_dist.data.folder_kind import kinds_of
from mura_dist.data.loaders.loader import BatchLoader, Targets
from mura_dist.data.shards.reader import Damaged, Shards
from mura_dist.distributed import process_group as world
from mura_dist.evaluation import gallery, prediction_files, saliency
from mura_dist.evaluation.gallery import Wanted
from mura_dist.metrics import calibration, classification
from mura_dist.metrics.operating_points import PAPER, STUDIES, THRESHOLD, Points, chosen
from mura_dist.metrics.summary import curves, measure, subgroups
from mura_dist.models.target import Target
from mura_dist.reports import evaluation
from mura_dist.training.metrics_log import read
from mura_dist.training.run import environment
from mura_dist.training.validation import Scores, scores, study_scores
from mura_dist.training.weights import Weights

ROLES = {
    "train": "fits the weights",
    "tune": "chooses: learning-rate drops, the checkpoint, calibration, thresholds, the uncertain band",
    "valid": "is only reported",
}


@dataclass(frozen=True)
class Asked:
    """What an evaluation is to assume. operating_point: whose thresholds make the calls; None: the paper's, of an exported model
    its own. prevalence: share of abnormal studies to work PPV and NPV out for. gallery: what it should be; None for none."""

    operating_point: str | None = None
    prevalence: float | None = None
    gallery: Wanted | None = None


def evaluate_target(
    target: Target,
    shards_folder: Where,
    *,
    split: str = "valid",
    which: str = "best",
    out: Path | None = None,
    asked: Asked = Asked(),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint, or a list's ensemble, on a split; returns metrics.json's content.

    Writes into `out`, by default the run, or the folder of the list's name. Raises Refusal where a member of the list is not
    what it was, or `out` is another run.
    """
    weights = Weights.of_target(target, which)
    out = out or target.report_folder
    _check_out(out, target)
    facts: dict[str, Any] = {"title": target.path.stem}
    if target.kind == "run":
        facts = {"title": target.path.name, "history": read(target.path / "metrics.jsonl")}
    return _evaluate(weights, shards_folder, split=split, out=out, facts=facts, asked=asked, say=say)


def _check_out(out: Path, target: Target) -> None:
    """Before anything is measured: nothing that somebody else wrote is written over; the run that is evaluated may be."""
    if target.kind == "run" and out.resolve() == target.path.resolve():
        return
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file; give a folder")
    kinds = kinds_of(out)
    for kind, what in (("run", "is a run, whose report"), ("prediction", "holds predictions, whose tables")):
        if kind in kinds:
            raise Refusal(f"--out {out} {what} would be overwritten; give another folder")


def _evaluate(
    weights: Weights,
    shards_folder: Where,
    *,
    split: str,
    out: Path,
    facts: dict[str, Any],
    asked: Asked,
    say: Callable[[str], None],
) -> dict[str, Any]:
    settings, data = weights.settings, weights.data()
    shards = Shards.open(shards_folder, Path(settings.mirror).expanduser() if settings.mirror else None)
    rows = shards.rows(split)
    shards.require(split)
    if data["size"] != shards.size:
        raise Refusal(
            f"{shards_folder} has radiographs of {shards.size} px, {facts['title']} was trained on {data['size']}; "
            f"convert with --size {data['size']}"
        )
    tune = _tune(weights, shards)
    if isinstance(tune, str):
        if asked.operating_point not in (None, PAPER):
            raise Refusal(f"--operating-point {asked.operating_point}: nothing can be fitted: {tune}")
        also = np.zeros(0, np.int64)
    else:
        also = tune
    started = time.perf_counter()
    with world.join(settings.timeout_s) as ranks:
        model = weights.model().to(ranks.device)
        targets = Targets.of(shards, weighted=False)
        loading = BatchLoader.from_settings(settings, shards, targets, ranks.device)
        with_tune = f", and tune to fit on: {len(also)}" if len(also) and split != "tune" else ""
        say(f"evaluating {weights.name} on {split}: {len(rows)} radiographs{with_tune}")
        found = scores(model, np.union1d(rows, also), loading, ranks)
        if not ranks.is_first:
            return {}
    facts |= {
        "title": f"{facts['title']}: {weights.name} on {split}",
        "checkpoint": weights.name,
        "members": [member.model_dump() for member in weights.members],
        "weights_sha256": weights.digests(),
        "selected_on": settings.select_on,
        "trained_on": data["holds"],
        "settings": weights.recipe(),
        "same_data": data["manifest_sha256"] == shards.index["manifest"]["sha256"],
    }
    points = Points(reason=tune) if isinstance(tune, str) else _fit(weights, shards, found.of_rows(tune), split)
    facts["num_scored"], seconds = len(np.union1d(rows, also)), time.perf_counter() - started
    shown, found = saliency.CamModel.of_weights(weights, model), found.of_rows(rows)
    return write(
        out, shards, found, points, split=split, facts=facts, asked=asked, seconds=seconds, shown=shown, say=say
    )


def _tune(weights: Weights, shards: Shards) -> np.ndarray | str:
    """The rows to fit on, or why there are none."""
    if weights.data()["manifest_sha256"] != shards.index["manifest"]["sha256"]:
        return "these are not the shards the model was trained on: it may have learnt from their tune split; evaluate on its own"
    try:
        rows = shards.rows("tune")
    except Refusal:
        return "the shards have no tune split; convert with --tune 0.1 and train on that"
    shards.require("tune")
    return rows


def _fit(weights: Weights, shards: Shards, found: Scores, split: str) -> Points:
    """Everything that is fitted, on tune's studies alone."""
    notes = []
    if split == "tune":
        notes.append("fitted on what is reported here: optimistic")
    if len(found.damaged):
        notes.append(f"damaged radiographs of tune, left out: {len(found.damaged)}")
    studies, shift = study_scores(shards, found), odds_shift(weights, shards)
    study_types = weights.data()["study_types"]
    return calibration.fit(studies, shift, study_types, num_damaged=len(found.damaged), notes=notes)


def odds_shift(weights: Weights, shards: Shards) -> dict[str, float]:
    """How far the weighted loss moves the log odds of each study type: log(w1/w0) = log(N/A); 0 where it was not weighted.

    Of an ensemble whose members differ in that, the mean over members.
    """
    weighted = np.mean([run.settings.loss_weights == "study_type" for run in weights.runs])
    train = shards.manifest.frame.loc[shards.rows("train")]
    table = class_weights(train["study_type"].to_numpy(), train["label"].to_numpy())
    return {name: float(weighted * np.log(w1 / w0)) for name, (w0, w1) in table.items()}


def evaluate_scores(
    target: Target,
    score: Callable[[np.ndarray], np.ndarray],
    shards: Shards,
    *,
    split: str,
    out: Path,
    facts: dict[str, Any],
    points: Points,
    asked: Asked = Asked(),
    batch_size: int = 16,
    shown: saliency.CamModel | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The same for anything that turns images uint8 (B, 1, S, S) into logits (B,): an exported model, in one process.

    points: those of its card; nothing else is fitted or used. shown: the same model with its maps, for the gallery.
    """
    _check_out(out, target)
    rows, started = shards.rows(split), time.perf_counter()
    shards.require(split)
    blank = np.zeros((shards.size, shards.size), np.uint8)
    logit, sound = [], np.ones(len(rows), bool)
    for part in np.array_split(np.arange(len(rows)), -(-len(rows) // batch_size)):
        images = []
        for place in part.tolist():
            try:
                images.append(shards.pixels(int(rows[place])))
            except Damaged as damaged:
                say(f"{damaged}; left out")
                images.append(blank)
                sound[place] = False
        logit.append(score(np.stack(images)[:, None]))
    found, seconds = Scores.of(rows, np.concatenate(logit), sound), time.perf_counter() - started
    return write(
        out, shards, found, points, split=split, facts=facts, asked=asked, seconds=seconds, shown=shown, say=say
    )


def write(
    out: Path,
    shards: Shards,
    found: Scores,
    points: Points,
    *,
    split: str,
    facts: dict[str, Any],
    asked: Asked,
    seconds: float,
    shown: saliency.CamModel | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and write everything an evaluation leaves behind; metrics.json last, but for the gallery, which is apart."""
    if not len(found.rows):
        raise Failure(f"{shards.folder}: every sample of split {split!r} is damaged; `mura-dist verify` names them")
    name = asked.operating_point or PAPER
    looks = looked_at(shards, found.rows)
    studies = exposures(shards, looks, calibration.apply(points, study_scores(shards, found)))
    thresholds = _thresholds(studies, points, name)
    cut = studies["study_type"].map(thresholds).astype(np.float64)
    studies = studies.assign(
        threshold=cut, call=classification.is_positive(studies["probability"], cut).astype(np.int64)
    )
    threshold = THRESHOLD if name == PAPER else None  # of all study types
    measured = measure(studies, prevalence=asked.prevalence) | {
        "subgroups": subgroups(studies),
        "curves": curves(studies),
        "calibration": points.model_dump(mode="json"),
        "operating_points": calibration.measured(points, studies),
        "split": split,
        "operating_point": name,
        "threshold": threshold,
        "thresholds": thresholds,
        "selected_on": facts.get("selected_on"),
        "note": _note(split, facts.get("selected_on")),
        "checkpoint": facts.get("checkpoint"),
        "members": facts.get("members", []),  # of an ensemble
        "weights_sha256": facts.get("weights_sha256"),  # of each checkpoint; null of an exported model
        "trained_on": facts.get("trained_on"),
        "measured_on": shards.trained_on,
        "manifest_sha256": shards.index["manifest"]["sha256"],
        "num_unreadable": len(shards.index["unreadable"]),
        "num_damaged": len(found.damaged),
        "terms": mura.TERMS,
    }
    roles = ROLES if facts.get("selected_on") != "valid" else ROLES | {"valid": "chooses, and is reported: optimistic"}
    context = {
        **facts,
        "split": split,
        "operating_point": name,
        "threshold": threshold,
        "measured_on": shards.trained_on,
        "terms": mura.TERMS,
        "licence": mura.LICENCE,
        "environment": environment(),
        "manifest_sha256": shards.index["manifest"]["sha256"],
        "roles": {name: roles.get(name, "") for name in shards.index["splits"]},
        "conversion": {key: shards.index[key] for key in ("size", "encoding", "defects", "unreadable", "splits")},
        "seconds": seconds,
    }
    _write_tables(out, shards, found, studies, looks["gate"])
    evaluation.write(out, metrics=measured, studies=studies, context=context)
    files.write_json(out / "metrics.json", measured)
    gallery.write(
        out, shards, studies, found.rows, model=shown, wanted=asked.gallery, facts=measured | context, say=say
    )
    return measured


def _note(split: str, selected_on: str | None) -> str | None:
    if split == "train":
        return "optimistic: this split fitted the model"
    return "optimistic: this split chose the model" if split == selected_on else None


def looked_at(shards: Shards, rows: np.ndarray) -> pd.DataFrame:
    """By row: grey, the mean level 0 to 255, and gate's verdict. It reads the pixels once more; NaN and "" if damaged since."""
    looks = []
    for row in rows.tolist():
        looks.append((math.nan, ""))
        with contextlib.suppress(Damaged):
            image = shards.pixels(row)
            looks[-1] = image.mean(), gate.verdict(image)
    return pd.DataFrame(looks, columns=["grey", "gate"], index=rows)


def exposures(shards: Shards, looks: pd.DataFrame, studies: pd.DataFrame) -> pd.DataFrame:
    """`studies` with exposure: the mean grey level over a study's views, 0 to 255."""
    by_study = looks["grey"].groupby(shards.manifest.frame.loc[looks.index, "study"]).mean()
    return studies.assign(exposure=studies["study"].map(by_study).astype(np.float64))


def _thresholds(studies: pd.DataFrame, points: Points, name: str) -> dict[str, float]:
    """Each study type's. Refusal where the operating point was not fitted for one of them."""
    counts = {str(key): int(num) for key, num in studies["study_type"].value_counts().sort_index().items()}
    return dict.fromkeys(counts, THRESHOLD) if name == PAPER else chosen(points, name, counts)


def _write_tables(out: Path, shards: Shards, found: Scores, studies: pd.DataFrame, verdicts: pd.Series) -> None:
    frame = shards.manifest.frame.loc[found.rows]
    predictions = frame[["path", "study", "study_type"]].assign(
        logit=found.logit, probability=classification.sigmoid(found.logit), gate=verdicts
    )
    told = studies[[*STUDIES, "label", "patient", "exposure"]]
    for name, table in (("predictions", predictions), ("studies", told)):
        text = table.to_csv(index=False, lineterminator="\n")
        files.write_text(out / f"{name}.csv", text)
    files.write_text(out / "predictions-official.csv", prediction_files.official_text(studies))
