"""Pages and pictures that hold radiographs: marked LOCAL ONLY wherever one may look.

    body -> page: the file's first lines, title, banner, footer      pixels -> png, jpeg: a line inside the file -> data URI

No other page of the house holds a radiograph. MURA's licence lets nobody share any portion of it, whatever it was made into.
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
WHY = (
    f"{MARK}: this holds radiographs. It stays on this machine: do not send it, publish it or put it into a repository."
)

_STYLE = """
@media print { body::before { content: "LOCAL ONLY: holds radiographs"; font-weight: 600 } }
"""


def page(title: str, *body: Any, style: str = "") -> str:
    """Return an HTML file with radiographs in it; `body` follows its heading and banner."""
    head = (element("h1", title), banner(f"{WHY} MURA's licence: no sharing of any portion of the data."))
    foot = element("footer", *(element("p", line) for line in (WHY, f"Terms: {mura.TERMS}.", f"{mura.LICENSE}.")))
    return html_page(f"{MARK}: {title}", *head, *body, foot, remark=WHY, style=_STYLE + style)


def png(pixels: np.ndarray) -> bytes:
    """Return a PNG file of pixels, uint8 (H, W) grey or (H, W, 3) colour, that says what it is."""
    comment, data = PngImagePlugin.PngInfo(), io.BytesIO()
    comment.add_text("Comment", f"{WHY} {mura.TERMS}")
    Image.fromarray(pixels).save(data, "PNG", pnginfo=comment, compress_level=6)
    return data.getvalue()


def jpeg(pixels: np.ndarray) -> bytes:
    """Return a JPEG file of pixels, uint8 (H, W), that says what it is: a third of the PNG's bytes, for looking at."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=90, comment=f"{WHY} {mura.TERMS}".encode())
    return data.getvalue()


def data_uri(pixels: np.ndarray, *, lossy: bool = False) -> Html:
    """Return the file's content as an address that needs no file: a PNG, or a JPEG where `lossy`."""
    kind, data = ("jpeg", jpeg(pixels)) if lossy else ("png", png(pixels))
    return Html(f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}")
