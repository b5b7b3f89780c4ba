"""Test gate.py: radiographs pass, most photographs and drawings do not, and predict's gate column equals gate.classify."""

import csv
import io
import itertools
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mura_dist.data import gate, radiograph
from mura_dist.inference.predict import predict

SIZES = (64, 128, 320, 512)
TURNS = tuple(itertools.product(range(4), (1, -1)))


def turned(image: np.ndarray, turn: tuple[int, int]) -> np.ndarray:
    return np.rot90(image, turn[0])[:, :: turn[1]]


@pytest.fixture(scope="module")
def radiographs(shared: Path) -> dict[int, list[np.ndarray]]:
    """Return every sixth radiograph of FracAtlas, by size."""
    paths = sorted((shared / "radiographs" / "fracatlas-mura").rglob("*.png"))[::6]
    return {size: [radiograph.read(path, size) for path in paths] for size in SIZES}


def counts(images: list[np.ndarray]) -> Counter[str]:
    return Counter(gate.classify(image) for image in images)


@pytest.mark.shared
@pytest.mark.parametrize("size", SIZES)
def test_radiographs_pass_at_all_sizes(radiographs: dict[int, list[np.ndarray]], size: int) -> None:
    actual = counts(radiographs[size])
    assert actual["not_a_radiograph"] + actual["blank"] == 0, actual
    assert actual["inverted"] <= 2, actual


@pytest.mark.shared
def test_verdict_rarely_depends_on_size_and_orientation(radiographs: dict[int, list[np.ndarray]]) -> None:
    verdicts = [[gate.classify(image) for image in radiographs[size]] for size in SIZES]
    assert sum(len(set(by_size)) > 1 for by_size in zip(*verdicts, strict=True)) <= 2
    for image in radiographs[128]:
        actual = [gate.compute_scores(gate.compute_statistics(turned(image, turn))) for turn in TURNS]
        assert np.ptp(actual, axis=0).max() < 0.2  # Pillow rounds between its two passes


@pytest.mark.shared
def test_inverted_radiograph_is_a_warning_only(radiographs: dict[int, list[np.ndarray]]) -> None:
    actual = counts([255 - image for image in radiographs[320]])
    assert actual["not_a_radiograph"] + actual["blank"] == 0, actual
    assert actual["inverted"] >= 0.9 * len(radiographs[320]), actual


@pytest.mark.shared
@pytest.mark.parametrize("level", [0, 255])
def test_radiographs_with_borders_or_other_exposure_pass(radiographs: dict[int, list[np.ndarray]], level: int) -> None:
    varied = []
    for image in radiographs[320]:
        framed = image.copy()
        framed[:24], framed[:, -24:] = level, level
        dark, bright = (((image / 255) ** gamma * 255).astype(np.uint8) for gamma in (1.6, 0.6))
        varied += [framed, dark, bright, image[40:280, 40:280], (90 + image * 0.3).astype(np.uint8)]
    actual = counts(varied)
    assert actual["not_a_radiograph"] + actual["blank"] <= 0.02 * len(varied), actual


def test_phantoms_pass(phantoms: Path) -> None:
    actual = counts([radiograph.read(path, 64) for path in sorted(phantoms.rglob("*.png"))])
    assert actual["not_a_radiograph"] + actual["blank"] <= 0.02 * actual.total(), actual
    assert actual["inverted"] <= 0.07 * actual.total(), actual


# ---- unexposed borders: the field inside decides


def bordered(
    image: np.ndarray, level: int, turn: tuple[int, int], widths: tuple[float, ...], soft: float = 0
) -> np.ndarray:
    """Add a border of one level; `widths` are shares of a side, and it fades over the share `soft`."""
    framed, size = np.ascontiguousarray(turned(image, turn)), len(image)
    for width in widths:
        framed = np.rot90(framed).copy()
        solid, fade = round(width * size), round(soft * size)
        framed[:solid] = level
        share = (np.arange(fade) + 1)[:, None] / (fade + 1)
        framed[solid : solid + fade] = framed[solid : solid + fade] * share + level * (1 - share)
    return framed


