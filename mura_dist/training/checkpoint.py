"""Write, read and select checkpoints. A checkpoint is a folder that is complete or does not exist.

    checkpoints/step-00012000/model.safetensors                      weights that are evaluated and exported, torchvision's keys
                              training.safetensors                   with a moving average: the weights training resumes from
                              optimiser-00000-of-00001.safetensors   one for each rank under ZeRO stage 1, else one;
                                                                     any number of ranks can read them
                              state.json                             step, plateau, scores, sums of the epoch so far
                              COMPLETE                               SHA-256 of each file above; written last

All files are written into `.step-00012000.partial`, which is then renamed. Nothing is pickled. Where rank 0 writes all files, it
writes copies of the tensors in a background thread (checkpoint_writer.py).
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
from safetensors.torch import save as serialize
from torch import Tensor

from mura_dist.core import files as atomic
from mura_dist.core.errors import UserError
from mura_dist.core.storage import sha256

FORMAT = 2
MARK = "COMPLETE"
_CORRUPT_SUFFIX = ".damaged"
_FileName = Annotated[str, StringConstraints(strict=True, pattern="^[0-9a-z.-]+$")]
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. `state` is the content of its state.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, `step-00012000`."""
        return self.folder.name

    @property
    def step(self) -> int:
        """The number of steps done."""
        return self.state["step"]

    def model_weights(self) -> dict[str, Tensor]:
        """Read the state dict of the network that is evaluated and exported."""
        return _load(self.folder / "model.safetensors")

    def load_into(self, network: torch.nn.Module) -> None:
        """Load the model weights into `network`.

        Raises:
            UserError: the weights belong to another architecture.
        """
        try:
            network.load_state_dict(self.model_weights())
        except RuntimeError as error:  # its text has one line for each key that differs
            raise UserError(
                f"{self.folder} holds the weights of another network than the architecture in the run's recipe.toml. Restore "
                "that recipe.toml, or choose another checkpoint."
            ) from error

    def training_state(self) -> dict[str, Tensor]:
        """Read what `Engine.state` returned. It is empty for a run without a moving average."""
        path = self.folder / "training.safetensors"
        return _load(path) if path.is_file() else {}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Read the `OptimizerState.tensors` of all ranks: vectors concatenated by rank, scalars as they are."""
        shares = [_load(path) for path in sorted(self.folder.glob("optimiser-*.safetensors"))]
        return {
            name: torch.cat([share[name] for share in shares]) if value.ndim else value
            for name, value in shares[0].items()
        }


Tensors = dict[str, Tensor]


class _State(BaseModel):
    """The fields that every checkpoint's state.json has."""

    format: Annotated[int, Field(strict=True)]
    step: Annotated[int, Field(strict=True, ge=0, lt=2**53)]


def _load(path: Path) -> Tensors:
    """Read the tensors of a file. Nothing in it is executed."""
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        reason = str(error).partition("\n")[0][:160]
        raise UserError(f"{path} holds no tensors ({reason}). Choose another checkpoint, or train again.") from error


def read_digests(folder: Path) -> dict[str, str]:
    """Read COMPLETE: the SHA-256 of each file of a checkpoint, by file name.

    Raises:
        ValueError: the file is corrupt.
        OSError: the file cannot be read.
    """
    digests: dict[str, str] = atomic.parse_json((folder / MARK).read_bytes(), dict[_FileName, StrictStr])
    return digests


def _optimizer_file(rank: int, num_shares: int) -> str:
    return f"optimiser-{rank:05d}-of-{num_shares:05d}.safetensors"


def _partial_folder(parent: Path, step: int) -> Path:
    return parent / f".step-{step:08d}.partial"


def write(parent: Path, state: dict[str, Any], files: dict[str, Tensors], optimizer: Tensors) -> Path:
    """Write a whole checkpoint from one process.

    Args:
        parent: The run's `checkpoints` folder.
        state: The content of state.json, with the key `step`.
        files: CPU tensors by file stem, `model` among them.
        optimizer: The optimizer's state, on the CPU.

    Returns:
        The checkpoint's folder.
    """
    begin_partial(parent, state["step"])
    write_optimizer_share(parent, state["step"], optimizer)
    return complete_partial(parent, state, files)


def begin_partial(parent: Path, step: int) -> None:
    """Create an empty partial folder for a checkpoint. Called on rank 0."""
    shutil.rmtree(_partial_folder(parent, step), ignore_errors=True)
    _partial_folder(parent, step).mkdir(parents=True)


def write_optimizer_share(parent: Path, step: int, optimizer: Tensors, *, rank: int = 0, num_shares: int = 1) -> None:
    """Write a rank's share of the optimizer's state, after `begin_partial`."""
    _write_tensors(_partial_folder(parent, step) / _optimizer_file(rank, num_shares), optimizer)


def _write_tensors(path: Path, tensors: Tensors) -> None:
    """Write a file with the umask's permissions. safetensors.save_file ignores the umask and raises no OSError on a full disk."""
    path.write_bytes(serialize(tensors))


def complete_partial(parent: Path, state: dict[str, Any], files: dict[str, Tensors]) -> Path:
    """Write the remaining files of a checkpoint, then COMPLETE, and rename the folder. Called on rank 0 after all shares."""
    folder, partial = checkpoint_folder(parent, state["step"]), _partial_folder(parent, state["step"])
    for stem, tensors in files.items():
        _write_tensors(partial / f"{stem}.safetensors", tensors)
    atomic.write_json(partial / "state.json", {"format": FORMAT, **state})
    digests = {path.name: _sync_and_digest(path) for path in sorted(partial.iterdir())}
    atomic.write_json(partial / MARK, digests)
    _publish(partial, folder)
    return folder


