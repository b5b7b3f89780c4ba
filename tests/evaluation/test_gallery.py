"""Test the gallery and saliency maps: selected studies, stability of maps, one color scale, LOCAL ONLY marks."""

import base64
import html
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import laws
from helpers.commands import SHORT
from PIL import Image

from mura_dist.cli.main import DONE, main
from mura_dist.data.loaders.opencv import augment
from mura_dist.data.mura import TERMS, display_name
from mura_dist.data.shards.reader import Shards
from mura_dist.evaluation import gallery, gallery_page, gallery_picture, gallery_studies, results, saliency
from mura_dist.evaluation.subject import EvaluateOptions, EvaluationSubject, GalleryOptions, SplitScores
from mura_dist.metrics.operating_points import FittedThresholds
from mura_dist.reports import heatmap
from mura_dist.training.scores import Scores, study_scores

CELLS = 10


def block_forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean gray level of each cell as its logit, so that a mirrored radiograph has a mirrored map."""
    side = images.shape[-1] // CELLS
    cells = images[:, 0].astype(np.float64).reshape(-1, CELLS, side, CELLS, side).mean(axis=(2, 4)) / 32 - 4
    return cells.mean(axis=(1, 2)), cells


def positional_forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return maps that depend on the position only, not on the image."""
    cells = np.broadcast_to(np.random.default_rng(5).normal(size=(CELLS, CELLS)), (len(images), CELLS, CELLS))
    return cells.mean(axis=(1, 2)), cells


def toy_subject(outputs: saliency.ForwardFunction, **fields: Any) -> EvaluationSubject:
    return EvaluationSubject(fields.pop("title", "a title"), "toy", outputs, "step-1", "radiographs", **fields)


def smooth_images(num: int = 12, size: int = 160, seed: int = 0) -> np.ndarray:
    """Return images (n, S, S) uint8 of a few soft blobs on black, which stay on the canvas when rotated."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:size, :size] / size
    images = np.zeros((num, size, size))
    for image in images:
        for _ in range(4):
            cy, cx = rng.uniform(0.25, 0.75, 2)
            image += rng.uniform(60, 200) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.02)
    return np.clip(images, 0, 255).astype(np.uint8)


def pearson(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Return NumPy's correlation of each pair of maps."""
    return [float(np.corrcoef(first.ravel(), second.ravel())[0, 1]) for first, second in zip(a, b, strict=True)]


# ---- selection of studies


def studies_table(seed: int, num: int = 90, threshold: float = 0.5) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, num).astype(float)
    probability = np.round(1 / (1 + np.exp(-(2 * label - 1 + rng.normal(0, 2, num)))), 2)  # with ties, some of them 0.5
    label[3], probability[7] = np.nan, np.nan
    names = {"study": [f"s{i}" for i in range(num)], "patient": [f"p{i}" for i in range(num)], "study_type": "XR_HAND"}
    return pd.DataFrame(names | {"label": label, "probability": probability, "call": probability > threshold})


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_most_confident_errors_are_selected(seed: int, threshold: float) -> None:
    studies = studies_table(seed, threshold=threshold)
    selected = gallery_studies.choose_studies(studies, 24, seed)
    of_kind: dict[str, list[Any]] = {}
    for name, line, call in selected:
        of_kind.setdefault(name.rpartition("-")[0], []).append(line)
        assert call == int(studies.at[line, "probability"] > threshold)
    missed, false_alarms = [], []
    for line, study in studies.iterrows():
        if study["label"] == 1 and study["probability"] <= threshold:
            missed.append((study["probability"], line))
        if study["label"] == 0 and study["probability"] > threshold:
            false_alarms.append((-study["probability"], line))
    assert of_kind["missed"] == [line for _, line in sorted(missed)[:6]]
    assert of_kind["false-alarm"] == [line for _, line in sorted(false_alarms)[:6]]
    for kind, label in (("hit-abnormal", 1), ("hit-normal", 0)):
        hits = studies.loc[of_kind[kind]]
        assert len(hits) == 6
        assert hits["label"].eq(label).all()
        assert (hits["probability"] > threshold).eq(label == 1).all()
    assert len({line for _, line, _ in selected}) == len(selected) == len({name for name, _, _ in selected})


