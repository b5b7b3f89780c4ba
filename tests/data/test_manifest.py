"""Test mura.py and manifest.py: paths, scans, the CSVs of MURA and their variants, the tune split, links and corrections."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import laws

from mura_dist.core.errors import UserError
from mura_dist.core.storage import StoragePath
from mura_dist.data import mura
from mura_dist.data.manifest import Manifest, cut_tune
from mura_dist.data.source import duplicates
from mura_dist.data.source.scan import DEFECTS, Scan, scan


def make(root: Path, *paths: str) -> Path:
    """Write files whose content is their path, so that no two are equal. A scan decodes none of them."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(os.fsencode(path))
    return root


def refused(source: StoragePath, *phrases: str, labels: Path | None = None) -> None:
    """Assert that a scan is refused in one line with all of `phrases`."""
    with pytest.raises(UserError) as refusal:
        scan(source, labels)
    message = str(refusal.value)
    assert len(message.splitlines()) == 1, message
    assert not [word for word in phrases if word not in message], message


@pytest.fixture
def memory() -> Iterator[str]:
    """Return a folder of fsspec's in-memory store."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    yield "memory://test-manifest/data"
    if store.exists("/test-manifest"):
        store.rm("/test-manifest", recursive=True)


def delete(url: str) -> None:
    import fsspec

    fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)


def upload(folder: Path, url: str) -> str:
    import fsspec

    store = fsspec.filesystem("memory")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.pipe_file(f"{url.removeprefix('memory:/')}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def view(
    split: str = "train",
    study_type: str = "XR_WRIST",
    patient: int = 1,
    study: str = "study1_positive",
    image: str = "image1.png",
) -> str:
    return f"{split}/{study_type}/patient{patient:05d}/{study}/{image}"


@pytest.mark.parametrize("before", ["", "MURA-v1.1/", "/data/train/MURA-v1.1/MURA-v1.1/", "./"])
def test_path_gives_all_fields_of_a_radiograph(before: str) -> None:
    radiograph = mura.parse(before + view(image="image12.png"))
    assert radiograph == mura.Radiograph(
        "train",
        "XR_WRIST",
        "patient00001",
        "train/XR_WRIST/patient00001/study1_positive",
        12,
        1,
        view(image="image12.png"),
    )


@pytest.mark.parametrize(
    "path", ["image1.png", "train/WRIST/patient1/study1_positive/image1.png", "train/XR_WRIST/patient1/image1.png", ""]
)
def test_path_outside_the_layout_is_no_radiograph(path: str) -> None:
    assert mura.parse(path) is None


def test_radiograph_of_the_test_split_has_no_label() -> None:
    radiograph = mura.parse("test/XR_HAND/patient00007/study2/image1.png")
    assert radiograph is not None
    assert radiograph.label is None


def test_rows_are_independent_of_file_system_order(tmp_path: Path) -> None:
    paths = [
        view(patient=p, study=s, image=f"image{i}.png")
        for p in (2, 1)
        for s in ("study1_positive",)
        for i in (10, 2, 1)
    ]
    a = scan(make(tmp_path / "a", *paths)).manifest
    b = scan(make(tmp_path / "b" / "MURA-v1.1" / "MURA-v1.1", *reversed(paths))).manifest
    assert a.digest == b.digest
    assert a.frame["view"].tolist() == [1, 2, 10, 1, 2, 10]  # image10 after image2


def test_subfolder_of_a_data_set_is_scanned(tmp_path: Path) -> None:
    make(tmp_path, view(), view("valid", patient=2))
    assert scan(tmp_path / "train").manifest.frame["path"].tolist() == [view()]


def test_junk_files_are_skipped_and_reported(tmp_path: Path) -> None:
    junk = [view(image=name) for name in ("._image1.png", "Thumbs.db", "notes.txt")]
    scanned = scan(make(tmp_path, view(), *junk))
    assert len(scanned.manifest.frame) == 1
    assert sorted(scanned.defects["not a radiograph"]) == sorted(junk)


# ---- variants of the CSVs


def csv_text(lines: list[list[str]], header: str, end: str, comma: str, mark: str, quote: str) -> bytes:
    rows = [*([header] if header else []), *(",".join(f"{quote}{piece}{quote}" for piece in line) for line in lines)]
    return (mark + "".join(f"{row}{comma}{end}" for row in rows)).encode()


@dataclass
class Listed:
    """Small data set with CSVs. Two labels are in the CSV only, one file is in no CSV, one is missing on disk."""

    studies: dict[str, int] = field(
        default_factory=lambda: {
            "train/XR_WRIST/patient00001/study1_negative": 1,
            "train/XR_HAND/patient00002/study1_positive": 1,
            "valid/XR_HAND/patient00003/study1": 0,
        }
    )

    def images(self, split: str) -> list[str]:
        return [f"{study}/image{k}.png" for study in self.studies if study.startswith(split) for k in (1, 2, 3)]

    def write(self, root: Path, csvs: Path, *variant: str) -> None:
        for split in ("train", "valid"):
            make(root, *self.images(split)[:-1], *[f"{path[:-4]}0.png" for path in self.images(split)[-1:]])
            lines = [[f"MURA-v1.1/{path}"] for path in self.images(split)]
            output = [[f"MURA-v1.1/{s}/", str(label)] for s, label in self.studies.items() if s.startswith(split)]
            (csvs / f"{split}_image_paths.csv").write_bytes(csv_text(lines, *variant))
            (csvs / f"{split}_labeled_studies.csv").write_bytes(csv_text(output, *variant))


@pytest.fixture(scope="module")
def as_mura_writes_it(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    root = tmp_path_factory.mktemp("csvs")
    Listed().write(root, root, "", "\n", "", "", "")
    return scan(root)


def test_csv_labels_take_precedence_over_folders(as_mura_writes_it: Scan) -> None:
    frame, hand = as_mura_writes_it.manifest.frame, "train/XR_HAND/patient00002/study1_positive"
    valid = "valid/XR_HAND/patient00003/study1"
    assert frame["label"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert as_mura_writes_it.defects == {
        "label differs between CSV and folder (CSV taken)": ["train/XR_WRIST/patient00001/study1_negative"],
        "listed in a CSV, missing on disk": [f"{hand}/image3.png", f"{valid}/image3.png"],
        "on disk, listed in no CSV": [f"{hand}/image30.png", f"{valid}/image30.png"],
    }


@pytest.mark.parametrize("quote", ["", '"'], ids=["bare", "quoted"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
@pytest.mark.parametrize("position", ["", "MURA-v1.1/MURA-v1.1", "above"], ids=["plain", "nested", "above"])
@pytest.mark.parametrize("comma", ["", ","], ids=["", "comma"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("header", ["", "Img_Path,Label", "path"], ids=["none", "Img_Path", "path"])
def test_csv_variants_give_the_same_manifest(
    tmp_path: Path,
    as_mura_writes_it: Scan,
    header: str,
    end: str,
    comma: str,
    position: str,
    mark: str,
    quote: str,
) -> None:
    root = tmp_path / ("copy/MURA-v1.1" if position == "above" else position)
    root.mkdir(parents=True, exist_ok=True)
    Listed().write(root, root.parent if position == "above" else root, header, end, comma, mark, quote)
    scanned = scan(tmp_path)
    assert scanned.root == root.resolve()
    assert scanned.manifest.digest == as_mura_writes_it.manifest.digest
    assert scanned.defects == as_mura_writes_it.defects


def test_index_column_and_empty_lines_are_ignored(tmp_path: Path) -> None:
    make(tmp_path, view(), view(patient=2))
    text = f",Img_Path,Label\n\n0,MURA-v1.1/{view().rpartition('/')[0]}/,0\n\n1,{view(patient=2).rpartition('/')[0]},1"
    (tmp_path / "train_labeled_studies.csv").write_text(text)
    assert scan(tmp_path).manifest.frame["label"].tolist() == [0, 1]


@pytest.mark.parametrize("piece", ["train", "train/XR_HAND", "valid"])
def test_scan_of_a_subfolder_reports_only_its_own_defects(tmp_path: Path, as_mura_writes_it: Scan, piece: str) -> None:
    Listed().write(tmp_path, tmp_path, "", "\n", "", "", "")
    scanned, complete = scan(tmp_path / piece), as_mura_writes_it
    assert scanned.root == tmp_path.resolve()
    expected = complete.manifest.frame[complete.manifest.frame["path"].str.startswith(piece)]
    assert scanned.manifest.frame["path"].tolist() == expected["path"].tolist()
    assert scanned.defects == {
        name: [item for item in visited if item.startswith(piece)]
        for name, visited in complete.defects.items()
        if any(item.startswith(piece) for item in visited)
    }


def test_csvs_that_match_no_file_are_refused(tmp_path: Path) -> None:
    make(tmp_path, view(), view("valid", patient=2))
    images = tmp_path / "train_image_paths.csv"
    for text in (b"", b"Img_Path\n", view("valid").encode(), "utf-16 text, of a spreadsheet/".encode("utf-16")):
        images.write_bytes(text)
        refused(tmp_path, "train_image_paths.csv names no radiograph of train/", "delete it to use the folders")
    images.write_text(view(patient=9))
    (tmp_path / "valid_image_paths.csv").write_text(view("valid", patient=9))
    refused(tmp_path, "no file on disk is listed in its CSVs", "which name 2", "delete them to use the folders")
    images.write_text('"' + "x" * 200_000)
    refused(tmp_path, "train_image_paths.csv line 1 is not CSV", "field larger", "Fix or delete the file")


# ---- single defects


@dataclass(frozen=True)
class Case:
    """Folder of files (path -> content, by default the path), and the defects that a scan reports."""

    files: tuple[str, ...]
    shows: list[str]
    contents: dict[str, str] = field(default_factory=dict)
    remaining: dict[str, list[str]] = field(default_factory=dict)  # further defects that the case causes
    links: dict[str, str] = field(default_factory=dict)  # path -> target; a store has none

    def make(self, root: Path) -> Path:
        make(root, *self.files)
        for path, text in self.contents.items():
            make(root, path)
            (root / path).write_text(text)
        for path, target in self.links.items():
            (root / path).symlink_to(target)
        return root


def study(*of: Any, **more: Any) -> str:
    return view(*of, **more).rpartition("/")[0]


P, N = "study1_positive", "study1_negative"
CASES = {
    "patient in train and valid": Case((view(), view("valid")), ["patient00001"]),
    "duplicate across splits": Case(
        (),
        [f"{view()} = {view('valid', patient=2)}", f"{view()} = {view('valid', patient=3)}"],
        {view(): "same", view("valid", patient=2): "same", view("valid", patient=3): "same"},
        {"duplicate within a split": [f"{view('valid', patient=2)} = {view('valid', patient=3)}"]},
    ),
    "duplicate within a split": Case(
        (view(patient=4),),
        [f"{view()} = {view(patient=2)}", f"{view()} = {view(patient=3)}"],
        {view(patient=n): "s" * 5000 for n in (1, 2, 3)},
    ),
    "study under both labels": Case(
        (view(), view(study=N), view(patient=2), view(patient=3), view(patient=3, study="study2_negative")),
        ["train/XR_WRIST/patient00001/study1"],
    ),
    "label differs between CSV and folder (CSV taken)": Case(
        (view(), view(image="image2.png"), view(patient=2)),
        [study()],
        {"train_labeled_studies.csv": f"{study()}/,0\n{study(patient=2)}/,1\n"},
    ),
    "two labels in a CSV (folder taken)": Case(
        (view(), view(patient=2)),
        [study()],
        {"train_labeled_studies.csv": f"{study()}/,0\n{study()}/,1\n{study(patient=2)}/,1\n"},
    ),
    "no label in the CSV (folder taken)": Case(
        (view(), view(patient=2)), [study()], {"train_labeled_studies.csv": f"{study(patient=2)}/,1\n"}
    ),
    "no label": Case((view(), view("test", study="study1")), [view("test", study="study1")]),
    "listed in a CSV, missing on disk": Case(
        (view(), view(image="image3.png")),
        [view(image="image2.png")],
        {"train_image_paths.csv": "".join(f"{view(image=f'image{k}.png')}\n" for k in (1, 2, 3))},
    ),
    "labelled in a CSV, no files": Case(
        (view(),), [study(patient=2)], {"train_labeled_studies.csv": f"{study()}/,1\n{study(patient=2)}/,1\n"}
    ),
    "on disk, listed in no CSV": Case(
        (view(), view(image="image2.png")), [view(image="image2.png")], {"train_image_paths.csv": view()}
    ),
    "listed twice in a CSV": Case((view(),), [view()], {"train_image_paths.csv": f"{view()}\nMURA-v1.1/{view()}\n"}),
    "line of a CSV not understood": Case(
        (view(),),
        [
            "train_image_paths.csv line 2: 'what is this'",
            f"train_image_paths.csv line 3: '{view('valid')}'",
            f"train_labeled_studies.csv line 1: '{study()}/,2'",
            "train_labeled_studies.csv line 3: 'train/XR_WRIST/,1'",
        ],
        {
            "train_image_paths.csv": f"{view()}\nwhat is this\n{view('valid')}\n",
            "train_labeled_studies.csv": f"{study()}/,2\n{study()}/,1\ntrain/XR_WRIST/,1\n",
        },
    ),
    "gap in image numbers": Case(
        tuple(view(image=f"image{k}.png") for k in (2, 4, 8))
        + tuple(view(patient=2, image=name) for name in ("7.png", "lateral.png", "image1.png")),
        [f"{study()}: no image1, image3, image5 to image7"],
    ),
    "view number used twice": Case(
        tuple(view(image=name) for name in ("image1.png", "image01.png", "image2.jpg", "image2.png", "1.png")),
        [f"{study()}: image1, image2"],
    ),
    "link to a folder that is there already (left out)": Case(
        (view(), view(patient=2)),
        [
            "train/XR_HAND = train/XR_WRIST",
            "train/XR_WRIST/patient00001/loop = train",
            "train/XR_WRIST/patient00009 = train/XR_WRIST/patient00001",
            "valid = train",
        ],
        links={
            "latest": "train",
            "valid": "train",
            "train/XR_HAND": "XR_WRIST",
            "train/XR_WRIST/patient00009": "patient00001",
            "train/XR_WRIST/patient00001/loop": "../..",
        },
    ),
    "link that leads nowhere": Case(
        (view(),),
        ["train/XR_HAND", study(patient=2).rpartition("/")[0], "valid"],
        links={
            **dict.fromkeys(("nowhere", "valid", "train/XR_HAND"), "../not-mounted"),
            study(patient=2).rpartition("/")[0]: "nowhere",
        },
    ),
    "outside MURA's layout": Case(
        (view(), "train/XR_WRIST/patient00001/image1.png", "sources.csv", "docs/train.png"),
        ["train/XR_WRIST/patient00001/image1.png"],
    ),
    "not a radiograph": Case(
        (
            view(),
            view(image="._image1.png"),
            view(image="Thumbs.db"),
            "train/.DS_Store",
            "__MACOSX/" + view(),
            "README",
        ),
        ["train/.DS_Store", view(image="._image1.png"), view(image="Thumbs.db")],
    ),
}


def test_every_defect_has_a_case() -> None:
    assert set(CASES) == set(DEFECTS)


@pytest.mark.parametrize("name", CASES)
def test_single_defect_is_reported(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    actual = scan(case.make(tmp_path)).defects
    assert actual == {name: case.shows, **case.remaining}
    assert list(actual) == [defect for defect in DEFECTS if defect in actual]


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name].links])
def test_remote_scan_equals_local_scan(tmp_path: Path, memory: str, name: str) -> None:
    local = scan(CASES[name].make(tmp_path))
    for above in ("", "/deeper/MURA-v1.1"):
        upload(tmp_path, f"{memory}{above}")
        remote = scan(memory)
        assert remote.root == f"{memory}{above}"
        assert (remote.manifest.digest, remote.defects) == (local.manifest.digest, local.defects)
        assert scan(f"{memory}{above}/").defects == local.defects
        delete(memory)


def test_subfolder_of_a_remote_data_set_is_scanned(tmp_path: Path, memory: str) -> None:
    Listed().write(tmp_path, tmp_path, "", "\n", "", "", "")
    upload(tmp_path, memory)
    for piece in ("train", "train/XR_HAND"):
        local, remote = scan(tmp_path / piece), scan(f"{memory}/{piece}")
        assert remote.root == memory
        assert (remote.manifest.digest, remote.defects) == (local.manifest.digest, local.defects)


def test_study_under_both_labels_in_a_study_csv_is_reported(tmp_path: Path) -> None:
    make(tmp_path, view())
    (tmp_path / "train_labeled_studies.csv").write_text(f"{study()}/,1\n{study(study=N)}/,0\n")
    assert scan(tmp_path).defects["study under both labels"] == ["train/XR_WRIST/patient00001/study1"]


def test_study_under_both_labels_in_an_image_csv_is_reported(tmp_path: Path) -> None:
    make(tmp_path, view())
    (tmp_path / "train_image_paths.csv").write_text(f"{view()}\n{view(study=N)}\n")
    assert scan(tmp_path).defects == {
        "study under both labels": ["train/XR_WRIST/patient00001/study1"],
        "listed in a CSV, missing on disk": [view(study=N)],
    }


def test_junk_listed_in_a_csv_is_reported_as_junk(tmp_path: Path) -> None:
    """Some people make such a CSV by listing a folder. The file exists but is no radiograph."""
    make(tmp_path, view(), view(image="._image1.png"))
    (tmp_path / "train_image_paths.csv").write_text(f"{view(image='._image1.png')}\n{view()}\n")
    assert scan(tmp_path).defects == {"not a radiograph": [view(image="._image1.png")]}


def test_first_line_with_a_label_is_not_a_header(tmp_path: Path) -> None:
    make(tmp_path, view())
    (tmp_path / "train_labeled_studies.csv").write_text(f"patient00001,1\n{study()},1\n")
    assert scan(tmp_path).defects == {
        "line of a CSV not understood": ["train_labeled_studies.csv line 1: 'patient00001,1'"]
    }


# ---- duplicates


def test_only_byte_identical_files_are_duplicates(tmp_path: Path) -> None:
    for size in (1, 4096, 4097, 9000):
        complete = bytearray(os.urandom(size))
        (tmp_path / f"{size}").mkdir()
        make(tmp_path / f"{size}", *(view(patient=n) for n in range(5)))
        for n, position in enumerate((None, 0, size // 2, size - 1, None)):
            changed = bytearray(complete)
            if position is not None:
                changed[position] ^= 1 << n
            (tmp_path / f"{size}" / view(patient=n)).write_bytes(changed)
        actual = scan(tmp_path / f"{size}")
        assert actual.duplicates == [(view(patient=0), view(patient=4))]
        assert scan(tmp_path / f"{size}", duplicates=False).defects == {}


def test_duplicate_search_reads_few_bytes(tmp_path: Path) -> None:
    counter = Path("/proc/self/io")
    if not counter.is_file():
        pytest.skip("needs /proc/self/io, which counts the bytes a process reads")
    paths = [view(patient=n) for n in range(20)]
    make(tmp_path, *paths)
    for path in paths:
        (tmp_path / path).write_bytes(os.urandom(1 << 20))
    before = int(counter.read_text().split()[1])
    assert scan(tmp_path).defects == {}
    assert int(counter.read_text().split()[1]) - before < 20 * 4096 + (1 << 18)


def test_unreadable_and_empty_files_are_no_duplicates(tmp_path: Path) -> None:
    def key(path: str) -> str:
        if path == "c":
            raise PermissionError(path)
        return "same"

    assert duplicates._regroup([["a", "c", "b"], ["d"]], key, 2) == [["a", "b"]]
    make(tmp_path, view())
    for n in (2, 3):  # links to nowhere, and empty files
        make(tmp_path, view(patient=n))
        (tmp_path / view(patient=n)).unlink()
        (tmp_path / view(patient=n)).symlink_to("nowhere")
    for n in (4, 5):
        make(tmp_path, view(patient=n))
        (tmp_path / view(patient=n)).write_bytes(b"")
    assert scan(tmp_path).defects == {}
    assert len(scan(tmp_path).manifest.frame) == 5


# ---- links


@pytest.mark.parametrize(
    "linked", ["valid", "train/XR_HAND", "train/XR_HAND/patient00002", "train/XR_HAND/patient00002/study1_positive"]
)
@pytest.mark.parametrize("relative", [False, True])
def test_linked_folder_is_scanned(linked: str, relative: bool, tmp_path: Path) -> None:
    """Radiographs may lie on several disks. The identity of a row is its path, not the target of the link."""
    paths = [
        view(),
        view("train", "XR_HAND", 2),
        view("train", "XR_HAND", 2, image="image2.png"),
        view("valid", patient=3),
    ]
    plain = scan(make(tmp_path / "plain", *paths))
    make(tmp_path / "set", *paths)
    target = tmp_path / "disk" / "elsewhere"
    target.parent.mkdir()
    (tmp_path / "set" / linked).rename(target)
    (tmp_path / "set" / linked).symlink_to(
        os.path.relpath(target, (tmp_path / "set" / linked).parent) if relative else target
    )
    scanned = scan(tmp_path / "set")
    assert scanned.manifest.digest == plain.manifest.digest
    assert scanned.sizes == plain.sizes
    assert scanned.defects == plain.defects == {}


def test_folder_linked_twice_is_scanned_once_in_any_file_system_order(tmp_path: Path) -> None:
    """Of two names of one folder, the first of the least depth counts, on every machine."""
    patients = [f"patient{n:05d}" for n in range(4)]
    make(tmp_path / "pool", *(f"{patient}/study1_positive/image1.png" for patient in patients))
    visited = set()
    for number, names in enumerate((patients, patients[::-1])):
        root = make(tmp_path / f"{number}", view())
        for split in ("train", "valid") if number else ("valid", "train"):
            (root / split / "XR_HAND").mkdir(parents=True)
            for patient in names:
                (root / split / "XR_HAND" / patient).symlink_to(tmp_path / "pool" / patient)
        scanned = scan(root)
        assert sorted(scanned.manifest.frame["path"]) == sorted(
            [view(), *(f"train/XR_HAND/{patient}/study1_positive/image1.png" for patient in patients)]
        )
        assert scanned.defects == {
            "link to a folder that is there already (left out)": [
                f"valid/XR_HAND/{patient} = train/XR_HAND/{patient}" for patient in patients
            ]
        }
        visited.add(scanned.manifest.digest)
    assert len(visited) == 1


# ---- corrections


def test_label_corrections_are_applied_and_recorded(tmp_path: Path) -> None:
    make(
        tmp_path, view(), view(patient=2), view(patient=2, image="image2.png"), view("test", patient=3, study="study1")
    )
    labels = tmp_path / "labels.csv"
    test = study("test", patient=3, study="study1")
    labels.write_text(f"study,label\r\n{study()},1\r\n\r\nMURA-v1.1/{study(patient=2)}/,0,\r\n{test},0\r\n")
    scanned = scan(tmp_path, labels)
    assert scanned.manifest.frame["label"].tolist() == [1, 0, 0, 0]
    assert scanned.corrections == {test: 0, study(patient=2): 0}
    assert scanned.needless == [study()]
    assert scanned.defects == {}


def test_invalid_label_corrections_are_refused(tmp_path: Path) -> None:
    make(tmp_path, view(), view(patient=2))
    labels = tmp_path / "labels.csv"
    refused(tmp_path, "--labels", "no such file", "Give a CSV of study,label lines", labels=labels)
    for text, phrases in {
        f"{study(patient=9)},0\nx/y,1\n": (
            "2 studies are not in the data",
            "patient00009",
            "Fix or remove these lines",
        ),
        f"study,label\n{study()},2\n": ("line 2", "is not study,label with a label of 0 or 1"),
        f"{study()}\n": ("line 1", "is not study,label with a label of 0 or 1"),
        f"{study()},0\n{study()}/,1\n": ("line 2", "has label 0 and label 1. Remove one of the lines"),
    }.items():
        labels.write_text(text)
        refused(tmp_path, *phrases, labels=labels)


# ---- refusals


@pytest.mark.parametrize("remote", [False, True], ids=["local", "memory"])
def test_folder_without_a_data_set_is_refused(tmp_path: Path, memory: str, remote: bool) -> None:
    def at(name: str, *paths: str) -> StoragePath:
        folder = make(tmp_path / name, *paths)
        return upload(folder, f"{memory}/{name}") if remote else folder

    nowhere = f"{memory}/nowhere" if remote else tmp_path / "nowhere"
    refused(nowhere, f"{nowhere}: no such folder. Give the folder that holds train/")
    refused(at("flat", "image1.png"), "flat is not in MURA's layout", "imageN.png", "Give the folder that holds train/")
    refused(at("test", "test/XR_HAND/patient1/study1/image1.png"), "no radiograph has a label", "--labels")
    refused(at("two", "a/" + view(), "b/" + view()), "holds 2 data sets", "/a, ", "/b). Give one of them")
    refused(at("three", *(f"{n}/{view()}" for n in "abc")), "holds 3 data sets", ", ...", "Give one of them")


def test_unknown_url_protocol_is_refused() -> None:
    refused("nowhere-known://bucket/MURA-v1.1", "nowhere-known", "Give a local folder, or a URL")


def test_command_line_refuses_an_invalid_data_set_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    laws.refusal(capsys, ["shards", tmp_path / "nowhere", out], "nowhere: no such folder. Give the folder that holds")
    make(tmp_path / "set", view())
    (tmp_path / "set" / "train_image_paths.csv").write_text("nothing\n")
    laws.refusal(capsys, ["shards", tmp_path / "set", out], "train_image_paths.csv names no radiograph of train/")
    (tmp_path / "set" / "train_image_paths.csv").unlink()
    laws.refusal(
        capsys, ["shards", tmp_path / "set", out, "--labels", out], f"--labels {out}: no such file. Give a CSV"
    )
    assert not out.exists()


# ---- names


def test_number_beyond_int64_is_no_view() -> None:
    """The file name is a DICOM UID."""
    radiograph = mura.parse(view(image=f"2.25.{'9' * 39}.dcm"))
    assert radiograph is not None
    assert radiograph.view == 0
    assert Manifest.from_radiographs([radiograph]).frame["view"].tolist() == [0]


def test_file_names_may_contain_any_byte(tmp_path: Path) -> None:
    names = [b"image1.png", b"image\xff2.png", b"image\n3.png"]
    root = os.fsencode(tmp_path / "line\nbreak") + b"/" + os.fsencode(view(image=""))
    os.makedirs(root)
    for name in names:
        Path(os.fsdecode(root + name)).write_bytes(name)
    scanned = scan(tmp_path)
    assert scanned.manifest.frame["view"].tolist() == [1, 2, 3]
    assert len(scanned.manifest.digest) == 64


def test_counts_of_mura_v1_1_are_consistent() -> None:
    train, valid = (np.array(list(mura.IMAGES_V1_1[split].values())) for split in ("train", "valid"))
    studies = {split: np.sum(list(types.values()), axis=0).tolist() for split, types in mura.STUDIES_V1_1.items()}
    assert studies == {"train": [8_280, 5_177], "valid": [661, 538]}
    assert train.sum(axis=0).tolist() == [21_935, 14_873]
    assert valid.sum(axis=0).tolist() == [1_667, 1_530]
    assert train.sum() + valid.sum() == mura.NUM_IMAGES_V1_1


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("seed", [0, 1])
def test_tune_split_is_cut_by_patient(phantoms: Path, fraction: float, seed: int) -> None:
    complete = scan(phantoms).manifest
    cut = cut_tune(complete, fraction, seed)
    patients = cut.frame.groupby("split")["patient"].agg(set)
    train, tune = patients["train"], patients.get("tune", set())
    assert not train & tune
    assert not tune & patients["valid"]
    assert abs(len(tune) - fraction * len(train | tune)) < 1
    assert sorted(cut.frame["path"]) == sorted(complete.frame["path"])
    assert cut.digest == cut_tune(complete, fraction, seed).digest
    if fraction:
        assert cut.digest != cut_tune(complete, fraction, seed + 1).digest


def drawn_lots() -> Iterator[str]:
    """Yield paths by arithmetic: several studies a patient, several study types, both labels."""
    types = ("XR_ELBOW", "XR_HAND", "XR_WRIST")
    for patient, k in ((number, k) for number in range(120) for k in range(1 + number % 3)):
        study_type = types[(patient + k) % 3] if patient % 4 else types[patient % 3]
        label = "positive" if (patient * 7 + k) % 5 < 2 else "negative"
        for image in range(1, 2 + (patient + k) % 3):
            split = "valid" if patient >= 100 else "train"
            yield view(split, study_type, patient, f"study{k + 1}_{label}", f"image{image}.png")


@pytest.mark.parametrize(
    ("fraction", "seed", "digest", "patients"),
    [
        (0.0, 0, "57af0ed49b75892a", []),
        (0.1, 0, "276f7a4b1a1b2bc5", [8, 34, 38, 39, 41, 65, 69, 70, 73, 75]),
        (0.1, 1, "f7ba0d30fe5bb223", [4, 8, 25, 33, 59, 78, 82, 84, 86, 96]),
        (0.25, 0, "29452643e9b4cc48", None),
    ],
)
def test_tune_split_equals_the_recorded_one(
    fraction: float, seed: int, digest: str, patients: list[int] | None
) -> None:
    """Existing shards, and runs on them, depend on this choice."""
    complete = Manifest.from_radiographs(radiograph for path in drawn_lots() if (radiograph := mura.parse(path)))
    assert len(complete.frame) == 480
    cut = cut_tune(complete, fraction, seed)
    assert cut.digest.startswith(digest)
    tune = sorted(set(cut.frame.loc[cut.frame["split"] == "tune", "patient"]))
    assert patients is None or tune == [f"patient{number:05d}" for number in patients]


def test_phantoms_have_no_defects(phantoms: Path) -> None:
    scanned = scan(phantoms)
    assert (scanned.defects, scanned.phantoms) == ({}, True)
    assert scan(phantoms / "train").phantoms


def test_phantoms_are_detected_by_their_marker_at_the_root(tmp_path: Path) -> None:
    make(tmp_path / "nested", view())
    assert not scan(tmp_path).phantoms
    (tmp_path / "phantoms.json").write_text("{}")
    assert scan(tmp_path).phantoms
    assert not scan(tmp_path / "nested").phantoms


def test_tune_fraction_is_limited(phantoms: Path) -> None:
    with pytest.raises(UserError, match=r"--tune 0\.6.*between 0.*0\.5"):
        cut_tune(scan(phantoms).manifest, 0.6, 0)


def test_manifest_round_trips_through_its_file(phantoms: Path, tmp_path: Path) -> None:
    manifest = scan(phantoms).manifest
    manifest.save(tmp_path / "manifest.csv")
    loaded = Manifest.load(tmp_path / "manifest.csv")
    assert loaded.digest == manifest.digest
    assert loaded.frame.equals(manifest.frame)
    text = (tmp_path / "manifest.csv").read_text().splitlines()
    (tmp_path / "manifest.csv").write_text("\n".join([text[0], *text[2:]]))
    with pytest.raises(UserError, match="not a manifest"):
        Manifest.load(tmp_path / "manifest.csv")


@pytest.mark.parametrize(
    ("column", "value", "limit"),
    [
        *(("label", value, "0 or 1") for value in ("2", "-1", "0.5", "", "nan", "abnormal", "1e400")),
        *(("split", value, "one of train, tune, valid, test") for value in ("", "Train", "validation")),
        *(("view", value, "a whole number from 0 on") for value in ("-1", "1.5", "", "x", "1" + "0" * 20, "inf")),
        *((name, "", "not empty") for name in ("study_type", "patient", "study", "path")),
    ],
)
def test_manifest_with_invalid_values_is_refused(column: str, value: str, limit: str, tmp_path: Path) -> None:
    names = ("row", "split", "study_type", "patient", "study", "view", "label", "path")
    lines = [[f"{n}", "train", "XR_HAND", "patient1", "study1", f"{n}", f"{n % 2}", f"image{n}.png"] for n in range(3)]
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(",".join(line) for line in [names, *lines]))
    assert Manifest.load(path).frame["label"].tolist() == [0, 1, 0]
    lines[1][names.index(column)] = value
    path.write_text("\n".join(",".join(line) for line in [names, *lines]))
    with pytest.raises(UserError) as refusal:
        Manifest.load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path} row 1: {column} ")
    assert message.endswith(f" ({limit}). Make the shards again.")


def test_real_radiographs_in_muras_layout(shared: Path, tmp_path: Path) -> None:
    scanned = scan(shared / "radiographs" / "fracatlas-mura")
    assert len(scanned.manifest.frame) == 386
    assert scanned.manifest.frame["study"].nunique() == 193
    assert scanned.manifest.frame["patient"].nunique() == 160
    # FracAtlas contains IMG0002790 again as IMG0004151, so the cut by patient did not detect it.
    duplicate_patients = ("train/XR_LEG/patient00109", "valid/XR_LEG/patient00133")
    first, second = (f"{patient}/study1_positive/image1.png" for patient in duplicate_patients)
    assert scanned.defects == {"duplicate across splits": [f"{first} = {second}"]}
    linked = tmp_path / "link"
    linked.symlink_to(shared / "radiographs" / "fracatlas-mura")
    assert scan(linked).manifest.digest == scanned.manifest.digest
    shutil.rmtree(tmp_path)
