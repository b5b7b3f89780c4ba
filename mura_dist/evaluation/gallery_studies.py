"""The studies that a gallery shows: which ones, and their radiographs with their maps. No page, no picture.

    studies -> choose (surest errors, random hits) -> read_study: views, logits, maps -> Study

`words` say in one place what a page and a picture say of a study.
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
}  # of the groups; and the order's stream
LABEL_TEXT = ("normal", "abnormal")
CALL_TEXT = ("no abnormality flagged", "called abnormal")


@dataclass(frozen=True)
class GalleryView:
    """A radiograph and its map: pixels (S, S) uint8, cells (h, w) float64."""

    number: int
    logit: float
    pixels: np.ndarray
    cells: np.ndarray

    @property
    def probability(self) -> float:
        return classification.logit_to_probability(self.logit)

    @property
    def words(self) -> str:
        """Its number and probability in words."""
        return f"View {self.number}: probability {self.probability:.3f}, logit {self.logit:+.2f}"


@dataclass(frozen=True)
class GalleryStudy:
    """A study to show. `name`: its picture's; `num_damaged`: views that cannot be shown."""

    name: str
    study: str
    study_type: str
    label: int
    call: int
    probability: float
    views: tuple[GalleryView, ...]
    num_damaged: int

    @property
    def kind(self) -> str:
        """The group it is shown in, one of NAMES."""
        return self.name.rpartition("-")[0]

    @property
    def words(self) -> str:
        """Truth and prediction in words."""
        return (
            f"{display_name(self.study_type)}, labelled {LABEL_TEXT[self.label]}, {CALL_TEXT[self.call]} at probability "
            f"{self.probability:.3f}"
        )

    @property
    def damage(self) -> str:
        """How many of its views are missing, to be added to its name; "" where none is."""
        return f"; {self.num_damaged} of its views damaged, left out" if self.num_damaged else ""


def choose_studies(studies: pd.DataFrame, num: int, seed: int) -> list[tuple[str, Any, int]]:
    """Return (name, index in `studies`, call) of at most `num` studies, a quarter of each kind; fewer where there are fewer."""
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
        chosen += [(f"{kind}-{place}", line, call) for place, line in enumerate(first, start=1)]
    return chosen


def shuffle_rows(rows: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Return rows int64 (n,) in an order that depends on seed and stream only."""
    return sampler.epoch_permutation(rows, seed, stream, rotate_deg=0, flip=False).rows


def read_study(
    shards: Shards, line: dict[Any, Any], rows: np.ndarray, name: str, call: int, outputs: saliency.ForwardFunction
) -> GalleryStudy:
    """Return a study with those of its views that are in `rows` and not damaged. line: its line in the table of studies."""
    frame = shards.manifest.frame
    number: dict[int, int] = frame.loc[frame["study"] == line["study"], "view"].to_dict()
    read = {row: pixels for row in number if row in rows and (pixels := read_pixels(shards, row)) is not None}
    logit, cells = saliency.compute_maps(outputs, np.stack(list(read.values()))) if read else (np.zeros(0), np.zeros(0))
    views = tuple(
        GalleryView(number[row], float(logit[place]), pixels, cells[place])
        for place, (row, pixels) in enumerate(read.items())
    )
    truth, probability = int(line["label"]), float(line["probability"])
    return GalleryStudy(
        name, line["study"], line["study_type"], truth, call, probability, views, len(number) - len(read)
    )


def read_pixels(shards: Shards, row: int) -> np.ndarray | None:
    """Return a radiograph, (S, S) uint8; None where it is damaged."""
    try:
        return shards.read_pixels(row)
    except CorruptSampleError:
        return None
