"""Test phantoms: MURA's layout, the same bytes from the same seed, and fractures that a thumbnail does not reveal."""

import csv
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mura_dist.core.errors import UserError
from mura_dist.data import mura, phantoms


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "set"
    phantoms.draw(out, studies=140, size=64, seed=3, workers=1)
    return out


def digests(out: Path) -> dict[str, str]:
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def parsed(out: Path) -> list[mura.Radiograph]:
    actual = [mura.parse(path.relative_to(out).as_posix()) for path in sorted(out.rglob("*.png"))]
    assert None not in actual
    return [radiograph for radiograph in actual if radiograph is not None]


def test_bytes_are_independent_of_the_number_of_processes(drawn: Path, tmp_path: Path) -> None:
    phantoms.draw(tmp_path / "again", studies=140, size=64, seed=3, workers=2)
    assert digests(tmp_path / "again") == digests(drawn)


def test_seed_changes_the_radiograph() -> None:
    pictures = [phantoms.radiograph(phantoms.plan(8, 0)[0], 1, size=64, seed=seed).convert("L") for seed in (0, 1)]
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_radiograph_is_independent_of_earlier_ones(drawn: Path) -> None:
    study = next(study for study in phantoms.plan(140, 3) if study.num_views > 1)
    with Image.open(drawn / study.folder / "image2.png") as existing:
        assert np.array_equal(np.asarray(existing), np.asarray(phantoms.radiograph(study, 2, size=64, seed=3)))


def test_summary_counts_the_files(tmp_path: Path) -> None:
    visited: list[tuple[int, int]] = []
    counts = phantoms.draw(
        tmp_path / "set", studies=12, size=64, progress=lambda done, total: visited.append((done, total))
    )
    existing = parsed(tmp_path / "set")
    assert visited == [(done, 12) for done in range(1, 13)]
    assert counts["studies"] == len({r.study for r in existing}) == 12
    assert counts["radiographs"] == len(existing)
    assert counts["patients"] == len({r.patient for r in existing})
    assert counts["positive_studies"] == len({r.study for r in existing if r.label})
    assert counts["train_studies"] + counts["valid_studies"] == 12


def test_csvs_agree_with_folders(drawn: Path) -> None:
    for split in ("train", "valid"):
        existing = [r for r in parsed(drawn) if r.split == split]
        paths = (drawn / f"{split}_image_paths.csv").read_text().splitlines()
        assert sorted(paths) == sorted(f"MURA-v1.1/{r.path}" for r in existing)
        with open(drawn / f"{split}_labeled_studies.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert sorted(rows) == sorted(
            [f"MURA-v1.1/{study}/", str(label)] for study, label in {(r.study, r.label) for r in existing}
        )


def test_patient_is_in_one_split_and_may_have_several_studies(drawn: Path) -> None:
    existing = parsed(drawn)
    splits = {(r.patient, r.split) for r in existing}
    assert len(splits) == len({r.patient for r in existing})
    studies = {(r.patient, r.study_type, r.study, r.label) for r in existing}
    by_patient = [list(group) for _, group in itertools.groupby(sorted(studies), key=lambda study: study[0])]
    assert any(len({study[3] for study in group}) == 2 for group in by_patient)
    assert any(len({study[1] for study in group}) > 1 for group in by_patient)


@pytest.mark.parametrize("studies", [4, 5, 9, 40, 1200])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plan_has_both_labels_in_each_split(studies: int, seed: int) -> None:
    planned = phantoms.plan(studies, seed)
    assert [study.number for study in planned] == list(range(studies))
    assert len({study.folder for study in planned}) == studies
    for split in ("train", "valid"):
        assert {study.label for study in planned if study.split == split} == {0, 1}
    assert {study.num_views for study in planned} <= {1, 2, 3, 4}


def test_larger_plan_has_both_labels_in_each_study_type_and_split() -> None:
    planned = phantoms.plan(400, 0)
    actual = {(study.split, study.study_type, study.label) for study in planned}
    assert actual == set(itertools.product(("train", "valid"), mura.STUDY_TYPES, (0, 1)))
    assert 0.75 <= sum(study.split == "train" for study in planned) / 400 <= 0.8


def test_files_vary_as_in_mura(drawn: Path) -> None:
    modes, sizes = set(), []
    for path in drawn.rglob("*.png"):
        with Image.open(path) as picture:
            modes.add(picture.mode)
            sizes.append(picture.size)
            bands = np.asarray(picture.convert("RGB"))
        assert np.array_equal(bands[..., 0], bands[..., 1])
        assert np.array_equal(bands[..., 0], bands[..., 2])
        assert bands.std() > 5
    assert modes == {"L", "RGB"}
    longest = [max(size) for size in sizes]
    assert min(longest) >= 0.55 * 64 - 1
    assert max(longest) <= 64
    assert len({width / height for width, height in sizes}) > 20


@pytest.mark.parametrize("study_type", mura.STUDY_TYPES)
def test_fracture_moves_only_the_distal_bones(study_type: str) -> None:
    complete = phantoms.skeleton(study_type, phantoms.PhiloxRandom(0, 0, 1))
    broken = phantoms.break_bone(complete, study_type, phantoms.PhiloxRandom(0, 7, 1))
    before = {bone.name: bone for bone in complete}
    pieces = [bone for bone in broken if bone.cut]
    assert len([bone for bone in broken if bone.name in before]) == len(complete) + 1
    assert [piece.cut.side for piece in pieces if piece.cut] == [-1, 1]
    moved = {b.name for b in broken if b.name in before and not np.allclose(b.head, before[b.name].head)}
    hanging = {pieces[0].name}
    for bone in complete:
        if bone.hangs_on in hanging:
            hanging.add(bone.name)
    assert moved == hanging


