"""Explain why a file is not used: what is wrong, what to do, and the decoder's reason in parentheses.

Upload.code, Upload.failure -> failure_sentence
a verdict of the gate -> GATE_TEXTS
a failed upload -> UPLOAD_REFUSED
"""

from mura_dist.data import gate, radiograph
from mura_dist.inference.page.study import MAX_FILES, MAX_UPLOAD_MB

FAILURE_TEXTS = {
    "not_image": ("this is not a picture", "Choose a PNG, JPEG, TIFF or DICOM file"),
    "out_of_scope": ("this type of file is not supported", "Export the radiograph as PNG or DICOM"),
    "unreadable": ("this picture is corrupt or incomplete", "Save or export it again"),
    "too_large": ("this file is too large", f"The limit is {radiograph.MAX_PIXELS // 1_000_000} million pixels"),
    "io_error": ("this file could not be read", "Remove it and upload it again"),
    "decoder": ("this file takes too much time or memory to read", "Save or export it again"),
    "model": ("the model's output for this picture is not a number", "The model is broken: export it again"),
}
GATE_TEXTS = {
    "not_a_radiograph": "this does not look like a bone radiograph. It is not used",
    "blank": "this picture is blank: it has a single gray level. It is not used",
    "inverted": "this picture looks inverted: bone is dark. The model may be wrong on it",
}
assert set(GATE_TEXTS) == set(gate.MESSAGES)
# The browser reports a status code without a reason, so one message covers all of them.
UPLOAD_REFUSED = (
    f"A file marked in red was not uploaded: it is too large (over {MAX_UPLOAD_MB} MB), or there are more than "
    f"{MAX_FILES} files, or the server is busy. Remove it. If it is small enough, try it again in a minute."
)
TOO_MANY = f"a study may have at most {MAX_FILES} pictures. Remove some"


def failure_sentence(code: str, reason: str) -> str:
    """Return what is wrong with a file and what to do. A reason with its own remedy, after a semicolon, gets no other."""
    problem, remedy = FAILURE_TEXTS[code]
    return f"{problem}: {reason}." if ";" in reason else f"{problem}. {remedy}. (Detail: {reason}.)"