def round_field(image: np.ndarray, level: int, radius: float) -> np.ndarray:
    """Apply round collimation; `radius` is a share of the side."""
    y, x = np.mgrid[: len(image), : len(image)] / (len(image) - 1) - 0.5
    return np.where(np.hypot(x, y) <= radius, image, np.uint8(level))


BORDERS = {
    "one side": [(0.05,), (0.15,), (0.3,)],
    "two sides": [(0.05, 0, 0.1), (0.25, 0, 0.2), (0.15, 0.15)],
    "three sides": [(0.05, 0.1, 0.2), (0.2, 0.2, 0.2)],
    "four sides": [(0.05,) * 4, (0.1, 0.2, 0.15, 0.05), (0.2,) * 4],
}


@pytest.fixture(scope="module")
def bones(phantoms: Path) -> list[np.ndarray]:
    """Return phantoms that do not look inverted, and that look inverted once inverted. Any change is then due to the border."""
    images = [radiograph.read(path, 128) for path in sorted(phantoms.rglob("*.png"))[::3]]
    images = [image for image in images if (gate.classify(image), gate.classify(255 - image)) == ("ok", "inverted")]
    assert len(images) >= 30
    return images


def inverted_share(images: list[np.ndarray]) -> float:
    actual = counts(images)
    return actual["inverted"] / actual.total()


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("sides", BORDERS)
def test_border_does_not_change_the_verdict(bones: list[np.ndarray], sides: str, level: int) -> None:
    """White borders (unexposed CR film) and black borders, on original and inverted images."""
    framed = [
        bordered(image, level, TURNS[number % 8], widths, soft)
        for number, image in enumerate(bones)
        for widths in BORDERS[sides]
        for soft in (0, 0.03)
    ]
    assert inverted_share(framed) <= 0.07
    assert inverted_share([255 - image for image in framed]) >= 0.6


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("radius", [0.4, 0.45, 0.5])
def test_round_collimation_does_not_change_the_verdict(bones: list[np.ndarray], radius: float, level: int) -> None:
    framed = [round_field(image, level, radius) for image in bones]
    assert inverted_share(framed) <= 0.1
    assert inverted_share([255 - image for image in framed]) >= 0.4  # a square crop of a bone may be undecided


@pytest.mark.shared
@pytest.mark.parametrize("level", [0, 255])
def test_border_does_not_change_the_verdict_of_real_radiographs(
    radiographs: dict[int, list[np.ndarray]], level: int
) -> None:
    framed = [
        bordered(image, level, TURNS[number % 8], widths, soft)
        for number, image in enumerate(radiographs[320])
        for widths in ((0.15,), (0.2, 0, 0.2), (0.1,) * 4)
        for soft in (0, 0.03)
    ]
    framed += [round_field(image, level, radius) for image in radiographs[320] for radius in (0.4, 0.5)]
    assert inverted_share(framed) <= 0.03
    assert inverted_share([255 - image for image in framed]) >= 0.9


@pytest.mark.shared
def test_leg_between_unexposed_borders_is_not_inverted(shared: Path) -> None:
    """Computed radiography: a dark field between two white borders, one of which fades."""
    leg = radiograph.read(shared / "hostile/dicom/RG3_J2KR.dcm", 320)
    assert gate.classify(leg) == "ok"
    assert gate.classify(255 - leg) == "inverted"


@pytest.mark.parametrize("widths", [(0.45, 0, 0.45), (0.45,) * 4])
def test_narrow_field_between_borders_gets_a_verdict(bones: list[np.ndarray], widths: tuple[float, ...]) -> None:
    """The field is too small for statistics of its own, or has one level."""
    for image in bones[:5]:
        assert gate.classify(bordered(image, 255, (0, 1), widths)) in gate.NAMES
        assert gate.classify(bordered(np.full_like(image, 90), 255, (0, 1), widths)) in gate.NAMES


