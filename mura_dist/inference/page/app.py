"""The page itself, top to bottom. The only file that imports Streamlit.

    upload, or an example -> study type -> answer -> views and maps -> another threshold -> downloads -> about the model

Runs at every change of a session. What was read and computed of a file is kept in that session, by the file's number.
"""

import io
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st
from PIL import Image, ImageFont

from mura_dist.data import gate, mura, table_names
from mura_dist.inference import overlays
from mura_dist.inference.file_list import printable
from mura_dist.inference.page import wording
from mura_dist.inference.page.study import (
    MAX_FILES,
    MAX_UPLOAD_MB,
    Answer,
    File,
    View,
    answer,
    num_studies,
    study_types,
    told_types,
)
from mura_dist.metrics.classification import is_positive
from mura_dist.reports import heatmap, local_only
from mura_dist.reports.html import NEGATIVE_COLOUR, POSITIVE_COLOUR, element

if TYPE_CHECKING:
    from mura_dist.inference.page.server import Serving

TITLE = "Bone radiographs: one study"
NO_EXAMPLE = "none"
CHOOSE = "Choose the study type"
_COLOURS: dict[wording.Outcome, str] = {
    "none_flagged": NEGATIVE_COLOUR,
    "flagged": POSITIVE_COLOUR,
    "uncertain": "#8a8f98",
    "no_call": "#8a8f98",
}
_STYLE = """
<style>
.terms { position: fixed; inset: auto 0 0 0; z-index: 1100000; padding: .45rem 1rem; background: #7a3500; color: #fff;
         font: 600 .9rem/1.35 system-ui, sans-serif; text-align: center }
.drawings { padding: .8rem 1rem; background: #7a3500; color: #fff; font-weight: 600; border-radius: .4rem }
.outcome { border-left: .5rem solid var(--mark); padding: .2rem 0 .2rem 1rem }
.outcome h2 { padding: 0 0 .3rem; margin: 0; font-size: 1.6rem } .outcome p { margin: 0 0 .3rem }
[data-testid="stMainBlockContainer"] { padding-bottom: 6rem; padding-top: 3rem }
</style>
"""


def show(serving: "Serving") -> None:
    st.set_page_config(page_title="mura_dist: a study", layout="centered")
    card = serving.desk.card
    st.html(_STYLE)
    st.html(element("div", _sentence(mura.TERMS), class_="terms", role="note"))
    st.title(TITLE, anchor=False)
    if wording.drawings(card):
        st.html(element("div", f"{wording.DRAWINGS}.", class_="drawings", role="note"))
    files = _files(serving)
    _failures(files)
    good = [file for file in files if file.view is not None]
    if not good:
        _about(serving)
        return
    study_type = _study_type(serving, good)
    found = None
    if study_type is not None:
        found = answer(good, study_type, card)
        _outcome(found, serving, num_left_out=len(files) - len(good))
    at_hand = str(hash(tuple(st.session_state["files"])))  # what moves starts anew with other files
    _views(good, at_hand, drawn=wording.drawings(card))
    if found is not None:
        _threshold(found, serving, at_hand)
        _tables(found)
    _about(serving)


# ---- what comes in


def _files(serving: "Serving") -> list[File]:
    """Every file of the study, read and, where it passes the gate, predicted."""
    uploaded = st.file_uploader(
        f"Radiographs of one study of one patient: PNG, JPEG, TIFF or DICOM, up to {MAX_FILES} files of {MAX_UPLOAD_MB} MB",
        accept_multiple_files=True,
        help="They stay in this server's memory, and go when you remove them or close the page. A file with status code 503 "
        "found no room on the server: remove it, and upload it again in a minute.",
    )
    named = {one.name: one for one in serving.examples}
    chosen = st.selectbox("Or an example study", [NO_EXAMPLE, *named]) if named else NO_EXAMPLE
    if uploaded:
        content = {str(one.file_id): (one.name, one.getvalue) for one in uploaded}
    elif chosen != NO_EXAMPLE:
        content = {
            f"{chosen} {place}": (f"{chosen}/{printable(path.name)}", partial(_content, path))
            for place, path in enumerate(named[chosen].files)
        }
    else:
        content = {}
    if len(content) > MAX_FILES:
        st.error(f"{len(content)} files; at most {MAX_FILES} make a study here: remove some.")
        content = {}
    kept: dict[str, File] = st.session_state.get("files", {})
    new = [number for number in content if number not in kept]
    if new:
        with st.spinner("Reading"):
            asked = serving.desk.ask([content[number][0] for number in new], [content[number][1]() for number in new])
            kept = {**kept, **dict(zip(new, asked, strict=True))}
    st.session_state["files"] = {number: kept[number] for number in content}
    return list(st.session_state["files"].values())


