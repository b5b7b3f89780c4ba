"""A contact sheet: a few small radiographs of each study type and label, to see what a data set looks like. LOCAL ONLY.

    manifest's frame -> studies by study type and label, in a seeded order -> a view of each -> small -> a page

One radiograph a study, so that no patient with eleven views fills a row. What cannot be read is passed over, and counted.
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

NUM = 6  # of a study type and label
SIDE_PX = 160  # of the longer side
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
"""A row -> uint8 (H, W); may raise UnreadableFileError, CorruptSampleError, OSError or ValueError."""


@dataclass(frozen=True)
class Thumb:
    row: int
    pixels: np.ndarray  # uint8 (h, w), neither above SIDE_PX


def page(title: str, frame: pd.DataFrame, pixels: Pixels, *, drawings: bool, num: int = NUM, seed: int = 0) -> str:
    """A whole HTML file. frame: a manifest's, or part of it; drawings: these are phantoms."""
    return local_only.page(title, *_body(frame, pixels, drawings, num, seed), style=_STYLE)


def _body(frame: pd.DataFrame, pixels: Pixels, drawings: bool, num: int, seed: int) -> Iterator[Html]:
    if drawings:
        yield banner("these are drawings, made by mura-dist phantoms: no radiographs")
    yield element(
        "p",
        f"Up to {num} radiographs of each study type and label, one a study, drawn at random (seed {seed}). Look for what a "
        "network might take for the label: markers, metal, plaster, borders, exposure.",
    )
    for study_type in sorted(set(frame["study_type"])):
        groups = []
        for label, name in enumerate(_LABELS):
            part = frame[(frame["study_type"] == study_type) & (frame["label"] == label)]
            shown, passed_over = choose(part, pixels, num, seed)
            of = f"{name}: {len(shown)} of {part['study'].nunique():,} studies"
            groups.append(element("h3", of + (f"; {passed_over} could not be read" if passed_over else "")))
            groups.append(element("div", *(_figure(frame, one) for one in shown), class_="sheet"))
        yield section(join((display_name(study_type), " ", element("small", study_type))), *groups)


def choose(part: pd.DataFrame, pixels: Pixels, num: int, seed: int) -> tuple[list[Thumb], int]:
    """At most `num` of the radiographs in `part`, one a study, in a seeded order; and how many were passed over."""
    shuffled = sampler.epoch_permutation(part.index.to_numpy(np.int64), seed, 0, rotate_deg=0, flip=False).rows
    first = part.loc[shuffled].drop_duplicates("study").index
    failed: list[int] = []
    return list(itertools.islice(_readable(first, pixels, failed), num)), len(failed)


def _readable(rows: pd.Index, pixels: Pixels, failed: list[int]) -> Iterator[Thumb]:
    for row in rows:
        try:
            image = Image.fromarray(pixels(row))
        except (radiograph.UnreadableFileError, CorruptSampleError, OSError, ValueError):
            failed.append(row)
            continue
        image.thumbnail((SIDE_PX, SIDE_PX))
        yield Thumb(row, np.asarray(image))


def _figure(frame: pd.DataFrame, thumb: Thumb) -> Html:
    line: dict[Any, Any] = frame.loc[thumb.row].to_dict()
    label = _LABELS[line["label"]]
    caption = f"{display_name(line['study_type'])}, {label}"
    picture = element("img", src=local_only.data_uri(thumb.pixels), alt=f"{caption}, a radiograph of {line['split']}")
    return element("figure", picture, element("figcaption", caption), class_=label)
