"""MURA's vocabulary: study types, folder layout, counts of version 1.1, terms.

    MURA-v1.1/{train,valid}/XR_<TYPE>/patient<digits>/study<k>_{positive,negative}/image<k>.png

Sources: arXiv 1712.06957 and the data set's own files.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

STUDY_TYPES = ("XR_ELBOW", "XR_FINGER", "XR_FOREARM", "XR_HAND", "XR_HUMERUS", "XR_SHOULDER", "XR_WRIST")

# The order of splits in a manifest, hence of rows. `tune` is cut from train and has no folder.
SPLITS = ("train", "tune", "valid", "test")

TERMS = "research only, not a medical device; a disclaimer does not make clinical use lawful"
LICENSE = (
    "MURA's research-use agreement: personal, non-commercial research; no sharing of any portion of the data; results "
    "obtained with MURA may not be relied on in patient care; ask Stanford before you share shards or trained weights"
)

# (normal, abnormal) radiographs of v1.1, by split and study type.
IMAGES_V1_1: dict[str, dict[str, tuple[int, int]]] = {
    "train": {
        "XR_ELBOW": (2925, 2006),
        "XR_FINGER": (3138, 1968),
        "XR_FOREARM": (1164, 661),
        "XR_HAND": (4059, 1484),
        "XR_HUMERUS": (673, 599),
        "XR_SHOULDER": (4211, 4168),
        "XR_WRIST": (5765, 3987),
    },
    "valid": {
        "XR_ELBOW": (235, 230),
        "XR_FINGER": (214, 247),
        "XR_FOREARM": (150, 151),
        "XR_HAND": (271, 189),
        "XR_HUMERUS": (148, 140),
        "XR_SHOULDER": (285, 278),
        "XR_WRIST": (364, 295),
    },
}
# (normal, abnormal) studies of v1.1, by split and study type.
STUDIES_V1_1: dict[str, dict[str, tuple[int, int]]] = {
    "train": {
        "XR_ELBOW": (1094, 660),
        "XR_FINGER": (1280, 655),
        "XR_FOREARM": (590, 287),
        "XR_HAND": (1497, 521),
        "XR_HUMERUS": (321, 271),
        "XR_SHOULDER": (1364, 1457),
        "XR_WRIST": (2134, 1326),
    },
    "valid": {
        "XR_ELBOW": (92, 66),
        "XR_FINGER": (92, 83),
        "XR_FOREARM": (69, 64),
        "XR_HAND": (101, 66),
        "XR_HUMERUS": (68, 67),
        "XR_SHOULDER": (99, 95),
        "XR_WRIST": (140, 97),
    },
}
# (normal, abnormal) studies of the hidden test set, 207 in all, on which the paper's kappas were measured.
STUDIES_TEST: dict[str, tuple[int, int]] = {
    "XR_ELBOW": (17, 11),
    "XR_FINGER": (19, 11),
    "XR_FOREARM": (14, 16),
    "XR_HAND": (19, 11),
    "XR_HUMERUS": (15, 15),
    "XR_SHOULDER": (17, 13),
    "XR_WRIST": (14, 15),
}
PATIENTS_V1_1 = {"train": 11_184, "valid": 783}  # none is in both
NUM_IMAGES_V1_1 = 40_005  # train and valid; the 40,561 of the paper include the hidden test set
NUM_IMAGES_V1_0 = 40_895  # withdrawn: held patient data

_LAYOUT = re.compile(
    r"(?s:^|.*/)(?P<split>train|valid|test)/(?P<study_type>XR_[A-Z0-9_]+)/(?P<patient>patient[^/]+)"
    r"/(?P<study>study[^/]*?)(?:_(?P<label>positive|negative))?/(?P<view>[^/]+)$"
)
_STUDY = re.compile(r"(?:.*/)?(XR_[^/]+/patient[^/]+/study[^/]*)/[^/]+", re.DOTALL)
_CODE = re.compile("XR_[A-Z]+(?:_[A-Z]+)*")
_VIEW_NUMBER = re.compile(r"(\d+)(?!.*\d)", re.DOTALL)
_MAX_DIGITS = 18  # fits int64; the last number of a DICOM's UID may be longer and is no view number


def display_name(study_type: str) -> str:
    """Return a study type for people (XR_HAND -> Hand). Names of another form are unchanged."""
    return study_type[3:].replace("_", " ").capitalize() if _CODE.fullmatch(study_type) else study_type


@dataclass(frozen=True, slots=True)
class Radiograph:
    """Image file, described by its path. `label` is 1 for positive (abnormal), 0 for negative (normal), None if missing."""

    split: str
    study_type: str
    patient: str
    study: str  # path of the study's folder from the split on, unique in a data set
    view: int
    label: int | None
    path: str  # relative to the data set's root, separated by "/"


def parse(path: str) -> Radiograph | None:
    """Parse a path in MURA's layout, separated by "/". Return None for other paths.

    Any folders may precede the split's. The view is the last number in the file's name (0 without one, or above 18 digits).
    """
    match = _LAYOUT.match(path)
    if match is None:
        return None
    fields = match.groupdict()
    number = _VIEW_NUMBER.search(fields["view"].rsplit(".", 1)[0])
    return Radiograph(
        split=fields["split"],
        study_type=fields["study_type"],
        patient=fields["patient"],
        study=path[match.start("split") : match.start("view") - 1],
        view=int(number[1]) if number and len(number[1]) <= _MAX_DIGITS else 0,
        label={"positive": 1, "negative": 0, None: None}[fields["label"]],
        path=path[match.start("split") :],
    )


def study_folder(path: str) -> str | None:
    """Return study type, patient and study of a file in MURA's layout, with or without the split's folder; else None."""
    match = _STUDY.fullmatch(path)
    return match[1] if match else None


def is_official_test(studies: Mapping[str, Iterable[Any]]) -> bool:
    """Return whether the counts of `studies` (columns study_type and label) equal those of the hidden test set.

    Only then are kappas comparable with those of the paper and the radiologists.
    """
    counts = Counter((name, label) for name, label in zip(studies["study_type"], studies["label"], strict=True))
    return counts == Counter({(name, label): pair[label] for name, pair in STUDIES_TEST.items() for label in (0, 1)})
