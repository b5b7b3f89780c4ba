"""mura.py and manifest.py: paths, scanning, CSVs in the wild, the tune split, class weights."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from mura_dist import mura
from mura_dist.manifest import Manifest, class_weights, cut_tune, scan
from mura_dist.refusal import Refusal

PIXEL = b"not opened by a scan"


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PIXEL)
    return root


def view(split="train", study_type="XR_WRIST", patient=1, study="study1_positive", image="image1.png") -> str:
    return f"{split}/{study_type}/patient{patient:05d}/{study}/{image}"


@pytest.mark.parametrize("before", ["", "MURA-v1.1/", "/data/train/MURA-v1.1/MURA-v1.1/", "./"])
def test_a_path_says_everything(before: str) -> None:
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
def test_other_paths_say_nothing(path: str) -> None:
    assert mura.parse(path) is None


def test_a_test_folder_has_no_label() -> None:
    radiograph = mura.parse("test/XR_HAND/patient00007/study2/image1.png")
    assert radiograph is not None
    assert radiograph.label is None


def test_rows_do_not_depend_on_the_file_system(tmp_path: Path) -> None:
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


def test_a_subfolder_of_the_data_set_is_enough(tmp_path: Path) -> None:
    make(tmp_path, view(), view("valid", patient=2))
    assert scan(tmp_path / "train").manifest.frame["path"].tolist() == [view()]


def test_junk_is_left_out_and_named(tmp_path: Path) -> None:
    junk = [view(image=name) for name in ("._image1.png", "Thumbs.db", "notes.txt")]
    scanned = scan(make(tmp_path, view(), *junk))
    assert len(scanned.manifest.frame) == 1
    assert sorted(scanned.defects["not a radiograph"]) == sorted(junk)


CSV_VARIANTS = {
    "as MURA writes it": "{path},1\n",
    "header": "Img_Path,Label\n{path},1\n",
    "CRLF": "{path},1\r\n",
    "trailing comma": "{path},1,\n",
    "byte-order mark": "\ufeff{path},1\n",
}


@pytest.mark.parametrize("variant", CSV_VARIANTS)
def test_csvs_are_the_truth(tmp_path: Path, variant: str) -> None:
    unlisted, missing = view(image="image2.png"), view(image="image3.png")
    make(tmp_path, view(study="study1_negative"), unlisted)
    listed = [view(study="study1_negative"), missing]
    lines = "".join(f"MURA-v1.1/{path}\r\n" for path in listed)
    (tmp_path / "train_image_paths.csv").write_bytes(lines.encode())
    study = "MURA-v1.1/train/XR_WRIST/patient00001/study1_negative/"
    text = CSV_VARIANTS[variant].format(path=study)
    (tmp_path / "train_labeled_studies.csv").write_bytes(text.encode())
    scanned = scan(tmp_path)
    assert scanned.manifest.frame["label"].tolist() == [1]  # the CSV's, not the folder's
    assert scanned.defects == {
        "listed in a CSV, missing on disk": [missing],
        "on disk, listed in no CSV": [unlisted],
        "label differs between CSV and folder (CSV taken)": [view(study="study1_negative")],
    }


def test_corrections_are_applied_and_recorded(tmp_path: Path) -> None:
    make(tmp_path, view(), view(patient=2))
    labels = tmp_path / "labels.csv"
    labels.write_text("study,label\ntrain/XR_WRIST/patient00002/study1_positive,0\n")
    scanned = scan(tmp_path, labels)
    assert scanned.manifest.frame["label"].tolist() == [1, 0]
    assert scanned.defects == {"label corrected by --labels": [view(patient=2)]}
    labels.write_text("train/XR_WRIST/patient00009/study1_positive,0\n")
    with pytest.raises(Refusal, match=r"1 studies are not in the data.*patient00009"):
        scan(tmp_path, labels)
    labels.write_text("train/XR_WRIST/patient00002/study1_positive,2\n")
    with pytest.raises(Refusal, match=r"line 1.*label of 0 or 1"):
        scan(tmp_path, labels)


def test_a_patient_of_both_splits_is_named(tmp_path: Path) -> None:
    scanned = scan(make(tmp_path, view(), view("valid")))
    assert scanned.defects["patient in train and valid"] == ["patient00001"]


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no such folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(Refusal, match="not in MURA's layout"):
        scan(make(tmp_path / "flat", "image1.png"))
    with pytest.raises(Refusal, match="no radiograph has a label"):
        scan(make(tmp_path / "test", "test/XR_HAND/patient1/study1/image1.png"))
    with pytest.raises(Refusal, match="holds 2 data sets"):
        scan(make(tmp_path / "two", "a/" + view(), "b/" + view()))


def test_v1_0_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *[view(patient=patient) for patient in range(1, 8)])
    monkeypatch.setattr(mura, "NUM_IMAGES_V1_0", 7)
    with pytest.raises(Refusal, match=r"MURA-v1\.0.*patient data"):
        scan(tmp_path)


def test_counts_of_v1_1_add_up() -> None:
    train, valid = (np.array(list(mura.IMAGES_V1_1[split].values())) for split in ("train", "valid"))
    assert train.sum(axis=0).tolist() == [21_935, 14_873]
    assert valid.sum(axis=0).tolist() == [1_667, 1_530]
    assert train.sum() + valid.sum() == mura.NUM_IMAGES_V1_1


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("seed", [0, 1])
def test_tune_is_cut_by_patient(phantoms: Path, fraction: float, seed: int) -> None:
    whole = scan(phantoms).manifest
    cut = cut_tune(whole, fraction, seed)
    patients = cut.frame.groupby("split")["patient"].agg(set)
    train, tune = patients["train"], patients.get("tune", set())
    assert not train & tune
    assert not tune & patients["valid"]
    assert abs(len(tune) - fraction * len(train | tune)) < 1
    assert sorted(cut.frame["path"]) == sorted(whole.frame["path"])
    assert cut.digest == cut_tune(whole, fraction, seed).digest
    if fraction:
        assert cut.digest != cut_tune(whole, fraction, seed + 1).digest


def test_tune_has_limits(phantoms: Path) -> None:
    with pytest.raises(Refusal, match=r"--tune 0\.6.*between 0.*0\.5"):
        cut_tune(scan(phantoms).manifest, 0.6, 0)


def test_a_manifest_survives_the_disk(phantoms: Path, tmp_path: Path) -> None:
    manifest = scan(phantoms).manifest
    manifest.save(tmp_path / "manifest.csv")
    loaded = Manifest.load(tmp_path / "manifest.csv")
    assert loaded.digest == manifest.digest
    assert loaded.frame.equals(manifest.frame)
    text = (tmp_path / "manifest.csv").read_text().splitlines()
    (tmp_path / "manifest.csv").write_text("\n".join([text[0], *text[2:]]))
    with pytest.raises(Refusal, match="not a manifest"):
        Manifest.load(tmp_path / "manifest.csv")


def test_class_weights_are_the_papers() -> None:
    counts = mura.IMAGES_V1_1["train"]
    study_type = np.concatenate([[name] * sum(pair) for name, pair in counts.items()])
    label = np.concatenate([np.repeat([0, 1], pair) for pair in counts.values()])
    weights = class_weights(study_type, label)
    assert weights["XR_ELBOW"] == pytest.approx((0.406814, 0.593186), abs=5e-7)
    assert weights["XR_HAND"] == pytest.approx((0.267725, 0.732275), abs=5e-7)
    assert weights["XR_WRIST"] == pytest.approx((0.408839, 0.591161), abs=5e-7)
    assert class_weights(np.array(["A", "A"]), np.array([1, 1])) == {"A": (0.5, 0.5)}


def test_real_radiographs_in_muras_layout(shared: Path, tmp_path: Path) -> None:
    scanned = scan(shared / "radiographs" / "fracatlas-mura")
    assert len(scanned.manifest.frame) == 386
    assert scanned.manifest.frame["study"].nunique() == 193
    assert scanned.manifest.frame["patient"].nunique() == 160
    assert scanned.defects == {}
    linked = tmp_path / "link"
    linked.symlink_to(shared / "radiographs" / "fracatlas-mura")
    assert scan(linked).manifest.digest == scanned.manifest.digest
    shutil.rmtree(tmp_path)
