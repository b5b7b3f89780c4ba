"""Which weights make a model: a run's one checkpoint, or an ensemble of several.

    runs -> checkpoints by loss on the selecting split -> choose -> FILE.json (model_list.py)
    RUN, FILE.json -> Weights -> one module: image uint8 -> logit, activation_map          for evaluate and export

An ensemble averages its members' probabilities. It gives the logit of that mean, computed from logits alone: as a
probability in fp32 a logit of 17 is 1 already.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mura_dist.core import config, files
from mura_dist.core.config import Settings
from mura_dist.core.errors import Refusal
from mura_dist.models import model_list as members
from mura_dist.models.card import Member
from mura_dist.models.densenet import build
from mura_dist.models.model_list import ModelList
from mura_dist.training import checkpoint
from mura_dist.training.checkpoint import Checkpoint
from mura_dist.training.run import Run

WEIGHTS = "model.safetensors"


class Ensemble(torch.nn.Module):
    """One model of several. A single member is handed through: the same bits."""

    def __init__(self, networks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 1, S, S) uint8 -> logit (B,) float32, activation_map (B, h, w) float32: the mean of the members' maps.

        The mean of that map over its cells is the mean of the logits, which is not the logit of the mean probability.
        """
        outputs = [network(image) for network in self.networks]
        if len(outputs) == 1:
            return outputs[0]
        logits = torch.stack([logit for logit, _ in outputs])  # (K, B)
        maps = torch.stack([activation_map for _, activation_map in outputs])  # (K, B, h, w)
        return mean_probability(logits), maps.mean(dim=0)


def mean_probability(logits: Tensor) -> Tensor:
    """(K, B) -> (B,): the logit of the mean of the K probabilities; as log odds, so that neither end is rounded away.

    logsumexp(logsigmoid(l)) - logsumexp(logsigmoid(-l)), in steps that no exporter rewrites: torch.onnx makes log(sigmoid(l))
    of logsigmoid, which is -inf at -100.
    """
    return _logsumexp(_logsigmoid(logits)) - _logsumexp(_logsigmoid(-logits))


def _logsigmoid(x: Tensor) -> Tensor:
    return x.clamp(max=0) - torch.log1p(torch.exp(-x.abs()))


def _logsumexp(x: Tensor) -> Tensor:
    """Over the first dimension."""
    largest = x.amax(dim=0)
    return largest + torch.log(torch.exp(x - largest).sum(dim=0))


@dataclass(frozen=True)
class Weights:
    """Checkpoints that make one model. `runs`: the run of each; `members`: what a list says of them, empty for a run's own."""

    name: str
    runs: tuple[Run, ...]
    checkpoints: tuple[Checkpoint, ...]
    members: tuple[Member, ...] = ()

    @classmethod
    def of_run(cls, folder: Path, which: str) -> "Weights":
        """A run's checkpoint: best, last or step-N. Refusal where there is no such run or checkpoint."""
        run = Run.load(folder)
        chosen = checkpoint.select(run.checkpoints, which)
        return cls(chosen.name, (run,), (chosen,))

    @classmethod
    def of_list(cls, path: Path) -> "Weights":
        """The members of a list, each checked. Refusal naming the one that changed or is gone."""
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
        return [_digest(chosen.folder) for chosen in self.checkpoints]

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

    def model(self) -> torch.nn.Module:
        """On the CPU, in eval mode."""
        networks = [_network(run, chosen) for run, chosen in zip(self.runs, self.checkpoints, strict=True)]
        return (Ensemble(networks) if self.members else networks[0]).eval()


def _network(run: Run, chosen: Checkpoint) -> torch.nn.Module:
    network = build(run.settings.architecture)
    network.load_state_dict(chosen.model())
    return network


def _member(path: Path, member: Member) -> tuple[Run, Checkpoint]:
    run_folder = path.parent / member.run
    folder = run_folder / "checkpoints" / member.checkpoint
    again = "restore it, or make the list again with `mura-dist ensemble`"
    if not (folder / checkpoint.MARK).is_file():
        raise Refusal(f"{path}: its member {folder} is gone; {again}")
    try:
        found = checkpoint.read(folder)
    except ValueError as error:
        raise Refusal(f"{path}: of its members, {error}; {again}") from error
    if (digest := _digest(folder)) != member.sha256:
        raise Refusal(
            f"{path}: its member {folder} has changed ({WEIGHTS} is {digest[:12]}, listed as {member.sha256[:12]}); {again}"
        )
    return Run.load(run_folder), found


