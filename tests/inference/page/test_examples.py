"""Test the examples of the page: selection, names, known drawings, thumbnails."""

import hashlib
import io
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from mura_dist.data import mura
from mura_dist.data.phantoms import MARK, PhantomSet, plan
from mura_dist.inference.page import examples, study
from mura_dist.inference.page.examples import EXAMPLES_PER_TYPE, THUMBNAIL_PX, Example
from mura_dist.inference.page.study_input import example_title


@pytest.fixture(scope="module")
def drawn(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the phantoms' valid split and their marker file, which a test may change."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(phantoms / "valid", folder / "valid")
    shutil.copy(phantoms / MARK, folder)
    return folder


def label_of(example: Example) -> str:
    return example.files[0].parent.name.partition("_")[2]


def test_examples_cover_each_type_and_both_labels(phantoms: Path) -> None:
    selection = examples.find_examples(phantoms)
    assert selection == examples.find_examples(phantoms / "valid" / "..")  # the same folder by another path
    assert [example.number for example in selection] == list(range(1, len(selection) + 1))
    for turn in range(EXAMPLES_PER_TYPE):  # one of each study type comes first
        assert {example.study_type for example in selection[7 * turn : 7 * turn + 7]} == set(mura.STUDY_TYPES)
    assert len(selection) == EXAMPLES_PER_TYPE * len(mura.STUDY_TYPES)
    assert {label_of(example) for example in selection} == {"positive", "negative"}
    for example in selection:
        assert 1 <= len(example.files) <= study.MAX_FILES
        assert all(path.is_file() for path in example.files)


def create_layout(root: Path, folders: Iterable[str]) -> Path:
    """Create empty files in MURA's layout below `root`, and return it."""
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "image1.png").touch()
    return root


def examples_by_seed(tmp_path: Path) -> dict[int, tuple[Example, ...]]:
    """Return the examples of the valid split of a phantom set by seed, as in launch/demo.sh."""
    return {
        seed: examples.find_examples(
            create_layout(
                tmp_path / str(seed), (planned.folder for planned in plan(700, seed) if planned.split == "valid")
            )
        )
        for seed in range(8)
    }


def test_example_number_does_not_reveal_label(tmp_path: Path) -> None:
    """In every set, both labels occur at even and odd numbers. Over all sets, they occur at each index within a type."""
    labels_by_number: dict[int, set[str]] = {}
    labels_by_index: dict[int, set[str]] = {}
    type_orders, counts_of_types = set(), set()
    for seed, selection in examples_by_seed(tmp_path).items():
        assert len(selection) == EXAMPLES_PER_TYPE * len(mura.STUDY_TYPES)
        for odd in (0, 1):
            assert {label_of(example) for example in selection if example.number % 2 == odd} == {
                "positive",
                "negative",
            }, (seed, odd)
        for study_type in mura.STUDY_TYPES:
            of_type = [label_of(example) for example in selection if example.study_type == study_type]
            counts_of_types.add(of_type.count("positive"))
            for index, label in enumerate(of_type):
                labels_by_index.setdefault(index, set()).add(label)
        for example in selection:
            labels_by_number.setdefault(example.number, set()).add(label_of(example))
        type_orders |= {
            tuple(example.study_type for example in selection[start : start + 7]) for start in range(0, 28, 7)
        }
    assert set(map(frozenset, labels_by_index.values())) == {frozenset({"positive", "negative"})}
    assert sum(len(labels) == 2 for labels in labels_by_number.values()) >= 0.9 * len(labels_by_number)
    assert len(type_orders) > 4, "the study types have no fixed order"
    assert len(counts_of_types) > 1, "no study type has a fixed number of each label"


def test_parity_of_number_does_not_predict_label(tmp_path: Path) -> None:
    """The difference stays within 4 standard errors of independence, over 224 examples."""
    cases = [
        (example.number % 2, label_of(example) == "positive")
        for selection in examples_by_seed(tmp_path).values()
        for example in selection
    ]
    odd = np.array([case[0] for case in cases])
    positive = np.array([case[1] for case in cases])
    difference = positive[odd == 1].mean() - positive[odd == 0].mean()
    share = positive.mean()
    assert abs(difference) < 4 * (share * (1 - share) * 4 / len(cases)) ** 0.5


def test_selection_and_number_do_not_depend_on_labels(tmp_path: Path) -> None:
    """The same studies with exchanged labels give the same patients under the same numbers."""
    folders = [planned.folder for planned in plan(300, 3)]
    exchanged = [
        name.replace("_positive", "_x").replace("_negative", "_positive").replace("_x", "_negative") for name in folders
    ]
    before = examples.find_examples(create_layout(tmp_path / "a", folders))
    after = examples.find_examples(create_layout(tmp_path / "b", exchanged))
    assert [example.files[0].parent.parent.name for example in before] == [
        example.files[0].parent.parent.name for example in after
    ]
    assert [label_of(example) for example in before] != [label_of(example) for example in after]


@pytest.mark.parametrize(
    ("rare", "common"),
    [("_positive", ""), ("_negative", ""), ("_positive", "_negative"), ("_negative", "_positive")],
)
def test_rare_label_is_selected_at_any_number(tmp_path: Path, rare: str, common: str) -> None:
    numbers = set()
    for rare_number in range(30):
        names = (
            f"XR_WRIST/patient{number:05}/study1{rare if number == rare_number else common}" for number in range(30)
        )
        selection = examples.find_examples(create_layout(tmp_path / str(rare_number), names))
        assert len(selection) == EXAMPLES_PER_TYPE
        numbers |= {example.number for example in selection if example.files[0].parent.name == f"study1{rare}"}
    assert numbers == set(range(1, EXAMPLES_PER_TYPE + 1))


