"""Read the files of one study, run the model on them, build the study's result. No Streamlit.

    bytes -> InferenceService.read (in worker processes) -> Upload: model image, preview, verdict of the gate, or the failure
    uploads that pass the gate -> InferenceService.predict -> ViewOutput: logit and activation map
    uploads and outputs -> StudyFile -> build_result -> StudyResult: the rows that `predict` writes

All sessions share one `InferenceService`. It stores no file of a session and writes nothing to disk. wording.py holds the texts.
"""

import contextlib
import hashlib
import io
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from mura_dist.data import gate, mura, radiograph
from mura_dist.distributed import worker_pool
from mura_dist.distributed.worker_pool import TaskFailed, WorkerPool
from mura_dist.inference import grouping, tables
from mura_dist.inference.grouping import Grouping
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.metrics import classification
from mura_dist.models.card import Card

MAX_FILES = 12  # of a study
MAX_UPLOAD_MB = 100  # a file; what radiograph.MAX_PIXELS pixels of 16 bits take
LONGEST_PX = 1024  # of what is shown
STUDY = "study"  # what the tables call it: the page has one, and no name of it is anybody's business

_LIMITS = replace(
    worker_pool.DEFAULT_LIMITS, processor_s=10.0, wall_s=60.0
)  # somebody is waiting; the dearest file takes 3
_AT_ONCE = 2  # files of a session before another one's turn comes


class Upload(NamedTuple):
    """A file as it was read: image (S, S) and `shown` (h, w) uint8, what a DICOM says of itself, the verdict; or why not:
    `failure` with its code, one of failures.WORDS. notes: radiograph.RadiographDetails's."""

    image: np.ndarray | None
    shown: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    verdict: str
    failure: str
    notes: tuple[str, ...] = ()
    code: str = ""

    @property
    def passes(self) -> bool:
        """Whether the model is asked about it."""
        return self.image is not None and self.verdict not in gate.BLOCKING


def failed_upload(why: str, code: str) -> Upload:
    return Upload(None, None, None, "", why, code=code)


@dataclass(frozen=True)
class UploadReader:
    """Reads one file's content; `size`: pixels of a side of the model's image. A guarded process runs it."""

    size: int

    def __call__(self, data: bytes) -> Upload:
        try:
            found = radiograph.read_details(io.BytesIO(data), self.size, LONGEST_PX)
            verdict = gate.classify(found.image, found.colors)
        except radiograph.UnreadableFileError as error:
            return failed_upload(error.reason, error.code)
        except Exception:  # short of memory, or our own mistake: it costs this file, not everybody's reading
            return failed_upload("it could not be read", "io_error")
        return Upload(found.image, found.display, radiograph.read_identity(io.BytesIO(data)), verdict, "", found.notes)


@dataclass(frozen=True)
class ViewOutput:
    """What the model says of a radiograph. cells (h, w) float32: logits."""

    logit: float
    cells: np.ndarray

    @property
    def probability(self) -> float:
        return classification.logit_to_probability(self.logit)


@dataclass(frozen=True)
class StudyResult:
    """`studies`: the study's one line of studies.csv; `predictions`: a line a view, as predict writes both.

    withheld: the model is of drawings, the study is not known to be one: nothing is called.
    """

    studies: pd.DataFrame
    predictions: pd.DataFrame
    withheld: bool

    @property
    def study_type(self) -> str:
        return str(self.studies["study_type"].iloc[0])

    @property
    def probability(self) -> float:
        return float(self.studies["probability"].iloc[0])

    def cell(self, name: str) -> float | str | None:
        """Of the study's line; None where it is empty."""
        value = self.studies[name].iloc[0]
        return None if pd.isna(value) else value


@dataclass(frozen=True)
class StudyFile:
    """A file of the study at hand; without a view where it was not read, or not looked at. drawn: its bytes are an example's that
    is a drawing."""

    name: str
    upload: Upload
    view: ViewOutput | None
    drawn: bool = False


