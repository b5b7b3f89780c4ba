"""The examples of the page: which they are, what they are called, which of them are drawings."""

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
    """A copy of the phantoms' valid split and their mark, to change."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(phantoms / "valid", folder / "valid")
    shutil.copy(phantoms / MARK, folder)
    return folder


def label_of(example: Example) -> str:
    return example.files[0].parent.name.partition("_")[2]


def test_examples_are_some_of_each_type_with_both_labels(phantoms: Path) -> None:
    found = examples.find_examples(phantoms)
    assert found == examples.find_examples(phantoms / "valid" / "..")  # another way to the same folder
    assert [one.number for one in found] == list(range(1, len(found) + 1))
    for turn in range(EXAMPLES_PER_TYPE):  # one of each comes first
        assert {one.study_type for one in found[7 * turn : 7 * turn + 7]} == set(mura.STUDY_TYPES)
    assert len(found) == EXAMPLES_PER_TYPE * len(mura.STUDY_TYPES)
    assert {label_of(one) for one in found} == {"positive", "negative"}
    for one in found:
        assert 1 <= len(one.files) <= study.MAX_FILES
        assert all(path.is_file() for path in one.files)


def in_layout(root: Path, folders: Iterable[str]) -> Path:
    """A folder in MURA's layout, its files empty."""
    for name in folders:
        (root / name).mkdir(parents=True)
        (root / name / "image1.png").touch()
    return root


def of_seeds(tmp_path: Path) -> dict[int, tuple[Example, ...]]:
    """The examples of the valid split of a phantom set, as launch/demo.sh shows them, by seed."""
    return {
        seed: examples.find_examples(
            in_layout(tmp_path / str(seed), (one.folder for one in plan(700, seed) if one.split == "valid"))
        )
        for seed in range(8)
    }


def test_a_number_tells_no_label(tmp_path: Path) -> None:
    """Of every set: both labels at even and at odd numbers, and at some position within a type; over all: at each."""
    turns: dict[int, set[str]] = {}
    positions: dict[int, set[str]] = {}
    types_in_turns, counts_of_types = set(), set()
    for seed, found in of_seeds(tmp_path).items():
        assert len(found) == EXAMPLES_PER_TYPE * len(mura.STUDY_TYPES)
        for odd in (0, 1):
            assert {label_of(one) for one in found if one.number % 2 == odd} == {"positive", "negative"}, (seed, odd)
        for study_type in mura.STUDY_TYPES:
            of_type = [label_of(one) for one in found if one.study_type == study_type]
            counts_of_types.add(of_type.count("positive"))
            for position, label in enumerate(of_type):
                positions.setdefault(position, set()).add(label)
        for one in found:
            turns.setdefault(one.number, set()).add(label_of(one))
        types_in_turns |= {tuple(one.study_type for one in found[start : start + 7]) for start in range(0, 28, 7)}
    assert set(map(frozenset, positions.values())) == {frozenset({"positive", "negative"})}
    assert sum(len(labels) == 2 for labels in turns.values()) >= 0.9 * len(turns)
    assert len(types_in_turns) > 4, "the study types have no fixed order"
    assert len(counts_of_types) > 1, "no study type has a fixed number of each label"


def test_parity_predicts_a_label_no_better_than_chance(tmp_path: Path) -> None:
    """Within 4 standard errors of what independence gives, over 224 examples; the old order agreed in all of them."""
    cases = [(one.number % 2, label_of(one) == "positive") for found in of_seeds(tmp_path).values() for one in found]
    odd = np.array([case[0] for case in cases])
    positive = np.array([case[1] for case in cases])
    difference = positive[odd == 1].mean() - positive[odd == 0].mean()
    share = positive.mean()
    assert abs(difference) < 4 * (share * (1 - share) * 4 / len(cases)) ** 0.5


def test_no_label_decides_which_study_is_an_example_or_its_number(tmp_path: Path) -> None:
    """The same studies with all labels exchanged: the same patients under the same numbers."""
    folders = [one.folder for one in plan(300, 3)]
    exchanged = [
        name.replace("_positive", "_x").replace("_negative", "_positive").replace("_x", "_negative") for name in folders
    ]
    before = examples.find_examples(in_layout(tmp_path / "a", folders))
    after = examples.find_examples(in_layout(tmp_path / "b", exchanged))
    assert [one.files[0].parent.parent.name for one in before] == [one.files[0].parent.parent.name for one in after]
    assert [label_of(one) for one in before] != [label_of(one) for one in after]


@pytest.mark.parametrize(
    ("rare", "common"),
    [("_positive", ""), ("_negative", ""), ("_positive", "_negative"), ("_negative", "_positive")],
)
def test_a_rare_label_is_among_them_at_any_number(tmp_path: Path, rare: str, common: str) -> None:
    numbers = set()
    for rare_number in range(30):
        names = (
            f"XR_WRIST/patient{number:05}/study1{rare if number == rare_number else common}" for number in range(30)
        )
        found = examples.find_examples(in_layout(tmp_path / str(rare_number), names))
        assert len(found) == EXAMPLES_PER_TYPE
        numbers |= {one.number for one in found if one.files[0].parent.name == f"study1{rare}"}
    assert numbers == set(range(1, EXAMPLES_PER_TYPE + 1))


