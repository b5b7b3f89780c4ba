"""Draw the page, from top to bottom. Streamlit runs `show` at every change in a session.

    upload or example -> study type -> result next to its picture -> another threshold, downloads -> about the model

The session stores each file's result, so a file is predicted once.
"""

from typing import TYPE_CHECKING

import streamlit as st

from mura_dist.data import mura
from mura_dist.inference.page import style, wording
from mura_dist.inference.page.result import show_downloads, show_result, show_threshold
from mura_dist.inference.page.study import build_result
from mura_dist.inference.page.study_input import choose_files, choose_study_type, escape_markdown, show_failures
from mura_dist.reports.html import element

if TYPE_CHECKING:
    from mura_dist.inference.page.server import PageContext


def show(context: "PageContext") -> None:
    """Draw the page for one session."""
    st.set_page_config(page_title="mura_dist: a study", layout="wide")
    card = context.service.card
    drawings = card.trained_on_phantoms
    banner = element("div", wording.DEMO_BANNER, class_="banner", role="note") if drawings else ""
    terms = element("div", f"{mura.TERMS[0].upper()}{mura.TERMS[1:]}.", class_="terms", role="note")
    st.html(f"{style.sheet(banner=drawings)}{banner}{terms}")
    st.title(wording.TITLE, anchor=False)
    st.html(element("p", wording.PURPOSE, class_="purpose"))
    files = choose_files(context)
    show_failures(files)
    scored = [file for file in files if file.output is not None]
    if scored:
        study_type = choose_study_type(context, scored)
        files_key = str(hash(tuple(st.session_state["files"])))  # new files reset the controls
        result = build_result(scored, study_type, card) if study_type is not None else None
        show_result(result, scored, context, files_key, len(files) - len(scored))
        if result is not None:
            threshold_column, download_column = st.columns([5, 6], gap="medium")
            with threshold_column:
                show_threshold(result, context, files_key)
            with download_column:
                show_downloads(result, scored, context, files_key)
    _about(context)


def _about(context: "PageContext") -> None:
    card, model = context.service.card, context.service.model
    kind = "computer drawings" if card.trained_on_phantoms else "radiographs"
    facts = {
        "Trained on": f"{card.trained_on.num_radiographs:,} {kind}",
        "Checkpoint": card.checkpoint,
        "Selected on": f"the {wording.SPLIT_NAMES.get(card.selected_on, card.selected_on)}",
        "Precision": card.precision,
        "Input": f"{card.size} x {card.size} pixels, {card.resize}",
        "File (SHA-256)": model.sha256,
        "Terms": f"{card.terms}. {card.licence}.",
    }
    with st.expander("About this model"):
        st.markdown("\n".join(f"- **{name}**: {escape_markdown(str(value))}" for name, value in facts.items()))
