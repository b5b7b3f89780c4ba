"""Overlays of a prediction run: a radiograph alone, and beside it the same under its class activation map. LOCAL ONLY.

    image (S, S), cells (h, w), logit -> picture, with scale, caveat and mark in its pixels -> OUT/overlays/NAME.png

NAME is the radiograph's path in the tables, a pseudonym where those have one, with ".png" behind it. No metadata but the mark.
Of a DICOM whose pixels may show a name, none is written unless that is allowed; of a PNG or a JPEG nothing tells.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mura_dist.core import files
from mura_dist.data.radiograph import DicomIdentity
from mura_dist.metrics import classification
from mura_dist.reports import heatmap, local_only

FOLDER, NOTE = "overlays", "LOCAL-ONLY.txt"
CAVEAT = "research only, not a medical device; a heatmap shows what moved this model, not where a lesion is"  # fits the picture
_SIDE_PX, _WIDTH_PX = 320, 664  # at least, of a radiograph and of the picture
_NAME_BYTES = 230  # of 255: a suffix follows
_MARGIN, _TOP, _BELOW = 8, 26, 26


@dataclass(frozen=True)
class Overlay:
    """What one is drawn from. `name`: the radiograph's path as the tables have it; image (S, S) uint8, cells (h, w)."""

    name: str
    image: np.ndarray
    cells: np.ndarray
    logit: float


@dataclass(frozen=True)
class Overlays:
    """The folder of the overlays, and which may be written. `drawings`: the model was trained on phantoms."""

    out: Path
    allow_pixels: bool = False
    drawings: bool = False

    def begin(self) -> None:
        """The note comes first: nothing lies in the folder without it."""
        self._put(self.out / FOLDER / NOTE, f"{local_only.WHY}\n{CAVEAT}.\n".encode())

    def withholds(self, identity: DicomIdentity | None) -> bool:
        return identity is not None and identity.may_show_text and not self.allow_pixels

    def write_all(self, some: Sequence[Overlay]) -> None:
        """Return when they are on disk. By threads: at 320 px one costs a core 28 ms to draw and 52 to compress (two cores,
        shared with others)."""
        with ThreadPoolExecutor(min(len(some), os.cpu_count() or 1) or 1) as pool:
            list(pool.map(self._write, some))

    def _write(self, overlay: Overlay) -> None:
        pixels = draw_overlay(overlay.image, overlay.cells, overlay.logit, drawings=self.drawings)
        self._put(overlay_path(self.out, overlay.name), local_only.png(pixels))

    def _put(self, path: Path, data: bytes) -> None:
        files.write_bytes(path, data)


def overlay_path(out: Path, name: str) -> Path:
    """The file of a radiograph's overlay: two names never share one, nor does one need a folder where the other is a file."""
    *folders, last = (_short(part) for part in name.split("/"))
    return out.joinpath(FOLDER, *(_no_file(folder) for folder in folders), f"{last}.png")


def _short(part: str) -> str:
    data = part.encode("utf-8", "surrogatepass")
    if len(data) <= _NAME_BYTES:
        return part
    return f"{data[: _NAME_BYTES - 20].decode('utf-8', 'ignore')}~{hashlib.sha256(data).hexdigest()[:16]}"


def _no_file(folder: str) -> str:
    """A folder called like an overlay, or like the note, with one underscore more."""
    return f"{folder}_" if re.fullmatch(rf"(?s:.*\.png|{re.escape(NOTE)})_*", folder) else folder


def withheld_warnings(num_withheld: int) -> Iterable[str]:
    """Why some are not there, in a line."""
    if num_withheld:
        yield (
            f"no overlay of {num_withheld:,} radiographs, whose pixels may show a name (BurnedInAnnotation, a secondary "
            "capture, or a header that cannot be read); --allow-pixels writes them"
        )


def overlay_counts(num_written: int, num_withheld: int) -> dict[str, int]:
    """As predict.json has them."""
    return {"num_overlays": num_written, "num_overlays_withheld": num_withheld}


def sum_overlay_counts(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The counts of all parts of a run."""
    total = Counter(overlay_counts(0, 0))
    for part in parts:
        total.update(part)
    return dict(total)


# ---- the picture


def draw_overlay(image: np.ndarray, cells: np.ndarray, logit: float, *, drawings: bool = False) -> np.ndarray:
    """image (S, S) uint8 and its map (h, w) -> uint8 (H, W, 3). Nothing in it is of this radiograph but its pixels."""
    zoom = max(1, round(_SIDE_PX / len(image)))
    side = zoom * len(image)
    width, bottom = max(_WIDTH_PX, 2 * side + 3 * _MARGIN), _TOP + _MARGIN + side
    canvas = Image.new("RGB", (width, bottom + _BELOW + heatmap.SCALE_PX + 2 * _MARGIN + 18), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.rectangle((0, 0, width, _TOP), fill="#8a3c00")
    drawn = ". The model was trained on drawings" if drawings else ""
    draw.text((_MARGIN, 4), f"{local_only.MARK}: holds a radiograph; do not send or publish{drawn}", "white", font)
    both = (np.repeat(image[..., None], 3, axis=2), heatmap.overlay_heatmap(image, cells))
    left = (width - 2 * side - _MARGIN) // 2
    for number, pixels in enumerate(both):
        shown = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(shown, (left + number * (side + _MARGIN), _TOP + _MARGIN))
    probability = classification.logit_to_probability(logit)
    words = f"Of this view alone: logit {logit:+.2f}, probability {probability:.3f}; the model sees it as a square"
    draw.text((_MARGIN, bottom + 5), words, "#1b1f24", font)
    heatmap.draw_scale(canvas, _MARGIN, bottom + _BELOW + 4, width - 2 * _MARGIN, font)
    end = bottom + _BELOW + heatmap.SCALE_PX + _MARGIN
    draw.text((_MARGIN, end), f"{CAVEAT[0].upper()}{CAVEAT[1:]}.", "#8a3c00", ImageFont.load_default(13))
    return np.asarray(canvas)
