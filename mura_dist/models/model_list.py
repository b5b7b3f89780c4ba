"""Read and describe a model list: the checkpoints of an ensemble, as a JSON file. No torch.

    mura-dist ensemble -> FILE.json -> evaluate, export (which load the checkpoints), predict (which needs FILE.onnx beside it)

A list names checkpoints and does not contain them: move it together with its runs. The digest of its weights identifies a member.
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
    """The content of a model list. All members were trained on the same manifest at the same size."""

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
        """Read a model list.

        Raises:
            UserError: `path` is no list, or one of a later format.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file. Pass the list that `mura-dist ensemble` wrote.")
        return parse_json(
            cls,
            path.read_bytes(),
            subject=f"{path} is a model list",
            remake="make the list again",
            problem=f"{path} is not a model list",
            remedy="Pass the file that `mura-dist ensemble` wrote.",
        )


def have_same_weights(first: Iterable[EnsembleMember], second: Iterable[EnsembleMember]) -> bool:
    """Return whether both have the same weights, in any order and any folder."""
    return sorted(member.sha256 for member in first) == sorted(member.sha256 for member in second)


def strip_run_folders(path: Path, members: Iterable[EnsembleMember]) -> list[EnsembleMember]:
    """Return the members of the list `path` with the name of their run only, so that no folder of this machine is published."""
    return [member.model_copy(update={"run": (path.parent / member.run).resolve().name}) for member in members]


def format_title(members: Sequence[EnsembleMember]) -> str:
    """Return a short title: `ensemble of 3: a step-12 step-24, b step-24`."""
    steps: dict[str, list[str]] = {}
    for member in members:
        steps.setdefault(member.run, []).append(f"step-{member.checkpoint.removeprefix('step-').lstrip('0') or '0'}")
    return f"ensemble of {len(members)}: {', '.join(' '.join([run, *names]) for run, names in steps.items())}"
