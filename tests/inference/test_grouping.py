"""Test that a study has the same name whichever folder is predicted."""

import pytest

from mura_dist.inference.grouping import Grouping

STUDY = "XR_WRIST/patient00006/study1_positive"
VALID = f"valid/{STUDY}"


@pytest.mark.parametrize(
    ("directory", "path", "study"),
    [
        # A split's folder at, above or just below the directory: the name in the manifest.
        ("/data/MURA-v1.1", f"{VALID}/image1.png", VALID),
        ("/data/MURA-v1.1/valid", f"{STUDY}/image1.png", VALID),
        ("/data/MURA-v1.1/valid/XR_WRIST", "patient00006/study1_positive/image1.png", VALID),
        ("/data/MURA-v1.1/" + VALID, "image1.png", VALID),
        # Copies below one directory stay apart.
        ("/data", f"a/{VALID}/image1.png", f"a/{VALID}"),
        ("/data", f"b/{VALID}/image1.png", f"b/{VALID}"),
        ("/data/valid", f"a/{VALID}/image1.png", f"a/{VALID}"),
        ("/data/valid", f"a/{STUDY}/image1.png", f"a/{STUDY}"),
        # Without the split's folder: still a study.
        ("/data", f"{STUDY}/image1.png", STUDY),
        ("/data/" + STUDY, "image1.png", STUDY),
        ("/data/XR_WRIST", "patient00006/study1_positive/image1.png", STUDY),
        # No study's folder: each file by itself.
        ("/data", "a/b/image1.png", "a/b/image1.png"),
        ("/data/valid", "XR_WRIST/image1.png", "XR_WRIST/image1.png"),
    ],
)
def test_study_name_equals_the_name_in_evaluation(directory: str, path: str, study: str) -> None:
    assert Grouping(directory, "auto").study_and_type(path, None)[0] == study