@pytest.mark.parametrize("study_type", mura.STUDY_TYPES)
def test_fracture_is_visible_in_most_views_and_local(study_type: str) -> None:
    """Compare the bone on each ray with and without the fracture in the same pose."""
    changed = []
    for number in range(12):
        bones = phantoms.skeleton(study_type, phantoms.PhiloxRandom(0, number, 1))
        broken = phantoms.break_bone(bones, study_type, phantoms.PhiloxRandom(1, number, 1))
        depths = [
            phantoms.bone_depth(
                phantoms.project(b, study_type, 96, 96, phantoms.PhiloxRandom(2, number, 1)), 96, 96, 0.4
            )
            for b in (bones, broken)
        ]
        assert all(np.isfinite(depth).all() and (depth >= 0).all() for depth in depths)
        changed.append(float((abs(depths[0] - depths[1]) > 0.2 * depths[0].max()).mean()))
    assert np.median(changed) > 0.004
    assert max(changed) < 0.5


def test_finished_set_is_not_drawn_again(drawn: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in drawn.rglob("*.png")}
    counts = phantoms.draw(drawn, studies=140, size=64, seed=3)
    assert counts["studies"] == 140
    assert times == {path: path.stat().st_mtime_ns for path in drawn.rglob("*.png")}


def test_interrupted_set_is_completed(tmp_path: Path) -> None:
    def die(done: int, total: int) -> None:
        if done == total // 2:
            raise KeyboardInterrupt

    phantoms.draw(tmp_path / "whole", studies=10, size=64)
    with pytest.raises(KeyboardInterrupt):
        phantoms.draw(tmp_path / "half", studies=10, size=64, progress=die)
    assert not (tmp_path / "half" / phantoms.MARK).exists()
    next((tmp_path / "half").rglob("*.png")).write_bytes(b"torn")
    phantoms.draw(tmp_path / "half", studies=10, size=64)
    assert digests(tmp_path / "half") == digests(tmp_path / "whole")
    assert json.loads((tmp_path / "half" / phantoms.MARK).read_text())["phantoms"] is True


@pytest.mark.parametrize(
    ("request_", "phrases"),
    [
        ({"studies": 3}, ("studies=3", "at least 4", "--studies")),
        ({"size": 40}, ("size=40", "64 to 2048", "--size")),
        ({"size": 4000}, ("size=4000", "64 to 2048", "--size")),
        ({"seed": -1}, ("seed=-1", "0 to 2**64 - 1", "--seed")),
    ],
)
def test_invalid_request_is_refused(request_: dict[str, int], phrases: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        phantoms.draw(tmp_path / "set", **{"studies": 10, "size": 64, **request_})  # type: ignore[arg-type]
    assert all(word in str(refused.value) for word in phrases)
    assert not (tmp_path / "set").exists()


def test_set_killed_at_its_first_write_is_completed(tmp_path: Path) -> None:
    (tmp_path / f".{phantoms.STARTED}.77.partial").write_text("{")
    phantoms.draw(tmp_path, studies=4, size=64)
    assert (tmp_path / phantoms.MARK).is_file()
    assert not (tmp_path / phantoms.STARTED).exists()


def test_folder_with_other_files_is_refused_and_unchanged(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not empty and holds no phantoms\. Give a new folder"):
        phantoms.draw(tmp_path, studies=10, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
    with pytest.raises(UserError, match="is a file"):
        phantoms.draw(tmp_path / "letter.txt", studies=10, size=64)
    with pytest.raises(UserError, match=r"another set \(studies=140, size=64, seed=3, version=\d+\)"):
        phantoms.draw(drawn, studies=140, size=64, seed=4)
    (tmp_path / "mark").mkdir()
    (tmp_path / "mark" / phantoms.MARK).write_text("[torn")
    with pytest.raises(UserError, match="Give a new folder"):
        phantoms.draw(tmp_path / "mark", studies=10, size=64)


@pytest.mark.nightly(part="training")
@pytest.mark.parametrize("seed", [0, 1])
def test_thumbnails_do_not_reveal_the_label(seed: int) -> None:
    """Fit a logistic regression on 16 x 16 thumbnails. The held-out AUROC is 0.5 by chance, with a deviation of 0.03."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    first_views = [(s, phantoms.radiograph(s, 1, size=64, seed=seed)) for s in phantoms.plan(1000, seed)]
    thumbnails = np.array(
        [np.asarray(p.convert("L").resize((16, 16), Image.Resampling.BILINEAR)).ravel() for _, p in first_views], float
    )
    labels = np.array([study.label for study, _ in first_views])
    train = np.arange(len(labels)) < 600
    thumbnails = (thumbnails - thumbnails[train].mean(0)) / thumbnails[train].std(0)
    scores = [
        linear_model.LogisticRegression(C=c, max_iter=500)
        .fit(thumbnails[train], labels[train])
        .decision_function(thumbnails[~train])
        for c in (1e-4, 1e-3, 1e-2)
    ]
    assert max(metrics.roc_auc_score(labels[~train], score) for score in scores) < 0.65
