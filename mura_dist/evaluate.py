"""From rows to metrics: every radiograph of a split exactly once, whatever the number of ranks.

    rows -> micro-batches over ranks, padded by mask -> logits -> gathered *by row* -> studies -> metrics -> report, gallery

Writes into a folder (a run's, or --out): metrics.json, predictions.csv, studies.csv, report.html, pictures/; then, where it
is wanted, the gallery (LOCAL ONLY: it holds radiographs).
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import atomic, gallery, maps, metrics, mura, order, report, world
from .ensemble import Weights
from .journal import read as read_journal
from .measure import measure
from .order import Micro
from .pipeline import Loading, Targets
from .places import Where
from .refusal import Failure, Refusal
from .runs import environment
from .shards import Damaged, Shards
from .world import World

_ASK_EVERY = 64  # radiographs of a rank: seconds on a CPU, and a GPU is not kept waiting
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


class Interrupted(Exception):
    """An evaluation that was asked to stop, on all ranks at the same place."""


def scores(
    model: torch.nn.Module,
    rows: np.ndarray,
    loading: Loading,
    world: World,
    *,
    asked: Callable[[], bool] | None = None,
) -> Scores:
    """The logit of each of `rows`, the same on every rank; fp32. Called by all ranks.

    asked: says whether this rank was asked to stop; every few micro-batches the ranks tell each other, and raise Interrupted.
    """
    micros = order.evaluation_micros(rows, micro_batch=loading.micro_batch, rank=world.rank, world_size=world.size)
    mine = torch.zeros(len(micros), loading.micro_batch, device=world.device)
    sound = torch.zeros(len(micros), loading.micro_batch, dtype=torch.bool, device=world.device)
    every = max(1, _ASK_EVERY // loading.micro_batch)
    with torch.inference_mode(), contextlib.closing(loading.batches(micros, world.device)) as stream:
        for place, batch in enumerate(stream):
            if asked is not None and place % every == 0 and world.any(asked()):
                raise Interrupted
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
    wanted: gallery.Wanted | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a run's checkpoint on a split; writes into `out` (default: the run) and returns metrics.json's content.

    wanted: what the gallery should be; None for none.
    """
    weights = Weights.of_run(folder, which)
    facts = {"title": folder.name, "history": read_journal(folder / "metrics.jsonl")}
    return _evaluate(weights, shards_folder, split=split, out=out or folder, facts=facts, wanted=wanted, say=say)


def evaluate_list(
    path: Path,
    shards_folder: Where,
    *,
    out: Path,
    split: str = "valid",
    wanted: gallery.Wanted | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The same of a model list's ensemble. Refusal where a member is not what it was, or `out` is a run."""
    weights = Weights.of_list(path)
    if (out / "recipe.toml").exists():
        raise Refusal(f"--out {out} is a run, whose report would be overwritten; give another folder")
    return _evaluate(weights, shards_folder, split=split, out=out, facts={"title": path.stem}, wanted=wanted, say=say)


def _evaluate(
    weights: Weights,
    shards_folder: Where,
    *,
    split: str,
    out: Path,
    facts: dict[str, Any],
    wanted: gallery.Wanted | None,
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
    gallery.check(wanted, shards.size)
    started = time.perf_counter()
    with world.join(settings.timeout_s) as ranks:
        model = weights.model().to(ranks.device)
        targets = Targets.of(shards, weighted=False)
        loading = Loading.of(settings, shards, targets, ranks.device)
        say(f"evaluating {weights.name} on {split}: {len(rows)} radiographs")
        found = scores(model, rows, loading, ranks)
        if not ranks.is_first:
            return {}
    facts |= {
        "title": f"{facts['title']}: {weights.name} on {split}",
        "checkpoint": weights.name,
        "members": [member.model_dump() for member in weights.members],
        "selected_on": settings.select_on,
        "trained_on": data["holds"],
        "settings": weights.recipe(),
        "same_data": data["manifest_sha256"] == shards.index["manifest"]["sha256"],
    }
    shown = maps.Model.of_weights(weights, model)
    seconds = time.perf_counter() - started
    return write(out, shards, found, split=split, facts=facts, seconds=seconds, shown=shown, wanted=wanted, say=say)


def evaluate_scores(
    score: Callable[[np.ndarray], np.ndarray],
    shards: Shards,
    *,
    split: str,
    out: Path,
    facts: dict[str, Any],
    batch_size: int = 16,
    shown: maps.Model | None = None,
    wanted: gallery.Wanted | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The same for anything that turns images uint8 (B, 1, S, S) into logits (B,): an exported model, in one process.

    shown: the same model with its maps, for the gallery.
    """
    rows, started = shards.rows(split), time.perf_counter()
    shards.require(split)
    gallery.check(wanted, shards.size)
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
    seconds = time.perf_counter() - started
    return write(out, shards, found, split=split, facts=facts, seconds=seconds, shown=shown, wanted=wanted, say=say)


def write(
    out: Path,
    shards: Shards,
    found: Scores,
    *,
    split: str,
    facts: dict[str, Any],
    seconds: float,
    shown: maps.Model | None = None,
    wanted: gallery.Wanted | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure, and write everything an evaluation leaves behind; metrics.json last, but for the gallery, which is apart."""
    if not len(found.rows):
        raise Failure(f"{shards.folder}: every sample of split {split!r} is damaged; `mura-dist verify` names them")
    studies = study_scores(shards, found)
    measured = measure(studies, threshold=THRESHOLD) | {
        "split": split,
        "threshold": THRESHOLD,
        "selected_on": facts.get("selected_on"),
        "note": _note(split, facts.get("selected_on")),
        "checkpoint": facts.get("checkpoint"),
        "members": facts.get("members", []),  # of an ensemble
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
    gallery.write(out, shards, studies, found.rows, model=shown, wanted=wanted, facts=measured | context, say=say)
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