def _publish(partial: Path, folder: Path) -> None:
    """Rename a complete partial folder to `folder`, which may hold the same step from before an interruption.

    After a kill between the two renames, `find_latest` finds the partial folder with its mark and renames it.
    """
    previous = _hidden(folder)
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(partial, folder)
    atomic.sync_folder(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return parent / f"step-{step:08d}"


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.deleted")


def _sync_and_digest(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and compare its files with their digests.

    Raises:
        ValueError: `folder` is incomplete, corrupt, or of another format. The text names the file.
    """
    try:
        digests = read_digests(folder)
        state = atomic.parse_json((folder / "state.json").read_bytes(), _State)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not complete ({error})") from error
    if missing := {"model.safetensors", "state.json"} - digests.keys():
        raise ValueError(f"{folder}/{MARK} does not name {', '.join(sorted(missing))}")
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder}/{name} is corrupt or missing")
    if state.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {state.get('format')}, this mura-dist reads format {FORMAT}")
    return Checkpoint(folder, state)


def list_folders(parent: Path) -> list[Path]:
    """Return the folders of the complete checkpoints below `parent`, by step."""
    folders = sorted(parent.glob("step-*"), key=_step_of)
    return [folder for folder in folders if _NAME.fullmatch(folder.name) and (folder / MARK).is_file()]


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def find_latest(parent: Path, report: Callable[[str], None] = lambda line: None) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None where there is no checkpoint. Called by the run's one writer at its start.

    Corrupt checkpoints that are newer are reported and renamed to `.step-N.damaged`, so that `prune` does not count them as the
    newest. A checkpoint that lacks only its last rename gets it.

    Args:
        parent: The run's `checkpoints` folder.
        report: Called with a line for each corrupt checkpoint.

    Raises:
        UserError: all checkpoints are corrupt. To start anew would delete what may still be restored.
    """
    for partial in parent.glob(".step-*.partial"):
        folder = parent / partial.name[1 : -len(".partial")]
        if (partial / MARK).is_file() and not folder.exists():
            _publish(partial, folder)
    folders, corrupt = list_folders(parent), []
    for folder in reversed(folders):
        try:
            checkpoint = read(folder)
        except ValueError as error:
            report(f"{error}; trying the checkpoint before")
            corrupt.append(folder)
        else:
            for corrupt_folder in corrupt:
                _hide_corrupt(corrupt_folder)
            return checkpoint
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints in {parent} can be read. Restore one, or use a new run=NEW."
        )
    return None


def _hide_corrupt(folder: Path) -> None:
    target = folder.with_name(f".{folder.name}{_CORRUPT_SUFFIX}")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)


def select(parent: Path, which: str) -> Checkpoint:
    """Read the checkpoint that `--checkpoint` names.

    Args:
        parent: The run's `checkpoints` folder.
        which: `best` (lowest loss on the selecting split), `last` or `step-N`.

    Raises:
        UserError: there is no such checkpoint, or it is corrupt.
    """
    folders = list_folders(parent)
    if not folders:
        raise UserError(f"{parent.parent} has no complete checkpoint. Train it with mura-dist train.")
    if which == "last":
        folder = folders[-1]
    elif which == "best":
        folder = best_folder(folders)
    else:
        match = re.fullmatch(r"step-(\d+)", which)
        matching = [folder for folder in folders if match and _step_of(folder) == int(match[1])]
        if not matching:
            names = ", ".join(folder.name for folder in folders)
            raise UserError(
                f"--checkpoint {which} does not exist: {parent.parent} has best, last, {names}. Choose one of these."
            )
        [folder] = matching
    try:
        return read(folder)
    except ValueError as error:
        raise UserError(f"--checkpoint {which} cannot be used: {error}. Choose another checkpoint.") from error


def best_folder(folders: list[Path]) -> Path:
    """Return the folder with the lowest finite `select_loss`, or the last folder where none has a loss."""
    return next(iter(sort_by_loss(folders)), folders[-1])


def sort_by_loss(folders: list[Path]) -> list[Path]:
    """Return the folders of evaluated checkpoints, lowest `select_loss` first, the newer first among equals."""
    losses = {folder: loss for folder in reversed(folders) if (loss := read_select_loss(folder)) is not None}
    return sorted(losses, key=losses.__getitem__)


def read_select_loss(folder: Path) -> float | None:
    """Return the loss on the selecting split of a checkpoint at an epoch's end. It is None for any other checkpoint."""
    try:
        value = atomic.parse_json((folder / "state.json").read_bytes(), dict[str, Any]).get("select_loss")
    except (OSError, ValueError):
        return None  # `read` reports a corrupt file when the checkpoint is selected
    return value if isinstance(value, float) and math.isfinite(value) else None


def prune(parent: Path, keep: int, keep_best: int = 1) -> None:
    """Delete all checkpoints but the newest `keep` and the `keep_best` with the lowest loss, and incomplete folders."""
    folders = list_folders(parent)
    retained = {*folders[-keep:], *sort_by_loss(folders)[:keep_best]}
    for folder in [*parent.glob("step-*"), *parent.glob(".step-*")]:
        if folder not in retained and not folder.name.endswith(_CORRUPT_SUFFIX):
            _delete(folder)


def _delete(folder: Path) -> None:
    """Rename the folder, then delete its files, so that a kill in between leaves nothing that looks like a checkpoint."""
    hidden = folder if folder.name.startswith(".") else _hidden(folder)
    if folder.exists() and hidden != folder:
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def copy_to_cpu(tensors: Tensors) -> Tensors:
    """Return copies on the CPU, which later steps do not change."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