def _content(path: Path) -> bytes:
    """Of an example; an empty file where it has gone since the start."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _failures(files: Sequence[File]) -> None:
    for file in files:
        if file.upload.failure:
            st.error(f"{_plain(file.name)}: {file.upload.failure}.")
        elif file.view is None:
            st.error(f"{_plain(file.name)}: {gate.WORDS[file.upload.verdict]}. It is left out.")
        elif file.upload.verdict in gate.WORDS:
            st.warning(f"{_plain(file.name)}: {gate.WORDS[file.upload.verdict]}.")
        for note in file.upload.notes:
            st.caption(f"{_plain(file.name)}: {note}.")


def _study_type(serving: "Serving", files: Sequence[File]) -> str | None:
    """As files tell, else as chosen; None until it is chosen."""
    known, told = study_types(serving.desk.card), told_types(files, serving.desk.card)
    if num_studies(files) > 1:
        st.warning("These DICOMs are of several studies. The answer takes all files as one study of one patient.")
    if len(told) > 1:
        st.warning(f"The files tell of several study types: {', '.join(sorted(map(wording.noun, told)))}.")
    elif told - set(known):
        st.warning(f"The files tell of the study type {wording.noun(min(told))}, which this model was not trained on.")
    labels = {wording.noun(one).capitalize(): one for one in known}
    chosen = st.selectbox(
        "Study type",
        list(labels),
        index=known.index(min(told)) if len(told) == 1 and told <= set(known) else None,
        placeholder=CHOOSE,
        help="Read from MURA's names or a DICOM's body part where they tell; else choose it.",
    )
    if chosen is None:
        st.info(f"{CHOOSE}: the answer depends on it.")
        return None
    return labels[chosen]


# ---- what goes out


def _outcome(found: Answer, serving: "Serving", num_left_out: int) -> None:
    said = wording.outcome(found, serving.desk.card)
    lines = wording.explained(found, serving.desk.card)
    if num_left_out:
        lines.append(f"{num_left_out} of the files {'is' if num_left_out == 1 else 'are'} left out, see above.")
    st.html(
        element(
            "section",
            element("h2", wording.HEADLINES[said]),
            *(element("p", line) for line in lines),
            class_="outcome",
            style=f"--mark: {_COLOURS[said]}",
            role="alert",
        )
    )


@st.fragment  # what moves in here draws this part anew, and nothing else
def _views(files: Sequence[File], at_hand: str, *, drawn: bool) -> None:
    st.header("Views", anchor=False)
    strength = _strength(at_hand)
    for start in range(0, len(files), 2):  # row by row: on a phone columns stand under each other, in their order
        for place, column in enumerate(st.columns(2), start):
            if place < len(files):
                with column:
                    _view(files[place], f"view {place + 1}", strength)
                    _overlay(files[place], f"view {place + 1}", at_hand, drawn=drawn)


def _strength(at_hand: str) -> float | None:
    """Of the maps, 0.1 to 1; None as long as nobody asks for them: a map shows something beside every answer."""
    if not st.toggle("Show the activation map", value=False, help=wording.MAP_CAVEAT, key=f"map {at_hand}"):
        return None
    strength = st.slider("Opacity of the map, in percent", 10, 100, 100, step=10) / 100
    st.image(_scale(), alt=_SCALE_WORDS, width="stretch")
    st.caption(f"One scale for every map of every study. {wording.MAP_CAVEAT}")
    return strength


def _view(file: File, which: str, strength: float | None) -> None:
    assert file.view is not None
    assert file.upload.shown is not None
    shown, what = file.upload.shown, "Radiograph"
    if strength is not None:
        shown, what = heatmap.painted(shown, file.view.cells, strength), "Radiograph under its activation map"
    st.image(_png(shown), alt=f"{what}, {which}", width="stretch")
    name = file.name.rpartition("/")[2]
    st.markdown(f"{which.capitalize()}, {_plain(name)}: probability **{file.view.probability:.2f}**")


def _overlay(file: File, which: str, at_hand: str, *, drawn: bool) -> None:
    """A download of the view and its map, as predict draws it; where the pixels may show a name, only when that was confirmed."""
    identity = file.upload.identity
    withheld = identity is not None and identity.may_show_text
    if withheld and not st.checkbox("Its pixels may show a name: I may download it", key=f"allow {which} {at_hand}"):
        return
    assert file.upload.image is not None
    assert file.view is not None
    st.download_button(
        f"Overlay of {which} (PNG)",
        data=partial(_picture, file.upload.image, file.view, drawn),
        file_name=f"overlay-{which.replace(' ', '-')}.png",
        mime="image/png",
        key=f"overlay {which} {at_hand}",
        on_click="ignore",
        help=local_only.WHY,
    )


def _picture(image: np.ndarray, view: View, drawn: bool) -> bytes:
    return local_only.png(overlays.picture(image, view.cells, view.logit, drawings=drawn))


@st.fragment
def _threshold(found: Answer, serving: "Serving", at_hand: str) -> None:
    """Look at another threshold; nothing else on the page, and no download, moves with it."""
    curve = wording.Curve.of(serving.desk.card, found.study_type)
    own = found.cell("threshold")
    if curve is None or own is None:
        return
    st.header("Another threshold", anchor=False)
    first, last = wording.ENDS
    start = min(max(round(float(own), 2), first), last)
    value = st.slider("Threshold", first, last, start, step=0.01, key=f"threshold {found.study_type} {at_hand}")
    call = "flagged" if is_positive(found.probability, value) else "not flagged"
    st.markdown(
        f"At {value:.2f} this study ({found.probability:.2f}) would be **{call}**: {', '.join(curve.rates(value))}.  \n"
        f"On {curve.people}. The model's own threshold is {float(own):.2f}; downloads keep its own call."
    )


def _tables(found: Answer) -> None:
    st.header("Downloads", anchor=False)
    for label, table, name in (("Study", found.studies, "studies"), ("Views", found.predictions, "predictions")):
        st.download_button(
            f"{label} (CSV)",
            data=table_names.cells(table).to_csv(index=False, lineterminator="\n").encode(),
            file_name=f"{name}.csv",
            mime="text/csv",
            on_click="ignore",
        )


def _about(serving: "Serving") -> None:
    card, model = serving.desk.card, serving.desk.model
    trained = f"{card.trained_on.num_radiographs:,} {card.trained_on.kind}"
    facts = {
        "Trained on": trained,
        "Checkpoint": card.checkpoint,
        "Chosen by": f"the split {card.selected_on}",
        "Computed in": card.precision,
        "Sees": f"{card.size} x {card.size} pixels, {card.resize}",
        "File (SHA-256)": model.sha256,
        "Terms": f"{card.terms}. {card.licence}.",
    }
    with st.expander("About this model"):
        st.markdown("\n".join(f"- **{name}**: {_plain(str(value))}" for name, value in facts.items()))


# ---- pieces

_SCALE_WORDS = f"Colours of a cell's logit: blue lowers it, orange raises it, clear is near 0; steps at {heatmap.EDGES}"


def _png(pixels: np.ndarray) -> bytes:
    """Quickly rather than small: it goes no further than the screen."""
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=1)
    return data.getvalue()


@cache
def _scale() -> bytes:
    canvas = Image.new("RGB", (664, heatmap.SCALE_PX + 12), "white")
    heatmap.draw_scale(canvas, 8, 6, 648, ImageFont.load_default(14))
    return _png(np.asarray(canvas))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _plain(text: str) -> str:
    """A file may be called anything: nothing of it is markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!|<>~$:&" else sign for sign in text)
