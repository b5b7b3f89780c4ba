"""Parse and validate index.json, which may come from another machine, before any of it is used as a path or size.

bytes -> parse -> valid tar names, counts and sizes; or UserError
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictStr, StringConstraints

from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data import mura
from mura_dist.data.shards.codec import MAX_SIZE_PX

FORMAT = 1

_Count = Annotated[int, Field(strict=True, ge=0, lt=2**56)]
_Digest = Annotated[str, StringConstraints(strict=True, pattern="^[0-9a-f]{64}$")]


_Name = Annotated[str, StringConstraints(strict=True, pattern=f"^({'|'.join(mura.SPLITS)})-[0-9]{{6}}[.]tar$")]


class _Shard(BaseModel):
    name: _Name
    num_samples: _Count
    bytes: _Count
    sha256: _Digest


class _Shards(BaseModel):
    num_studies: _Count
    num_radiographs: _Count
    shards: list[_Shard]


class _Manifest(BaseModel):
    sha256: _Digest


class _Unreadable(BaseModel):
    row: _Count
    code: StrictStr


class FileFault(BaseModel):
    """A radiograph missing from its shard, with the reason."""

    row: _Count
    code: StrictStr
    reason: StrictStr


class CompletionMark(BaseModel):
    """The record of a finished shard. `sha256` is None where no file was readable."""

    name: _Name
    num_samples: _Count
    bytes: _Count
    sha256: _Digest | None
    unreadable: list[FileFault]


class _Index(BaseModel):
    """The keys of index.json that are read."""

    holds: Literal["phantoms", "radiographs"]
    size: Annotated[int, Field(strict=True, ge=1, le=MAX_SIZE_PX)]
    encoding: Literal["raw", "png", "jpeg"]
    manifest: _Manifest
    splits: dict[str, _Shards]
    unreadable: list[_Unreadable]
    defects: dict[str, list[Any]]


class _Format(BaseModel):
    format: Annotated[int, Field(strict=True)]


def parse(data: bytes, folder: StoragePath) -> dict[str, Any]:
    """Parse the index.json of a folder. Raises UserError where it is corrupt or of another format."""
    try:
        version = files.parse_json(data, _Format)["format"]
        index: dict[str, Any] = files.parse_json(data, _Index) if version == FORMAT else {}
        _check_names(index.get("splits", {}))
    except ValueError as error:
        raise UserError(f"{folder}/index.json is corrupt ({error}). Make the shards again.") from error
    if version != FORMAT:
        raise UserError(
            f"{folder} has shards of format {version} (this version reads format {FORMAT}). "
            "Make them again, or install the version that wrote them."
        )
    return index


def _check_names(splits: dict[str, Any]) -> None:
    for split, content in splits.items():
        if split not in mura.SPLITS:
            raise ValueError(f"splits: {split[:80]!r} is not a split")
        names = [shard["name"] for shard in content["shards"]]
        if len(set(names)) < len(names):
            raise ValueError(f"splits.{split}: a shard is listed twice")
        if foreign := next((name for name in names if not name.startswith(f"{split}-")), None):
            raise ValueError(f"splits.{split}: {foreign} belongs to another split")
