"""Draw a study of the gallery as a picture: its views alone and under their maps, the scale, captions, LOCAL ONLY."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mura_dist.data import mura
from mura_dist.evaluation.gallery_studies import GalleryStudy, GalleryView
from mura_dist.reports import heatmap, local_only

_GAP, _TOP = 8, 92


def draw_picture(study: GalleryStudy) -> np.ndarray:
    """Draw the picture of a study, uint8 (H, W, 3). A map with too few cells is omitted."""
    size = max((len(view.pixels) for view in study.views), default=320)
    side = size * max(1, round(320 / size))
    columns = 2 if len(study.views) > 2 else 1
    num_lines = -(-len(study.views) // columns)
    pair, line = 2 * side + _GAP, side + 26
    width = max(columns * (pair + 3 * _GAP) + _GAP, 660)
    height = _TOP + num_lines * line + 132
    canvas = Image.new("RGB", (width, height), "white")
    draw, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(19), ImageFont.load_default(14)
    draw.rectangle((0, 0, width, 26), fill="#8a3c00")
    draw.text((2 * _GAP, 4), f"{local_only.MARK}: holds radiographs; do not send or publish", "white", small)
    draw.text((2 * _GAP, 34), study.caption, "black", large)
    draw.text((2 * _GAP, 62), f"{study.study}{study.corrupt_note}", "#5b6570", small)
    for index, view in enumerate(study.views):
        x, y = 2 * _GAP + index % columns * (pair + 3 * _GAP), _TOP + index // columns * line
        for number, pixels in enumerate(_render_pair(view, side)):
            canvas.paste(pixels, (x + number * (side + _GAP), y))
        draw.text((x, y + side + 3), view.caption, "#1b1f24", small)
    drawn = any(heatmap.drawable(view.cells) for view in study.views)
    if drawn:
        heatmap.draw_scale(canvas, 2 * _GAP, height - 122, min(width - 4 * _GAP, 640), small)
    caveat = "The map does not outline a lesion." if drawn else "No map: it has too few cells."
    for number, text in enumerate((caveat, f"{mura.TERMS}.")):
        draw.text((2 * _GAP, height - 42 + 18 * number), text, "#5b6570", ImageFont.load_default(13))
    return np.asarray(canvas)


def _render_pair(view: GalleryView, side: int) -> list[Image.Image]:
    """Return the radiograph alone and, where it has enough cells, under its map; side x side pixels each."""
    both = [np.repeat(view.pixels[..., None], 3, axis=2)]
    if heatmap.drawable(view.cells):
        both.append(heatmap.overlay_heatmap(view.pixels, view.cells))
    return [Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC) for pixels in both]