# ---- other images


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a palace and a flower. In gray, many photographs with a soft dark background pass (docs/gate.md)."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    folder = tmp_path_factory.mktemp("photographs")
    for name, image in zip(("palace", "flower"), images, strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("size", SIZES)
def test_photograph_is_refused_original_and_inverted(photographs: dict[str, Path], size: int) -> None:
    """The colors decide. In gray both of these pass, as two thirds of photographs do (docs/gate.md)."""
    for path in photographs.values():
        image, colors, *_ = radiograph.read_details(path, size)
        actual = {
            gate.classify(turned(pixels, turn), turned(pixel_colors, turn))
            for pixels, pixel_colors in ((image, colors), (255 - image, 255 - colors))
            for turn in TURNS
        }
        assert actual == {"not_a_radiograph"}
        assert gate.classify(image) not in gate.BLOCKING


@pytest.mark.parametrize("level", [0, 1, 127, 255])
@pytest.mark.parametrize("size", [1, 2, 3, 64, 320])
def test_image_of_one_level_is_blank(size: int, level: int) -> None:
    image = np.full((size, size), level, np.uint8)
    assert gate.classify(image) == "blank"
    image[0, 0] ^= 2  # a level or two apart
    assert gate.classify(image) == "blank"


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_refused(size: int) -> None:
    random = np.random.default_rng(size)
    for _ in range(5):
        assert gate.classify(random.integers(0, 256, (size, size), dtype=np.uint8)) in gate.BLOCKING


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", TURNS)
def test_ramps_and_text_pages_are_refused(size: int, turn: tuple[int, int]) -> None:
    y, x = np.mgrid[:size, :size] / (size - 1)
    ramps = [x, (x + y) / 2, np.hypot(x - 0.5, y - 0.5) / 0.71]
    for ramp in ramps:
        assert gate.classify(turned((255 * ramp).astype(np.uint8), turn)) in gate.BLOCKING
    page = Image.new("L", (512, 512), 255)
    for line in range(24):
        ImageDraw.Draw(page).text(
            (20, 20 * line + 10), "the patient was seen today, again, " * 2, 0, ImageFont.load_default(16)
        )
    page = np.asarray(page.resize((size, size), Image.Resampling.BILINEAR))
    assert gate.classify(turned(page, turn)) in gate.BLOCKING
    assert gate.classify(turned(255 - page, turn)) in gate.BLOCKING


# ---- interface


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 65])
def test_image_of_any_size_gets_a_verdict(size: int) -> None:
    random = np.random.default_rng(size)
    for image in (random.integers(0, 256, (size, size), dtype=np.uint8), np.eye(size, dtype=np.uint8) * 255):
        assert gate.classify(image) in gate.NAMES


def test_memory_layout_does_not_matter(phantoms: Path) -> None:
    for path in sorted(phantoms.rglob("*.png"))[:20]:
        image = radiograph.read(path, 128)
        layouts = [np.asfortranarray(image), np.repeat(image, 2, 1)[:, ::2], image[::-1][::-1]]
        image.flags.writeable = False
        assert {gate.classify(layout) for layout in layouts} == {gate.classify(image)}


def test_all_verdicts_except_ok_have_a_message() -> None:
    assert set(gate.MESSAGES) == set(gate.NAMES) - {"ok"}
    assert set(gate.BLOCKING) < set(gate.MESSAGES)
    assert all("not look like a bone radiograph" in gate.MESSAGES[name] for name in gate.BLOCKING)


def test_statistics_of_the_inverse_are_swapped(phantoms: Path) -> None:
    for path in sorted(phantoms.rglob("*.png"))[:20]:
        image = radiograph.read(path, 64)  # no reduction: nothing is rounded
        actual, expected = gate.compute_statistics(255 - image)[::-1], gate.compute_statistics(image)
        np.testing.assert_allclose(actual, expected, atol=0.05)  # a level on the edge of two bins may be in either
        np.testing.assert_allclose(gate.compute_scores(actual), gate.compute_scores(expected), atol=0.2)