def _digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights, as its mark says it; `checkpoint.read` compares the mark with the files."""
    return json.loads((folder / checkpoint.MARK).read_bytes())[WEIGHTS]


# ---- choosing


@dataclass(frozen=True, order=True)
class _Candidate:
    """An evaluated checkpoint; ordered by loss, then so that the order of the runs does not matter."""

    select_loss: float
    run: str  # relative to the list's folder
    checkpoint: str
    folder: Path
    architecture: str

    def member(self) -> Member:
        return Member(
            run=self.run,
            checkpoint=self.checkpoint,
            architecture=self.architecture,
            select_loss=self.select_loss,
            sha256=_digest(self.folder),
        )


def choose(
    run_folders: Sequence[Path], out: Path, *, top: int, say: Callable[[str], None] = lambda line: None
) -> ModelList:
    """The `top` checkpoints of lowest loss among all complete ones of the runs, written as a list to `out`.

    Damaged checkpoints are reported and passed over. Refusal where the runs do not go together, or hold too few
    evaluated checkpoints.
    """
    _check(run_folders, out, top)
    runs = [Run.load(folder) for folder in run_folders]
    _go_together(runs)
    candidates = sorted(candidate for run in runs for candidate in _candidates(run, out.parent))
    chosen = _sound(candidates, top, say)
    if len(chosen) < top:
        few = f"only {len(chosen)}" if chosen else "none"
        fewer = f"give --top {len(chosen)}, or train" if chosen else "train"
        raise Refusal(
            f"--top {top}: of the complete checkpoints in {_names(run_folders)} {few} can be chosen (evaluated, sound); "
            f"{fewer} with keep_best={top}, which keeps as many of a run"
        )
    _different(chosen)
    data = runs[0].data()
    made = ModelList(
        members=[candidate.member() for candidate in chosen],
        select_on=runs[0].settings.select_on,
        size=data["size"],
        manifest_sha256=data["manifest_sha256"],
    )
    files.write_json(out, made.model_dump())
    return made


def _check(run_folders: Sequence[Path], out: Path, top: int) -> None:
    if top < 1:
        raise Refusal(f"--top {top}: must be at least 1; the paper's ensemble has 5")
    if out.suffix.lower() != members.SUFFIX:
        raise Refusal(f"--out {out}: must end in {members.SUFFIX}, other commands know a list by it; add it")
    if out.is_dir():
        raise Refusal(f"--out {out} is a folder; give a file")
    seen: set[Path] = set()
    for folder in run_folders:
        if folder.resolve() in seen:
            raise Refusal(f"{folder} is given twice; give each run once, its checkpoints all take part")
        seen.add(folder.resolve())


def _go_together(runs: Sequence[Run]) -> None:
    first = runs[0]
    for other in runs[1:]:
        for what, one, two in zip(
            ("radiographs of size", "a manifest of digest", "checkpoints chosen on"),
            _kind(first),
            _kind(other),
            strict=True,
        ):
            if one != two:
                raise Refusal(
                    f"{other.folder} has {what} {str(two)[:12]}, {first.folder} {str(one)[:12]}; the members of an ensemble "
                    "are compared by their loss: give runs with the same shards and the same select_on"
                )


def _kind(run: Run) -> tuple[int, str, str]:
    """What must be equal: size in pixels, manifest's digest, selecting split."""
    data = run.data()
    return data["size"], data["manifest_sha256"], run.settings.select_on


def _candidates(run: Run, beside: Path) -> Iterator[_Candidate]:
    """Its checkpoints that were evaluated."""
    relative = Path(os.path.relpath(run.folder.resolve(), beside.resolve())).as_posix()
    for folder in checkpoint.folders(run.checkpoints):
        if (loss := checkpoint.select_loss(folder)) is not None:
            yield _Candidate(loss, relative, folder.name, folder, run.settings.architecture)


def _sound(candidates: Sequence[_Candidate], top: int, say: Callable[[str], None]) -> list[_Candidate]:
    """The first `top` that can be read."""
    sound: list[_Candidate] = []
    for candidate in candidates:
        if len(sound) == top:
            break
        try:
            checkpoint.read(candidate.folder)
        except ValueError as error:
            say(f"{error}; taking the next one")
        else:
            sound.append(candidate)
    return sound


def _different(chosen: Sequence[_Candidate]) -> None:
    seen: dict[str, _Candidate] = {}
    for candidate in chosen:
        before = seen.setdefault(_digest(candidate.folder), candidate)
        if before is not candidate:
            raise Refusal(
                f"{candidate.folder} and {before.folder} hold the same weights, which would count twice; leave one run out"
            )


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