def test_correct_studies_depend_on_the_seed() -> None:
    studies = studies_table(0)
    selected, reseeded = (gallery_studies.choose_studies(studies, 24, seed) for seed in (1, 2))
    assert selected == gallery_studies.choose_studies(studies, 24, 1)
    assert [item for item in selected if "hit" in item[0]] != [item for item in reseeded if "hit" in item[0]]
    assert [item for item in selected if "hit" not in item[0]] == [item for item in reseeded if "hit" not in item[0]]


def test_call_column_overrides_probability() -> None:
    """Thresholds by study type are in the calls of the table. The selection is small where errors are few."""
    studies = studies_table(0).iloc[10:40].assign(call=1)
    kinds = {name.rpartition("-")[0] for name, _, _ in gallery_studies.choose_studies(studies, 24, 0)}
    assert kinds == {"false-alarm", "hit-abnormal"}
    assert gallery_studies.choose_studies(studies.iloc[:0], 24, 0) == []


# ---- stability of maps


@pytest.mark.parametrize("angle_deg", [10.0, -10.0, 3.5, -30.0, 90.0, 0.0])
def test_maps_rotate_as_radiographs_do(angle_deg: float) -> None:
    """OpenCV's bilinear weights have 5 bits, which allows differences of two gray levels."""
    image = smooth_images(1, 81)[0]
    expected = np.empty_like(image)
    augment(image, angle_deg, False, expected)
    result, inside = saliency.rotate(image[None].astype(np.float64), angle_deg)
    assert np.abs(result[0] - expected)[inside].max() < 3
    assert inside[40, 40]
    assert inside.all() == (angle_deg in (0.0, 90.0))


@pytest.mark.parametrize("size", [160, 320])
def test_map_of_content_is_stable(size: int) -> None:
    images = smooth_images(size=size)
    _, cells = saliency.compute_maps(block_forward, images)
    result = saliency.compute_stability(block_forward, images, cells, [str(i) for i in range(len(images))], 0)
    assert result["mirror"]["mean"] == pytest.approx(1, abs=1e-12)
    assert result["rotation"]["quartile_1"] > 0.98
    assert 70 < result["rotation"]["num_cells"] < CELLS**2 == result["mirror"]["num_cells"]


def test_map_of_positions_is_unstable() -> None:
    images = smooth_images()
    _, cells = saliency.compute_maps(positional_forward, images)
    result = saliency.compute_stability(positional_forward, images, cells, ["p"] * len(images), 0)
    assert result["mirror"]["mean"] == pytest.approx(pearson(cells[:1], cells[:1, :, ::-1])[0])
    assert result["rotation"]["mean"] < 0.9
    assert result["mirror"]["mean_low"] is None  # one patient


def test_rotation_in_the_wrong_direction_is_unstable() -> None:
    images = smooth_images()
    _, cells = saliency.compute_maps(block_forward, images)
    _, rotated_cells = saliency.compute_maps(block_forward, saliency._rotate_images(images, saliency.ANGLE_DEG))
    aligned, misaligned = (saliency.rotate(rotated_cells, angle) for angle in (-saliency.ANGLE_DEG, saliency.ANGLE_DEG))
    assert (
        saliency.compute_correlation(cells, *aligned).mean()
        > saliency.compute_correlation(cells, *misaligned).mean() + 0.05
    )


