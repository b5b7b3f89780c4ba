"""Write a contact sheet: a page of small radiographs of each study type and label. LOCAL ONLY.

    manifest's frame -> studies by study type and label, in a seeded order -> one view of each -> thumbnails -> a page

A radiograph that cannot be read is skipped and counted.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from mura_dist.data import radiograph
from mura_dist.data.loaders import sampler
from mura_dist.data.mura import display_name
from mura_dist.data.shards.reader import CorruptSampleError
from mura_dist.reports import local_only
from mura_dist.reports.html import NEGATIVE_COLOR, POSITIVE_COLOR, Html, banner, element, join, section

NUM = 6  # radiographs of each study type and label
SIDE_PX = 160  # longer side of a thumbnail
_LABELS = ("normal", "abnormal")
_STYLE = f"""
.sheet {{ display: grid; gap: .5rem .7rem; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)) }}
.sheet figure {{ margin: 0; border-top: .25rem solid; padding-top: .25rem }}
.sheet img {{ display: block; width: 100%; height: 8.4rem; object-fit: contain; background: #000 }}
.sheet figcaption {{ color: var(--ink); font-size: .8rem; line-height: 1.3 }}
.normal {{ border-color: {NEGATIVE_COLOR} !important }} .abnormal {{ border-color: {POSITIVE_COLOR} !important }}
@media print {{ .sheet {{ grid-template-columns: repeat(6, 1fr) }} }}
"""

Pixels = Callable[[int], np.ndarray]
"""Row -> uint8 (H, W). May raise UnreadableFileError, CorruptSampleError, OSError or ValueError."""


@dataclass(frozen=True)
class Thumbnail:
    """A small radiograph."""

    row: int
    pixels: np.ndarray  # uint8 (h, w), neither above SIDE_PX


def page(title: str, frame: pd.DataFrame, pixels: Pixels, *, drawings: bool, num: int = NUM, seed: int = 0) -> str:
    """Return the content of an HTML file.

    Args:
        title: The title.
        frame: Rows of a manifest.
        pixels: Reads a row's pixels.
        drawings: Whether these are phantoms.
        num: Maximum number of radiographs of each study type and label.
        seed: Selects the studies.
    """
    return local_only.page(title, *_body(frame, pixels, drawings, num, seed), style=_STYLE)


def _body(frame: pd.DataFrame, pixels: Pixels, drawings: bool, num: int, seed: int) -> Iterator[Html]:
    if drawings:
        yield banner("computer drawings from mura-dist phantoms, not radiographs")
    yield element(
        "p",
        f"Up to {num} radiographs of each study type and label, one per study, selected at random (seed {seed}). Look for "
        "features that a network might learn instead of the abnormality: markers, metal, plaster, borders, exposure.",
    )
    for study_type in sorted(set(frame["study_type"])):
        groups = []
        for label, name in enumerate(_LABELS):
            group = frame[(frame["study_type"] == study_type) & (frame["label"] == label)]
            thumbnails, num_failed = select_thumbnails(group, pixels, num, seed)
            heading = f"{name}: {len(thumbnails)} of {group['study'].nunique():,} studies"
            groups.append(element("h3", heading + (f"; {num_failed} could not be read" if num_failed else "")))
            groups.append(element("div", *(_figure(frame, thumbnail) for thumbnail in thumbnails), class_="sheet"))
        yield section(join((display_name(study_type), " ", element("small", study_type))), *groups)


def select_thumbnails(frame: pd.DataFrame, pixels: Pixels, num: int, seed: int) -> tuple[list[Thumbnail], int]:
    """Return at most `num` radiographs of `frame`, one per study in a seeded order, and the number of skipped ones."""
    shuffled = sampler.epoch_permutation(frame.index.to_numpy(np.int64), seed, 0, rotate_deg=0, flip=False).rows
    first = frame.loc[shuffled].drop_duplicates("study").index
    failed: list[int] = []
    return list(itertools.islice(_readable(first, pixels, failed), num)), len(failed)


def _readable(rows: pd.Index, pixels: Pixels, failed: list[int]) -> Iterator[Thumbnail]:
    for row in rows:
        try:
            image = Image.fromarray(pixels(row))
        except (radiograph.UnreadableFileError, CorruptSampleError, OSError, ValueError):
            failed.append(row)
            continue
        image.thumbnail((SIDE_PX, SIDE_PX))
        yield Thumbnail(row, np.asarray(image))


def _figure(frame: pd.DataFrame, thumbnail: Thumbnail) -> Html:
    line: dict[Any, Any] = frame.loc[thumbnail.row].to_dict()
    label = _LABELS[line["label"]]
    caption = f"{display_name(line['study_type'])}, {label}"
    picture = element(
        "img", src=local_only.data_uri(thumbnail.pixels), alt=f"{caption}, a radiograph of {line['split']}"
    )
    return element("figure", picture, element("figcaption", caption), class_=label)
