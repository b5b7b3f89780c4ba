"""Resolve which weights make a model: one checkpoint of a run, or the checkpoints of a model list.

RUN or FILE.json -> ModelWeights -> one module: image (B, 1, S, S) uint8 -> logit (B,), activation_map (B, h, w)

`evaluate`, `export` and `load_network` use it. DeepSpeed is not imported.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mura_dist.core import config, files
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.core.storage import sha256
from mura_dist.data.folder_kind import RECIPE
from mura_dist.models import model_list
from mura_dist.models.card import EnsembleMember
from mura_dist.models.densenet import build
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.model_list import ModelList
from mura_dist.models.target import Target
from mura_dist.training import checkpoint as checkpoints
from mura_dist.training.checkpoint import Checkpoint
from mura_dist.training.run import Run

WEIGHTS = "model.safetensors"


def load_network(run: str | os.PathLike[str], checkpoint: str = "best") -> torch.nn.Module:
    """Load the network of a run's checkpoint, on the CPU and in eval mode.

    The weights are those that `mura-dist evaluate` scores and `mura-dist export` writes. They are the moving average if the
    recipe sets `ema`.

    Args:
        run: The folder of a run, or a model list (FILE.json) of `mura-dist ensemble`.
        checkpoint: `best` (lowest loss on the selecting split), `last` or `step-N`. A model list accepts `best` alone.

    Returns:
        A module that maps image (B, 1, S, S) uint8 to logit (B,) float32 and activation_map (B, h, w) float32. For a run it is a
        `DenseNet`. For a model list it is an `Ensemble`, whose logit is that of the mean probability.

    Raises:
        UserError: `run` is neither a run nor a model list, or the checkpoint is missing or corrupt.

    Example:
        >>> network = mura_dist.load_network("runs/mura", checkpoint="last")
        >>> with torch.inference_mode():
        ...     logit, activation_map = network(image)
    """
    target = Target.parse(files.expand_user(os.fspath(run)))
    if target.kind == "onnx":
        raise UserError(f"{target.path} is a file, not the folder of a run. Load an ONNX file with mura_dist.load.")
    return ModelWeights.from_target(target, checkpoint).load_model()


@dataclass(frozen=True)
class ModelWeights:
    """The checkpoints that make one model.

    Attributes:
        name: The checkpoint's name, or the ensemble's.
        runs: The run of each checkpoint.
        checkpoints: One checkpoint of a run, or one for each member of a model list.
        members: The entries of the model list; empty for a run.
    """

    name: str
    runs: tuple[Run, ...]
    checkpoints: tuple[Checkpoint, ...]
    members: tuple[EnsembleMember, ...] = ()

    @classmethod
    def from_target(cls, target: Target, which: str) -> "ModelWeights":
        """Return the weights of a run's checkpoint `which`, or of a model list, which names its own."""
        if target.kind != "list":
            return cls.from_run(target.path, which)
        target.check_checkpoint(which)
        return cls.from_list(target.path)

    @classmethod
    def from_run(cls, folder: Path, which: str) -> "ModelWeights":
        """Return the weights of a run's checkpoint.

        Args:
            folder: The run's folder.
            which: `best`, `last` or `step-N`.

        Raises:
            UserError: there is no such run or checkpoint.
        """
        run = Run.load(folder)
        checkpoint = checkpoints.select(run.checkpoints, which)
        return cls(checkpoint.name, (run,), (checkpoint,))

    @classmethod
    def from_list(cls, path: Path) -> "ModelWeights":
        """Return the weights of a model list.

        Raises:
            UserError: a member is missing or has changed.
        """
        entries = ModelList.load(path).members
        loaded = [_load_member(path, member) for member in entries]
        members = model_list.strip_run_folders(path, entries)
        return cls(
            model_list.format_title(members),
            tuple(run for run, _ in loaded),
            tuple(checkpoint for _, checkpoint in loaded),
            tuple(members),
        )

    @property
    def settings(self) -> Settings:
        """The settings of the first member's run. They say how shards are loaded."""
        return self.runs[0].settings

    def digests(self) -> list[str]:
        """Return the SHA-256 of each checkpoint's weights. It identifies them independent of names."""
        return [weights_digest(checkpoint.folder) for checkpoint in self.checkpoints]

    def inputs(self) -> list[dict[str, str]]:
        """Return the files that make the model and describe it, for a stamp: names and SHA-256, for each member."""
        return [
            {
                "run": run.folder.resolve().name,
                "checkpoint": checkpoint.name,
                "weights_sha256": weights_digest(checkpoint.folder),
                "recipe_sha256": sha256(run.folder / RECIPE),
                "data_sha256": sha256(run.folder / "data.json"),
            }
            for run, checkpoint in zip(self.runs, self.checkpoints, strict=True)
        ]

    def data(self) -> dict[str, Any]:
        """Return data.json of the first member's run. All members were trained on the same data."""
        return self.runs[0].data()

    def recipe(self) -> dict[str, Any]:
        """Return the settings to publish. A setting that differs between members is a list with one value a member."""
        recipes = [config.shareable(run.settings) for run in self.runs]
        return {
            key: value if all(recipe[key] == value for recipe in recipes) else [recipe[key] for recipe in recipes]
            for key, value in recipes[0].items()
        }

    def load_model(self) -> torch.nn.Module:
        """Return the module with its weights, on the CPU and in eval mode."""
        networks = [
            _build_network(run, checkpoint) for run, checkpoint in zip(self.runs, self.checkpoints, strict=True)
        ]
        return (Ensemble(networks) if self.members else networks[0]).eval()


def _build_network(run: Run, checkpoint: Checkpoint) -> torch.nn.Module:
    network = build(run.settings.architecture)
    checkpoint.load_into(network)
    return network


def _load_member(path: Path, member: EnsembleMember) -> tuple[Run, Checkpoint]:
    run_folder = path.parent / member.run
    folder = run_folder / "checkpoints" / member.checkpoint
    remedy = "Restore it, or make the list again with `mura-dist ensemble`."
    if not (folder / checkpoints.MARK).is_file():
        raise UserError(f"{path}: the member {folder} is missing. {remedy}")
    try:
        checkpoint = checkpoints.read(folder)
    except ValueError as error:
        raise UserError(f"{path}: a member is corrupt: {error}. {remedy}") from error
    if (digest := weights_digest(folder)) != member.sha256:
        raise UserError(
            f"{path}: the member {folder} has changed: {WEIGHTS} has the digest {digest[:12]}, the list has "
            f"{member.sha256[:12]}. {remedy}"
        )
    return Run.load(run_folder), checkpoint


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights as its COMPLETE file records it.

    `checkpoint.read` compares the record with the file.

    Raises:
        UserError: the COMPLETE file is corrupt.
    """
    try:
        return checkpoints.read_digests(folder)[WEIGHTS]
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}/{checkpoints.MARK} is corrupt ({error}). Choose another checkpoint.") from error
