"""Test the overlays of a prediction: pixels, LOCAL ONLY marks, file names, and DICOMs whose pixels may show a name."""

import itertools
import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
from helpers.predictions import contents, draw, draw_dicom, rows
from PIL import Image

from mura_dist.cli.main import main
from mura_dist.core.errors import UserError
from mura_dist.data import radiograph
from mura_dist.data.radiograph import DicomIdentity
from mura_dist.inference import overlays
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.inference.overlays import FOLDER, NOTE, Overlay, Overlays, draw_overlay, overlay_path
from mura_dist.inference.predict import PredictOptions, predict
from mura_dist.reports import heatmap, local_only

LEFT_PX, TOP, GAP = 8, 34, 8  # position of the radiograph, 64 px enlarged 5 times


pytestmark = pytest.mark.usefixtures("own_site_key")


def split_picture(path: Path, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return the radiograph and its overlay, (S, S, 3) uint8 each, from a picture file."""
    pixels, side = np.asarray(Image.open(path)), 5 * size
    tall = pixels[TOP : TOP + side]
    item, overlay = tall[:, LEFT_PX : LEFT_PX + side], tall[:, LEFT_PX + side + GAP : LEFT_PX + 2 * side + GAP]
    assert (item[::5] == item[4::5]).all()  # enlarged, not smoothed
    return item[::5, ::5], overlay[::5, ::5]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create radiographs in folders, a DICOM, a text file, and a study in MURA's layout."""
    folder = tmp_path_factory.mktemp("source")
    names = ["a.png", "a", "deep/er/ü 1.PNG", "valid/XR_HAND/patient1/study1/image1.png", "x.png/b"]
    for seed, name in enumerate(names):
        draw(folder / name, seed)
    draw_dicom(folder / "d.dcm", "1.2.3", "WRIST", "L")
    (folder / "notes.txt").write_text("none")
    return folder


def test_each_predicted_radiograph_has_an_overlay(model: Path, source: Path, tmp_path: Path) -> None:
    summary = predict(model, source, tmp_path / "out", PredictOptions(overlays=True, batch_size=4))
    folder, loaded = tmp_path / "out" / FOLDER, OnnxModel.load(model)
    lines = rows(tmp_path / "out/predictions.csv")
    assert summary["num_overlays"] == len(lines) == 6
    assert summary["num_overlays_withheld"] == 0
    expected = {f"{line['path']}.png" for line in lines} - {"x.png/b.png"} | {"x.png_/b.png", NOTE}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == expected
    for line in lines:
        image = radiograph.read(source / line["path"], 64)
        logit, cells = loaded.outputs(image[None, None])
        assert np.float32(line["logit"]) == logit[0]
        plain, overlaid = split_picture(overlay_path(tmp_path / "out", line["path"]))
        assert (plain == image[..., None]).all()
        assert (overlaid == heatmap.overlay_heatmap(image, cells[0])).all()
    assert (folder / NOTE).read_text().startswith("LOCAL ONLY: ")
    assert overlays.CAVEAT in (folder / NOTE).read_text()


def test_tables_identical_with_and_without_overlays(model: Path, source: Path, tmp_path: Path) -> None:
    first = predict(model, source, tmp_path / "with", PredictOptions(overlays=True))
    second = predict(model, source, tmp_path / "without")
    assert contents(tmp_path / "with") == contents(tmp_path / "without")
    assert (second["num_overlays"], second["num_overlays_withheld"]) == (0, 0)
    assert not (tmp_path / "without" / FOLDER).exists()
    assert first["warnings"] == second["warnings"]


def test_overlay_metadata_is_local_only_comment(model: Path, source: Path, tmp_path: Path) -> None:
    predict(model, source, tmp_path / "out", PredictOptions(overlays=True, keytable=tmp_path / "keys.csv"))
    files = [path for path in (tmp_path / "out" / FOLDER).rglob("*") if path.name != NOTE]
    assert len(files) == 6
    assert {path.stem for path in files} == {line["path"] for line in rows(tmp_path / "out/predictions.csv")}
    for path in files:
        with Image.open(path) as image:
            image.load()
            assert set(image.info) == {"Comment"}
            assert image.info["Comment"].startswith("LOCAL ONLY: ")
            assert not image.getexif()


# ---- scale and caveat


@pytest.mark.filterwarnings("ignore:invalid value")  # a NaN logit
@pytest.mark.parametrize("size", [32, 64, 224, 320, 512])
def test_text_stays_within_the_picture(size: int) -> None:
    """Banner, numbers, scale and caveat are dark on light and apart from the edges, for every model size."""
    image = np.zeros((size, size), np.uint8)
    for logit in (0.0, -1234.5678, float("nan"), float("inf")):
        pixels = draw_overlay(image, np.full((2, 2), logit), logit)
        caveat = pixels[-26:]
        assert (caveat[:, :7] == 255).all()
        assert (caveat[:, -7:] == 255).all()
        assert (caveat != 255).any(axis=(0, 2)).sum() > 400  # a line of text
        assert (caveat[-2:] == 255).all()
    assert draw_overlay(image, np.zeros((2, 2)), 0.0).shape == draw_overlay(image, np.full((9, 7), 9.0), 9.0).shape


@pytest.mark.parametrize("other_logit", [-50.0, -1.0, 0.0, 1.0, 50.0])
def test_logit_color_independent_of_other_logits(other_logit: float) -> None:
    """This holds at the center of the cell. The map is interpolated between the centers."""
    image, cells = np.full((320, 320), 90, np.uint8), np.full((64, 64), other_logit)
    cells[21, 31] = 2**0.5
    pixels = draw_overlay(image, cells, 0.0)
    color, opacity = heatmap.step_color(2)
    expected = [round(90 * (1 - opacity) + channel * opacity) for channel in color]
    y, x = TOP + 21 * 5 + 2, LEFT_PX + 320 + GAP + 31 * 5 + 2
    assert pixels[y, x].tolist() == expected


def test_banner_states_training_on_drawings() -> None:
    image = np.zeros((64, 64), np.uint8)
    assert (draw_overlay(image, np.zeros((2, 2)), 0.0) != draw_overlay(image, np.zeros((2, 2)), 0.0, drawings=True))[
        :26
    ].any()


def test_nan_cell_is_transparent() -> None:
    image, cells = np.full((320, 320), 90, np.uint8), np.zeros((64, 64))
    cells[21, 31] = np.nan
    assert (draw_overlay(image, cells, 0.0) == draw_overlay(image, np.zeros((64, 64)), 0.0)).all()
    cells[21, 31], cells[41, 11] = np.inf, -np.inf
    pixels = draw_overlay(image, cells, 0.0)
    for (row, column), step in (((21, 31), 5), ((41, 11), -5)):
        color, opacity = heatmap.step_color(step)
        expected = [round(90 * (1 - opacity) + channel * opacity) for channel in color]
        assert pixels[TOP + row * 5 + 2, LEFT_PX + 320 + GAP + column * 5 + 2].tolist() == expected


# ---- file names


def test_overlay_paths_are_unique_and_never_folders() -> None:
    """All of them lie below OUT/overlays, and none replaces the note."""
    arguments = [
        "a",
        "a.png",
        "a.png_",
        "a.png.png",
        NOTE,
        f"{NOTE}_",
        f"{NOTE}.png",
        "é" * 120,
        "é" * 121,
        "ü" * 250,
        "a\nb",
    ]
    names = [*arguments, *("/".join(pair) for pair in itertools.product(arguments, arguments)), "a/a/a.png/a"]
    files = [overlay_path(Path("out"), name) for name in names]
    assert len(set(files)) == len(names)
    folders = {parent for file in files for parent in file.parents}
    assert not folders & set(files)
    assert all(file.is_relative_to(f"out/{FOLDER}") and file.suffix == ".png" for file in files)
    assert Path("out", FOLDER, NOTE) not in {*files, *folders}
    assert max(len(os.fsencode(f".{component}.partial")) for file in files for component in file.parts) <= 255


def test_overlay_of_longest_file_name(model: Path, tmp_path: Path) -> None:
    for letter in "ab":
        draw(tmp_path / "in" / ("x" * 254 + letter))
    summary = predict(model, tmp_path / "in", tmp_path / "out", PredictOptions(overlays=True))
    assert summary["num_overlays"] == 2
    assert len(list((tmp_path / "out" / FOLDER).glob("*.png"))) == 2


# ---- pixels that may show a name


BURNED = {
    "burned.dcm": {"BurnedInAnnotation": "YES"},
    "odd.dcm": {"BurnedInAnnotation": "MAYBE"},
    "captured.dcm": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"},
    "other.dcm": {"Modality": "OT"},
    "digitised.dcm": {"ConversionType": "DF"},
}
CLEAN = {"clean.dcm": {"BurnedInAnnotation": "NO"}, "silent.dcm": {}}


@pytest.fixture(scope="module")
def maybe_identifying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("burned")
    for seed, (name, values) in enumerate((BURNED | CLEAN).items()):
        dicom = pydicom.dcmread(draw_dicom(folder / name, f"1.2.{seed}", "HAND", "L", seed))
        for keyword, value in values.items():
            setattr(dicom, keyword, value)
        dicom.save_as(folder / name)
    draw(folder / "plain.png")
    return folder


def test_overlay_is_withheld_when_pixels_may_show_a_name(model: Path, maybe_identifying: Path, tmp_path: Path) -> None:
    summary = predict(model, maybe_identifying, tmp_path / "out", PredictOptions(overlays=True))
    assert (summary["num_overlays"], summary["num_overlays_withheld"]) == (3, len(BURNED))
    assert {path.stem for path in (tmp_path / "out" / FOLDER).glob("*.png")} == {*CLEAN, "plain.png"}
    (warning,) = [line for line in summary["warnings"] if "overlay" in line]
    assert warning.startswith(
        "no overlay of 5 radiographs: their pixels may show a name (BurnedInAnnotation, a secondary "
    )
    assert "--allow-pixels" in warning
    assert summary["num_radiographs"] == 8  # all radiographs are predicted


def test_allow_pixels_writes_all_overlays(model: Path, maybe_identifying: Path, tmp_path: Path) -> None:
    summary = predict(model, maybe_identifying, tmp_path / "out", PredictOptions(overlays=True, allow_pixels=True))
    assert (summary["num_overlays"], summary["num_overlays_withheld"]) == (8, 0)
    assert {path.stem for path in (tmp_path / "out" / FOLDER).glob("*.png")} == {*BURNED, *CLEAN, "plain.png"}
    assert not any("overlay" in line for line in summary["warnings"])
    with pytest.raises(UserError, match=r"holds a run with allow_pixels=True, this one has allow_pixels=False"):
        predict(model, maybe_identifying, tmp_path / "out", PredictOptions(overlays=True))


def test_allow_pixels_without_overlays_warns(model: Path, maybe_identifying: Path, tmp_path: Path) -> None:
    summary = predict(model, maybe_identifying, tmp_path / "out", PredictOptions(allow_pixels=True))
    assert "--allow-pixels has no effect without --overlays" in summary["warnings"]


def test_withholds_depends_on_identity_and_option() -> None:
    clear, hidden = DicomIdentity("1", "HAND", "L"), DicomIdentity("1", "HAND", "L", True)
    for allowed in (False, True):
        item = Overlays(Path("out"), allow_pixels=allowed)
        assert [item.withholds(identity) for identity in (None, clear, hidden)] == [
            False,
            False,
            not allowed,
        ]


def test_folder_with_foreign_overlays_is_refused(model: Path, maybe_identifying: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    with pytest.raises(UserError, match=r"out holds overlays of another origin\. Give another folder"):
        predict(model, maybe_identifying, tmp_path / "out")


def test_command_prints_overlay_counts(
    model: Path,
    maybe_identifying: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(["predict", str(model), str(maybe_identifying), "--out", str(tmp_path / "out"), "--overlays", "--quiet"])
        == 0
    )
    output = capsys.readouterr().out
    assert "overlays (LOCAL ONLY): 3, 5 withheld\n" in output
    assert "warning: no overlay of 5 radiographs" in output


def test_overlay_files_identical_for_one_and_many(tmp_path: Path) -> None:
    """Threads leave no trace."""
    rng = np.random.default_rng(0)
    items = [
        Overlay(f"{number}", rng.integers(0, 256, (32, 32), dtype=np.uint8), rng.normal(0, 3, (3, 4)), 1.0)
        for number in range(12)
    ]
    Overlays(tmp_path / "many").write_all(items)
    Overlays(tmp_path / "many").write_all([])
    for item in items:
        Overlays(tmp_path / "one").write_all([item])
        assert (
            overlay_path(tmp_path / "one", item.name).read_bytes()
            == overlay_path(tmp_path / "many", item.name).read_bytes()
        )
        assert overlay_path(tmp_path / "one", item.name).read_bytes() == local_only.png(
            draw_overlay(item.image, item.cells, item.logit)
        )
