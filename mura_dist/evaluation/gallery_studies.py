"""Choose the studies of a gallery, and read their radiographs with their maps. Pages and pictures are drawn elsewhere.

studies -> choose_studies (most confident errors, random correct ones) -> read_study: views, logits, maps -> GalleryStudy
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mura_dist.data.loaders import sampler
from mura_dist.data.mura import display_name
from mura_dist.data.shards.reader import CorruptSampleError, Shards
from mura_dist.evaluation import saliency
from mura_dist.metrics import classification

KIND_STREAMS = {
    "missed": 0,
    "false-alarm": 1,
    "hit-abnormal": 2,
    "hit-normal": 3,
}  # kind -> stream of its random order
LABEL_TEXT = ("normal", "abnormal")
CALL_TEXT = ("no abnormality flagged", "called abnormal")


@dataclass(frozen=True)
class GalleryView:
    """A radiograph and its map."""

    number: int
    logit: float
    pixels: np.ndarray  # (S, S) uint8
    cells: np.ndarray  # (h, w) float64

    @property
    def probability(self) -> float:
        """The probability that the view is abnormal."""
        return classification.logit_to_probability(self.logit)

    @property
    def caption(self) -> str:
        """The view's number and probability, as pages and pictures show them."""
        return f"View {self.number}: probability {self.probability:.3f}, logit {self.logit:+.2f}"


@dataclass(frozen=True)
class GalleryStudy:
    """A study of the gallery."""

    name: str  # of its picture, `KIND-NUMBER`
    study: str
    study_type: str
    label: int
    call: int
    probability: float
    views: tuple[GalleryView, ...]
    num_corrupt: int  # views that cannot be shown

    @property
    def kind(self) -> str:
        """The group that the study is shown in, one of KIND_STREAMS."""
        return self.name.rpartition("-")[0]

    @property
    def caption(self) -> str:
        """The label and the prediction, as pages and pictures show them."""
        return (
            f"{display_name(self.study_type)}, labeled {LABEL_TEXT[self.label]}, {CALL_TEXT[self.call]} at probability "
            f"{self.probability:.3f}"
        )

    @property
    def corrupt_note(self) -> str:
        """The suffix of its name that counts corrupt views; "" where there is none."""
        return f"; {self.num_corrupt} of its views corrupt, skipped" if self.num_corrupt else ""


def choose_studies(studies: pd.DataFrame, num: int, seed: int) -> list[tuple[str, Any, int]]:
    """Choose at most `num` studies, a quarter of each kind: (name, index in `studies`, call)."""
    scored = studies[studies["label"].notna() & np.isfinite(studies["probability"].astype(float))]
    label, called = scored["label"].to_numpy(int), scored["call"].to_numpy(int)
    kinds = {"missed": (1, 0), "false-alarm": (0, 1), "hit-abnormal": (1, 1), "hit-normal": (0, 0)}
    chosen = []
    for kind, (truth, call) in kinds.items():
        group = scored[(label == truth) & (called == call)]
        if truth != call:
            group = group.sort_values("probability", ascending=call == 0, kind="stable")
        else:
            group = group.iloc[shuffle_rows(np.arange(len(group)), seed, KIND_STREAMS[kind])]
        first = group.index[: num // len(kinds)]
        chosen += [(f"{kind}-{number}", index, call) for number, index in enumerate(first, start=1)]
    return chosen


def shuffle_rows(rows: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Return rows int64 (n,) in an order that depends only on seed and stream."""
    return sampler.epoch_permutation(rows, seed, stream, rotate_deg=0, flip=False).rows


def read_study(
    shards: Shards, study: dict[Any, Any], rows: np.ndarray, name: str, call: int, forward: saliency.ForwardFunction
) -> GalleryStudy:
    """Read a study's views that are in `rows` and not corrupt, and compute their maps.

    Args:
        shards: hold the radiographs.
        study: the row of the study in the table of studies.
        rows: the evaluated radiographs, int64 (n,).
        name: of the study's picture.
        call: 0 or 1.
        forward: the network.
    """
    frame = shards.manifest.frame
    number: dict[int, int] = frame.loc[frame["study"] == study["study"], "view"].to_dict()
    read = {row: pixels for row in number if row in rows and (pixels := read_pixels(shards, row)) is not None}
    logit, cells = saliency.compute_maps(forward, np.stack(list(read.values()))) if read else (np.zeros(0), np.zeros(0))
    views = tuple(
        GalleryView(number[row], float(logit[index]), pixels, cells[index])
        for index, (row, pixels) in enumerate(read.items())
    )
    truth, probability = int(study["label"]), float(study["probability"])
    return GalleryStudy(
        name, study["study"], study["study_type"], truth, call, probability, views, len(number) - len(read)
    )


def read_pixels(shards: Shards, row: int) -> np.ndarray | None:
    """Return a radiograph, (S, S) uint8, or None where it is corrupt."""
    try:
        return shards.read_pixels(row)
    except CorruptSampleError:
        return None
