"""report.py: is it MURA-v1.1, what a report holds, what is printed of it; on a tree of all 40,005 files too."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mura_dist.core.errors import UserError
from mura_dist.data import mura
from mura_dist.data.manifest import Manifest, cut_tune
from mura_dist.data.source import report as audit
from mura_dist.data.source.scan import DEFECTS, Scan, scan
from mura_dist.reports.dataset import describe


def paths_of_v1_1() -> Iterator[str]:
    """As many radiographs, studies and patients as v1.1 has; who is who is ours, but patient07840 has an XR_WRIST."""
    patients = 0
    for split, types in mura.STUDIES_V1_1.items():
        removed, studies = itertools.count(9000), Counter[tuple[int, str]]()
        for study_type, pair in types.items():
            for label, number in ((item, number) for item in (0, 1) for number in range(pair[item])):
                patient = patients + next(removed) % mura.PATIENTS_V1_1[split] + 1
                studies[patient, study_type] += 1
                study = f"study{studies[patient, study_type]}_{('negative', 'positive')[label]}"
                # The cell's radiographs, shared out evenly over its studies.
                images, cell = mura.IMAGES_V1_1[split][study_type][label], pair[label]
                for image in range(images * (number + 1) // cell - images * number // cell):
                    yield f"{split}/{study_type}/patient{patient:05d}/{study}/image{image + 1}.png"
        patients += mura.PATIENTS_V1_1[split]


PATHS = list(paths_of_v1_1())
JUNK = next(path for path in PATHS if path.startswith("train/XR_WRIST/patient07840/")).rpartition("/")[0]


def frame_of(paths: list[str]) -> pd.DataFrame:
    return Manifest.from_radiographs(radiograph for path in paths if (radiograph := mura.parse(path))).frame


def checked(scanned: Scan, manifest: Manifest, unreadable: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A report, of which it is sure that it is standard JSON, deterministic, and of no machine."""
    report = audit.report(scanned, manifest, unreadable)
    written = json.dumps(report, allow_nan=False)
    assert json.loads(written) == report
    assert written == json.dumps(audit.report(scanned, manifest, unreadable))
    assert str(scanned.root) not in written
    return report


# ---- the counts


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return frame_of(PATHS)


@pytest.mark.parametrize("tune", [0.0, 0.1, 0.5])
def test_v1_1_is_complete_however_tune_is_cut(frame: pd.DataFrame, tune: float) -> None:
    assert audit.differences_from_v1_1(cut_tune(Manifest(frame), tune, 0).frame) == []


def test_each_radiograph_counts(frame: pd.DataFrame) -> None:
    """Of each cell one radiograph less, of a study with several: this cell is named, and nothing else."""
    several = frame[frame.groupby("study")["view"].transform("size") > 1]
    rows = several.reset_index().groupby(["split", "study_type", "label"])["row"].first()
    for split, types in mura.IMAGES_V1_1.items():
        for (study_type, pair), (label, name) in itertools.product(types.items(), enumerate(audit.LABELS)):
            [line] = audit.differences_from_v1_1(frame.drop(rows[split, study_type, label]))
            num = pair[label]
            assert line == f"{split} {study_type} {name}: {num - 1} radiographs, v1.1 has {num} (-1)"


def test_what_differs_is_told_exactly(frame: pd.DataFrame) -> None:
    relabelled = frame.copy()
    study = frame.loc[(frame["study_type"] == "XR_WRIST") & (frame["label"] == 0), "study"].iloc[0]
    views = int((frame["study"] == study).sum())
    relabelled.loc[frame["study"] == study, "label"] = 1
    assert audit.differences_from_v1_1(relabelled) == [
        f"train XR_WRIST normal: {5765 - views} radiographs, v1.1 has 5765 ({-views})",
        f"train XR_WRIST abnormal: {3987 + views} radiographs, v1.1 has 3987 (+{views})",
        "train XR_WRIST normal: 2133 studies, v1.1 has 2134 (-1)",
        "train XR_WRIST abnormal: 1327 studies, v1.1 has 1326 (+1)",
    ]
    elsewhere = frame.assign(patient=frame["patient"].replace("patient00001", "patient00002"))
    assert audit.differences_from_v1_1(elsewhere) == ["train: 11183 patients, v1.1 has 11184 (-1)"]
    more = frame_of([*PATHS, "test/XR_HIP/patient20000/study1_negative/image1.png"])
    assert audit.differences_from_v1_1(more) == [
        "test XR_HIP normal: 1 radiographs, v1.1 has 0 (+1)",
        "test XR_HIP normal: 1 studies, v1.1 has 0 (+1)",
        "test: 1 patients, v1.1 has 0 (+1)",
    ]


