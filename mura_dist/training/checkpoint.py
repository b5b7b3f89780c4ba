"""Checkpoints: a resumable state in a folder, complete or not there.

    checkpoints/step-00012000/model.safetensors                      torchvision's keys, one copy: what the run offers
                              training.safetensors                   with a moving average: the weights training goes on from
                              optimiser-00000-of-00001.safetensors   one a rank under ZeRO stage 1, else one; end to end they
                                                                     are the whole, so any number of ranks can read them
                              state.json                             step, plateau, scores, sums of the epoch so far
                              COMPLETE                               SHA-256 of each file above; written last

Everything is written into `.step-00012000.partial`, which is then renamed. Nothing is pickled. Where one rank writes all,
it does so beside the next steps (checkpoint_writer.py): what is written was copied first.
"""

import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, StrictStr, StringConstraints
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from mura_dist.core import files as atomic
from mura_dist.core.errors import UserError
from mura_dist.core.storage import sha256

FORMAT = 2
MARK = "COMPLETE"
_DAMAGED = ".damaged"
_FileName = Annotated[str, StringConstraints(strict=True, pattern="^[0-9a-z.-]+$")]
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
        return _load(self.folder / "model.safetensors")

    def load_into(self, network: torch.nn.Module) -> None:
        """Fill `network` with `model()`. Raises UserError where that is another network's."""
        try:
            network.load_state_dict(self.model())
        except RuntimeError as error:  # of many lines, one a name that differs
            raise UserError(
                f"{self.folder} holds the weights of another network than the run's recipe.toml names; restore that, or choose "
                "another checkpoint"
            ) from error

    def training(self) -> dict[str, Tensor]:
        """What `Engine.state` was; empty for a run without a moving average."""
        path = self.folder / "training.safetensors"
        return _load(path) if path.is_file() else {}

    def optimiser(self) -> dict[str, Tensor]:
        """What all ranks' `OptimizerState.tensors` were, end to end: vectors joined, counters as they are."""
        shares = [_load(path) for path in sorted(self.folder.glob("optimiser-*.safetensors"))]
        return {
            name: torch.cat([share[name] for share in shares]) if value.ndim else value
            for name, value in shares[0].items()
        }


Tensors = dict[str, Tensor]


class _State(BaseModel):
    """The content of any checkpoint's state.json."""

    format: Annotated[int, Field(strict=True)]
    step: Annotated[int, Field(strict=True, ge=0, lt=2**53)]


def _load(path: Path) -> Tensors:
    """The tensors of a file, which are no program: nothing of it is executed. Raises UserError where it holds none."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise UserError(f"{path} holds no tensors ({reason}); choose another checkpoint, or train again") from error


def read_mark(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by its name. Raises ValueError where its mark is damaged, OSError."""
    digests: dict[str, str] = atomic.parse_json((folder / MARK).read_bytes(), dict[_FileName, StrictStr])
    return digests


def _optimiser_name(rank: int, shares: int) -> str:
    return f"optimiser-{rank:05d}-of-{shares:05d}.safetensors"


def _aside(parent: Path, step: int) -> Path:
    return parent / f".step-{step:08d}.partial"


def write(parent: Path, state: dict[str, Any], files: dict[str, Tensors], optimiser: Tensors) -> Path:
    """A whole checkpoint of `state["step"]`, by one process. `files`: by stem, `model` among them; tensors on the CPU."""
    begin(parent, state["step"])
    write_share(parent, state["step"], optimiser)
    return complete(parent, state, files)


def begin(parent: Path, step: int) -> None:
    """An empty place for a checkpoint that is on its way; one rank."""
    shutil.rmtree(_aside(parent, step), ignore_errors=True)
    _aside(parent, step).mkdir(parents=True)


def write_share(parent: Path, step: int, optimiser: Tensors, *, rank: int = 0, shares: int = 1) -> None:
    """A rank's share of the optimiser's state, after `begin`."""
    _write_tensors(_aside(parent, step) / _optimiser_name(rank, shares), optimiser)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    """As any other file: readable for whom the umask says, OSError where the disk is full (safetensors' own way is neither)."""
    path.write_bytes(serialised(tensors))


def complete(parent: Path, state: dict[str, Any], files: dict[str, Tensors]) -> Path:
    """The rest of a checkpoint whose shares are all there, then its mark; one rank."""
    folder, aside = folder_of(parent, state["step"]), _aside(parent, state["step"])
    for stem, tensors in files.items():
        _write_tensors(aside / f"{stem}.safetensors", tensors)
    atomic.write_json(aside / "state.json", {"format": FORMAT, **state})
    digests = {path.name: _durable_digest(path) for path in sorted(aside.iterdir())}
    atomic.write_json(aside / MARK, digests)
    _take_place(aside, folder)
    return folder