def test_color_photograph_is_refused(photographs: dict[str, Path], tmp_path: Path) -> None:
    for name, path in photographs.items():
        Image.open(path).save(tmp_path / f"{name}.jpg", quality=70)
        for file in (path, tmp_path / f"{name}.jpg"):
            for size in SIZES:
                actual = radiograph.read_details(file, size)
                assert gate.classify(actual.image, actual.colors) == "not_a_radiograph"


TINTS = {
    "gray": lambda x: [x, x, x],
    "blue film": lambda x: [0.75 * x, 0.9 * x, x],
    "sepia": lambda x: [x, 0.85 * x, 0.6 * x],
    "screen": lambda x: [x**1.3, x, x**0.8],
}


@pytest.mark.parametrize("tint", TINTS)
@pytest.mark.parametrize("loud", [0.0, 0.03, 0.08])
def test_tint_or_red_arrow_is_not_a_photograph(phantoms: Path, tint: str, loud: float) -> None:
    """JPEG; `loud` is the share of pure red pixels. Coarse JPEG smears red into a tint, so the two are not combined there."""
    for path in sorted(phantoms.rglob("*.png"))[:12]:
        gray = radiograph.decode(path).astype(np.float64) / 255
        pixels = np.rint(255 * np.stack(TINTS[tint](gray), -1)).astype(np.uint8)
        side = round((loud * gray.size) ** 0.5)
        pixels[5 : 5 + side, 5 : 5 + side] = (255, 0, 0)
        for quality in (60, 95) if tint == "gray" or not loud else (95,):
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "JPEG", quality=quality)
            actual = radiograph.read_details(data, 64)
            assert actual.colors is not None
            assert not gate.is_colored(actual.colors)
            assert gate.classify(actual.image, actual.colors) == gate.classify(actual.image)


@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_color_sample_of_any_size_is_classified(size: int) -> None:
    random = np.random.default_rng(size)
    for colors in (
        random.integers(0, 256, (size, size, 3), dtype=np.uint8),
        np.full((size, size, 3), (9, 200, 3), np.uint8),
    ):
        assert gate.is_colored(colors) in (True, False)


def test_gate_column_of_predict_equals_classify(
    model: Path, phantoms: Path, photographs: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number, path in enumerate(sorted(phantoms.rglob("*.png"))[:6]):
        image = Image.fromarray(radiograph.read(path, 128))
        image.save(source / f"bone {number}.png")
        Image.fromarray(255 - np.asarray(image)).save(source / f"inverted {number}.png")
    Image.new("L", (90, 60), 30).save(source / "blank.png")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (100, 80, 3), dtype=np.uint8)).save(source / "noise.png")
    for path in photographs.values():
        shutil.copy(path, source)
    (source / "notes.txt").write_text("none")
    summary = predict(model, source, tmp_path / "out")
    with open(tmp_path / "out" / "predictions.csv", newline="", encoding="utf-8") as file:
        actual = {row["path"]: row["gate"] for row in csv.DictReader(file)}
    size = summary["model"]["size"]
    looks = {path.name: radiograph.read_details(path, size) for path in sorted(source.glob("*.png"))}
    assert actual == {name: gate.classify(item.image, item.colors) for name, item in looks.items()}
    assert (actual["blank.png"], actual["noise.png"], actual["flower.png"]) == ("blank", *2 * ["not_a_radiograph"])
    assert summary["radiographs_by_gate"] == {name: list(actual.values()).count(name) for name in gate.NAMES}
    output = [line for line in summary["warnings"] if "column gate" in line]
    assert output == [
        f"column gate of predictions is {name} for {number} of {len(actual)} radiographs: {gate.MESSAGES[name]}"
        for name, number in summary["radiographs_by_gate"].items()
        if name != "ok" and number
    ]
