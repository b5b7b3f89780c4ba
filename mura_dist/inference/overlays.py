"""Overlays of a prediction: a radiograph, and beside it the same under its class activation map. LOCAL ONLY.

    image (S, S), cells (h, w), logit -> picture with scale, caveat and mark -> OUT/overlays/NAME.png

NAME is the radiograph's name in the tables, which may be a pseudonym. The file has no metadata but the mark. A DICOM whose
pixels may show a person's name gets no overlay without --allow-pixels. A PNG or JPEG does not tell whether they do.
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
CAVEAT = "research only, not a medical device; a heatmap shows what moved this model, not where a lesion is"  # one line
_SIDE_PX, _WIDTH_PX = 320, 664  # minimum of a radiograph and of the picture
_NAME_BYTES = 230  # a file name has 255, of which a suffix needs some
_MARGIN, _TOP, _BELOW = 8, 26, 26


@dataclass(frozen=True)
class Overlay:
    """The content of an overlay.

    Attributes:
        name: Name of the radiograph in the tables.
        image: (S, S) uint8.
        cells: Activation map (h, w) float32.
        logit: Output of the model.
    """

    name: str
    image: np.ndarray
    cells: np.ndarray
    logit: float


@dataclass(frozen=True)
class Overlays:
    """A writer of overlays.

    Attributes:
        out: Output folder of the prediction.
        allow_pixels: Write also overlays of DICOMs whose pixels may show a name.
        drawings: The model was trained on drawings (phantoms).
    """

    out: Path
    allow_pixels: bool = False
    drawings: bool = False

    def begin(self) -> None:
        """Write the note that the folder is local only, before any overlay."""
        files.write_bytes(self.out / FOLDER / NOTE, f"{local_only.WHY}\n{CAVEAT}.\n".encode())

    def withholds(self, identity: DicomIdentity | None) -> bool:
        """Return whether the overlay of a radiograph must not be written."""
        return identity is not None and identity.may_show_text and not self.allow_pixels

    def write_all(self, overlays: Sequence[Overlay]) -> None:
        """Draw and write overlays in threads: drawing and compressing one of 320 px take 28 ms and 52 ms of a core."""
        with ThreadPoolExecutor(min(len(overlays), os.cpu_count() or 1) or 1) as pool:
            list(pool.map(self._write, overlays))

    def _write(self, overlay: Overlay) -> None:
        pixels = draw_overlay(overlay.image, overlay.cells, overlay.logit, drawings=self.drawings)
        files.write_bytes(overlay_path(self.out, overlay.name), local_only.png(pixels))


def overlay_path(out: Path, name: str) -> Path:
    """Return the file of a radiograph's overlay. Different names have different files, none of which is a folder of another."""
    *folders, last = map(_shorten, name.split("/"))
    return out.joinpath(FOLDER, *map(_folder_name, folders), f"{last}.png")


def _shorten(name: str) -> str:
    data = name.encode("utf-8", "surrogatepass")
    if len(data) <= _NAME_BYTES:
        return name
    return f"{data[: _NAME_BYTES - 20].decode('utf-8', 'ignore')}~{hashlib.sha256(data).hexdigest()[:16]}"


def _folder_name(folder: str) -> str:
    """Append an underscore to a folder that is named like an overlay or like the note."""
    return f"{folder}_" if re.fullmatch(rf"(?s:.*\.png|{re.escape(NOTE)})_*", folder) else folder


def withheld_warnings(num_withheld: int) -> Iterable[str]:
    """Yield a warning if overlays were withheld."""
    if num_withheld:
        yield (
            f"no overlay of {num_withheld:,} radiographs: their pixels may show a name (BurnedInAnnotation, a secondary "
            "capture, or an unreadable header). --allow-pixels writes them"
        )


def overlay_counts(num_written: int, num_withheld: int) -> dict[str, int]:
    """Return the counts with their keys in predict.json."""
    return {"num_overlays": num_written, "num_overlays_withheld": num_withheld}


def sum_overlay_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Return the sums of the counts of all chunks."""
    total = Counter(overlay_counts(0, 0))
    for chunk_counts in counts:
        total.update(chunk_counts)
    return dict(total)


# ---- the picture


def draw_overlay(image: np.ndarray, cells: np.ndarray, logit: float, *, drawings: bool = False) -> np.ndarray:
    """Draw a radiograph beside its overlay. The picture contains no name.

    Args:
        image: (S, S) uint8.
        cells: Activation map (h, w) float32.
        logit: Output of the model.
        drawings: The model was trained on drawings.

    Returns:
        (H, W, 3) uint8.
    """
    zoom = max(1, round(_SIDE_PX / len(image)))
    side = zoom * len(image)
    width, bottom = max(_WIDTH_PX, 2 * side + 3 * _MARGIN), _TOP + _MARGIN + side
    canvas = Image.new("RGB", (width, bottom + _BELOW + heatmap.SCALE_PX + 2 * _MARGIN + 18), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    draw.rectangle((0, 0, width, _TOP), fill="#8a3c00")
    suffix = ". The model was trained on drawings" if drawings else ""
    draw.text((_MARGIN, 4), f"{local_only.MARK}: holds a radiograph; do not send or publish{suffix}", "white", font)
    panels = (np.repeat(image[..., None], 3, axis=2), heatmap.overlay_heatmap(image, cells))
    left_px = (width - 2 * side - _MARGIN) // 2
    for number, pixels in enumerate(panels):
        panel = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(panel, (left_px + number * (side + _MARGIN), _TOP + _MARGIN))
    probability = classification.logit_to_probability(logit)
    caption = f"This view alone: logit {logit:+.2f}, probability {probability:.3f}. The model sees it as a square"
    draw.text((_MARGIN, bottom + 5), caption, "#1b1f24", font)
    heatmap.draw_scale(canvas, _MARGIN, bottom + _BELOW + 4, width - 2 * _MARGIN, font)
    end = bottom + _BELOW + heatmap.SCALE_PX + _MARGIN
    draw.text((_MARGIN, end), f"{CAVEAT[0].upper()}{CAVEAT[1:]}.", "#8a3c00", ImageFont.load_default(13))
    return np.asarray(canvas)