def test_both_rare_labels_are_selected(tmp_path: Path) -> None:
    for pair in range(20):
        suffix = {pair: "_positive", pair + 20: "_negative"}
        names = (f"XR_HAND/patient{number:05}/study1{suffix.get(number, '')}" for number in range(60))
        selection = examples.find_examples(create_layout(tmp_path / str(pair), names))
        assert {label_of(example) for example in selection} >= {"positive", "negative"}


def test_unlabeled_folder_has_examples(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / "XR_WRIST" / f"patient{number:05}" / "study1"
        folder.mkdir(parents=True)
        (folder / "image1.png").touch()
    assert len(examples.find_examples(tmp_path)) == EXAMPLES_PER_TYPE


def test_example_name_contains_study_type_and_no_label(phantoms: Path) -> None:
    for example in examples.find_examples(phantoms):
        for index in range(len(example.files)):
            name = example.name(index)
            assert name == f"{example.study_type}/example{example.number}/image{index + 1}.png"
            assert example.content(index) == example.files[index].read_bytes()
        plural = "" if len(example.files) == 1 else "s"
        noun = example.study_type.removeprefix("XR_").lower()
        assert example_title(example) == f"Example {example.number}: {noun}, {len(example.files)} picture{plural}"
    gone = Example(1, "XR_HAND", (Path("/nowhere/image1.PNG"),))
    assert (gone.content(0), gone.name(0)) == (b"", "XR_HAND/example1/image1.png")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("below", [".", "valid", "valid/XR_HAND"])
def test_phantom_examples_are_known_drawings(drawn: Path, below: str) -> None:
    selection = examples.find_examples(drawn / below)
    assert examples.drawing_digests(drawn / below, selection) == {
        digest(path) for example in selection for path in example.files
    }


def png_bytes(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_changed_file_is_not_a_known_drawing(drawn: Path) -> None:
    """Neither the name nor the marker file of the phantoms makes another file a drawing."""
    selection = examples.find_examples(drawn)[:3]
    target, another_file = selection[0].files[0], selection[1].files[0]
    before = target.read_bytes()
    with Image.open(target) as image:
        pixels, mode = np.asarray(image).astype(int), image.mode
    photograph = Image.fromarray(load_sample_image("flower.jpg")).convert(mode).resize(pixels.shape[1::-1])
    loud = pixels.copy()
    loud[pixels.shape[0] // 2, 3] = (loud[pixels.shape[0] // 2, 3] + 128) % 256
    contents = {
        "a photograph of the same size": png_bytes(photograph),
        "another drawing of the set": another_file.read_bytes(),
        "one pixel changed": png_bytes(Image.fromarray(loud.astype(np.uint8))),
        "cut short": before[: len(before) // 2],
        "nothing": b"",
        "no picture": b"GIF89a",
    }
    try:
        for case, data in contents.items():
            target.write_bytes(data)
            digests = examples.drawing_digests(drawn, selection)
            assert hashlib.sha256(data).hexdigest() not in digests or case == "another drawing of the set", case
            assert len(digests) == sum(len(example.files) for example in selection) - 1, case
    finally:
        target.write_bytes(before)


def test_drawing_may_differ_by_one_gray_level(drawn: Path) -> None:
    """Drawings of another processor may differ by one gray level."""
    selection = PhantomSet.open(drawn)
    assert selection is not None
    path = examples.find_examples(drawn)[0].files[0]
    with Image.open(path) as image:
        pixels = np.asarray(image).astype(int)
    for difference, is_known in ((1, True), (2, False)):
        moved = np.where(pixels > 128, pixels - difference, pixels + difference).astype(np.uint8)
        assert selection.holds(path.relative_to(drawn).as_posix(), png_bytes(Image.fromarray(moved))) == is_known


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"seed": 2},
        {"size": 256},
        {"studies": 61},
        {"studies": "60"},
        {"size": 10**9},
        {"seed": -1},
        None,
    ],
)
def test_other_phantom_marker_has_no_known_drawings(
    drawn: Path, tmp_path: Path, change: dict[str, object] | None
) -> None:
    mark = json.loads((drawn / MARK).read_text())
    shutil.copytree(drawn / "valid" / "XR_HAND", tmp_path / "valid" / "XR_HAND")
    for text in ("[torn", "[]") if change is None else (json.dumps(mark | change),):
        (tmp_path / MARK).write_text(text)
        assert examples.drawing_digests(tmp_path, examples.find_examples(tmp_path)) == frozenset()
    (tmp_path / MARK).unlink()
    assert examples.drawing_digests(tmp_path, examples.find_examples(tmp_path)) == frozenset()


def test_path_outside_phantom_set_is_not_a_drawing(drawn: Path) -> None:
    selection = PhantomSet.open(drawn)
    assert selection is not None
    path = examples.find_examples(drawn)[0].files[0]
    name, data = path.relative_to(drawn).as_posix(), path.read_bytes()
    assert selection.holds(name, data)
    for wrong in (
        "",
        "image1.png",
        f"x/{name}",
        name.replace("image1", "image9"),
        name.replace("image1", "image0"),
        f"{name}/",
    ):
        assert not selection.holds(wrong, data)


@pytest.mark.parametrize("shape", [(10, 100), (100, 10), (500, 400), (1, 1)])
def test_thumbnail_is_square(shape: tuple[int, int]) -> None:
    preview = np.full(shape, 200, np.uint8)
    data = examples.render_thumbnail(study.Upload(None, preview, None, "ok", ""))
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (THUMBNAIL_PX, THUMBNAIL_PX)
        assert np.asarray(image).max() == 200
    assert examples.render_thumbnail(study.failed_upload("no", "not_image")) is None
