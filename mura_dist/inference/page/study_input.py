"""What comes in: files that were uploaded, or an example, and the study type.

nothing yet -> drop zone, cards of examples        files -> read and predicted once, kept in the session by number
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
_EXAMPLE = "example"  # of the session's state: its number

Content = dict[str, tuple[str, Callable[[], bytes]]]
"""By the file's number in this session: its name, and how to get its bytes."""


def choose_files(context: "PageContext") -> list[StudyFile]:
    """Draw what asks for files; return those of the study, read and, where they pass the gate, predicted."""
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
                return {str(one.file_id): (one.name, one.getvalue) for one in uploaded}
            st.error(f"{len(uploaded)} files: {failures.TOO_MANY}.")
            return {}
        privacy = "They stay in this server's memory, and are gone when you remove them or close the page."
        st.html(element("p", f"{LIMITS} {privacy}", class_="soft"))
    return {}


def _example_cards(context: "PageContext") -> None:
    """Draw the examples as cards: one of each study type first, the others folded."""
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
    """Return what an example is called."""
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
    """Return the files, each asked about once in a session."""
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
    """Say beside each file's name what is wrong with it."""
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
    """Return the study type as files tell, else as chosen; None until it is chosen."""
    known, types = study_types(context.service.card), detect_study_types(files, context.service.card)
    if st.session_state.get(_EXAMPLE) is not None and len(types) == 1 and types <= set(known):
        return min(types)
    if num_studies(files) > 1:
        st.warning("These DICOMs are of several studies. The answer takes all files as one study of one patient.")
    if len(types) > 1:
        st.warning(f"The files tell of several study types: {', '.join(sorted(map(display_name, types))).lower()}.")
    elif types - set(known):
        st.warning(
            f"The files tell of the study type {display_name(min(types)).lower()}, which this model was not trained on."
        )
    labels = {display_name(one): one for one in known}
    label = st.selectbox(
        "Study type",
        list(labels),
        index=known.index(min(types)) if len(types) == 1 and types <= set(known) else None,
        placeholder=CHOOSE,
        help="Read from MURA's names or a DICOM's body part where they tell; else choose it.",
    )
    if label is None:
        st.info(f"{CHOOSE}: the answer depends on it.")
        return None
    return labels[label]


def escape_markdown(text: str) -> str:
    """Return text without markup: a file may be called anything."""
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!|<>~$:&" else sign for sign in text)
