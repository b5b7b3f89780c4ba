"""Draw the result: the outcome next to the first picture, the other pictures, another threshold, the downloads.

StudyAnswer, files -> outcome, map switch and scale | first picture -> other pictures -> threshold slider | downloads
"""

import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st
from PIL import Image

from mura_dist.data import table_names
from mura_dist.inference import overlays
from mura_dist.inference.page import style, wording
from mura_dist.inference.page.study import StudyAnswer, StudyFile, ViewOutput
from mura_dist.inference.page.study_input import escape_markdown
from mura_dist.metrics.classification import is_positive
from mura_dist.models.card import Card
from mura_dist.reports import heatmap, local_only
from mura_dist.reports.html import Html, element

if TYPE_CHECKING:
    from mura_dist.inference.page.server import PageContext

_MIN_LABEL_SHARE = 0.16  # of the gauge; less is too narrow for a label
SCALE = "Colors of the activation map: blue lowers the probability, orange raises it, clear has little effect"


@st.fragment  # a control in a fragment redraws the fragment only
def show_result(
    result: StudyAnswer | None, files: Sequence[StudyFile], context: "PageContext", files_key: str, num_unused: int
) -> None:
    """Draw the result, if there is one, and the pictures.

    Args:
        result: None until a study type is chosen.
        files: Files with an output.
        context: The page's context.
        files_key: Key of the files in the session. New files reset the controls.
        num_unused: Number of files without an output.
    """
    summary_column, picture_column = st.columns([5, 6], gap="medium")
    with summary_column:
        strength = None
        if result is not None:
            st.html(outcome(result, context.service.card, num_unused))
            strength = _map_strength(result, files, files_key)
    values = result is not None and not result.withheld
    with picture_column, st.container(key="picture-main"):
        _picture(files, 0, strength, values=values)
    for start in range(1, len(files), 3):  # row by row, since a phone stacks the columns of a row
        for index, column in zip(range(start, len(files)), st.columns(3), strict=False):
            with column, st.container(key=f"picture-{index}"):
                _picture(files, index, strength, values=values)


def outcome(result: StudyAnswer, card: Card, num_unused: int) -> Html:
    """Return the outcome as markup."""
    headline, lines = wording.outcome(result), wording.explanation_lines(result, card)
    num_first = len(wording.ERROR_RATES_BY_OUTCOME[headline])
    if num_unused:
        lines.append(f"{num_unused} of the files {'is' if num_unused == 1 else 'are'} not used, see above.")
    return element(
        "section",
        element("h2", wording.HEADLINES[headline]),
        element("p", wording.lead_sentence(result), class_="lead"),
        *([] if result.withheld else [gauge(result, card)]),
        *(element("p", line, class_="frequency") for line in lines[:num_first]),
        *(element("small", line) for line in lines[num_first:]),
        class_="outcome",
        style=f"--mark: {style.MARKS[headline]}",
        role="alert",
    )


def gauge(result: StudyAnswer, card: Card) -> Html:
    """Return a bar with the probability, the threshold and the uncertain band. The text contains the same numbers."""
    above, marks, below = [], [], [element("span", "0", class_="low"), element("span", "1", class_="high")]
    band = card.calibration.bands.get(result.study_type)
    if band is not None and result.cell("band") is not None:
        marks.append(element("span", class_="band", style=f"left: {band.low:.2%}; right: {1 - band.high:.2%}"))
        if band.high - band.low > _MIN_LABEL_SHARE:
            above.append(element("span", "uncertain", style=f"left: {(band.low + band.high) / 2:.2%}"))
    if (threshold := result.cell("threshold")) is not None:
        marks.append(element("span", class_="threshold", style=f"left: {float(threshold):.2%}"))
        if _MIN_LABEL_SHARE < float(threshold) < 1 - _MIN_LABEL_SHARE:
            below.append(element("span", "threshold", style=f"left: {float(threshold):.2%}"))
    marks.append(element("span", class_="here", style=f"left: {result.probability:.2%}"))
    labels_above, labels_below = (element("div", *spans, class_="gauge-words") for spans in (above, below))
    return element("div", labels_above, element("div", *marks, class_="gauge"), labels_below, aria_hidden="true")


# ---- pictures and their maps


