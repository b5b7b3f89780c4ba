"""csv_files.py: MURA's CSVs and files of corrections as spreadsheets, Windows and macOS save them."""

import csv
import io
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from mura_dist.core.errors import UserError
from mura_dist.data.source.scan import Scan, scan

STUDIES = [
    f"{split}/XR_WRIST/patient{n:05d}/study1_negative" for split, n in (("train", 1), ("train", 2), ("valid", 3))
]
LABELS = [1, 0, 1]
NAME = "train_labeled_studies.csv"


def data_set(root: Path, studies: list[str] = STUDIES) -> Path:
    """A radiograph a study; the folders' names call each study negative."""
    for study in studies:
        (root / study).mkdir(parents=True)
        (root / study / "image1.png").write_text(study)
    return root


def table(lines: list[tuple[str, ...]], delimiter: str = ",") -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(lines)
    return text.getvalue()


WAYS: dict[str, Callable[[list[tuple[str, int]]], bytes]] = {
    "numbers with a point": lambda pairs: table([(name, f"{label}.0") for name, label in pairs]).encode(),
    "numbers with a comma": lambda pairs: table([(name, f"{label},0") for name, label in pairs], ";").encode(),
    "backslashes": lambda pairs: table([(name.replace("/", "\\"), str(label)) for name, label in pairs]).encode(),
    "backslashes here and there": lambda pairs: table(
        [(name.replace("/XR", "\\XR").replace("/study", "\\study"), str(label)) for name, label in pairs]
    ).encode(),
    "a backslash at the end": lambda pairs: table([(f"{name[:-1]}\\", str(label)) for name, label in pairs]).encode(),
    "semicolons": lambda pairs: table(
        [("study", "label"), *((name, str(label)) for name, label in pairs)], ";"
    ).encode(),
    "tabs in UTF-16": lambda pairs: table([(name, str(label)) for name, label in pairs], "\t").encode("utf-16"),
    "UTF-16": lambda pairs: table([("study", "label"), *((name, str(label)) for name, label in pairs)]).encode(
        "utf-16"
    ),
    "words": lambda pairs: table([(name, ("Normal", "ABNORMAL")[label]) for name, label in pairs]).encode(),
    "signs": lambda pairs: table([(name, ("negative", "Positive")[label]) for name, label in pairs]).encode(),
    "an index": lambda pairs: table([(f"{n}", pair[0], f"{pair[1]}") for n, pair in enumerate(pairs)], ";").encode(),
}


@pytest.mark.parametrize("route", WAYS)
def test_labels_are_understood_however_they_are_saved(route: str, tmp_path: Path) -> None:
    """In MURA's CSVs and in a file of corrections."""
    data_set(tmp_path / "set")
    pairs = [(f"MURA-v1.1/{study}/", label) for study, label in zip(STUDIES, LABELS, strict=True)]
    (tmp_path / "labels.csv").write_bytes(WAYS[route](pairs))
    corrected = scan(tmp_path / "set", tmp_path / "labels.csv")
    assert corrected.manifest.frame["label"].tolist() == LABELS
    assert corrected.corrections == {STUDIES[0]: 1, STUDIES[2]: 1}
    for split in ("train", "valid"):
        piece = [pair for pair in pairs if f"/{split}/" in pair[0]]
        (tmp_path / "set" / f"{split}_labeled_studies.csv").write_bytes(WAYS[route](piece))
    message = scan(tmp_path / "set")
    assert message.manifest.frame["label"].tolist() == LABELS
    assert message.defects == {"label differs between CSV and folder (CSV taken)": [STUDIES[0], STUDIES[2]]}


@pytest.mark.parametrize(
    "as_saved", [lambda text: text.replace("/", "\\").encode(), lambda text: text.encode("utf-16")]
)
def test_lists_of_images_too(as_saved: Callable[[str], bytes], tmp_path: Path) -> None:
    data_set(tmp_path)
    lines = [f"MURA-v1.1/{study}/image1.png\n" for study in STUDIES[:2]]
    (tmp_path / "train_image_paths.csv").write_bytes(as_saved("".join(lines)))
    assert scan(tmp_path).defects == {}
    (tmp_path / "train_image_paths.csv").write_bytes(as_saved(lines[0] * 2))
    assert scan(tmp_path).defects == {
        "on disk, listed in no CSV": [f"{STUDIES[1]}/image1.png"],
        "listed twice in a CSV": [f"{STUDIES[0]}/image1.png"],
    }


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("tables", ["NFC", "NFD"])
def test_names_are_compared_composed(disk: str, tables: str, tmp_path: Path) -> None:
    """As macOS stores them and as Windows types them; the manifest has the disk's own."""
    study = "train/XR_WRIST/patientM\u00fcller/study1_negative"
    on_disk, output = unicodedata.normalize(disk, study), unicodedata.normalize(tables, study)
    data_set(tmp_path / "set", [on_disk])
    (tmp_path / "set" / "train_image_paths.csv").write_text(f"{output}/image1.png", encoding="utf-8")
    (tmp_path / "set" / "train_labeled_studies.csv").write_text(f"{output}/,1", encoding="utf-8")
    (tmp_path / "labels.csv").write_text(f"{output},0", encoding="utf-8")
    message = scan(tmp_path / "set")
    assert message.manifest.frame[["path", "label"]].values.tolist() == [[f"{on_disk}/image1.png", 1]]
    assert message.defects == {"label differs between CSV and folder (CSV taken)": [on_disk]}
    assert scan(tmp_path / "set", tmp_path / "labels.csv").corrections == {on_disk: 0}


