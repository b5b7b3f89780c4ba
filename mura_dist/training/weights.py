"""Which weights make a model: a run's one checkpoint, or the several of a model list.

RUN, FILE.json -> ModelWeights -> one module: image uint8 -> logit, activation_map          for evaluate and export
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mura_dist.core import config
from mura_dist.core.config import Settings
from mura_dist.core.errors import UserError
from mura_dist.models import model_list as members
from mura_dist.models.card import Member
from mura_dist.models.densenet import build
from mura_dist.models.ensemble import Ensemble
from mura_dist.models.model_list import ModelList
from mura_dist.models.target import Target
from mura_dist.training import checkpoint
from mura_dist.training.checkpoint import Checkpoint
from mura_dist.training.run import Run

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelWeights:
    """Checkpoints that make one model. `runs`: the run of each; `members`: what a list says of them, empty for a run's own."""

    name: str
    runs: tuple[Run, ...]
    checkpoints: tuple[Checkpoint, ...]
    members: tuple[Member, ...] = ()

    @classmethod
    def from_target(cls, target: Target, which: str) -> "ModelWeights":
        """Those of a run's checkpoint `which`, or of a model list, which has its own."""
        if target.kind != "list":
            return cls.from_run(target.path, which)
        target.check_checkpoint(which)
        return cls.from_list(target.path)

    @classmethod
    def from_run(cls, folder: Path, which: str) -> "ModelWeights":
        """A run's checkpoint: best, last or step-N. UserError where there is no such run or checkpoint."""
        run = Run.load(folder)
        chosen = checkpoint.select(run.checkpoints, which)
        return cls(chosen.name, (run,), (chosen,))

    @classmethod
    def from_list(cls, path: Path) -> "ModelWeights":
        """The members of a list, each checked. UserError naming the one that changed or is gone."""
        listed = ModelList.load(path)
        found = [_member(path, member) for member in listed.members]
        runs, checkpoints = (tuple(part) for part in zip(*found, strict=True))
        named = members.anonymous(path, listed.members)
        return cls(members.title(named), runs, checkpoints, tuple(named))

    @property
    def settings(self) -> Settings:
        """Those of the first member's run: how the shards are loaded."""
        return self.runs[0].settings

    def digests(self) -> list[str]:
        """SHA-256 of each checkpoint's weights: which ones these are, whatever they are called."""
        return [digest(chosen.folder) for chosen in self.checkpoints]

    def data(self) -> dict[str, Any]:
        """data.json of the first member's run; the others learnt from the same."""
        return self.runs[0].data()

    def recipe(self) -> dict[str, Any]:
        """The settings to show; a list of values, one a member, where they differ."""
        each = [config.shareable(run.settings) for run in self.runs]
        return {
            key: value if all(one[key] == value for one in each) else [one[key] for one in each]
            for key, value in each[0].items()
        }

    def load_model(self) -> torch.nn.Module:
        """On the CPU, in eval mode."""
        networks = [_network(run, chosen) for run, chosen in zip(self.runs, self.checkpoints, strict=True)]
        return (Ensemble(networks) if self.members else networks[0]).eval()


def _network(run: Run, chosen: Checkpoint) -> torch.nn.Module:
    network = build(run.settings.architecture)
    chosen.load_into(network)
    return network


def _member(path: Path, member: Member) -> tuple[Run, Checkpoint]:
    run_folder = path.parent / member.run
    folder = run_folder / "checkpoints" / member.checkpoint
    again = "restore it, or make the list again with `mura-dist ensemble`"
    if not (folder / checkpoint.MARK).is_file():
        raise UserError(f"{path}: its member {folder} is gone; {again}")
    try:
        found = checkpoint.read(folder)
    except ValueError as error:
        raise UserError(f"{path}: of its members, {error}; {again}") from error
    if (sha256 := digest(folder)) != member.sha256:
        raise UserError(
            f"{path}: its member {folder} has changed ({WEIGHTS} is {sha256[:12]}, listed as {member.sha256[:12]}); {again}"
        )
    return Run.load(run_folder), found


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its mark says it; `checkpoint.read` compares the mark with the files."""
    try:
        return checkpoint.read_mark(folder)[WEIGHTS]
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder}/{checkpoint.MARK} is damaged ({error}); choose another checkpoint") from error