def _take_place(aside: Path, folder: Path) -> None:
    """A complete one becomes `folder`, which may hold the same step of before an interruption: killed in between, `aside` carries
    the mark and `latest` finishes."""
    before = _hidden(folder)
    if folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    os.replace(aside, folder)
    atomic.sync_folder(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def folder_of(parent: Path, step: int) -> Path:
    return parent / f"step-{step:08d}"


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleted")


def _durable_digest(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def read(folder: Path) -> Checkpoint:
    """Raises ValueError naming what is wrong where `folder` is not a complete, undamaged checkpoint of this format."""
    try:
        digests = read_mark(folder)
        state = atomic.parse_json((folder / "state.json").read_bytes(), _State)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not complete ({error})") from error
    if missing := {"model.safetensors", "state.json"} - digests.keys():
        raise ValueError(f"{folder}/{MARK} does not name {', '.join(sorted(missing))}")
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder}/{name} is damaged or missing")
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder} is of format {state.get('format')}, this mura-dist reads {FORMAT}")
    return Checkpoint(folder, state)


def list_folders(parent: Path) -> list[Path]:
    """Checkpoints below `parent` that carry the mark, by step."""
    names = sorted(parent.glob("step-*"), key=_step_of)
    return [folder for folder in names if _NAME.fullmatch(folder.name) and (folder / MARK).is_file()]


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def latest(parent: Path, report: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """The newest sound checkpoint, None where there is none at all. By the one writer of the run, as it begins.

    CorruptSampleError ones that are newer are reported and put out of the way, as `.step-N.damaged`: they are not to be the newest for
    whoever prunes. One that was complete but for its last rename gets it.

    Raises UserError where all are damaged: to begin anew would throw away what may still be saved.
    """
    for aside in parent.glob(".step-*.partial"):
        if (aside / MARK).is_file() and not (folder := parent / aside.name[1 : -len(".partial")]).exists():
            _take_place(aside, folder)
    present, damaged = list_folders(parent), []
    for folder in reversed(present):
        try:
            found = read(folder)
        except ValueError as error:
            report(f"{error}; taking the one before")
            damaged.append(folder)
        else:
            for other in damaged:
                _put_away(other)
            return found
    if present:
        raise UserError(f"none of the {len(present)} checkpoints in {parent} can be read; restore one, or give run=NEW")
    return None


def _put_away(folder: Path) -> None:
    away = folder.with_name(f".{folder.name}{_DAMAGED}")
    shutil.rmtree(away, ignore_errors=True)
    os.replace(folder, away)


def select(parent: Path, which: str) -> Checkpoint:
    """`best` (lowest loss on the selecting split), `last`, or `step-N`. UserError where there is none."""
    present = list_folders(parent)
    if not present:
        raise UserError(f"{parent.parent} has no complete checkpoint; train it with mura-dist train")
    if which == "last":
        chosen = present[-1]
    elif which == "best":
        chosen = best(present)
    else:
        match = re.fullmatch(r"step-(\d+)", which)
        wanted = [folder for folder in present if match and _step_of(folder) == int(match[1])]
        if not wanted:
            names = ", ".join(folder.name for folder in present)
            raise UserError(f"--checkpoint {which}: {parent.parent} has best, last, {names}")
        [chosen] = wanted
    try:
        return read(chosen)
    except ValueError as error:
        raise UserError(f"--checkpoint {which}: {error}; choose another one") from error


def best(present: list[Path]) -> Path:
    """The folder whose state has the lowest finite `select_loss`; the last one where none has."""
    return next(iter(ranking(present)), present[-1])


def ranking(present: list[Path]) -> list[Path]:
    """Those that were evaluated, by their finite `select_loss`, lowest first; among equals the newest first."""
    losses = {folder: loss for folder in reversed(present) if (loss := select_loss(folder)) is not None}
    return sorted(losses, key=losses.__getitem__)


def select_loss(folder: Path) -> float | None:
    """Of a checkpoint that was evaluated at an epoch's end, on the split the run selects on; None of any other."""
    try:
        value = atomic.parse_json((folder / "state.json").read_bytes(), dict[str, Any]).get("select_loss")
    except (OSError, ValueError):
        return None  # damaged: `read` says so when it is taken
    return value if isinstance(value, float) and math.isfinite(value) else None


def prune(parent: Path, keep: int, keep_best: int = 1) -> None:
    """Delete all but the newest `keep` and the `keep_best` of lowest loss; and what a kill left half written."""
    present = list_folders(parent)
    kept = {*present[-keep:], *ranking(present)[:keep_best]}
    for folder in [*parent.glob("step-*"), *parent.glob(".step-*")]:
        if folder not in kept and not folder.name.endswith(_DAMAGED):
            _delete(folder)


def _delete(folder: Path) -> None:
    """Out of sight in one rename, then file by file: a kill in between leaves nothing that looks like a checkpoint."""
    hidden = folder if folder.name.startswith(".") else _hidden(folder)
    if folder.exists() and hidden != folder:
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def to_cpu(tensors: Tensors) -> Tensors:
    """Copies, which later steps do not touch."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