def test_correlation_equals_pearson() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7, 7)) * 3 + 1
    np.testing.assert_allclose(saliency.compute_correlation(a, b, np.ones((7, 7), bool)), pearson(a, b), atol=1e-12)
    inside = rng.random((7, 7)) < 0.7
    np.testing.assert_allclose(
        saliency.compute_correlation(a, b, inside), pearson(a[:, inside], b[:, inside]), atol=1e-12
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num", [0, 1, 2])
def test_correlation_needs_min_cells(num: int) -> None:
    a, inside = np.random.default_rng(0).normal(size=(3, 2, 2)), np.zeros((2, 2), bool)
    inside.flat[:num] = True
    assert np.isnan(saliency.compute_correlation(a, a, inside)).all()


@pytest.mark.filterwarnings("error")
def test_map_without_contrast_has_no_correlation() -> None:
    a = np.random.default_rng(0).normal(size=(3, 4, 4))
    b = a.copy()
    a[1], b[2, 0, 0] = 7.0, np.nan
    result = saliency.compute_correlation(a, b, np.ones((4, 4), bool))
    assert result[0] == pytest.approx(1)
    assert np.isnan(result[1:]).all()
    entry = saliency.summarize_correlations(result, ["a", "b", "c"], 0)
    assert (entry["num_radiographs"], entry["num_without_contrast"], entry["num_patients"]) == (1, 2, 1)
    empty = saliency.summarize_correlations(np.full(3, np.nan), ["a", "b", "c"], 0)
    assert (empty["mean"], empty["mean_low"], empty["num_without_contrast"]) == (None, None, 3)
    assert json.dumps([entry, empty], allow_nan=False)


def test_interval_resamples_patients() -> None:
    """Ten radiographs of one patient do not count as ten patients."""
    values = np.repeat(np.random.default_rng(0).normal(size=8), 10)
    by_patient, by_radiograph = (
        saliency.summarize_correlations(values, [str(i // size) for i in range(len(values))], 0) for size in (10, 1)
    )
    widths = [entry["mean_high"] - entry["mean_low"] for entry in (by_patient, by_radiograph)]
    assert widths[0] == pytest.approx(widths[1] * np.sqrt(10), rel=0.15)
    assert by_patient["mean"] == pytest.approx(values.mean())
    assert by_patient["mean_low"] < values.mean() < by_patient["mean_high"]
    assert by_patient == saliency.summarize_correlations(values, [str(i // 10) for i in range(len(values))], 0)


# ---- one scale


def test_scale_step_has_color_by_sign_and_opacity_of_its_center() -> None:
    for step in heatmap.STEPS:
        color, opacity = heatmap.step_color(step)
        logit = np.sign(step) * (2.0 ** (abs(step) - 1.5) if step else 0.0)  # edges at 0.5, 1, 2, 4, 8
        assert opacity == pytest.approx(heatmap.opacity(np.array([logit]))[0])
        blended = heatmap.overlay_heatmap(np.full((9, 9), 100, np.uint8), np.full((4, 4), logit))[4, 4]
        assert blended.tolist() == [round(100 * (1 - opacity) + channel * opacity) for channel in color]
    assert len({heatmap.step_color(step) for step in heatmap.STEPS}) == 11
    assert {heatmap.step_color(step)[0] for step in (-5, -1)} == {heatmap.AGAINST}
    assert {heatmap.step_color(step)[0] for step in (1, 5)} == {heatmap.FOR}


def test_logit_determines_color_and_opacity() -> None:
    logits = np.array([-9, -6, -3, -1.5, -0.7, -0.2, 0.2, 0.7, 1.5, 3, 6, 9])
    layers = [heatmap.render_layer(np.full((4, 4), logit), (8, 8)) for logit in logits]
    assert all((layer == layer[0, 0]).all() for layer in layers)
    assert len({tuple(layer[0, 0]) for layer in layers}) == len(logits)
    for logit, layer in zip(logits, layers, strict=True):
        assert tuple(layer[0, 0, :3]) == (heatmap.FOR if logit > 0 else heatmap.AGAINST)
        assert layer[0, 0, 3] == round(
            255 * np.interp(abs(logit), [0, *(2.0 ** (np.arange(5) - 0.5))], heatmap.OPACITY)
        )


@pytest.mark.parametrize("background", [-20.0, 0.0, 3.0, 500.0])
def test_cell_color_does_not_depend_on_other_cells(background: float) -> None:
    """No map is scaled to itself. The center of a cell has the color of its own logit."""
    pixels = np.full((44, 44), 100, np.uint8)
    cells = np.full((4, 4), background)
    cells[1, 2] = 2**0.5  # the middle of a step
    result = heatmap.overlay_heatmap(pixels, cells)
    (red, green, blue), opacity = heatmap.step_color(2)
    assert result[16, 27].tolist() == [round(100 * (1 - opacity) + channel * opacity) for channel in (red, green, blue)]
    assert heatmap.step_color(0)[1] == 0


@pytest.mark.parametrize("side", [2, 4, 7, 10])
def test_map_is_smooth(side: int) -> None:
    """More pixels give smaller steps between neighbors. Blocks would keep their steps."""
    cells = np.random.default_rng(side).normal(0, 4, (side, side))

    def largest_step(size: int) -> int:
        result = heatmap.overlay_heatmap(np.full((size, size), 100, np.uint8), cells).astype(int)
        return max(int(np.abs(np.diff(result, axis=axis)).max()) for axis in (0, 1))

    assert 1 <= largest_step(1600) <= 0.5 * largest_step(200)


def test_opacity_increases_with_the_logit() -> None:
    middles = [2.0 ** (step - 1.5) for step in range(1, len(heatmap.OPACITY))]
    assert heatmap.opacity(np.array([0.0, *middles])) == pytest.approx(heatmap.OPACITY)
    logit = np.linspace(0, 40, 4001)
    assert (np.diff(heatmap.opacity(logit)) >= 0).all()
    assert (heatmap.opacity(-logit) == heatmap.opacity(logit)).all()
    logits = heatmap.scale_logits(1100)
    assert (np.diff(logits) > 0).all()
    assert np.abs(np.diff(heatmap.opacity(logits))).max() < 0.01  # no jumps
    assert logits[[99, 1000]].tolist() == pytest.approx([-8, 8], rel=0.01)


@pytest.mark.parametrize(("shape", "is_drawable"), [((4, 4), True), ((10, 10), True), ((3, 9), False), ((2, 2), False)])
def test_map_of_few_cells_is_not_drawable(shape: tuple[int, int], is_drawable: bool) -> None:
    assert heatmap.drawable(np.zeros(shape)) == is_drawable


def test_nan_cell_is_transparent() -> None:
    cells = np.zeros((5, 5))
    cells[2, 2] = np.nan
    assert (heatmap.overlay_heatmap(np.full((50, 50), 7, np.uint8), cells) == 7).all()
    cells[2, 2] = np.inf
    assert heatmap.overlay_heatmap(np.full((55, 55), 7, np.uint8), cells)[27, 27].tolist() == [171, 93, 23]


# ---- the complete gallery


@pytest.fixture(scope="module")
def open_shards(shard_folder: Path) -> Shards:
    return Shards.open(shard_folder)


def toy_forward(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return maps of 4 x 4 cells, from far below to far above 0, for images of 64 px."""
    cells = (images[:, 0].astype(np.float64).reshape(-1, 4, 16, 4, 16).mean(axis=(2, 4)) - 60) / 4
    return cells.mean(axis=(1, 2)), cells


def with_calls(shards: Shards, scores: Scores) -> pd.DataFrame:
    studies = study_scores(shards, scores)
    return studies.assign(call=studies["probability"] > 0.5)


def write_gallery(out: Path, shards: Shards, options: GalleryOptions, **fields: Any) -> dict[str, Any]:
    rows = shards.rows("train")
    logit, _ = saliency.compute_maps(toy_forward, np.stack([shards.read_pixels(row) for row in rows]))
    studies = with_calls(shards, Scores(rows, logit, np.array([], np.int64)))
    metrics = {"threshold": 0.5, "split": "train"}
    return gallery.write(
        out, shards, studies, rows, subject=toy_subject(toy_forward, **fields), options=options, metrics=metrics
    )


@pytest.fixture(scope="module")
def written_gallery(open_shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gallery")
    return out, write_gallery(
        out, open_shards, GalleryOptions(num_sampled=16), title="a <b>", settings={"flip": True, "rotate_deg": 30}
    )


def test_page_matches_gallery_json(written_gallery: tuple[Path, dict[str, Any]], open_shards: Shards) -> None:
    out, result = written_gallery
    assert result == json.loads((out / "gallery.json").read_bytes())
    page = laws.local_only(out / "gallery.html")
    frame = open_shards.manifest.frame
    labels = [values["aria-label"] for tag, values in page.elements if tag == "svg"][1:]  # the first is the scale
    for study in result["studies"]:
        label, call = (
            ("normal", "abnormal")[study["label"]],
            ("no abnormality flagged", "called abnormal")[study["call"]],
        )
        description = (
            f"{display_name(study['study_type'])}, labeled {label}, {call} at probability {study['probability']:.3f}"
        )
        assert len(study["views"]) == (frame["study"] == study["study"]).sum()
        assert [item for item in labels if item.startswith(description)], description
        assert study["study"] in page.text
        assert study["probability"] == pytest.approx(np.mean([view["probability"] for view in study["views"]]))
    assert len(labels) == sum(len(study["views"]) for study in result["studies"]) > 4
    assert "a <b>" in page.text
    for arguments in ("4 x 4 cells", "does not outline a lesion", "AUPRC 0.44 to 0.59", "0.82"):
        assert arguments in page.text, arguments
    assert "optimistic: the model was trained on both" in page.text
    assert "measured on computer drawings: the numbers do not hold for radiographs" in page.text
    assert result["stability"]["mirror"]["num_radiographs"] == 16
    assert not re.search(r"called normal|is normal", page.text)
    assert "-- " not in page.text


def test_all_maps_of_a_page_share_one_scale(written_gallery: tuple[Path, dict[str, Any]], open_shards: Shards) -> None:
    """Each radiograph has the map of its own cells, and a logit has one color in all maps."""
    out, result = written_gallery
    frame, expected, radiographs = open_shards.manifest.frame, [], []
    for study in result["studies"]:
        for row in frame.index[frame["study"] == study["study"]]:
            radiographs.append(open_shards.read_pixels(row))
            expected.append(heatmap.render_layer(toy_forward(radiographs[-1][None, None])[1][0], (60, 60)))
    text = (out / "gallery.html").read_text()
    maps = [decode_image(data) for data in re.findall(r'<image href="data:image/png;base64,([^"]*)" x=', text)]
    backgrounds = [
        decode_image(data) for data in re.findall(r'<image id="[^"]*" href="data:image/jpeg;base64,([^"]*)"', text)
    ]
    assert len(maps) == len(backgrounds) == len(expected) > 4
    assert all((actual == original).all() for actual, original in zip(maps, expected, strict=True))
    for actual, original in zip(backgrounds, radiographs, strict=True):  # JPEG is lossy
        assert np.abs(actual.astype(int) - original).mean() < 4
    assert len({tuple(pixel) for pixel in np.concatenate([item.reshape(-1, 4) for item in maps])}) > 50


def decode_image(data: str) -> np.ndarray:
    """Decode an image of a page, and check that its metadata states LOCAL ONLY."""
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        comment = image.info.get("Comment") or image.info["comment"].decode()
        assert "LOCAL ONLY" in comment
        return np.asarray(image)


def test_layer_over_radiograph_equals_overlay() -> None:
    """The browser's blend of radiograph and layer equals the picture file."""
    rng = np.random.default_rng(0)
    pixels, cells = rng.integers(0, 256, (48, 48), np.uint8), rng.normal(0, 4, (6, 6))
    layer = heatmap.render_layer(cells, (48, 48)).astype(float)
    share = layer[..., 3:] / 255
    blended = pixels[..., None] * (1 - share) + layer[..., :3] * share
    assert np.abs(blended - heatmap.overlay_heatmap(pixels, cells)).max() <= 1.5


# ---- pages


def build_study(index: int, num_views: int, size: int, num_cells: int = 10) -> gallery_studies.GalleryStudy:
    """Return a study of noise, which compresses poorly."""
    rng = np.random.default_rng(index)
    views = tuple(
        gallery_studies.GalleryView(
            number, 0.5, rng.integers(0, 256, (size, size), np.uint8), rng.normal(0, 4, (num_cells, num_cells))
        )
        for number in range(1, num_views + 1)
    )
    kind = list(gallery_studies.KIND_STREAMS)[index * 4 // 60 % 4]
    return gallery_studies.GalleryStudy(f"{kind}-{index}", f"valid/s{index}", "XR_HAND", 1, 0, 0.2, views, 0)


CONTENT: dict[str, Any] = {
    "title": "t",
    "trained_on": "radiographs",
    "measured_on": "radiographs",
    "note": None,
    "num_networks": 1,
    "map": {"cells": [10, 10], "caveat": "a caveat"},
    "stability": {
        "note": "n",
        "correlation": "c",
        "mirror": saliency.summarize_correlations(np.array([0.5, 0.7]), ["a", "b"], 0) | {"num_cells": 100},
    }
    | {"rotation": saliency.summarize_correlations(np.array([np.nan]), ["a"], 0) | {"num_cells": 2, "angle_deg": 10.0}},
}


@pytest.mark.parametrize(
    ("num", "views", "size"), [(0, 0, 0), (1, 1, 64), (24, 3, 64), (25, 1, 64), (60, 2, 64), (30, 5, 320), (3, 40, 400)]
)
def test_pages_are_small_and_linked(num: int, views: int, size: int, tmp_path: Path) -> None:
    studies = [build_study(index, views, size) for index in range(num)]
    texts = gallery_page.render_pages(studies, CONTENT)
    (tmp_path / "gallery").mkdir()
    paths = [tmp_path / gallery_page.page_path(number) for number in range(1, len(texts) + 1)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    card_names: list[str] = []
    for number, path in enumerate(paths, start=1):
        text = path.read_text()
        laws.local_only(path)
        assert path.stat().st_size < 3_000_000
        cards = re.findall(r"\(gallery/([\w-]+)\.png\)", text)
        assert len(cards) <= 24
        card_names += cards
        links = {(path.parent / href).resolve() for href in re.findall(r'<a href="([^"#][^"]*)"', text)}
        assert links == set(paths) - {path}
        named = dict(re.findall(r'<a href="([^"]*)">(previous|next)</a>', text))
        steps = {name: (path.parent / href).resolve() for href, name in named.items()}
        before, after = paths[number - 2 : number - 1] if number > 1 else [], paths[number : number + 1]
        assert steps == dict(zip(["previous"], before, strict=False)) | dict(zip(["next"], after, strict=False))
    assert sorted(card_names) == sorted(study.name for study in studies)
    if size < 320:
        assert len(paths) == max(1, -(-num // 24))
    if views > 12:
        assert f"{views - 12} more views: gallery/" in texts[0]


def test_missing_stability_has_a_sentence_and_no_tile() -> None:
    [text] = gallery_page.render_pages([build_study(0, 1, 64)], CONTENT)
    assert text.count("<strong>0.60</strong>") == 1
    assert (
        "Stability of a radiograph rotated by ±10°: not measured, since 2 cells of its map stay within the canvas"
        in text
    )
    assert "No studies of these kinds: False alarms: labeled normal, called abnormal; Hits: labeled abnormal" in text
    assert not re.search(r"<strong>none</strong>|n = 0|None in this split", text)


def test_maps_of_few_cells_are_omitted() -> None:
    """They are neither on a page nor in a picture. A sentence states the reason."""
    study = build_study(0, 2, 64, num_cells=3)
    [text] = map(
        html.unescape, gallery_page.render_pages([study], CONTENT | {"map": {"cells": [3, 3], "caveat": "a caveat"}})
    )
    assert (
        "this model's class activation maps have 3 x 3 cells here, too few to locate anything (at least 4 x 4 are needed)"
        in text
    )
    assert "How far to trust a map" not in text
    assert "a caveat" not in text
    assert not re.search("<use|image/png|One scale for all maps", text)
    pixels = gallery_picture.draw_picture(study)
    assert (pixels[26:, :, 0] == pixels[26:, :, 2]).mean() > 0.97  # gray, apart from the text
    pixels_with_map = gallery_picture.draw_picture(build_study(0, 2, 64, num_cells=4))
    assert (pixels_with_map[26:, :, 0] == pixels_with_map[26:, :, 2]).mean() < 0.9


def test_pictures_are_files_marked_local(written_gallery: tuple[Path, dict[str, Any]]) -> None:
    out, result = written_gallery
    files = {f"gallery/{path.name}" for path in (out / "gallery").iterdir()}
    assert files == {study["file"] for study in result["studies"]}
    for study in result["studies"]:
        with Image.open(out / study["file"]) as image:
            assert "LOCAL ONLY" in image.info["Comment"]
            pixels = np.asarray(image)
        banner = np.array([0x8A, 0x3C, 0x00])
        assert (pixels[2] == banner).all()
        assert (pixels[:26] == 255).all(axis=2).sum() > 100  # its text
        assert pixels.shape[0] > 320 * -(-len(study["views"]) // (2 if len(study["views"]) > 2 else 1))
    assert "LOCAL ONLY" in result["what"]


def test_gallery_holds_no_machine_paths(written_gallery: tuple[Path, dict[str, Any]], open_shards: Shards) -> None:
    out, _ = written_gallery
    for path in (out / "gallery.json", out / "gallery.html"):
        assert str(open_shards.folder) not in path.read_text()
        assert str(out) not in path.read_text()


def test_earlier_gallery_is_deleted(open_shards: Shards, tmp_path: Path) -> None:
    write_gallery(tmp_path, open_shards, GalleryOptions(num_sampled=4))
    stale = [tmp_path / "gallery" / name for name in ("missed-77.png", "page-2.html", "page-13.html")]
    for path in stale:
        path.write_bytes(b"of an earlier evaluation")
    user_file = tmp_path / "gallery" / "notes.txt"
    user_file.write_text("a person's")
    write_gallery(tmp_path, open_shards, GalleryOptions(num_studies=4, num_sampled=4))
    assert not any(path.exists() for path in stale)
    assert len(list((tmp_path / "gallery").glob("*.png"))) <= 4
    gallery.clear(tmp_path)
    assert [path.name for path in sorted(tmp_path.rglob("*")) if path.is_file()] == ["notes.txt"]


def test_corrupt_view_is_noted(shard_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(shard_folder, tmp_path / "shards")
    complete = write_gallery(tmp_path / "a", Shards.open(tmp_path / "shards"), GalleryOptions(num_sampled=999))
    study = next(item for item in complete["studies"] if len(item["views"]) > 1)
    frame = Shards.open(tmp_path / "shards").manifest.frame
    row = frame.index[frame["study"] == study["study"]][0]
    shards = Shards.open(tmp_path / "shards")
    rows = shards.rows("train")
    logit, _ = saliency.compute_maps(toy_forward, np.stack([shards.read_pixels(item) for item in rows]))
    laws.damage(shards, row)
    shards = Shards.open(tmp_path / "shards")
    is_intact = rows != row
    studies = with_calls(shards, Scores(rows[is_intact], logit[is_intact], rows[~is_intact]))
    options = GalleryOptions(num_studies=4 * len(studies), num_sampled=999)
    result = gallery.write(
        tmp_path / "b", shards, studies, rows, subject=toy_subject(toy_forward), options=options, metrics={}
    )
    [entry] = [item for item in result["studies"] if item["study"] == study["study"]]
    assert (entry["num_damaged"], len(entry["views"])) == (1, len(study["views"]) - 1)
    assert "1 of its views corrupt, skipped" in laws.local_only(tmp_path / "b" / "gallery.html").text
    assert result["num_sampled"] == len(rows) - 1


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"flip": True, "rotate_deg": 30.0}, "optimistic: the model was trained on both"),
        ({}, "optimistic: the model was trained on both"),
        ({"flip": True, "rotate_deg": 0}, "optimistic: the model was trained on mirrored radiographs"),
        ({"flip": False, "rotate_deg": 9}, "optimistic: the model was trained on rotated radiographs"),
        ({"flip": False, "rotate_deg": 0}, "the model was trained on neither"),
    ],
)
def test_stability_bias_follows_the_augmentation(settings: dict[str, Any], note: str) -> None:
    assert gallery.describe_stability_bias(settings) == note


# ---- the command


@pytest.fixture(scope="module")
def runs(reference_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two runs that differ in their seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", ()), ("b", ("seed=1",))):
        shutil.copytree(reference_run(1, *SHORT, *seed), folder / name)
    return folder / "a", folder / "b"


def run_evaluation(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict[str, Any], str]:
    """Run evaluate, and return the content of gallery.json and the captured stderr."""
    assert main(["evaluate", *map(str, arguments)]) == DONE
    captured = capsys.readouterr()
    [path] = re.findall(r"^gallery \(LOCAL ONLY.*: (.*gallery\.html)$", captured.out, flags=re.MULTILINE)
    return json.loads((Path(path).parent / "gallery.json").read_bytes()), captured.err


@pytest.mark.filterwarnings("error:Mean of empty slice", "error:invalid value")
def test_evaluate_writes_gallery_and_report_holds_no_radiographs(
    runs: tuple[Path, Path], shard_folder: Path, tmp_path: Path, capsys
) -> None:
    run, _ = runs
    result, captured = run_evaluation(capsys, run, shard_folder, "--out", tmp_path)
    assert re.search(r"gallery \(LOCAL ONLY\): \d+ studies, maps of \d+ radiographs, [\d.]+ s", captured)
    assert (
        "class activation maps have 2 x 2 cells here, too few to locate"
        in laws.local_only(tmp_path / "gallery.html").text
    )
    laws.holds_no_radiograph(tmp_path / "report.html")
    studies = pd.read_csv(tmp_path / "studies.csv").set_index("study")
    for study in result["studies"]:
        assert study["probability"] == pytest.approx(studies.at[study["study"], "probability"])
        assert study["call"] == studies.at[study["study"], "call"]
    assert main(["evaluate", str(run), str(shard_folder), "--out", str(tmp_path), "--no-gallery"]) == DONE
    assert not [path.name for path in tmp_path.iterdir() if "gallery" in path.name]
    assert "gallery.html" not in capsys.readouterr().out


@pytest.mark.slow
def test_onnx_file_and_list_have_galleries(runs: tuple[Path, Path], shard_folder: Path, tmp_path: Path, capsys) -> None:
    run, second_run = runs
    run_gallery, _ = run_evaluation(capsys, run, shard_folder, "--out", tmp_path / "run")
    assert main(["export", str(run), "--out", str(tmp_path / "m.onnx")]) == DONE
    capsys.readouterr()
    arguments = (tmp_path / "m.onnx", shard_folder, "--out", tmp_path / "onnx", "--quiet")
    onnx_gallery, captured = run_evaluation(capsys, *arguments)
    assert captured == f"{TERMS}\n"
    assert onnx_gallery["studies"][0]["views"][0]["logit"] == pytest.approx(
        run_gallery["studies"][0]["views"][0]["logit"], abs=1e-4
    )
    for number in ("mean", "median"):
        assert onnx_gallery["stability"]["mirror"][number] == pytest.approx(
            run_gallery["stability"]["mirror"][number], abs=1e-3
        )
    assert main(["ensemble", str(run), str(second_run), "--out", str(tmp_path / "two.json"), "--top", "2"]) == DONE
    capsys.readouterr()
    members, _ = run_evaluation(capsys, tmp_path / "two.json", shard_folder)
    assert members["num_networks"] == 2


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("shared", [False, True])
def test_gallery_is_private_unless_shared(
    shared: bool, open_shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has no radiographs. The folder, which may be a run's, keeps its mode."""
    rows = open_shards.rows("valid")
    logit, _ = saliency.compute_maps(toy_forward, np.stack([open_shards.read_pixels(row) for row in rows]))
    scores, before = SplitScores(Scores(rows, logit, np.array([], np.int64)), FittedThresholds(), 1.0), os.umask(0o022)
    try:
        options = EvaluateOptions(tmp_path / "out", gallery=GalleryOptions(8, 4), shared=shared)
        monkeypatch.setattr(gallery_page, "MAX_STUDIES_PER_PAGE", 3)  # several pages
        results.write(open_shards, toy_subject(toy_forward), scores, options)
    finally:
        os.umask(before)
    radiographs = {path for each in gallery.paths(tmp_path / "out") for path in (each, *each.rglob("*"))}
    assert len(radiographs) > 4
    assert tmp_path / "out" / "gallery" / "page-2.html" in radiographs
    for path in (tmp_path / "out").rglob("*"):
        mode = 0o755 if path.is_dir() else 0o644
        assert path.stat().st_mode & 0o777 == (mode & 0o700 if path in radiographs and not shared else mode), path
