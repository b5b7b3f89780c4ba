"""What an exported model says of itself.

    export: Card -> JSON -> the ONNX file's metadata_props["mura_dist"]        predict, evaluate, page: and back

A model travels alone: everything needed to use it rightly is inside its one file, everything needed to doubt it too.
Keys a later version adds are ignored here; a change that would mislead an older reader raises `FORMAT`.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mura_dist import __version__
from mura_dist.core import files
from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.shards.codec import MAX_SIZE_PX
from mura_dist.metrics.operating_points import PAPER_OPERATING_POINT, FittedThresholds, Share

KEY = "mura_dist"
FORMAT = 1
PRODUCER = "mura-dist"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
Precision = Literal["fp32", "fp16", "bf16", "int8"]
RESIZE = "Pillow bilinear, antialiased, aspect not kept"

Schema = TypeVar("Schema", bound=BaseModel)


def parse_json(
    schema: type[Schema], text: str | bytes, *, subject: str, remake: str, damaged: str, remedy: str
) -> Schema:
    """Read `text` as JSON of `schema`, whose field `format` defaults to the newest format.

    Args:
        subject: what is of a format; with `remake`, how to write it anew, for the message about a later format.
        damaged: what is wrong where the text does not fit; with `remedy`, for the message that gives the reason.

    Raises:
        UserError: where the text is of a later format, is no JSON, or does not fit `schema`.
    """
    newest = schema.model_fields["format"].default
    try:
        fields = files.parse_json(text)
        later = isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > newest
        if not later:
            return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in first['loc']) or 'content'}: {first['msg']}"
    except ValueError as error:  # no JSON, or no text at all
        reason = str(error)
    else:
        raise UserError(
            f"{subject} of format {fields['format']}, mura-dist {__version__} reads up to {newest}; "
            f"update mura-dist, or {remake} with this version"
        )
    raise UserError(f"{damaged} ({reason}); {remedy}")


class TrainedOn(BaseModel):
    """The data behind the weights. `splits`: radiographs in each."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["phantoms", "radiographs"]
    manifest_sha256: str
    num_radiographs: int
    splits: dict[str, int] = {}


class EnsembleMember(BaseModel):
    """A checkpoint of an ensemble. `sha256` of its model.safetensors is its identity; the rest is for people."""

    model_config = ConfigDict(frozen=True)

    run: str  # in a list: the folder, relative to the list's; in a card or a report: the folder's name alone
    checkpoint: str
    architecture: str
    select_loss: Annotated[float, Field(allow_inf_nan=False)]  # what it was chosen by
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PrecisionChange(BaseModel):
    """What computing in fewer bits changed, against fp32, on radiographs of the split that chose the model."""

    model_config = ConfigDict(frozen=True)

    engine: str  # what computed both
    num_radiographs: int
    num_studies: int
    mean_probability: Share  # of a radiograph, absolute
    max_probability: Share
    num_changed_calls: int  # studies
    calibrated_on: int = 0  # train radiographs, of int8


class Card(BaseModel):
    """The metadata of an exported model; see each field."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    size: Annotated[int, Field(ge=1, le=MAX_SIZE_PX)]  # pixels of a side of `image`
    resize: str = RESIZE  # how radiograph.read came to that size
    study_types: list[str]  # those it was trained on
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}  # by study type; none: no call is made
    operating_point: str = PAPER_OPERATING_POINT  # what `thresholds` are of: the paper's 1/2, or one fitted on tune
    calibration: FittedThresholds = (
        FittedThresholds()
    )  # all that was fitted on tune: calibration, operating points, the uncertain band
    metrics: dict[str, Any] = {}  # metrics.json of the reported split, {} where it was not evaluated
    trained_on: TrainedOn
    selected_on: str  # the split that chose the checkpoint
    recipe: dict[str, Any]
    checkpoint: str
    members: list[EnsembleMember] = []  # of an ensemble, whose map is the mean of theirs; empty: one checkpoint
    terms: str = mura.TERMS
    licence: str = mura.LICENSE
    version: str = __version__
    opset: int | None = None  # written by export
    precision: Precision = "fp32"  # what it is to be computed in
    change: PrecisionChange | None = None  # of a precision below fp32: what it changed

    @property
    def of_drawings(self) -> bool:
        """Whether the model was trained on computer drawings, so that it says nothing about radiographs."""
        return self.trained_on.kind == "phantoms"

    def text(self) -> str:
        """JSON. Raises ValueError for a NaN: JSON has none."""
        return json.dumps(self.model_dump(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def parse(cls, text: str | None, model: str) -> "Card":
        """The card of the file called `model`, whose metadata is `text` (None: it has none of ours). Raises UserError."""
        if text is None:
            raise UserError(
                f"{model} is not a model exported by mura-dist export (no {KEY} metadata); "
                "give the model.onnx that `mura-dist export` wrote"
            )
        return parse_json(
            cls,
            text,
            subject=f"{model} has metadata",
            remake="export the model again",
            damaged=f"{model} has damaged {KEY} metadata",
            remedy="export the model again",
        )
