"""Choose the members of an ensemble among the checkpoints of runs.

runs -> checkpoints by loss on the selecting split -> select_members -> FILE.json (model_list.py)
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.models import model_list as members
from mura_dist.models.card import EnsembleMember
from mura_dist.models.model_list import ModelList
from mura_dist.training import checkpoint
from mura_dist.training.run import Run
from mura_dist.training.weights import weights_digest


@dataclass(frozen=True, order=True)
class _Candidate:
    """An evaluated checkpoint; ordered by loss, then so that the order of the runs does not matter."""

    select_loss: float
    run: str  # relative to the list's folder
    checkpoint: str
    folder: Path
    architecture: str

    def member(self) -> EnsembleMember:
        return EnsembleMember(
            run=self.run,
            checkpoint=self.checkpoint,
            architecture=self.architecture,
            select_loss=self.select_loss,
            sha256=weights_digest(self.folder),
        )


def select_members(
    run_folders: Sequence[Path], out: Path, *, top: int, log: Callable[[str], None] = lambda line: None
) -> ModelList:
    """The `top` checkpoints of lowest loss among all complete ones of the runs, written as a list to `out`.

    CorruptSampleError checkpoints are reported and passed over. UserError where the runs do not go together, or hold too few
    evaluated checkpoints.
    """
    _check(run_folders, out, top)
    runs = [Run.load(folder) for folder in run_folders]
    _go_together(runs)
    candidates = sorted(candidate for run in runs for candidate in _candidates(run, out.parent))
    chosen = _sound(candidates, top, log)
    if len(chosen) < top:
        few = f"only {len(chosen)}" if chosen else "none"
        fewer = f"give --top {len(chosen)}, or train" if chosen else "train"
        raise UserError(
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
        raise UserError(f"--top {top}: must be at least 1; the paper's ensemble has 5")
    if out.suffix.lower() != members.SUFFIX:
        raise UserError(f"--out {out}: must end in {members.SUFFIX}, other commands know a list by it; add it")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give a file")
    seen: set[Path] = set()
    for folder in run_folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder} is given twice; give each run once, its checkpoints all take part")
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
                raise UserError(
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
    for folder in checkpoint.list_folders(run.checkpoints):
        if (loss := checkpoint.read_select_loss(folder)) is not None:
            yield _Candidate(loss, relative, folder.name, folder, run.settings.architecture)


def _sound(candidates: Sequence[_Candidate], top: int, log: Callable[[str], None]) -> list[_Candidate]:
    """The first `top` that can be read."""
    sound: list[_Candidate] = []
    for candidate in candidates:
        if len(sound) == top:
            break
        try:
            checkpoint.read(candidate.folder)
        except ValueError as error:
            log(f"{error}; taking the next one")
        else:
            sound.append(candidate)
    return sound


def _different(chosen: Sequence[_Candidate]) -> None:
    seen: dict[str, _Candidate] = {}
    for candidate in chosen:
        before = seen.setdefault(weights_digest(candidate.folder), candidate)
        if before is not candidate:
            raise UserError(
                f"{candidate.folder} and {before.folder} hold the same weights, which would count twice; leave one run out"
            )


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
