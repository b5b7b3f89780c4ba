"""Mark pages and pictures that hold radiographs as LOCAL ONLY.

    body -> page: marked in its first lines, title, banner and footer
    pixels -> png, jpeg: marked in the file's comment -> data URI

MURA's license forbids sharing any portion of the data in any form. No other page of this package holds a radiograph.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from mura_dist.data import mura
from mura_dist.reports.html import Html, banner, element
from mura_dist.reports.html import page as html_page

MARK = "LOCAL ONLY"
WHY = f"{MARK}: this file holds radiographs. Keep it on this machine: do not send it, publish it or add it to a repository."

_STYLE = """
@media print { body::before { content: "LOCAL ONLY: holds radiographs"; font-weight: 600 } }
"""


def page(title: str, *body: Any, style: str = "") -> str:
    """Return an HTML file that holds radiographs. `body` follows the heading and the banner."""
    head = (element("h1", title), banner(f"{WHY} MURA's license: no sharing of any portion of the data."))
    foot = element("footer", *(element("p", line) for line in (WHY, f"Terms: {mura.TERMS}.", f"{mura.LICENSE}.")))
    return html_page(f"{MARK}: {title}", *head, *body, foot, remark=WHY, style=_STYLE + style)


def png(pixels: np.ndarray) -> bytes:
    """Return a marked PNG file of uint8 pixels, gray (H, W) or RGB (H, W, 3)."""
    comment, data = PngImagePlugin.PngInfo(), io.BytesIO()
    comment.add_text("Comment", f"{WHY} {mura.TERMS}")
    Image.fromarray(pixels).save(data, "PNG", pnginfo=comment, compress_level=6)
    return data.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    """Return a marked JPEG file of uint8 pixels (H, W), a third of the PNG's size."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90, comment=f"{WHY} {mura.TERMS}".encode())
    return data.getvalue()


def data_uri(pixels: np.ndarray, *, lossy: bool = False) -> Html:
    """Return a data URI of a PNG, or of a JPEG if `lossy`."""
    kind, data = ("jpeg", jpeg(pixels)) if lossy else ("png", png(pixels))
    return Html(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}")