def test_both_rare_labels_are_among_many_without_one(tmp_path: Path) -> None:
    for pair in range(20):
        suffix = {pair: "_positive", pair + 20: "_negative"}
        names = (f"XR_HAND/patient{number:05}/study1{suffix.get(number, '')}" for number in range(60))
        found = examples.find_examples(in_layout(tmp_path / str(pair), names))
        assert {label_of(one) for one in found} >= {"positive", "negative"}


def test_examples_without_labels_are_as_few(tmp_path: Path) -> None:
    for number in range(30):
        folder = tmp_path / "XR_WRIST" / f"patient{number:05}" / "study1"
        folder.mkdir(parents=True)
        (folder / "image1.png").touch()
    assert len(examples.find_examples(tmp_path)) == EXAMPLES_PER_TYPE


def test_a_name_tells_the_study_type_and_no_label(phantoms: Path) -> None:
    for one in examples.find_examples(phantoms):
        for index in range(len(one.files)):
            name = one.name(index)
            assert name == f"{one.study_type}/example{one.number}/image{index + 1}.png"
            assert one.content(index) == one.files[index].read_bytes()
        plural = "" if len(one.files) == 1 else "s"
        noun = one.study_type.removeprefix("XR_").lower()
        assert example_title(one) == f"Example {one.number}: {noun}, {len(one.files)} picture{plural}"
    gone = Example(1, "XR_HAND", (Path("/nowhere/image1.PNG"),))
    assert (gone.content(0), gone.name(0)) == (b"", "XR_HAND/example1/image1.png")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("below", [".", "valid", "valid/XR_HAND"])
def test_examples_of_a_phantom_set_are_known_drawings(drawn: Path, below: str) -> None:
    some = examples.find_examples(drawn / below)
    assert examples.drawing_digests(drawn / below, some) == {digest(path) for one in some for path in one.files}


def saved(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_a_radiograph_among_them_is_none(drawn: Path) -> None:
    """Whatever it is called, and whatever the mark says."""
    some = examples.find_examples(drawn)[:3]
    target, other = some[0].files[0], some[1].files[0]
    before = target.read_bytes()
    with Image.open(target) as image:
        pixels, mode = np.asarray(image).astype(int), image.mode
    photograph = Image.fromarray(load_sample_image("flower.jpg")).convert(mode).resize(pixels.shape[1::-1])
    loud = pixels.copy()
    loud[pixels.shape[0] // 2, 3] = (loud[pixels.shape[0] // 2, 3] + 128) % 256
    contents = {
        "a photograph of the same size": saved(photograph),
        "another drawing of the set": other.read_bytes(),
        "one pixel changed": saved(Image.fromarray(loud.astype(np.uint8))),
        "cut short": before[: len(before) // 2],
        "nothing": b"",
        "no picture": b"GIF89a",
    }
    try:
        for what, data in contents.items():
            target.write_bytes(data)
            known = examples.drawing_digests(drawn, some)
            assert hashlib.sha256(data).hexdigest() not in known or what == "another drawing of the set", what
            assert len(known) == sum(len(one.files) for one in some) - 1, what
    finally:
        target.write_bytes(before)


def test_another_processors_drawing_is_one(drawn: Path) -> None:
    """It may differ by a grey level."""
    found = PhantomSet.open(drawn)
    assert found is not None
    path = examples.find_examples(drawn)[0].files[0]
    with Image.open(path) as image:
        pixels = np.asarray(image).astype(int)
    for off, same in ((1, True), (2, False)):
        moved = np.where(pixels > 128, pixels - off, pixels + off).astype(np.uint8)
        assert found.holds(path.relative_to(drawn).as_posix(), saved(Image.fromarray(moved))) == same


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
def test_another_mark_knows_no_drawing(drawn: Path, tmp_path: Path, change: dict[str, object] | None) -> None:
    mark = json.loads((drawn / MARK).read_text())
    shutil.copytree(drawn / "valid" / "XR_HAND", tmp_path / "valid" / "XR_HAND")
    for text in ("[torn", "[]") if change is None else (json.dumps(mark | change),):
        (tmp_path / MARK).write_text(text)
        assert examples.drawing_digests(tmp_path, examples.find_examples(tmp_path)) == frozenset()
    (tmp_path / MARK).unlink()
    assert examples.drawing_digests(tmp_path, examples.find_examples(tmp_path)) == frozenset()


def test_a_path_outside_of_the_set_holds_nothing(drawn: Path) -> None:
    found = PhantomSet.open(drawn)
    assert found is not None
    path = examples.find_examples(drawn)[0].files[0]
    name, data = path.relative_to(drawn).as_posix(), path.read_bytes()
    assert found.holds(name, data)
    for wrong in (
        "",
        "image1.png",
        f"x/{name}",
        name.replace("image1", "image9"),
        name.replace("image1", "image0"),
        f"{name}/",
    ):
        assert not found.holds(wrong, data)


@pytest.mark.parametrize("shape", [(10, 100), (100, 10), (500, 400), (1, 1)])
def test_a_thumbnail_is_a_square(shape: tuple[int, int]) -> None:
    shown = np.full(shape, 200, np.uint8)
    data = examples.render_thumbnail(study.Upload(None, shown, None, "ok", ""))
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (THUMBNAIL_PX, THUMBNAIL_PX)
        assert np.asarray(image).max() == 200
    assert examples.render_thumbnail(study.failed_upload("no", "not_image")) is None
