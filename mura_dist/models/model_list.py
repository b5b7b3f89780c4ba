"""A model list: the checkpoints of an ensemble, as a JSON file. Read without torch, so that predict can.

    mura-dist ensemble -> FILE.json -> evaluate, export (they load the checkpoints), predict (it wants FILE.onnx beside it)

A list names checkpoints, it holds none: move it together with its runs. A member is known by the digest of its weights.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mura_dist import __version__
from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.shards.codec import MAX_SIZE_PX
from mura_dist.models.card import EnsembleMember, parse_json

FORMAT = 1
SUFFIX = ".json"


class ModelList(BaseModel):
    """What the file holds; all members learnt from the same manifest at the same size."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    members: Annotated[list[EnsembleMember], Field(min_length=1)]  # lowest loss first
    select_on: Literal["tune", "valid"]  # the split of `select_loss`
    size: Annotated[int, Field(ge=1, le=MAX_SIZE_PX)]  # pixels of a side
    manifest_sha256: str
    terms: str = mura.TERMS
    version: str = __version__

    @classmethod
    def load(cls, path: Path) -> "ModelList":
        """Raises UserError where `path` is no list, or one of a later format."""
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the list that `mura-dist ensemble` wrote")
        return parse_json(
            cls,
            path.read_bytes(),
            subject=f"{path} is a model list",
            remake="make the list again",
            damaged=f"{path} is not a model list",
            remedy="give the file that `mura-dist ensemble` wrote",
        )


def have_same_weights(some: Iterable[EnsembleMember], others: Iterable[EnsembleMember]) -> bool:
    """Whether both are the same weights, in whatever order and wherever they lie."""
    return sorted(one.sha256 for one in some) == sorted(one.sha256 for one in others)


def strip_run_folders(path: Path, listed: Iterable[EnsembleMember]) -> list[EnsembleMember]:
    """The members of the list `path` without the folders of this machine, for what leaves it: a run by its name alone."""
    return [one.model_copy(update={"run": (path.parent / one.run).resolve().name}) for one in listed]


def format_title(some: Sequence[EnsembleMember]) -> str:
    """In a few words: `ensemble of 3: a step-12 step-24, b step-24`."""
    steps: dict[str, list[str]] = {}
    for one in some:
        steps.setdefault(one.run, []).append(f"step-{one.checkpoint.removeprefix('step-').lstrip('0') or '0'}")
    return f"ensemble of {len(some)}: {', '.join(' '.join([run, *names]) for run, names in steps.items())}"
