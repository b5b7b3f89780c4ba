"""Read the files of one study, run the model on them, build the study's result. No Streamlit.

    bytes -> InferenceService.read (in worker processes) -> Upload: model image, preview, verdict of the gate, or the failure
    uploads that pass the gate -> InferenceService.predict -> ViewOutput: logit and activation map
    uploads and outputs -> StudyFile -> build_result -> StudyAnswer: the rows that `predict` writes

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

MAX_FILES = 12  # per study
MAX_UPLOAD_MB = 100  # per file; the size of radiograph.MAX_PIXELS pixels of 16 bits
PREVIEW_PX = 1024  # longer side of the preview
STUDY = "study"  # the study's name in the tables

_LIMITS = replace(worker_pool.DEFAULT_LIMITS, processor_s=10.0, wall_s=60.0)  # the slowest valid file takes 3 s
_FILES_PER_TURN = 2  # files of one session that are read before another session's turn


class Upload(NamedTuple):
    """A decoded file, or the reason why it cannot be decoded.

    image: uint8 (S, S), the model's input. preview: uint8 (h, w). verdict: the gate's. failure and code: "" or the reason and
    its key in failures.FAILURE_TEXTS.
    """

    image: np.ndarray | None
    preview: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    verdict: str
    failure: str
    notes: tuple[str, ...] = ()
    code: str = ""

    @property
    def passes_gate(self) -> bool:
        """Whether the model is run on the file."""
        return self.image is not None and self.verdict not in gate.BLOCKING


def failed_upload(reason: str, code: str) -> Upload:
    """Return the result for a file that cannot be decoded."""
    return Upload(None, None, None, "", reason, code=code)


@dataclass(frozen=True)
class UploadReader:
    """Decodes the content of one file, in a worker process. size: side of the model's input in pixels."""

    size: int

    def __call__(self, data: bytes) -> Upload:
        """Return the decoded file, or the reason why it cannot be decoded."""
        try:
            details = radiograph.read_details(io.BytesIO(data), self.size, PREVIEW_PX)
            verdict = gate.classify(details.image, details.colors)
        except radiograph.UnreadableFileError as error:
            return failed_upload(error.reason, error.code)
        except Exception:  # out of memory, or a bug: this file fails, the worker lives on
            return failed_upload("it could not be read", "io_error")
        identity = radiograph.read_identity(io.BytesIO(data))
        return Upload(details.image, details.display, identity, verdict, "", details.notes)


@dataclass(frozen=True)
class ViewOutput:
    """The model's output for a radiograph. cells: float32 (h, w), the logits of the activation map."""

    logit: float
    cells: np.ndarray

    @property
    def probability(self) -> float:
        """The sigmoid of the logit."""
        return classification.logit_to_probability(self.logit)


@dataclass(frozen=True)
class StudyAnswer:
    """The rows that `predict` would write: one in `studies`, and one for each view in `predictions`.

    withheld: the model was trained on drawings and a file is not a known drawing, so there is no call.
    """

    studies: pd.DataFrame
    predictions: pd.DataFrame
    withheld: bool

    @property
    def study_type(self) -> str:
        """The study type."""
        return str(self.studies["study_type"].iloc[0])

    @property
    def probability(self) -> float:
        """The mean probability over the views."""
        return float(self.studies["probability"].iloc[0])

    def cell(self, name: str) -> float | str | None:
        """Return a value of the study's row, or None where it is empty."""
        value = self.studies[name].iloc[0]
        return None if pd.isna(value) else value


@dataclass(frozen=True)
class StudyFile:
    """A file of the study. output: None if the model was not run. is_drawing: it is a known drawing, by its SHA-256."""

    name: str
    upload: Upload
    output: ViewOutput | None
    is_drawing: bool = False