class InferenceService:
    """What all sessions share; several threads at once may `ask`. drawings: the SHA-256 of files that are known drawings."""

    def __init__(self, model: OnnxModel, workers: int, drawings: frozenset[str], stack: contextlib.ExitStack) -> None:
        self.model, self._workers, self._drawings, self._stack = model, workers, drawings, stack
        self._reading, self._looking = threading.Lock(), threading.Lock()
        self._crew = self._hire()

    @property
    def card(self) -> Card:
        return self.model.card

    def predict(self, names: Sequence[str], files: Sequence[bytes]) -> list[StudyFile]:
        """Every file, read and, where the gate lets it pass, looked at."""
        uploads = self.read(files)
        views = iter(self.run_model([one.image for one in uploads if one.passes and one.image is not None]))
        found = []
        for name, data, upload in zip(names, files, uploads, strict=True):
            view = next(views) if upload.passes else None
            if view is not None and not math.isfinite(view.logit):
                upload, view = failed_upload("the model gives no number for it", "model"), None
            found.append(StudyFile(name, upload, view, self._is_drawing(data)))
        return found

    def _is_drawing(self, data: bytes) -> bool:
        return bool(self._drawings) and hashlib.sha256(data).hexdigest() in self._drawings

    def read(self, files: Sequence[bytes]) -> list[Upload]:
        """Sessions take turns, a few files each: a WorkerPool does one list at a time, and slow files shall not hold up everybody."""
        found: list[Upload | TaskFailed] = []
        for start in range(0, len(files), _AT_ONCE):
            with self._reading:
                try:
                    found += self._crew.results([one] for one in files[start : start + _AT_ONCE])
                except Exception:  # this one has lost its place; the next shall find another
                    self._crew = self._hire()
                    raise
        return [
            failed_upload(f"its decoder {one.reason}", "decoder") if isinstance(one, TaskFailed) else one
            for one in found
        ]

    def run_model(self, images: Sequence[np.ndarray]) -> list[ViewOutput]:
        """images (S, S) uint8. One study at a time: a model on all processors gains nothing from two."""
        if not images:
            return []
        with self._looking:
            logit, cells = self.model.outputs(np.stack(images)[:, None])
        return [ViewOutput(float(one), map_) for one, map_ in zip(logit, cells, strict=True)]

    def _hire(self) -> WorkerPool:
        pool = worker_pool.start_pool(UploadReader, (self.model.size,), workers=self._workers, limits=_LIMITS)
        return self._stack.enter_context(pool)


@contextlib.contextmanager
def open_inference_service(
    model: OnnxModel, workers: int = 1, drawings: frozenset[str] = frozenset()
) -> Iterator[InferenceService]:
    """The processes end with the block."""
    with contextlib.ExitStack() as stack:
        yield InferenceService(model, workers, drawings, stack)


def study_types(card: Card) -> list[str]:
    """Those the model knows, else MURA's."""
    return list(card.study_types) or list(mura.STUDY_TYPES)


def detect_study_types(files: Sequence[StudyFile], card: Card) -> set[str]:
    """The study types that names or DICOMs tell of: one and the same as a rule, which the model need not know."""
    known = frozenset(study_types(card))
    groups = Grouping("", "file", None, known)
    paths = (file.name.replace("\\", "/") for file in files)
    found = {
        groups.study_type(_folders(path, known), file.upload.identity) for path, file in zip(paths, files, strict=True)
    }
    return found - {grouping.UNKNOWN}


def _folders(name: str, known: Collection[str]) -> str:
    """A browser sends no folders; people write MURA's into a name: XR_WRIST_patient00006_study1_image1.png."""
    for study_type in (*known, *mura.STUDY_TYPES):
        if name.startswith((f"{study_type}_", f"{study_type}-")):
            return f"{study_type}/{name}"
    return name


def num_studies(files: Sequence[StudyFile]) -> int:
    """How many studies the DICOMs among them say they are of."""
    return len({file.upload.identity.study_uid for file in files if file.upload.identity} - {""})


def build_result(files: Sequence[StudyFile], study_type: str, card: Card) -> StudyResult:
    """Return what predict writes of the files with a view, as one study. A model of drawings calls known drawings alone."""
    good = [(file, file.view.logit) for file in files if file.view is not None]
    rows = [[file.name, STUDY, study_type, logit, file.upload.verdict] for file, logit in good]
    predictions = tables.prediction_frame(rows)
    probability = classification.sigmoid(np.array([logit for _, logit in good], np.float32))
    worst = max((file.upload.verdict for file, _ in good), key=gate.NAMES.index)
    drawn = all(file.drawn for file, _ in good)
    heads = [(STUDY, study_type, worst)]
    studies = tables.apply_thresholds(heads, np.zeros(len(rows), np.int64), probability, card, drawn=drawn)
    withheld = card.of_drawings and not drawn
    if withheld:
        studies[["threshold", "calibrated_probability"]] = np.nan
    return StudyResult(studies, predictions, withheld)
