"""From rows to metrics: every radiograph of a split exactly once, whatever the number of ranks.

    rows -> micro-batches over ranks, padded by mask -> logits -> gathered *by row* -> studies -> metrics -> report

Writes into a folder (a run's, or --out): metrics.json, predictions.csv, studies.csv, report.html, pictures/.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import atomic, checkpoint, config, metrics, mura, order, report, world
from .journal import read as read_journal
from .model import DenseNet, build
from .order import Micro
from .pipeline import Loading, Targets
from .places import Where
from .refusal import Failure, Refusal
from .runs import Run, environment
from .shards import Damaged, Shards
from .world import World

THRESHOLD = 0.5  # the paper's; a study is called positive above it, strictly

ROLES = {
    "train": "fits the weights",
    "tune": "chooses: learning-rate drops and the checkpoint",
    "valid": "is only reported",
}


@dataclass(frozen=True)
class Scores:
    """What a model says of some rows: `rows` int64 (n,), `logit` float32 (n,), and the rows whose samples are damaged, int64."""

    rows: np.ndarray
    logit: np.ndarray
    damaged: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray, logit: np.ndarray, sound: np.ndarray) -> "Scores":
        """Of all rows of a split; `sound` bool (n,)."""
        return cls(rows[sound], logit[sound], rows[~sound])


def scores(model: torch.nn.Module, rows: np.ndarray, loading: Loading, world: World) -> Scores:
    """The logit of each of `rows`, the same on every rank; fp32. Called by all ranks."""
    micros = order.evaluation_micros(rows, micro_batch=loading.micro_batch, rank=world.rank, world_size=world.size)
    mine = torch.zeros(len(micros), loading.micro_batch, device=world.device)
    sound = torch.zeros(len(micros), loading.micro_batch, dtype=torch.bool, device=world.device)
    with torch.inference_mode():
        for place, batch in enumerate(loading.batches(micros, world.device)):
            mine[place], sound[place] = model(batch.image)[0], batch.mask
    return by_row(rows, micros, mine, sound, world)


def by_row(rows: np.ndarray, micros: Sequence[Micro], mine: Tensor, sound: Tensor, world: World) -> Scores:
    """Put each rank's results where their rows are: padding vanishes, nothing is counted twice."""
    places = world.gather(np.concatenate([micro.rows for micro in micros]))  # (ranks, n)
    values = world.gather(mine.flatten().cpu().numpy())  # (ranks, n)
    whole = world.gather(sound.flatten().to(torch.uint8).cpu().numpy())  # (ranks, n)
    real = places >= 0
    found, at = np.unique(places[real], return_index=True)
    assert np.array_equal(found, rows), "every row"
    assert real.sum() == len(rows), "once"
    return Scores.of(rows, values[real][at], whole[real][at] > 0)


def weighted_loss(found: Scores, targets: Targets) -> float:
    """Mean over radiographs of weight x BCE, in float64."""
    z, y = found.logit.astype(np.float64), targets.label[found.rows].astype(np.float64)
    return float((targets.weight[found.rows] * (np.logaddexp(0, z) - y * z)).mean())


def study_scores(shards: Shards, found: Scores) -> pd.DataFrame:
    return metrics.study_table(found.rows, metrics.sigmoid(found.logit), shards.manifest.frame)


def evaluate_run(
    folder: Path,
    shards_folder: Where,
    *,
    split: str = "valid",
    which: str = "best",
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint on a split; writes into `out` (default: the run) and returns metrics.json's content."""
    run = Run.load(folder)
    shards = Shards.open(shards_folder, Path(run.settings.mirror) if run.settings.mirror else None)
    rows = shards.rows(split)
    shards.require(split)
    chosen = checkpoint.select(run.checkpoints, which)
    data = run.data()
    if data["size"] != shards.size:
        raise Refusal(
            f"{shards_folder} has radiographs of {shards.size} px, {folder} was trained on {data['size']}; "
            f"convert with --size {data['size']}"
        )
    started = time.perf_counter()
    with world.join(run.settings.timeout_s) as ranks:
        model = load(run, chosen).to(ranks.device).eval()
        targets = Targets.of(shards, weighted=False)
        loading = Loading.of(run.settings, shards, targets, ranks.device)
        say(f"evaluating {chosen.name} on {split}: {len(rows)} radiographs")
        found = scores(model, rows, loading, ranks)
        if not ranks.is_first:
            return {}
    facts = {
        "title": f"{folder.name}: {chosen.name} on {split}",
        "checkpoint": chosen.name,
        "selected_on": run.settings.select_on,
        "trained_on": data["holds"],
        "settings": config.shareable(run.settings),
        "history": read_journal(folder / "metrics.jsonl"),
        "same_data": data["manifest_sha256"] == shards.index["manifest"]["sha256"],
    }
    return write(out or folder, shards, found, split=split, facts=facts, seconds=time.perf_counter() - started)


def load(run: Run, chosen: checkpoint.Checkpoint) -> DenseNet:
    model = build(run.settings.architecture)
    model.load_state_dict(chosen.model())
    return model


def evaluate_scores(
    score: Callable[[np.ndarray], np.ndarray],
    shards: Shards,
    *,
    split: str,
    out: Path,
    facts: dict[str, Any],
    batch_size: int = 16,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The same for anything that turns images uint8 (B, 1, S, S) into logits (B,): an exported model, in one process."""
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
    found = Scores.of(rows, np.concatenate(logit), sound)
    return write(out, shards, found, split=split, facts=facts, seconds=time.perf_counter() - started)


def write(
    out: Path,
    shards: Shards,
    found: Scores,
    *,
    split: str,
    facts: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Measure, and write everything an evaluation leaves behind; metrics.json last."""
    if not len(found.rows):
        raise Failure(f"{shards.folder}: every sample of split {split!r} is damaged; `mura-dist verify` names them")
    studies = study_scores(shards, found)
    measured = metrics.measure(studies, threshold=THRESHOLD) | {
        "split": split,
        "threshold": THRESHOLD,
        "selected_on": facts.get("selected_on"),
        "note": _note(split, facts.get("selected_on")),
        "checkpoint": facts.get("checkpoint"),
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
        "threshold": THRESHOLD,
        "measured_on": shards.trained_on,
        "terms": mura.TERMS,
        "licence": mura.LICENCE,
        "environment": environment(),
        "manifest_sha256": shards.index["manifest"]["sha256"],
        "roles": {name: roles.get(name, "") for name in shards.index["splits"]},
        "conversion": {key: shards.index[key] for key in ("size", "encoding", "defects", "unreadable", "splits")},
        "seconds": seconds,
    }
    _write_tables(out, shards, found, studies)
    report.write(out, metrics=measured, studies=studies, context=context)
    atomic.write_json(out / "metrics.json", measured)
    return measured


def _note(split: str, selected_on: str | None) -> str | None:
    if split == "train":
        return "optimistic: this split fitted the model"
    return "optimistic: this split chose the model" if split == selected_on else None


def _write_tables(out: Path, shards: Shards, found: Scores, studies: pd.DataFrame) -> None:
    frame = shards.manifest.frame.loc[found.rows]
    predictions = frame[["path", "study", "study_type"]].assign(
        logit=found.logit, probability=metrics.sigmoid(found.logit), gate=""
    )
    called = studies.assign(threshold=THRESHOLD, call=(studies["probability"] > THRESHOLD).astype(int))
    for name, table in (("predictions", predictions), ("studies", called)):
        text = table.to_csv(index=False, lineterminator="\n")
        atomic.write_text(out / f"{name}.csv", text)
