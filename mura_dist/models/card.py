"""Define the model card: the metadata of an exported model.

    export: Card -> JSON -> the ONNX file's metadata_props["mura_dist"]        -> Card in predict, evaluate, page

The one file of a model holds all that is needed to use it and to judge it. Keys of later versions are ignored. A
change that would mislead an older version increments `FORMAT`.
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
WEIGHT_BITS = (7, 8)  # of int8; the first is the default
RESIZE = "Pillow bilinear, antialiased, aspect not kept"

Schema = TypeVar("Schema", bound=BaseModel)


def parse_json(
    schema: type[Schema], text: str | bytes, *, subject: str, remake: str, problem: str, remedy: str
) -> Schema:
    """Parse JSON of a schema whose field `format` defaults to the newest format.

    Args:
        schema: the model of the content.
        text: JSON.
        subject: names the file, for the message about a later format.
        remake: how to write the file again, for the same message.
        problem: what is wrong if the text does not fit, for the message with the reason.
        remedy: a sentence, for the same message.

    Raises:
        UserError: the text has a later format, is no JSON, or does not fit `schema`.
    """
    newest = schema.model_fields["format"].default
    try:
        fields = files.parse_json(text)
        later = isinstance(fields, dict) and isinstance(fields.get("format"), int) and fields["format"] > newest
        if not later:
            return schema.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(str(key) for key in first['loc']) or 'content'}: {first['msg']}"
    except ValueError as error:  # no JSON, or no text at all
        reason = str(error)
    else:
        raise UserError(
            f"{subject} of format {fields['format']}, and mura-dist {__version__} reads up to {newest}. Update mura-dist, or "
            f"{remake} with this version."
        )
    raise UserError(f"{problem} ({reason}). {remedy}")


class TrainedOn(BaseModel):
    """The data that the weights were trained on."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["phantoms", "radiographs"]
    manifest_sha256: str
    num_radiographs: int
    splits: dict[str, int] = {}  # number of radiographs of each split


class EnsembleMember(BaseModel):
    """A checkpoint of an ensemble, identified by the `sha256` of its model.safetensors."""

    model_config = ConfigDict(frozen=True)

    run: str  # in a list: the folder, relative to the list's; in a card or a report: the folder's name alone
    checkpoint: str
    architecture: str
    select_loss: Annotated[float, Field(allow_inf_nan=False)]  # the loss that selected it
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PrecisionChange(BaseModel):
    """The differences of a lower precision from fp32, on radiographs of the split that selected the model."""

    model_config = ConfigDict(frozen=True)

    engine: str  # that computed both
    num_radiographs: int
    num_studies: int
    mean_probability: Share  # of a radiograph, absolute
    max_probability: Share
    num_changed_calls: int  # studies
    calibrated_on: int = 0  # train radiographs, of int8


class Card(BaseModel):
    """The metadata of an exported model."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    size: Annotated[int, Field(ge=1, le=MAX_SIZE_PX)]  # pixels of a side of `image`
    resize: str = RESIZE  # how data.radiograph resizes to that size
    study_types: list[str]  # those it was trained on
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}  # by study type; empty: no calls
    operating_point: str = PAPER_OPERATING_POINT  # of `thresholds`: the paper's 0.5, or one fitted on tune
    calibration: FittedThresholds = FittedThresholds()  # what was fitted on tune
    metrics: dict[str, Any] = {}  # metrics.json of the reported split, {} where it was not evaluated
    trained_on: TrainedOn
    selected_on: str  # the split that selected the checkpoint
    recipe: dict[str, Any]
    checkpoint: str
    members: list[EnsembleMember] = []  # of an ensemble; empty: one checkpoint
    terms: str = mura.TERMS
    licence: str = mura.LICENSE
    version: str = __version__
    opset: int | None = None  # written by export
    precision: Precision = "fp32"  # that it is computed in
    weight_bits: Literal[7, 8] | None = None  # of int8; None: 7, or another precision
    change: PrecisionChange | None = None  # of a precision below fp32

    @property
    def trained_on_phantoms(self) -> bool:
        """Whether the model was trained on phantoms (drawings), so that its output says nothing about radiographs."""
        return self.trained_on.kind == "phantoms"

    def to_json(self) -> str:
        """Return the card as JSON.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        return json.dumps(self.model_dump(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def parse(cls, text: str | None, model: str) -> "Card":
        """Parse the card of a model.

        Args:
            text: the metadata of the ONNX file, None where it has none.
            model: the file's name, for messages.

        Raises:
            UserError: the file was not exported by mura-dist, or its metadata is corrupt or of a later format.
        """
        if text is None:
            raise UserError(
                f"{model} was not exported by mura-dist (no {KEY} metadata). Pass the model.onnx that `mura-dist export` "
                "wrote."
            )
        return parse_json(
            cls,
            text,
            subject=f"{model} has metadata",
            remake="export the model again",
            problem=f"{model} has corrupt {KEY} metadata",
            remedy="Export the model again.",
        )
