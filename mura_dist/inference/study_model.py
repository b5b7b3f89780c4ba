"""An exported model in Python: load it, predict the views of one study.

    load(path) -> StudyModel        StudyModel.predict(views) -> StudyResult

It reads as `mura-dist predict` does, and its numbers are those of that command's tables.
"""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mura_dist.core.errors import RunError, UserError
from mura_dist.data import gate, radiograph
from mura_dist.data.radiograph import DicomIdentity, UnreadableFileError
from mura_dist.inference import grouping, study_types, tables
from mura_dist.inference.grouping import Grouping
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics import classification

Source = Path | str | bytes | np.ndarray
"""A file, its content, or the pixels of a radiograph: (H, W) uint8 or uint16, or (H, W, 3) uint8."""

_STUDY = "study"


@dataclass(frozen=True)
class ViewResult:
    """What the model computes for one radiograph.

    Attributes:
        name: Path as the caller gave it, or `view 1`, `view 2` ... for contents and pixels.
        logit: Raw output.
        probability: sigmoid(logit).
        gate: ok, inverted, not_a_radiograph or blank: whether the file looks like a bone radiograph.
        activation_map: (h, w) float32 logits, whose mean is `logit`.
        notes: DICOM attributes that were ignored, or that contradict another.
    """

    name: str
    logit: float
    probability: float
    gate: str
    activation_map: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StudyResult:
    """What the model computes for one study. A number is None where the model has none for this study type.

    Attributes:
        study_type: XR_WRIST and the like, or unknown.
        probability: Mean of the views' probabilities.
        calibrated_probability: The same after the calibration that the model carries.
        threshold: A study is called abnormal above it.
        call: True for abnormal. None without a threshold, and from a model that was trained on drawings.
        band: negative, uncertain or positive. None where no band was fitted, and from a model trained on drawings.
        gate: Worst gate verdict of the views.
        views: One result per radiograph, in the order they were given.
    """

    study_type: str
    probability: float
    calibrated_probability: float | None
    threshold: float | None
    call: bool | None
    band: str | None
    gate: str
    views: tuple[ViewResult, ...]

    @property
    def activation_map(self) -> np.ndarray:
        """Activation maps of all views: (V, h, w) float32 logits."""
        return np.stack([view.activation_map for view in self.views])


