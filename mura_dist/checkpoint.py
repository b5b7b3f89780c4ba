"""Checkpoints: a resumable state in a folder, complete or not there.

    checkpoints/step-00012000/model.safetensors                      torchvision's keys, one copy
                              optimiser-00000-of-00001.safetensors   one a rank under ZeRO stage 1, else one
                              state.json                             step, epoch, plateau, scores, sizes
                              COMPLETE                               SHA-256 of each file above; written last

Everything is written into `.step-00012000.partial`, which is then renamed. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from . import atomic
from .places import sha256
from .refusal import Refusal

FORMAT = 1
MARK = "COMPLETE"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk; `state` is its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        return self.state["step"]

    def model(self) -> dict[str, Tensor]:
        return load_file(self.folder / "model.safetensors")

    def optimiser(self, rank: int, world_size: int, zero_stage: int) -> dict[str, Tensor]:
        """What `save` was given by this rank. Refusal where ZeRO's shares were cut for another number of ranks."""
        saved, shares = self.state["zero_stage"], self.state["optimiser_shares"]
        if saved != zero_stage:
            raise Refusal(
                f"zero_stage={zero_stage}: {self.folder} was written with zero_stage={saved}; keep it, or give run=NEW"
            )
        if saved and shares != world_size:
            raise Refusal(
                f"{world_size} ranks: {self.folder} holds the optimiser of {shares} ranks under zero_stage={saved}; "
                f"start {shares} ranks, or train with zero_stage=0, whose checkpoints fit any number"
            )
        return load_file(self.folder / _optimiser_name(rank if shares > 1 else 0, shares))


def _optimiser_name(rank: int, shares: int) -> str:
    return f"optimiser-{rank:05d}-of-{shares:05d}.safetensors"


def save(
    parent: Path,
    state: dict[str, Any],
    model: dict[str, Tensor],
    optimiser: dict[str, Tensor],
    *,
    rank: int,
    shares: int,
    barrier: Callable[[], None],
) -> Path:
    """Write a checkpoint of `state["step"]`; called by all ranks. `shares`: ranks that hold a share of the optimiser."""
    folder = parent / f"step-{state['step']:08d}"
    aside = parent / f".{folder.name}.partial"
    if rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    if rank < shares:
        save_file(optimiser, aside / _optimiser_name(rank, shares))
    if rank == 0:
        save_file({key: value.contiguous() for key, value in model.items()}, aside / "model.safetensors")
        atomic.write_json(aside / "state.json", {"format": FORMAT, "optimiser_shares": shares, **state})
    barrier()
    if rank == 0:
        digests = {path.name: _durable_digest(path) for path in sorted(aside.iterdir())}
        atomic.write_json(aside / MARK, digests)
        _delete(folder)  # the same step, written again after a resume
        os.replace(aside, folder)
        atomic.sync_folder(parent)
    barrier()
    return folder


def _durable_digest(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def read(folder: Path) -> Checkpoint:
    """Raises ValueError naming what is wrong where `folder` is not a complete, undamaged checkpoint of this format."""
    try:
        digests = json.loads((folder / MARK).read_bytes())
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not complete ({error})") from error
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder}/{name} is damaged or missing")
    if state["format"] != FORMAT:
        raise ValueError(f"{folder} is of format {state['format']}, this mura-dist reads {FORMAT}")
    return Checkpoint(folder, state)


def folders(parent: Path) -> list[Path]:
    """Checkpoints below `parent` that carry the mark, by step."""
    names = sorted(parent.glob("step-*"), key=_step_of)
    return [folder for folder in names if _NAME.fullmatch(folder.name) and (folder / MARK).is_file()]


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def latest(parent: Path, report: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest sound checkpoint, None where there is none at all; damaged ones are reported and passed over.

    Raises Refusal where all are damaged: to begin anew would throw away what may still be saved.
    """
    present = folders(parent)
    for folder in reversed(present):
        try:
            return read(folder)
        except ValueError as error:
            report(f"{error}; taking the one before")
    if present:
        raise Refusal(f"none of the {len(present)} checkpoints in {parent} can be read; restore one, or give run=NEW")
    return None


def select(parent: Path, which: str) -> Checkpoint:
    """`best` (lowest loss on the selecting split), `last`, or `step-N`. Refusal where there is none."""
    present = folders(parent)
    if not present:
        raise Refusal(f"{parent.parent} has no complete checkpoint; train it with mura-dist train")
    if which == "last":
        chosen = present[-1]
    elif which == "best":
        chosen = best(present)
    else:
        match = re.fullmatch(r"step-(\d+)", which)
        wanted = [folder for folder in present if match and _step_of(folder) == int(match[1])]
        if not wanted:
            names = ", ".join(folder.name for folder in present)
            raise Refusal(f"--checkpoint {which}: {parent.parent} has best, last, {names}")
        [chosen] = wanted
    try:
        return read(chosen)
    except ValueError as error:
        raise Refusal(f"--checkpoint {which}: {error}; choose another one") from error


def best(present: list[Path]) -> Path:
    """The folder whose state has the lowest finite `select_loss`; the last one where none has."""

    def loss(folder: Path) -> float:
        try:
            value = json.loads((folder / "state.json").read_bytes())["select_loss"]
        except (OSError, ValueError, KeyError):
            return float("inf")  # damaged: `read` says so when it is taken
        return float("inf") if value is None else value

    return min(reversed(present), key=loss)


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the best; and what a kill left half written."""
    present = folders(parent)
    kept = {*present[-keep:], *([best(present)] if present else [])}
    for folder in [*parent.glob("step-*"), *parent.glob(".step-*")]:
        if folder not in kept:
            _delete(folder)


def _delete(folder: Path) -> None:
    """Out of sight in one rename, then file by file: a kill in between leaves nothing that looks like a checkpoint."""
    hidden = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.deleted")
    if folder.exists() and hidden != folder:
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
