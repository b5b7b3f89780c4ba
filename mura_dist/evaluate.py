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

from . import atomic, checkpoint, config, launcher, metrics, mura, order, report, world
from .journal import read as read_journal
from .model import DenseNet, build
from .order import Micro
from .pipeline import Targets, batches
from .refusal import Refusal
from .runs import Run, environment
from .shards import Shards
from .workers import processors
from .world import World

THRESHOLD = 0.5  # the paper's; a study is called positive above it, strictly

ROLES = {
    "train": "fits the weights",
    "tune": "chooses: learning-rate drops and the checkpoint",
    "valid": "is only reported",
}


@dataclass(frozen=True)
class Loading:
    """How batches are made for an evaluation."""

    shards: Shards
    targets: Targets
    pipeline: str
    micro_batch: int
    workers: int


def logits(model: torch.nn.Module, rows: np.ndarray, loading: Loading, world: World) -> np.ndarray:
    """float32 (n,), the logit of each of `rows`, on every rank; fp32. Called by all ranks."""
    micros = order.evaluation_micros(rows, micro_batch=loading.micro_batch, rank=world.rank, world_size=world.size)
    mine = torch.zeros(len(micros), loading.micro_batch, device=world.device)
    stream = batches(
        loading.shards, loading.targets, micros, backend=loading.pipeline, device=world.device, workers=loading.workers
    )
    with torch.inference_mode():
        for place, batch in enumerate(stream):
            mine[place] = model(batch.image)[0]
    return by_row(rows, micros, mine, world)


def by_row(rows: np.ndarray, micros: Sequence[Micro], mine: Tensor, world: World) -> np.ndarray:
    """Put each rank's results where their rows are: padding vanishes, nothing is counted twice."""
    places = world.gather(np.concatenate([micro.rows for micro in micros]))  # (ranks, n)
    values = world.gather(mine.flatten().cpu().numpy())  # (ranks, n)
    real = places >= 0
    found, at = np.unique(places[real], return_index=True)
    assert np.array_equal(found, rows), "every row"
    assert real.sum() == len(rows), "once"
    return values[real][at]


def weighted_loss(logit: np.ndarray, rows: np.ndarray, targets: Targets) -> float:
    """Mean over radiographs of weight x BCE, in float64."""
    z, y = logit.astype(np.float64), targets.label[rows].astype(np.float64)
    return float((targets.weight[rows] * (np.logaddexp(0, z) - y * z)).mean())


def study_scores(shards: Shards, rows: np.ndarray, logit: np.ndarray) -> pd.DataFrame:
    return metrics.study_table(rows, metrics.sigmoid(logit), shards.manifest.frame)


def evaluate_run(
    folder: Path,
    shards_folder: Path,
    *,
    split: str = "valid",
    which: str = "best",
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint on a split; writes into `out` (default: the run) and returns metrics.json's content."""
    run, shards = Run.load(folder), Shards.open(shards_folder)
    rows = shards.rows(split)
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
        name = pipeline_for(run.settings.pipeline, ranks)
        loading = Loading(shards, targets, name, run.settings.micro_batch, loading_threads(run.settings.workers))
        say(f"evaluating {chosen.name} on {split}: {len(rows)} radiographs")
        scores = logits(model, rows, loading, ranks)
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
    return write(out or folder, shards, rows, scores, split=split, facts=facts, seconds=time.perf_counter() - started)


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
) -> dict[str, Any]:
    """The same for anything that turns images uint8 (B, 1, S, S) into logits (B,): an exported model, in one process."""
    rows, started = shards.rows(split), time.perf_counter()
    parts = np.array_split(rows, -(-len(rows) // batch_size))
    scores = np.concatenate([score(np.stack([shards.pixels(row) for row in part])[:, None]) for part in parts])
    return write(out, shards, rows, scores, split=split, facts=facts, seconds=time.perf_counter() - started)


def write(
    out: Path,
    shards: Shards,
    rows: np.ndarray,
    scores: np.ndarray,
    *,
    split: str,
    facts: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Measure, and write everything an evaluation leaves behind; metrics.json last."""
    studies = study_scores(shards, rows, scores)
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
    _write_tables(out, shards, rows, scores, studies)
    report.write(out, metrics=measured, studies=studies, context=context)
    atomic.write_json(out / "metrics.json", measured)
    return measured


def _note(split: str, selected_on: str | None) -> str | None:
    if split == "train":
        return "optimistic: this split fitted the model"
    return "optimistic: this split chose the model" if split == selected_on else None


def _write_tables(out: Path, shards: Shards, rows: np.ndarray, scores: np.ndarray, studies: pd.DataFrame) -> None:
    frame = shards.manifest.frame.loc[rows]
    predictions = frame[["path", "study", "study_type"]].assign(
        logit=scores, probability=metrics.sigmoid(scores), gate=""
    )
    called = studies.assign(threshold=THRESHOLD, call=(studies["probability"] > THRESHOLD).astype(int))
    for name, table in (("predictions", predictions), ("studies", called)):
        text = table.to_csv(index=False, lineterminator="\n")
        atomic.write_text(out / f"{name}.csv", text)


def pipeline_for(wanted: str, ranks: World) -> str:
    """`auto`: DALI on CUDA, OpenCV elsewhere."""
    return wanted if wanted != "auto" else "dali" if ranks.device.type == "cuda" else "cpu"


def loading_threads(wanted: int) -> int:
    """Loading threads of this rank: what was asked for, else this rank's share of the processors, four at most."""
    return wanted or min(4, max(1, processors() // launcher.ranks_here()))