class StudyModel:
    """An exported model that predicts one study at a time. Threads may share it."""

    def __init__(self, onnx_model: OnnxModel) -> None:
        """Wrap a loaded ONNX model. `mura_dist.load` is the usual way."""
        self.onnx_model = onnx_model

    @property
    def size(self) -> int:
        """Side of the model's input in pixels."""
        return self.onnx_model.size

    @property
    def study_types(self) -> tuple[str, ...]:
        """Study types that the model was trained on."""
        return tuple(self.onnx_model.card.study_types)

    def predict(self, views: Source | Sequence[Source], *, study_type: str | None = None) -> StudyResult:
        """Predict one study from its radiographs.

        Files are decoded in this process. `mura_dist.predict_directory` decodes them in guarded processes, as suits
        files of unknown origin.

        Args:
            views: One radiograph of the study, or a sequence of them.
            study_type: `hand`, `XR_HAND` and the like. None takes it from MURA's folders or from DICOM.

        Returns:
            Probability, call, band, gate and activation maps.

        Raises:
            UserError: no view, a view that is no readable radiograph, DICOMs of several studies, a mistyped study type.
            RunError: the model's output is not finite.
        """
        sources = [views] if isinstance(views, Source) else list(views)
        if not sources:
            raise UserError("a study of 0 views cannot be predicted. Give at least one radiograph.")
        names = [_name(source, number) for number, source in enumerate(sources, start=1)]
        looks = [_read_details(source, name, self.size) for source, name in zip(sources, names, strict=True)]
        identities = [_identity(source) for source in sources]
        _check_one_study(identities)
        logits, maps = self.onnx_model.outputs(np.stack([look.image for look in looks])[:, None])
        if not np.isfinite(logits).all():
            raise RunError(f"the model's logits are {logits.tolist()}. Export the model again, or give another one.")
        results = tuple(
            ViewResult(
                name,
                float(logit),
                classification.logit_to_probability(float(logit)),
                gate.classify(look.image, look.colors),
                activation_map,
                look.notes,
            )
            for name, look, logit, activation_map in zip(names, looks, logits, maps, strict=True)
        )
        return self._summarize(results, self._study_type(study_type, sources, names, identities))

    def _study_type(
        self,
        study_type: str | None,
        sources: Sequence[Source],
        names: Sequence[str],
        identities: Sequence[DicomIdentity | None],
    ) -> str:
        model_types = frozenset((*self.onnx_model.card.study_types, *self.onnx_model.card.thresholds))
        if study_type is not None:
            study_type = study_types.normalize(study_type)
            for warning in study_types.check(study_type, model_types):
                warnings.warn(warning, stacklevel=3)
            return study_type
        types = set()
        for source, name, identity in zip(sources, names, identities, strict=True):
            folder, file = os.path.split(os.path.abspath(name)) if isinstance(source, Path | str) else ("", name)
            types.add(Grouping(Path(folder).as_posix(), "auto", None, model_types).study_type(file, identity))
        return types.pop() if len(types) == 1 else grouping.UNKNOWN

    def _summarize(self, views: tuple[ViewResult, ...], study_type: str) -> StudyResult:
        worst = max((view.gate for view in views), key=gate.NAMES.index)
        probability = classification.sigmoid(np.array([view.logit for view in views], np.float32))
        frame = tables.apply_thresholds(
            [(_STUDY, study_type, worst)], np.zeros(len(views), np.int64), probability, self.onnx_model.card
        )
        cells = {str(name): None if pd.isna(value) else value for name, value in frame.iloc[0].items()}
        return StudyResult(
            study_type,
            float(frame["probability"].iloc[0]),
            cells["calibrated_probability"],
            cells["threshold"],
            None if cells["call"] is None else bool(cells["call"]),
            cells["band"],
            worst,
            views,
        )


def load(path: Path | str, *, provider: str = "cpu") -> StudyModel:
    """Load the file that `mura-dist export` wrote.

    Args:
        path: model.onnx, or the list of an exported ensemble.
        provider: Engine that computes: cpu, cuda, tensorrt or openvino.

    Returns:
        The loaded model.

    Raises:
        UserError: the file is missing, is no such model, or the provider cannot start.
    """
    return StudyModel(OnnxModel.load(Path(path), provider))


def _name(source: Source, number: int) -> str:
    return str(source) if isinstance(source, Path | str) else f"view {number}"


def _read_details(source: Source, name: str, size: int) -> radiograph.RadiographDetails:
    try:
        return radiograph.read_details(_readable(source, name), size)
    except UnreadableFileError as error:
        raise UserError(f"{name}: {error.reason}. Give a radiograph as PNG, JPEG, TIFF or DICOM.") from error


def _readable(source: Source, name: str) -> Path | str | io.BytesIO:
    """Return what the file reader takes. Pixels go through a PNG, so that they are read as a file's are."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, np.ndarray):
        return source
    gray = source.ndim == 2 and source.dtype in (np.uint8, np.uint16)
    color = source.ndim == 3 and source.shape[2] == 3 and source.dtype == np.uint8
    if not (gray or color) or 0 in source.shape:
        raise UserError(
            f"{name}: an array of shape {source.shape} and dtype {source.dtype} is no radiograph. Give (H, W) uint8 or uint16, "
            "or (H, W, 3) uint8."
        )
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(source)).save(file, "PNG", compress_level=0)
    return file


def _identity(source: Source) -> DicomIdentity | None:
    if isinstance(source, np.ndarray):
        return None
    return radiograph.read_identity(io.BytesIO(source) if isinstance(source, bytes) else source)


def _check_one_study(identities: Sequence[DicomIdentity | None]) -> None:
    studies = {identity.study_uid for identity in identities if identity is not None} - {""}
    if len(studies) > 1:
        raise UserError(f"the DICOMs are of {len(studies)} studies. Give the views of one study at a time.")