def lines_of(frame: pd.DataFrame, **more: Any) -> list[str]:
    empty: dict[str, Any] = {
        "defects": {},
        "phantoms": False,
        "corrections": {},
        "needless": [],
        "duplicates": [],
        "sizes": {},
    }
    report = checked(Scan(Path("where/it/lay"), Manifest(frame), **(empty | more)), Manifest(frame))
    return audit.text(report).splitlines()


def test_another_data_set_is_told_in_a_line(frame: pd.DataFrame) -> None:
    half = frame.iloc[: mura.NUM_IMAGES_V1_1 // 2]
    assert lines_of(half)[1] == "not MURA-v1.1: 20,002 radiographs, v1.1 has 40,005"
    assert lines_of(half)[2:] == ["no defects", "details: report.json"]
    hips = frame.assign(study_type=frame["study_type"].replace("XR_HAND", "XR_HIP"))
    line = "not MURA-v1.1: 40,005 radiographs, v1.1 has 40,005; study types unknown to MURA: XR_HIP"
    assert lines_of(hips)[2:] == [line, "no defects", "details: report.json"]


def test_of_many_differences_the_first_are_printed(frame: pd.DataFrame) -> None:
    lines = lines_of(frame.iloc[::2])
    num = len(audit.differences_from_v1_1(frame.iloc[::2]))
    assert num > 20
    assert lines[2] == (f"not MURA-v1.1 as it was published, {num} counts differ: 20,003 radiographs, v1.1 has 40,005")
    assert [line.startswith("  ") for line in lines[3:-2]] == [True] * 9
    assert lines[-3] == f"  and {num - 8} more"


# ---- all 40,005 files


@pytest.fixture(scope="module")
def v1_1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tree of v1.1's size in MURA's real form, with CSVs and the four files of patient07840; a number in each file."""
    root = tmp_path_factory.mktemp("whole") / "MURA-v1.1"
    for folder in dict.fromkeys(path.rpartition("/")[0] for path in PATHS):
        (root / folder).mkdir(parents=True)
    for number, path in enumerate(PATHS):
        (root / path).write_text(str(number))
    for number in range(1, 5):
        (root / JUNK / f"._image{number}.png").write_bytes(b"\0\5\x16\7")
    write_csvs(root, PATHS)
    yield root
    shutil.rmtree(root.parent)


def write_csvs(root: Path, paths: list[str]) -> None:
    for split in ("train", "valid"):
        mine = [path for path in paths if path.startswith(split)]
        studies = dict.fromkeys(path.rpartition("/")[0] for path in mine)
        output = (f"MURA-v1.1/{study}/,{int(study.endswith('positive'))}\n" for study in studies)
        (root / f"{split}_image_paths.csv").write_text("".join(f"MURA-v1.1/{path}\n" for path in mine))
        (root / f"{split}_labeled_studies.csv").write_text("".join(output))


@pytest.mark.nightly(part="files")
def test_v1_1_complete(v1_1: Path) -> None:
    scanned = scan(v1_1)
    assert scanned.defects == {"not a radiograph": [f"{JUNK}/._image{number}.png" for number in range(1, 5)]}
    report = checked(scanned, cut_tune(scanned.manifest, 0.1, 0))
    assert report["mura_v1_1"] == {"complete": True, "resembles": True, "summary": audit.COMPLETE, "differences": []}
    assert report["counts"]["num_patients"] == 11_184 + 783
    assert "this is MURA-v1.1, complete" in audit.text(report).splitlines()


@pytest.mark.nightly(part="files")
def test_without_one_file_exactly_that_differs(v1_1: Path) -> None:
    path = next(path for path in PATHS if path.startswith("valid/XR_ELBOW/") and path.endswith("negative/image3.png"))
    content = (v1_1 / path).read_bytes()
    (v1_1 / path).unlink()
    try:
        scanned = scan(v1_1)
    finally:
        (v1_1 / path).write_bytes(content)
    assert scanned.defects.keys() == {"listed in a CSV, missing on disk", "not a radiograph"}
    assert scanned.defects["listed in a CSV, missing on disk"] == [path]
    report = checked(scanned, cut_tune(scanned.manifest, 0.1, 0))
    assert report["mura_v1_1"]["differences"] == ["valid XR_ELBOW normal: 234 radiographs, v1.1 has 235 (-1)"]
    lines = audit.text(report).splitlines()
    assert lines[3:5] == [
        "not MURA-v1.1 as it was published, 1 count differs: 40,004 radiographs, v1.1 has 40,005",
        "  valid XR_ELBOW normal: 234 radiographs, v1.1 has 235 (-1)",
    ]


@pytest.mark.nightly(part="files")
def test_v1_0_is_refused_by_its_count(v1_1: Path) -> None:
    """Of its CSVs, whatever of it is on disk; and of its files, where there are no CSVs."""
    more = [f"train/XR_HAND/patient{number:05d}/study1_negative/image1.png" for number in range(30_000, 30_890)]
    try:
        write_csvs(v1_1, PATHS + more)
        check_v1_0(v1_1)
        for csv in v1_1.glob("*.csv"):
            csv.unlink()
        for path in more[:-1]:
            (v1_1 / path).parent.mkdir(parents=True)
            (v1_1 / path).write_text(path)
        assert len(scan(v1_1, duplicates=False).manifest.frame) == 40_894
        (v1_1 / more[-1]).parent.mkdir(parents=True)
        (v1_1 / more[-1]).write_text(more[-1])
        check_v1_0(v1_1)
    finally:
        write_csvs(v1_1, PATHS)
        for path in more:
            shutil.rmtree((v1_1 / path).parent.parent, ignore_errors=True)


def check_v1_0(root: Path) -> None:
    with pytest.raises(UserError) as refusal:
        scan(root)
    message = str(refusal.value)
    assert message == (
        f"{root} has 40895 radiographs, as MURA-v1.0 had, which contained patient data and was withdrawn. Delete it and ask "
        "Stanford for MURA-v1.1."
    )


# ---- the report


def test_a_report_holds_everything(tmp_path: Path) -> None:
    files = {f"train/XR_HAND/patient{n:05d}/study1_positive/image1.png": str(n % 10) for n in range(20)}
    files |= {"valid/XR_HAND/patient00030/study1_negative/image1.png": "0"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    labels = tmp_path / "labels.csv"
    studies = [path.rpartition("/")[0] for path in files]
    labels.write_text(f"{studies[0]},0\n{studies[1]},1\n")
    scanned = scan(tmp_path, labels)
    cut = cut_tune(scanned.manifest, 0.2, 0)
    unreadable = ({"row": 1, "path": "x.png", "code": "not_image", "reason": "text"},)
    report = checked(scanned, cut, unreadable)
    assert report["corrections"] == {studies[0]: 0}
    assert report["corrections_without_effect"] == [studies[1]]
    assert report["unreadable"] == list(unreadable)
    assert report["defects"].keys() == {"duplicate across splits", "duplicate within a split"}
    split = dict(zip(cut.frame["path"], cut.frame["split"], strict=True))
    apart = [
        pair
        for pair in report["defects"]["duplicate within a split"]
        if len(set(map(split.get, pair.split(" = ")))) > 1
    ]
    assert report["duplicates_of_train_in_tune"] == apart != []
    assert {name: counts["num_radiographs"] for name, counts in report["counts"]["splits"].items()} == {
        "train": 16, "tune": 4, "valid": 1
    }  # fmt: skip
    text = audit.text(report).splitlines()
    assert text[0] == "train: 16 radiographs of 16 studies (1 normal, 15 abnormal), 16 patients"
    assert text[3] == "not MURA-v1.1: 21 radiographs, v1.1 has 40,005"
    assert text[4] == "duplicate across splits: 1 (serious: valid contains radiographs of train)"
    assert "duplicate within a split: 10" in text
    assert "  and 7 more" in text
    assert f"duplicates of which tune has one and train the other: {len(apart)}" in text
    assert text[-5:] == [
        "studies corrected by --labels: 1 (1 more already had that label)",
        f"  {studies[0]} is normal",
        "unreadable, skipped: 1",
        "  x.png: text (not_image)",
        "details: report.json",
    ]


def test_a_text_is_a_page_whatever_is_wrong(frame: pd.DataFrame) -> None:
    """Every defect there is, thousands of each, names that would steer a terminal: 40 lines, all of them printable."""
    name = "train/XR_HAND/patient1/study1_positive/image\x1b[2J\udcff\n1.png" + "x" * 500
    defects = {defect: [name] * 3000 for defect in DEFECTS}
    lines = lines_of(frame.iloc[::2], defects=defects, corrections={name: 1}, needless=[name])
    assert len(lines) <= audit.MAX_LINES + 1
    assert all(line.isprintable() and len(line) <= 180 for line in lines)
    assert all(any(line.startswith(f"{defect}: 3,000") for line in lines) for defect in DEFECTS)
    few = lines_of(frame.iloc[::2], defects={"no label": [name] * 3000})
    assert (
        sum(line.startswith("  train/XR_HAND/patient1/study1_positive/image\\x1b[2J\\udcff\\n1.pngxx") for line in few)
        == 3
    )
    assert "  and 2,997 more" in few


def test_real_radiographs(shared: Path) -> None:
    scanned = scan(shared / "radiographs" / "fracatlas-mura")
    report = checked(scanned, cut_tune(scanned.manifest, 0.1, 0))
    assert audit.text(report).splitlines() == [
        "train: 277 radiographs of 140 studies (78 normal, 62 abnormal), 115 patients",
        "tune: 33 radiographs of 16 studies (7 normal, 9 abnormal), 13 patients",
        "valid: 76 radiographs of 37 studies (19 normal, 18 abnormal), 32 patients",
        "not MURA-v1.1: 386 radiographs, v1.1 has 40,005; study types unknown to MURA: XR_HIP, XR_LEG",
        "duplicate across splits: 1 (serious: valid contains radiographs of train)",
        "  train/XR_LEG/patient00109/study1_positive/image1.png = valid/XR_LEG/patient00133/study1_positive/image1.png",
        "duplicates kept (--duplicates keep); drop-train drops train's copies of valid's, group keeps their patients together",
        "details: report.json",
    ]
    assert len(report["mura_v1_1"]["differences"]) > 40


@pytest.mark.parametrize("remote", [False, True], ids=["local", "memory"])
def test_a_page_counts_what_a_report_lists(tmp_path: Path, shared: Path, remote: bool) -> None:
    """mura-dist describe, of a folder or of a store, says no other thing than the conversion's report."""
    fsspec = pytest.importorskip("fsspec")
    folder: Path | str = shared / "radiographs" / "fracatlas-mura"
    if remote:
        store, folder = fsspec.filesystem("memory"), "memory://test-audit/fracatlas-mura"
        store.put(str(shared / "radiographs" / "fracatlas-mura"), "/test-audit/fracatlas-mura", recursive=True)
    actual = describe(folder, tmp_path / "page.html")
    scanned = scan(folder)
    report = checked(scanned, scanned.manifest)
    assert actual["name"] == "fracatlas-mura"
    assert actual["defects"] == {name: len(visited) for name, visited in report["defects"].items()}
    assert actual["is_mura_v1_1"] is report["mura_v1_1"]["complete"] is False
    assert actual["num_radiographs"] == actual["sizes"]["num_told"] == report["counts"]["num_radiographs"] == 386
    if remote:
        store.rm("/test-audit", recursive=True)
