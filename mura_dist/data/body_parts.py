"""Map a DICOM's body part to one of MURA's seven study types.

    BodyPartExamined, free text in practice ----.
    AnatomicRegionSequence, (scheme, code) -----+--> HAND, THUMB, ... -> study type, or None

Only entries of these tables become a study type. A person's name in the field never does. Sources: DICOM PS3.16, annex L
(terms) and CID 4, 7304, 8134 (codes).
"""

import re

from mura_dist.data.mura import STUDY_TYPES

_REGIONS = {study_type.removeprefix("XR_"): study_type for study_type in STUDY_TYPES}
_SYNONYMS = {
    "THUMB": "FINGER",
    "UPPERARM": "HUMERUS",
    "UPPER ARM": "HUMERUS",
    "RADIUS": "FOREARM",
    "ULNA": "FOREARM",
    "RADIUSULNA": "FOREARM",
    "FOREARMBONE": "FOREARM",
}
_SIDES = {"L", "R", "B", "LT", "RT", "LEFT", "RIGHT", "BOTH", "BILATERAL"}
_LATERALITY = {"LEFT": "L", "LT": "L", "RIGHT": "R", "RT": "R", "BOTH": "B", "BILATERAL": "B"}
# Joints and regions: a radiograph of the elbow joint is one of the elbow.
_SCT = {
    "16953009": "ELBOW",
    "7569003": "FINGER",
    "76505004": "THUMB",
    "14975008": "FOREARM",
    "62413002": "RADIUS",
    "23416004": "ULNA",
    "110535000": "RADIUSULNA",
    "85562004": "HAND",
    "85050009": "HUMERUS",
    "40983000": "UPPERARM",
    "16982005": "SHOULDER",
    "74670003": "WRIST",
    "8205005": "WRIST",
}
_SRT = {
    "T-15430": "ELBOW",
    "T-D8800": "FINGER",
    "T-D8810": "THUMB",
    "T-D8500": "FOREARM",
    "T-12420": "RADIUS",
    "T-12430": "ULNA",
    "T-12403": "RADIUSULNA",
    "T-D8700": "HAND",
    "T-12410": "HUMERUS",
    "T-D8200": "UPPERARM",
    "T-D2220": "SHOULDER",
    "T-15460": "WRIST",
    "T-D8600": "WRIST",
}
_CODES = {"SCT": _SCT} | dict.fromkeys(("SRT", "SNM3", "99SDM"), _SRT)  # SRT has had three names


def normalize(text: str) -> str:
    """Return text in capitals, with single blanks for separators and padding."""
    return " ".join(re.sub(r"[\s_\0]+", " ", text).upper().split())


def normalize_laterality(text: str) -> str:
    """Return L, R or B for the usual spellings of a side, else the normalized text."""
    return _LATERALITY.get(normalize(text), normalize(text))


def body_part_of_code(scheme: str, code: str) -> str:
    """Return the body part of an anatomic region's code, or "" outside the seven regions."""
    return _CODES.get(normalize(scheme), {}).get(normalize(code), "")


def find_study_type(body_part: str) -> str | None:
    """Return MURA's study type of a body part, or None. Sides and a plural s are ignored."""
    name = " ".join(word for word in normalize(body_part).split() if word not in _SIDES)
    singular = name.removesuffix("S")
    return _REGIONS.get(_SYNONYMS.get(name, name)) or _REGIONS.get(_SYNONYMS.get(singular, singular))