def test_of_two_spellings_on_disk_each_has_its_own_line(tmp_path: Path) -> None:
    studies = [f"train/XR_WRIST/patient{name}/study1_negative" for name in ("M\u00fcller", "Mu\u0308ller", "a\\b", "a")]
    data_set(tmp_path, studies)
    (tmp_path / "train_labeled_studies.csv").write_text(
        "".join(f"{study}/,{n % 2}\n" for n, study in enumerate(studies)), encoding="utf-8"
    )
    frame = scan(tmp_path).manifest.frame
    assert dict(zip(frame["study"], frame["label"], strict=True)) == dict(zip(studies, (0, 1, 0, 1), strict=True))


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        (b"", "it is empty"),
        (b"study,label\n", "it is empty"),
        (
            f"study,label\n{STUDIES[0]},fracture\n{STUDIES[1]},none\n".encode(),
            f"{NAME} line 2: '{STUDIES[0]},fracture' is invalid",
        ),
        (b"MURA-v1.1:train:XR_WRIST,1\n", f"{NAME} line 1: 'MURA-v1.1:train:XR_WRIST,1' is invalid"),
    ],
)
def test_labels_of_which_no_line_fits_are_refused(text: bytes, phrases: str, tmp_path: Path) -> None:
    """Nobody who left a file of labels meant the names of the folders."""
    data_set(tmp_path)
    (tmp_path / "train_labeled_studies.csv").write_bytes(text)
    with pytest.raises(UserError) as refusal:
        scan(tmp_path)
    assert str(refusal.value) == (
        f"train_labeled_studies.csv labels no study of train/ ({phrases}). Fix its lines (study,label with a label of 0 or 1, "
        "normal or abnormal), or delete it to use the folders."
    )


def test_labels_of_other_studies_are_refused(tmp_path: Path) -> None:
    data_set(tmp_path)
    another = "train/XR_WRIST/patient1/study1_negative"
    (tmp_path / "train_labeled_studies.csv").write_text(f"{another}/,1\n")
    with pytest.raises(
        UserError, match=rf"labels none of the 2 studies of train/ on disk \(first in the file: {another}, "
    ):
        scan(tmp_path)
    (tmp_path / "valid_labeled_studies.csv").write_text("valid/XR_WRIST/patient00009/study1_negative/,1\n")
    (tmp_path / "train_labeled_studies.csv").write_text(f"{another}/,1\n{STUDIES[0]}/,1\n")
    with pytest.raises(UserError, match=r"valid_labeled_studies\.csv labels none of the 1 studies of valid/ on disk"):
        scan(tmp_path)
    assert scan(tmp_path / "train").defects.keys() == {
        "labelled in a CSV, no files",
        "no label in the CSV (folder taken)",
        "label differs between CSV and folder (CSV taken)",
    }


def test_corrections_of_no_study_are_refused(tmp_path: Path) -> None:
    data_set(tmp_path / "set")
    labels = tmp_path / "labels.csv"
    labels.write_text("study;label\n")
    with pytest.raises(
        UserError, match=r"labels\.csv labels no study\. Give a CSV of study,label lines, or omit --labels"
    ):
        scan(tmp_path / "set", labels)
    labels.write_text(f"{STUDIES[0]},1\n{STUDIES[1]},fracture\n")
    with pytest.raises(
        UserError, match=r"labels\.csv line 2: .* is not study,label with a label of 0 or 1, normal or abnormal"
    ):
        scan(tmp_path / "set", labels)


def test_a_store_is_read_alike(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    saved = WAYS["tabs in UTF-16"]([(f"{study}/", label) for study, label in zip(STUDIES[:2], LABELS, strict=False)])
    try:
        for study in STUDIES:
            store.pipe_file(f"/test-csv-files/{study}/image1.png", study.encode())
        store.pipe_file("/test-csv-files/train_labeled_studies.csv", saved)
        message: Scan = scan("memory://test-csv-files")
    finally:
        store.rm("/test-csv-files", recursive=True)
    assert message.manifest.frame["label"].tolist() == [1, 0, 0]
