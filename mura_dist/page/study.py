"""Files of one study -> what the page shows of them. No Streamlit: what is said is decided here and in words.py.

    bytes -> Desk.read, in guarded processes -> Upload: the image, a picture of it, the gate's verdict, or why not
    uploads that pass -> Desk.look -> View: logit and map     both -> answer: predict's lines of its two tables

A `Desk` is what all sessions share: the model and the processes. Nothing of anybody's files stays in it, none is put on disk.
"""

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from .. import gate, grouping, guarded, mura, radiograph, tables
from ..card import Card
from ..grouping import Grouping
from ..guarded import Crew, Lost
from ..metrics import sigmoid
from ..runtime import Model

MAX_FILES = 12  # of a study
MAX_UPLOAD_MB = 100  # a file; what radiograph.MAX_PIXELS pixels of 16 bits take
LONGEST_PX = 1024  # of what is shown
STUDY = "study"  # what the tables call it: the page has one, and no name of it is anybody's business

_LIMITS = replace(guarded.DEFAULT, processor_s=20.0, wall_s=60.0)  # somebody is waiting


class Upload(NamedTuple):
    """A file as it was read: image (S, S) and `shown` (h, w) uint8, what a DICOM says of itself, the verdict; or why not."""

    image: np.ndarray | None
    shown: np.ndarray | None
    identity: radiograph.DicomIdentity | None
    verdict: str
    failure: str

    @property
    def passes(self) -> bool:
        """Whether the model is asked about it."""
        return self.image is not None and self.verdict not in gate.BLOCKING


def lost(why: str) -> Upload:
    return Upload(None, None, None, "", why)


@dataclass(frozen=True)
class UploadReader:
    """Reads one file's content; `size`: pixels of a side of the model's image. A guarded process runs it."""

    size: int

    def __call__(self, data: bytes) -> Upload:
        try:
            found = radiograph.look(io.BytesIO(data), self.size, LONGEST_PX)
        except radiograph.Unreadable as error:
            return lost(error.reason)
        verdict = gate.verdict(found.image, found.colours)
        return Upload(found.image, found.shown, radiograph.identity(io.BytesIO(data)), verdict, "")


@dataclass(frozen=True)
class View:
    """What the model says of a radiograph. cells (h, w) float32: logits."""

    logit: float
    cells: np.ndarray

    @property
    def probability(self) -> float:
        return float(sigmoid(np.array(self.logit)))


@dataclass(frozen=True)
class Answer:
    """`studies`: the study's one line of studies.csv; `predictions`: a line a view, as predict writes both."""

    studies: pd.DataFrame
    predictions: pd.DataFrame

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


class Desk:
    """Ask `read`, then `look`; several threads at once may."""

    def __init__(self, model: Model, crew: Crew) -> None:
        self.model, self._crew = model, crew
        self._reading, self._looking = threading.Lock(), threading.Lock()

    @property
    def card(self) -> Card:
        return self.model.card

    def read(self, files: Sequence[bytes]) -> list[Upload]:
        """One after the other where several sessions ask: a Crew does one list at a time."""
        with self._reading:
            found = list(self._crew.results([one] for one in files))
        return [lost(f"its decoder {one.why}") if isinstance(one, Lost) else one for one in found]

    def look(self, images: Sequence[np.ndarray]) -> list[View]:
        """images (S, S) uint8. One study at a time: a model on all processors gains nothing from two."""
        if not images:
            return []
        with self._looking:
            logit, cells = self.model.outputs(np.stack(images)[:, None])
        return [View(float(one), map_) for one, map_ in zip(logit, cells, strict=True)]


@contextlib.contextmanager
def desk(model: Model, workers: int = 1) -> Iterator[Desk]:
    """The processes end with the block."""
    with guarded.crew(UploadReader, (model.size,), workers=workers, limits=_LIMITS) as crew:
        yield Desk(model, crew)


def study_types(card: Card) -> list[str]:
    """Those the model knows, else MURA's."""
    return list(card.study_types) or list(mura.STUDY_TYPES)


def told_type(names: Sequence[str], uploads: Sequence[Upload], card: Card) -> str | None:
    """The study type that paths or DICOMs tell of, if they tell of one and the same. names: as many as uploads."""
    groups = Grouping("", "file", None, frozenset(study_types(card)))
    parts = (name.replace("\\", "/") for name in names)
    found = {
        groups.study_type(_folders(name), upload.identity) for name, upload in zip(parts, uploads, strict=True)
    } - {grouping.UNKNOWN}
    return found.pop() if len(found) == 1 else None


def _folders(name: str) -> str:
    """A browser sends no folders; people write MURA's into a name: XR_WRIST_patient00006_study1_image1.png."""
    for study_type in mura.STUDY_TYPES:
        if name.startswith((f"{study_type}_", f"{study_type}-")):
            return f"{study_type}/{name}"
    return name


def answer(
    names: Sequence[str], uploads: Sequence[Upload], views: Sequence[View], study_type: str, card: Card
) -> Answer:
    """What predict writes of these radiographs as one study. A model of drawings calls nothing."""
    logits = np.array([view.logit for view in views], np.float32)
    rows = [
        [name, STUDY, study_type, logit, upload.verdict]
        for name, logit, upload in zip(names, logits.tolist(), uploads, strict=True)
    ]
    predictions = tables.views(rows)
    code = np.zeros(len(rows), np.int64)
    studies = tables.judged([(STUDY, study_type)], code, sigmoid(logits), card)
    if card.trained_on.kind == "phantoms":
        studies[["threshold", "calibrated_probability"]] = np.nan
        studies[["call", "band"]] = pd.NA
    return Answer(studies, predictions)
