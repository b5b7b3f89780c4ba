"""Draw the inputs: an upload zone, the examples, the study type.

no files -> upload zone, cards of examples
files -> read and predicted once, stored in the session by their number
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from mura_dist.data import gate
from mura_dist.data.mura import display_name
from mura_dist.inference.page import failures
from mura_dist.inference.page.examples import Example
from mura_dist.inference.page.study import (
    MAX_FILES,
    MAX_UPLOAD_MB,
    StudyFile,
    detect_study_types,
    num_studies,
    study_types,
)
from mura_dist.reports.html import element
from mura_dist.reports.plurals import pluralize

if TYPE_CHECKING:
    from mura_dist.inference.page.server import PageContext

CHOOSE = "Choose the study type"
UPLOAD = "Drag and drop the radiographs of one study here"
LIMITS = f"PNG, JPEG, TIFF or DICOM, up to {MAX_FILES} files of {MAX_UPLOAD_MB} MB, of one study of one patient."
_EXAMPLE = "example"  # key of the session state: the number of the chosen example

Content = dict[str, tuple[str, Callable[[], bytes]]]
"""Number of a file in this session -> its name, and a function that returns its bytes."""


def choose_files(context: "PageContext") -> list[StudyFile]:
    """Draw the inputs for files. Return the study's files, decoded and, if they pass the gate, predicted."""
    number = st.session_state.get(_EXAMPLE)
    if number is not None:
        return _read_once(context, _chosen_example(context.examples[number - 1]))
    content = _uploaded()
    if not content and context.examples:
        _example_cards(context)
    return _read_once(context, content)


def _uploaded() -> Content:
    with st.container(key="upload-zone"):
        uploaded = st.file_uploader(UPLOAD, accept_multiple_files=True, key="upload")
        st.html(element("p", failures.UPLOAD_REFUSED, class_="refused", role="alert"))
        if uploaded:
            if len(uploaded) <= MAX_FILES:
                return {str(upload.file_id): (upload.name, upload.getvalue) for upload in uploaded}
            st.error(f"{len(uploaded)} files: {failures.TOO_MANY}.")
            return {}
        privacy = "The files stay in this server's memory. They are deleted when you remove them or close the page."
        st.html(element("p", f"{LIMITS} {privacy}", class_="soft"))
    return {}


def _example_cards(context: "PageContext") -> None:
    """Draw the examples as cards: one of each study type, and the others in a collapsed block."""
    st.header("Or try an example", anchor=False)
    first = len({example.study_type for example in context.examples})
    cards = list(zip(context.examples, context.thumbnails, strict=True))
    _grid("first", cards[:first])
    if cards[first:]:
        with st.expander(f"{len(cards) - first} more examples"):
            _grid("more", cards[first:])


def _grid(name: str, cards: Sequence[tuple[Example, bytes | None]]) -> None:
    with st.container(key=f"cards-{name}"):
        for example, picture in cards:
            with st.container(key=f"example-{example.number}"):
                if picture is not None:
                    st.image(picture, alt=f"First picture of example {example.number}", width="stretch")
                st.button(
                    example_title(example),
                    key=f"choose-{example.number}",
                    on_click=partial(st.session_state.__setitem__, _EXAMPLE, example.number),
                    type="tertiary",
                    width="stretch",
                )


def example_title(example: Example) -> str:
    """Return the title of an example."""
    return f"Example {example.number}: {display_name(example.study_type).lower()}, {pluralize(len(example.files), 'picture')}"


def _chosen_example(example: Example) -> Content:
    with st.container(key="bar", horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
        st.html(element("p", example_title(example)))
        st.button("Choose another study", on_click=partial(st.session_state.pop, _EXAMPLE, None), key="another")
    return {
        f"{example.number} {index}": (example.name(index), partial(example.content, index))
        for index in range(len(example.files))
    }


def _read_once(context: "PageContext", content: Content) -> list[StudyFile]:
    """Return the files. Each is read and predicted once per session."""
    by_number: dict[str, StudyFile] = st.session_state.get("files", {})
    new = [number for number in content if number not in by_number]
    if new:
        with st.spinner("Reading"):
            files = context.service.predict(
                [content[number][0] for number in new], [content[number][1]() for number in new]
            )
            by_number |= dict(zip(new, files, strict=True))
    st.session_state["files"] = {number: by_number[number] for number in content}
    return list(st.session_state["files"].values())


def show_failures(files: Sequence[StudyFile]) -> None:
    """Draw the name of each file that has a problem, and the problem."""
    for file in files:
        name = escape_markdown(file.name)
        if file.upload.failure:
            st.error(f"{name}: {escape_markdown(failures.failure_sentence(file.upload.code, file.upload.failure))}")
        elif file.output is None:
            st.error(f"{name}: {failures.GATE_TEXTS[file.upload.verdict]}.")
        elif file.upload.verdict in gate.MESSAGES:
            st.warning(f"{name}: {failures.GATE_TEXTS[file.upload.verdict]}.")
        for note in file.upload.notes:
            st.caption(f"{name}: {note}.")


def choose_study_type(context: "PageContext", files: Sequence[StudyFile]) -> str | None:
    """Draw the choice of the study type. Return it, or None until it is chosen. Files with one clear type preselect it."""
    choices, types = study_types(context.service.card), detect_study_types(files, context.service.card)
    if st.session_state.get(_EXAMPLE) is not None and len(types) == 1 and types <= set(choices):
        return min(types)
    if num_studies(files) > 1:
        st.warning(
            "These DICOM files belong to several studies. The result treats all files as one study of one patient."
        )
    if len(types) > 1:
        st.warning(f"The files name several study types: {', '.join(sorted(map(display_name, types))).lower()}.")
    elif types - set(choices):
        st.warning(
            f"The files name the study type {display_name(min(types)).lower()}, on which this model was not trained."
        )
    labels = {display_name(choice): choice for choice in choices}
    label = st.selectbox(
        "Study type",
        list(labels),
        index=choices.index(min(types)) if len(types) == 1 and types <= set(choices) else None,
        placeholder=CHOOSE,
        help="Preselected from MURA file names or the DICOM body part, if they contain it.",
    )
    if label is None:
        st.info(f"{CHOOSE}. The result depends on it.")
        return None
    return labels[label]


def escape_markdown(text: str) -> str:
    """Return text with Markdown's characters escaped."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!|<>~$:&" else sign for sign in text)
