"""The page itself, top to bottom.

    upload, or an example -> study type -> answer beside its picture -> another threshold, downloads -> about the model

Runs at every change of a session. What was read and computed of a file is kept in that session, by the file's number.
"""

from typing import TYPE_CHECKING

import streamlit as st

from mura_dist.data import mura
from mura_dist.inference.page import style, wording
from mura_dist.inference.page.result import show_answer, show_downloads, show_threshold
from mura_dist.inference.page.study import answer
from mura_dist.inference.page.study_input import choose_files, choose_study_type, plain, show_failures
from mura_dist.reports.html import element

if TYPE_CHECKING:
    from mura_dist.inference.page.server import Serving


def show(serving: "Serving") -> None:
    st.set_page_config(page_title="mura_dist: a study", layout="wide")
    card = serving.desk.card
    drawings = card.of_drawings
    banner = element("div", wording.DEMO, class_="banner", role="note") if drawings else ""
    terms = element("div", f"{mura.TERMS[0].upper()}{mura.TERMS[1:]}.", class_="terms", role="note")
    st.html(f"{style.sheet(banner=drawings)}{banner}{terms}")
    st.title(wording.TITLE, anchor=False)
    st.html(element("p", wording.PURPOSE, class_="purpose"))
    files = choose_files(serving)
    show_failures(files)
    good = [file for file in files if file.view is not None]
    if good:
        study_type = choose_study_type(serving, good)
        at_hand = str(hash(tuple(st.session_state["files"])))  # what moves starts anew with other files
        reply = answer(good, study_type, card) if study_type is not None else None
        show_answer(reply, good, serving, at_hand, len(files) - len(good))
        if reply is not None:
            left, right = st.columns([5, 6], gap="medium")
            with left:
                show_threshold(reply, serving, at_hand)
            with right:
                show_downloads(reply, good, serving, at_hand)
    _about(serving)


def _about(serving: "Serving") -> None:
    card, model = serving.desk.card, serving.desk.model
    kind = "computer drawings" if card.of_drawings else "radiographs"
    facts = {
        "Trained on": f"{card.trained_on.num_radiographs:,} {kind}",
        "Checkpoint": card.checkpoint,
        "Chosen on": f"the {wording.SETS.get(card.selected_on, card.selected_on)}",
        "Computed in": card.precision,
        "Sees": f"{card.size} x {card.size} pixels, {card.resize}",
        "File (SHA-256)": model.sha256,
        "Terms": f"{card.terms}. {card.licence}.",
    }
    with st.expander("About this model"):
        st.markdown("\n".join(f"- **{name}**: {plain(str(value))}" for name, value in facts.items()))
