"""Why a file gives no picture, in plain words: what is wrong, what to do, and the reader's own reason in brackets.

Upload.code, Upload.failure -> sentence        a verdict of the gate -> sentence        a failed upload -> UPLOAD_REFUSED
"""

from mura_dist.data import gate, radiograph
from mura_dist.inference.page.study import MAX_FILES, MAX_UPLOAD_MB

FAILURE_TEXTS = {
    "not_image": ("this is not a picture", "Choose a PNG, JPEG, TIFF or DICOM file"),
    "out_of_scope": ("this kind of file is not read here", "Export the radiograph as PNG or DICOM"),
    "unreadable": ("this picture is damaged or incomplete", "Save or export it once more"),
    "too_large": ("this file is too large", f"At most {radiograph.MAX_PIXELS // 1_000_000} million pixels are read"),
    "io_error": ("this file could not be read", "Remove it, and try it again"),
    "decoder": ("this file takes too much time or memory to read", "Save or export it once more"),
    "model": ("the model gives no number for this picture", "The model is broken: export it again"),
}
GATE_TEXTS = {
    "not_a_radiograph": "this does not look like a bone radiograph. It is left out",
    "blank": "this picture is blank, one grey level all over. It is left out",
    "inverted": "bone looks dark in this picture, as if black and white were swapped. The model may be wrong on it",
}
assert set(GATE_TEXTS) == set(gate.MESSAGES)
# The browser names a status code and no reason: all of them in one message.
UPLOAD_REFUSED = (
    f"A file marked in red was not taken: this file is too large (over {MAX_UPLOAD_MB} MB), or there are more than "
    f"{MAX_FILES} files, or the server is busy. Remove it; if it is small enough, try it again in a minute."
)
TOO_MANY = f"at most {MAX_FILES} pictures make a study here. Remove some"


def failure_sentence(code: str, reason: str) -> str:
    """Return what is wrong with a file, and what to do. A reason that has its own remedy, after a semicolon, needs no other."""
    problem, remedy = FAILURE_TEXTS[code]
    return f"{problem}: {reason}." if ";" in reason else f"{problem}. {remedy}. (Detail: {reason}.)"