def _map_strength(result: StudyAnswer, files: Sequence[StudyFile], files_key: str) -> float | None:
    """Draw the controls of the maps. Return the strength, 0.1 to 1, or None while the maps are off, as they are at first."""
    if result.withheld:
        return None
    if reason := wording.map_unavailable_reason(file.output.cells.shape for file in files if file.output is not None):
        st.caption(reason)
        return None
    if not st.toggle("Show the activation map", value=False, help=wording.MAP_CAVEAT, key=f"map {files_key}"):
        return None
    bar = element("div", class_="bar", style=f"background: {style.scale_gradient()}", role="img", aria_label=SCALE)
    effects = ("lowers the probability", "little effect", "raises it")
    ends = element("div", *(element("span", text) for text in effects), class_="ends")
    note = element("p", f"The color scale is the same for every picture. {wording.MAP_CAVEAT}")
    st.html(element("div", bar, ends, note, class_="scale"))
    return st.slider("Strength of the map", 1, 10, 10, key=f"strength {files_key}") / 10


def _picture(files: Sequence[StudyFile], index: int, strength: float | None, *, values: bool) -> None:
    file, which = files[index], f"picture {index + 1}"
    assert file.output is not None
    assert file.upload.preview is not None
    pixels, alt = file.upload.preview, "Radiograph"
    if strength is not None:
        pixels = heatmap.overlay_heatmap(pixels, file.output.cells, strength)
        alt = "Radiograph under its activation map"
    st.image(_png(pixels), alt=f"{alt}, {which}", width="stretch")
    caption = which.capitalize()
    if not file.is_drawing:
        caption += f", {escape_markdown(file.name.rpartition('/')[2])}"
    st.markdown(f"{caption}: probability **{file.output.probability:.2f}**" if values else caption)


def _png(pixels: np.ndarray) -> bytes:
    """Return a PNG at a low, fast compression level, for display only."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


# ---- another threshold


@st.fragment
def show_threshold(result: StudyAnswer, context: "PageContext", files_key: str) -> None:
    """Draw the slider of another threshold. It changes nothing else on the page and no download."""
    curve = None if result.withheld else wording.ThresholdCurve.from_card(context.service.card, result.study_type)
    model_threshold = result.cell("threshold")
    if curve is None or model_threshold is None:
        return
    st.header("Another threshold", anchor=False)
    first, last = wording.THRESHOLD_RANGE
    start = min(max(round(float(model_threshold), 2), first), last)
    value = st.slider("Threshold", first, last, start, step=0.01, key=f"threshold {result.study_type} {files_key}")
    call = "flagged" if is_positive(result.probability, value) else "not flagged"
    st.markdown(
        f"At {value:.2f} this study ({result.probability:.2f}) would be **{call}**. {' '.join(curve.sentences(value))}"
    )
    st.caption(f"{curve.caveat} The model's threshold is {float(model_threshold):.2f}. The downloads use it.")


# ---- downloads


def show_downloads(result: StudyAnswer, files: Sequence[StudyFile], context: "PageContext", files_key: str) -> None:
    """Draw the downloads: the tables that `predict` would write, and each picture with its map."""
    st.header("Downloads", anchor=False)
    drawn = context.service.card.trained_on_phantoms
    tail = "-of-drawings" if drawn and not result.withheld else ""
    with st.container(horizontal=True, key="downloads"):
        for label, table, name in (
            ("Study", result.studies, "studies"),
            ("Pictures", result.predictions, "predictions"),
        ):
            st.download_button(
                f"{label} (CSV)",
                data=table_names.escape_formulas(table).to_csv(index=False, lineterminator="\n").encode(),
                file_name=f"{name}{tail}.csv",
                mime="text/csv",
                on_click="ignore",
            )
        for index, file in enumerate(files):
            if not result.withheld and file.output is not None and heatmap.drawable(file.output.cells):
                _overlay(file, index, files_key, drawn=drawn)
    if tail:
        st.caption("Model and files are computer drawings. The tables state this in the column trained_on.")


def _overlay(file: StudyFile, index: int, files_key: str, *, drawn: bool) -> None:
    """Draw the download of a picture with its map. If its pixels may show a name, the user must confirm first."""
    assert file.upload.image is not None
    assert file.output is not None
    identity, which = file.upload.identity, f"picture {index + 1}"
    withheld = identity is not None and identity.may_show_text
    allow = f"The pixels of {which} may show a patient's name. I am allowed to download it."
    if withheld and not st.checkbox(allow, key=f"allow {which} {files_key}"):
        return
    st.download_button(
        f"{which.capitalize()} with its map (PNG)",
        data=partial(_overlay_png, file.upload.image, file.output, drawn),
        file_name=f"map-of-{which.replace(' ', '-')}.png",
        mime="image/png",
        key=f"overlay {which} {files_key}",
        on_click="ignore",
        help=local_only.WHY,
    )


def _overlay_png(image: np.ndarray, view: ViewOutput, drawn: bool) -> bytes:
    return local_only.png(overlays.draw_overlay(image, view.cells, view.logit, drawings=drawn))
