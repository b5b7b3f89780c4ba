"""Choose the members of an ensemble among the checkpoints of runs.

runs -> checkpoints by loss on the selecting split -> select_members -> FILE.json (model_list.py)
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.models import model_list
from mura_dist.models.card import EnsembleMember
from mura_dist.models.model_list import ModelList
from mura_dist.training import checkpoint
from mura_dist.training.run import Run
from mura_dist.training.weights import weights_digest


@dataclass(frozen=True, order=True)
class _Candidate:
    """An evaluated checkpoint. The order is by loss, then independent of the order of the runs."""

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
    """Choose the `top` checkpoints of lowest loss among all complete ones of the runs, and write them as a list to `out`.

    Args:
        run_folders: The folders of the runs.
        out: The JSON file to write.
        top: The number of members.
        log: Called with a line for each corrupt checkpoint, which is skipped.

    Raises:
        UserError: the runs are not comparable, or have too few evaluated checkpoints.
    """
    _check_arguments(run_folders, out, top)
    runs = [Run.load(folder) for folder in run_folders]
    _check_comparable(runs)
    candidates = sorted(candidate for run in runs for candidate in _candidates(run, out.parent))
    selected = _valid(candidates, top, log)
    if len(selected) < top:
        available = f"only {len(selected)}" if selected else "none"
        remedy = f"Give --top {len(selected)}, or train" if selected else "Train"
        raise UserError(
            f"--top {top}: of the checkpoints in {_names(run_folders)} {available} can be chosen (complete, evaluated, intact). "
            f"{remedy} with keep_best={top}, so that a run keeps as many."
        )
    _check_distinct(selected)
    data = runs[0].data()
    members = ModelList(
        members=[candidate.member() for candidate in selected],
        select_on=runs[0].settings.select_on,
        size=data["size"],
        manifest_sha256=data["manifest_sha256"],
    )
    files.write_json(out, members.model_dump())
    return members


def _check_arguments(run_folders: Sequence[Path], out: Path, top: int) -> None:
    if top < 1:
        raise UserError(f"--top {top} is less than 1. The paper's ensemble has 5 members.")
    if out.suffix.lower() != model_list.SUFFIX:
        raise UserError(f"--out {out} must end in {model_list.SUFFIX}. Other commands recognize a model list by it.")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder. Give a file.")
    folders: set[Path] = set()
    for folder in run_folders:
        if folder.resolve() in folders:
            raise UserError(f"{folder} is given twice. Give each run once: all its checkpoints take part.")
        folders.add(folder.resolve())


def _check_comparable(runs: Sequence[Run]) -> None:
    first = runs[0]
    labels = ("radiographs of size", "a manifest of digest", "checkpoints selected on")
    for run in runs[1:]:
        for label, value, expected in zip(labels, _comparable(run), _comparable(first), strict=True):
            if value != expected:
                raise UserError(
                    f"{run.folder} has {label} {str(value)[:12]}, {first.folder} {str(expected)[:12]}. The members of an "
                    "ensemble are compared by their loss: give runs with the same shards and the same select_on."
                )


def _comparable(run: Run) -> tuple[int, str, str]:
    """Return what must be equal in all runs: size in pixels, digest of the manifest, selecting split."""
    data = run.data()
    return data["size"], data["manifest_sha256"], run.settings.select_on


def _candidates(run: Run, list_folder: Path) -> Iterator[_Candidate]:
    relative = Path(os.path.relpath(run.folder.resolve(), list_folder.resolve())).as_posix()
    for folder in checkpoint.list_folders(run.checkpoints):
        if (loss := checkpoint.read_select_loss(folder)) is not None:
            yield _Candidate(loss, relative, folder.name, folder, run.settings.architecture)


def _valid(candidates: Sequence[_Candidate], top: int, log: Callable[[str], None]) -> list[_Candidate]:
    """Return the first `top` candidates that are not corrupt."""
    valid: list[_Candidate] = []
    for candidate in candidates:
        if len(valid) == top:
            break
        try:
            checkpoint.read(candidate.folder)
        except ValueError as error:
            log(f"{error}; trying the next checkpoint")
        else:
            valid.append(candidate)
    return valid


def _check_distinct(candidates: Sequence[_Candidate]) -> None:
    by_digest: dict[str, _Candidate] = {}
    for candidate in candidates:
        first = by_digest.setdefault(weights_digest(candidate.folder), candidate)
        if first is not candidate:
            raise UserError(
                f"{candidate.folder} and {first.folder} hold the same weights, which would count twice. Remove one of the runs."
            )


def _names(folders: Sequence[Path]) -> str:
    return ", ".join(map(str, folders))