class InferenceService:
    """The model and the worker processes that all sessions share. Several threads may call `predict` at once.

    drawings: the SHA-256 of known drawings.
    """

    def __init__(self, model: OnnxModel, workers: int, drawings: frozenset[str], stack: contextlib.ExitStack) -> None:
        self.model, self._workers, self._drawings, self._stack = model, workers, drawings, stack
        self._read_lock, self._model_lock = threading.Lock(), threading.Lock()
        self._pool = self._start_pool()

    @property
    def card(self) -> Card:
        """The model card."""
        return self.model.card

    def predict(self, names: Sequence[str], files: Sequence[bytes]) -> list[StudyFile]:
        """Decode each file, and run the model on those that pass the gate.

        Args:
            names: Names of the files.
            files: Their contents.
        """
        uploads = self.read(files)
        images = [upload.image for upload in uploads if upload.passes_gate and upload.image is not None]
        outputs = iter(self.run_model(images))
        study_files = []
        for name, data, upload in zip(names, files, uploads, strict=True):
            output = next(outputs) if upload.passes_gate else None
            if output is not None and not math.isfinite(output.logit):
                upload, output = failed_upload("the model's output is not a finite number", "model"), None
            study_files.append(StudyFile(name, upload, output, self._is_drawing(data)))
        return study_files

    def _is_drawing(self, data: bytes) -> bool:
        return bool(self._drawings) and hashlib.sha256(data).hexdigest() in self._drawings

    def read(self, files: Sequence[bytes]) -> list[Upload]:
        """Decode files in worker processes. Sessions take turns, so that slow files of one session do not block the others."""
        results: list[Upload | TaskFailed] = []
        for start in range(0, len(files), _FILES_PER_TURN):
            with self._read_lock:
                try:
                    results += self._pool.results([data] for data in files[start : start + _FILES_PER_TURN])
                except Exception:  # the pool is broken; the next session gets a new one
                    self._pool = self._start_pool()
                    raise
        return [
            failed_upload(f"its decoder {result.reason}", "decoder") if isinstance(result, TaskFailed) else result
            for result in results
        ]

    def run_model(self, images: Sequence[np.ndarray]) -> list[ViewOutput]:
        """Run the model on images, uint8 (S, S) each. One study at a time, since the model uses all processors."""
        if not images:
            return []
        with self._model_lock:
            logit, cells = self.model.outputs(np.stack(images)[:, None])
        return [ViewOutput(float(value), cell_map) for value, cell_map in zip(logit, cells, strict=True)]

    def _start_pool(self) -> WorkerPool:
        pool = worker_pool.start_pool(UploadReader, (self.model.size,), workers=self._workers, limits=_LIMITS)
        return self._stack.enter_context(pool)


@contextlib.contextmanager
def open_inference_service(
    model: OnnxModel, workers: int = 1, drawings: frozenset[str] = frozenset()
) -> Iterator[InferenceService]:
    """Yield an inference service. Its worker processes stop at the end of the block."""
    with contextlib.ExitStack() as stack:
        yield InferenceService(model, workers, drawings, stack)


def study_types(card: Card) -> list[str]:
    """Return the study types of the model, or MURA's where its card names none."""
    return list(card.study_types) or list(mura.STUDY_TYPES)


def detect_study_types(files: Sequence[StudyFile], card: Card) -> set[str]:
    """Return the study types that the files' names or DICOM headers contain, including types the model does not know."""
    card_types = frozenset(study_types(card))
    groups = Grouping("", "file", None, card_types)
    paths = (_with_folder(file.name.replace("\\", "/"), card_types) for file in files)
    detected = {groups.study_type(path, file.upload.identity) for path, file in zip(paths, files, strict=True)}
    return detected - {grouping.UNKNOWN}


def _with_folder(name: str, card_types: Collection[str]) -> str:
    """Return a name with its study type as a folder: XR_WRIST_patient00006_study1_image1.png. Browsers send no folders."""
    for study_type in (*card_types, *mura.STUDY_TYPES):
        if name.startswith((f"{study_type}_", f"{study_type}-")):
            return f"{study_type}/{name}"
    return name


def num_studies(files: Sequence[StudyFile]) -> int:
    """Return the number of different studies in the DICOM headers of the files."""
    return len({file.upload.identity.study_uid for file in files if file.upload.identity} - {""})


def build_result(files: Sequence[StudyFile], study_type: str, card: Card) -> StudyAnswer:
    """Return the rows that `predict` writes for the files, as one study.

    Args:
        files: Files without an output are ignored.
        study_type: Selects the threshold.
        card: The model card. A model that was trained on drawings gives a call for known drawings only.
    """
    scored = [(file, file.output.logit) for file in files if file.output is not None]
    rows = [[file.name, STUDY, study_type, logit, file.upload.verdict] for file, logit in scored]
    predictions = tables.prediction_frame(rows)
    probability = classification.sigmoid(np.array([logit for _, logit in scored], np.float32))
    worst = max((file.upload.verdict for file, _ in scored), key=gate.NAMES.index)
    drawn = all(file.is_drawing for file, _ in scored)
    studies = tables.apply_thresholds(
        [(STUDY, study_type, worst)], np.zeros(len(rows), np.int64), probability, card, drawn=drawn
    )
    withheld = card.trained_on_phantoms and not drawn
    if withheld:
        studies[["threshold", "calibrated_probability"]] = np.nan
    return StudyAnswer(studies, predictions, withheld)
