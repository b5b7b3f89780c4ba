"""The gallery of an evaluation: radiographs, their maps, and what the maps are worth. LOCAL ONLY, and apart from the report.

    studies -> choose (surest errors, random hits) -> look at their views -> gallery/*.png, one a study --> gallery.html
    radiographs, a seeded sample -> saliency.stability -------------------------------------------------^-> gallery.json (last)

One scale of logits for all maps of all galleries (heatmap.py), so that two maps may be compared.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from mura_dist.core import files
from mura_dist.data import mura
from mura_dist.data.loaders import sampler
from mura_dist.data.shards.reader import Damaged, Shards
from mura_dist.evaluation import saliency
from mura_dist.evaluation.subject import EvaluationSubject, GalleryOptions
from mura_dist.metrics import classification
from mura_dist.reports import heatmap, local_only
from mura_dist.reports.html import Html, banner, element, section, tile

NAMES = {"missed": 0, "false-alarm": 1, "hit-abnormal": 2, "hit-normal": 3}  # of the groups; and the order's stream
_PICTURE = re.compile(rf"(?:{'|'.join(NAMES)})-\d+\.png")

TITLES = {
    "missed": "Missed: labelled abnormal, nothing flagged; lowest probability first",
    "false-alarm": "False alarms: labelled normal, called abnormal; highest probability first",
    "hit-abnormal": "Hits, labelled abnormal and called so; drawn at random",
    "hit-normal": "Hits, labelled normal, nothing flagged; drawn at random",
}
_DRAWN = {  # by (trained on, measured on)
    (True, True): "trained and measured on drawings: says nothing about radiographs",
    (True, False): "trained on drawings: the model has never seen a radiograph",
    (False, True): "measured on drawings: says nothing about radiographs",
}
_LABELS = ("normal", "abnormal")
_CALLS = ("no abnormality flagged", "called abnormal")


@dataclass(frozen=True)
class View:
    """pixels (S, S) uint8, cells (h, w) float64."""

    number: int
    logit: float
    pixels: np.ndarray
    cells: np.ndarray

    @property
    def probability(self) -> float:
        return classification.probability(self.logit)


@dataclass(frozen=True)
class Study:
    """A study to show. `name`: its picture's; `num_damaged`: views that cannot be shown."""

    name: str
    study: str
    study_type: str
    label: int
    call: int
    probability: float
    views: tuple[View, ...]
    num_damaged: int

    @property
    def said(self) -> str:
        """Truth and prediction in words."""
        return f"{self.study_type}, labelled {_LABELS[self.label]}, {_CALLS[self.call]} at probability {self.probability:.3f}"


def write(
    out: Path,
    shards: Shards,
    studies: pd.DataFrame,
    rows: np.ndarray,
    *,
    subject: EvaluationSubject,
    options: GalleryOptions,
    metrics: Mapping[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `out`/gallery.html, gallery/*.png and gallery.json in place of earlier ones; returns gallery.json's content.

    studies: as classification.study_table gives it, with `call`; rows: the radiographs that were evaluated, int64 (n,);
    metrics: metrics.json's content, of which split, threshold and note are told, where it has them.
    """
    clear(out)
    started = time.perf_counter()
    chosen = choose(studies, options.num_studies, options.seed)
    shown = [_study(shards, dict(studies.loc[line]), rows, name, call, subject.outputs) for name, line, call in chosen]
    numbers = measured(subject, shards, rows, options)
    for study in shown:
        files.write_bytes(out / "gallery" / f"{study.name}.png", local_only.png(picture(study)))
    found = _content(shown, numbers, shards, subject, options, metrics)
    files.write_text(out / "gallery.html", _page(shown, found, shards))
    found["seconds"] = round(time.perf_counter() - started, 1)
    files.write_json(out / "gallery.json", found)
    say(
        f"gallery ({local_only.MARK}): {len(shown)} studies, maps of {numbers['num_sampled']} radiographs, {found['seconds']} s"
    )
    return found


def paths(out: Path) -> tuple[Path, Path, Path]:
    """Return what `write` makes: the numbers, the page and the folder of pictures."""
    return out / "gallery.json", out / "gallery.html", out / "gallery"


def clear(out: Path) -> None:
    """Take away what `write` made; nothing else that may lie in those places."""
    *single, folder = paths(out)
    for path in single:
        path.unlink(missing_ok=True)
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if _PICTURE.fullmatch(path.name):
                path.unlink()
        if not any(folder.iterdir()):
            shutil.rmtree(folder)


# ---- which studies, which radiographs


def choose(studies: pd.DataFrame, num: int, seed: int) -> list[tuple[str, Any, int]]:
    """(name, index in `studies`, call) of at most `num` studies, a quarter of each kind; fewer where there are fewer."""
    told = studies[studies["label"].notna() & np.isfinite(studies["probability"].astype(float))]
    label, called = told["label"].to_numpy(int), told["call"].to_numpy(int)
    kinds = {"missed": (1, 0), "false-alarm": (0, 1), "hit-abnormal": (1, 1), "hit-normal": (0, 0)}
    found = []
    for kind, (truth, said) in kinds.items():
        part = told[(label == truth) & (called == said)]
        if truth != said:
            part = part.sort_values("probability", ascending=said == 0, kind="stable")
        else:
            part = part.iloc[_shuffled(np.arange(len(part)), seed, NAMES[kind])]
        found += [
            (f"{kind}-{place}", line, said) for place, line in enumerate(part.index[: num // len(kinds)], start=1)
        ]
    return found


def _shuffled(rows: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """int64 (n,) in an order that depends on seed and stream only."""
    return sampler.epoch_order(rows, seed, stream, rotate_deg=0, flip=False).rows


def _study(
    shards: Shards, line: dict[Any, Any], rows: np.ndarray, name: str, call: int, outputs: saliency.Outputs
) -> Study:
    frame = shards.manifest.frame
    number: dict[int, int] = frame.loc[frame["study"] == line["study"], "view"].to_dict()
    read = {row: pixels for row in number if row in rows and (pixels := _pixels(shards, row)) is not None}
    logit, cells = saliency.look(outputs, np.stack(list(read.values()))) if read else (np.zeros(0), np.zeros(0))
    views = (
        View(number[row], float(logit[place]), pixels, cells[place]) for place, (row, pixels) in enumerate(read.items())
    )
    told = (line["study"], line["study_type"], int(line["label"]), call, float(line["probability"]))
    return Study(name, *told, tuple(views), len(number) - len(read))


def _pixels(shards: Shards, row: int) -> np.ndarray | None:
    try:
        return shards.pixels(row)
    except Damaged:
        return None


# ---- the numbers


def measured(subject: EvaluationSubject, shards: Shards, rows: np.ndarray, options: GalleryOptions) -> dict[str, Any]:
    """Stability over a seeded sample of `rows`, see saliency.py."""
    sample = [
        (row, pixels)
        for row in np.sort(_shuffled(rows, options.seed, len(NAMES))[: options.num_sampled]).tolist()
        if (pixels := _pixels(shards, row)) is not None
    ]
    images = np.stack([pixels for _, pixels in sample])  # (n, S, S)
    patients = shards.manifest.frame.loc[[row for row, _ in sample], "patient"].tolist()
    _, cells = saliency.look(subject.outputs, images)
    stability = saliency.stability(subject.outputs, images, cells, patients, options.seed)
    return {
        "num_sampled": len(sample),
        "num_cells": list(cells.shape[1:]),
        "stability": {"note": flattering(subject.settings), "correlation": saliency.CORRELATION} | stability,
    }


def flattering(settings: dict[str, Any]) -> str:
    """What the training's own augmentation makes of the stability."""
    flip, turned = settings.get("flip"), settings.get("rotate_deg")
    told = isinstance(flip, bool) and isinstance(turned, int | float)
    if not told or (flip and turned):
        return "flattering: the model was trained on both"
    if flip or turned:
        return f"flattering: the model was trained on {'mirrored' if flip else 'turned'} radiographs"
    return "the model was trained on neither"


def _content(
    shown: Sequence[Study],
    numbers: dict[str, Any],
    shards: Shards,
    subject: EvaluationSubject,
    options: GalleryOptions,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """gallery.json: standard JSON values, and nothing of where things lie but a study's own key."""
    h, w = numbers["num_cells"]
    return {
        "what": local_only.WHY,
        "title": subject.title,
        "checkpoint": subject.checkpoint,
        "model": subject.name,
        "num_networks": max(1, len(subject.members)),
        "split": metrics.get("split"),
        "threshold": metrics.get("threshold"),
        "trained_on": subject.trained_on,
        "measured_on": shards.trained_on,
        "note": metrics.get("note"),
        "seed": options.seed,
        "scale": {
            "edges_logit": list(heatmap.EDGES),
            "of": "a cell's logit, on either side of 0; the same for all maps",
        },
        "map": {"cells": [h, w], "cell_px": [shards.size / h, shards.size / w], "caveat": caveat(h, w, shards.size)},
        "num_sampled": numbers["num_sampled"],
        "stability": numbers["stability"],
        "studies": [_told(study) for study in shown],
        "terms": mura.TERMS,
        "licence": mura.LICENCE,
    }


def _told(study: Study) -> dict[str, Any]:
    return {
        "file": f"gallery/{study.name}.png",
        "kind": study.name.rpartition("-")[0],
        "study": study.study,
        "study_type": study.study_type,
        "label": study.label,
        "call": study.call,
        "probability": study.probability,
        "views": [{"view": one.number, "logit": one.logit, "probability": one.probability} for one in study.views],
        "num_damaged": study.num_damaged,
    }


def caveat(h: int, w: int, size: int) -> str:
    return (
        f"A class activation map has {h} x {w} cells here, each of {size / h:g} x {size / w:g} pixels: it does not outline a "
        "lesion. On MURA such maps were measured to localise poorly: AUPRC 0.44 to 0.59, where radiologists reach 0.82. "
        "A coloured cell is what moved this model's number, and that may be metal, plaster or a marker beside the bone."
    )


# ---- pictures


def picture(study: Study) -> np.ndarray:
    """One study for a file: its words, its views alone and under their maps, the scale, the mark. uint8 (H, W, 3)."""
    size = max((len(view.pixels) for view in study.views), default=320)
    zoom, gap = max(1, round(320 / size)), 8
    side = size * zoom
    columns = 2 if len(study.views) > 2 else 1
    num_lines = -(-len(study.views) // columns)
    pair, line = 2 * side + gap, side + 26
    width, top = max(columns * (pair + 3 * gap) + gap, 660), 92
    height = top + num_lines * line + 132
    canvas = Image.new("RGB", (width, height), "white")
    draw, large, small = ImageDraw.Draw(canvas), ImageFont.load_default(19), ImageFont.load_default(14)
    draw.rectangle((0, 0, width, 26), fill="#8a3c00")
    draw.text((2 * gap, 4), f"{local_only.MARK}: holds radiographs; do not send or publish", "white", small)
    draw.text((2 * gap, 34), study.said, "black", large)
    draw.text((2 * gap, 62), f"{study.study}{_damage(study)}", "#5b6570", small)
    for place, view in enumerate(study.views):
        x, y = 2 * gap + place % columns * (pair + 3 * gap), top + place // columns * line
        both = (np.repeat(view.pixels[..., None], 3, axis=2), heatmap.painted(view.pixels, view.cells))
        for number, pixels in enumerate(both):
            shown = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(shown, (x + number * (side + gap), y))
        draw.text((x, y + side + 3), _view_words(view), "#1b1f24", small)
    heatmap.draw_scale(canvas, 2 * gap, height - 122, min(width - 4 * gap, 640), small)
    for number, words in enumerate(("The map does not outline a lesion.", f"{mura.TERMS}.")):
        draw.text((2 * gap, height - 42 + 18 * number), words, "#5b6570", ImageFont.load_default(13))
    return np.asarray(canvas)


def _damage(study: Study) -> str:
    return f"; {study.num_damaged} of its views damaged, left out" if study.num_damaged else ""


def _view_words(view: View) -> str:
    return f"View {view.number}: probability {view.probability:.3f}, logit {view.logit:+.2f}"


# ---- page

_STYLE = (
    """
body { max-width: 84rem }
.study { margin: 1.4rem 0 2rem; break-inside: avoid-page } .study > p { margin: .1rem 0 }
.study h3 { margin: 0 } .study > p { max-width: none; overflow-wrap: anywhere }
.pair { max-width: 41rem } .pair svg { background: #000 }
.views { display: grid; gap: .2rem 1.4rem; grid-template-columns: repeat(auto-fill, minmax(min(30rem, 100%), 1fr)) }
.scale { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .3rem 0; margin: 1.2rem 0;
         border-bottom: 1px solid var(--line) }
.scale svg { display: block; width: 100%; max-width: 34rem; height: auto } .scale figcaption { margin-bottom: .2rem }
.caveat { border: 1px solid var(--warn); border-radius: .4rem; padding: .6rem .9rem; max-width: none }
@media print { .scale { position: static } .views { grid-template-columns: 1fr 1fr } }
"""
    + f".a {{ fill: rgb{heatmap.AGAINST} }} .f {{ fill: rgb{heatmap.FOR} }}\n"
    + "\n".join(f".s{step} {{ fill-opacity: {opacity} }}" for step, opacity in enumerate(heatmap.OPACITY) if step)
)


def _page(shown: Sequence[Study], found: dict[str, Any], shards: Shards) -> str:
    title = f"Gallery: {found['title']}"
    return local_only.page(title, *_head(found, shards), *_numbers(found), _scale(), *_groups(shown), style=_STYLE)


def _head(found: dict[str, Any], shards: Shards) -> Iterator[Html]:
    drawn = tuple(found[key] == "phantoms" for key in ("trained_on", "measured_on"))
    if any(drawn):
        yield banner(_DRAWN[drawn])
    if found["note"]:
        yield banner(found["note"])
    several = found["num_networks"] > 1
    yield element(
        "p",
        "The studies this model got most surely wrong, and some it got right. Of each view the radiograph alone, and beside it "
        "the same under its class activation map: how much each cell raises or lowers the logit, which is "
        f"{'the mean of all cells' if not several else 'about their mean; the map is the mean of the networks'}.",
    )
    yield element("p", found["map"]["caveat"], class_="caveat", role="note")


def _numbers(found: dict[str, Any]) -> Iterator[Html]:
    stability = found["stability"]
    angle = stability["rotation"]["angle_deg"]
    tiles = [
        _tile("Stability, mirrored", stability["mirror"]),
        _tile(f"Stability, turned by ±{angle:g}°", stability["rotation"]),
    ]
    yield section(
        "How far to trust a map",
        element("div", *tiles, class_="tiles"),
        element("p", *_spread(found), class_="soft"),
        _reading(found),
    )


def _tile(name: str, part: dict[str, Any]) -> Html:
    interval = "no interval"
    if part["mean_low"] is not None:
        interval = f"95 %: {part['mean_low']:.2f} to {part['mean_high']:.2f}"
    return tile(
        name, "none" if part["mean"] is None else f"{part['mean']:.2f}", f"{interval}, n = {part['num_radiographs']}"
    )


def _spread(found: dict[str, Any]) -> Iterator[str]:
    mirror = found["stability"]["mirror"]
    yield (
        f"Correlations ({found['stability']['correlation']}), their mean over {mirror['num_radiographs']} radiographs of "
        f"{mirror['num_patients']} patients, drawn at random from the split; in small print the 95 % interval of that mean, by "
        "bootstrap over patients. Half of the radiographs lie between "
    )
    parts = {"mirrored": mirror, "turned": found["stability"]["rotation"]}
    known = {name: part for name, part in parts.items() if part["mean"] is not None}
    yield "; ".join(f"{part['quartile_1']:.2f} and {part['quartile_3']:.2f} ({name})" for name, part in known.items())
    turned = found["stability"]["rotation"]["num_cells"]
    few = " Too few for a correlation." if turned < saliency.MIN_CELLS else ""
    yield f". Turned, {turned} cells count, those that stay within the canvas.{few}"
    if flat := max((part["num_without_contrast"] for part in known.values()), default=0):
        yield f" {flat} maps have no contrast, hence no correlation, and are left out."


def _reading(found: dict[str, Any]) -> Html:
    """Say what the numbers mean, and what they do not."""
    text = (
        "1: of the radiograph mirrored, or turned, the map is the same, mirrored or turned. A high number is expected and "
        "proves little; a low one says that the map depends on how the film lay."
    )
    name = element("strong", f"Stability ({found['stability']['note']}). ")
    return element("ul", element("li", name, text))


def _scale() -> Html:
    numbers, slot = heatmap.STEPS, 40
    width = slot * len(numbers)
    parts = [
        element("rect", x=0, y=half * 9, width=width, height=9, fill=grey) for half, grey in enumerate(("#000", "#fff"))
    ]
    parts += [_cell(step, place * slot, 0, slot, 18) for place, step in enumerate(numbers) if step]
    parts.append(element("rect", x=0.5, y=0.5, width=width - 1, height=17, fill="none", stroke="#8995a1"))
    parts += [
        element("text", f"{edge:g}".replace("-", "−"), x=place * slot, y=32, text_anchor="middle", fill="currentColor")
        for place, edge in enumerate(heatmap.edges(), start=1)
    ]
    alt = f"Colours of a cell by its logit: blue below 0, orange above, clear near 0; they change at {heatmap.edges()}"
    drawing = element("svg", *parts, viewBox=f"0 0 {width} 36", role="img", aria_label=alt, font_size="13")
    words = "One scale for all maps, a cell's logit: blue lowers it, orange raises it, clear is near 0."
    return element("figure", element("figcaption", words), drawing, class_="scale")


def _cell(step: int, x: float, y: float, width: float, height: float) -> Html:
    place = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return element("rect", **place, class_=f"{'f' if step > 0 else 'a'} s{abs(step)}")


def _groups(shown: Sequence[Study]) -> Iterator[Html]:
    for kind, title in TITLES.items():
        part = [study for study in shown if study.name.startswith(kind)]
        none = element("p", "None in this split.", class_="soft")
        yield section(title, *([_article(study) for study in part] or [none]))


def _article(study: Study) -> Html:
    said = f"{study.said}{_damage(study)}"
    views = [_figure(study, view, place) for place, view in enumerate(study.views)]
    return element(
        "article",
        element("h3", f"{study.study_type}: {_CALLS[study.call]} at probability {study.probability:.3f}"),
        element(
            "p",
            f"Label: {_LABELS[study.label]}. ",
            element("span", f"{study.study}{_damage(study)} (gallery/{study.name}.png)", class_="soft"),
        ),
        element("div", *views, class_="views"),
        class_="study",
        aria_label=said,
    )


def _figure(study: Study, view: View, place: int) -> Html:
    """The radiograph alone, and the same with the cells of its map; its pixels are in the page once."""
    size, gap, name = len(view.pixels), len(view.pixels) // 40, f"{study.name}-{place}"
    h, w = view.cells.shape
    alone = element("image", id=name, href=local_only.uri(view.pixels), width=size, height=size)
    again = element("use", href=f"#{name}", x=size + gap)
    step, tall, wide = heatmap.steps(view.cells), size / h, size / w
    cells = [
        _cell(step[i, j], size + gap + j * wide, i * tall, wide - 1, tall - 1)
        for i in range(h)
        for j in range(w)
        if step[i, j]
    ]
    alt = f"{study.said}; view {view.number}: the radiograph alone, and under its class activation map, logit {view.logit:+.2f}"
    drawing = element(
        "svg",
        alone,
        again,
        element("g", *cells, shape_rendering="crispEdges"),
        viewBox=f"0 0 {2 * size + gap} {size}",
        role="img",
        aria_label=alt,
    )
    return element("figure", drawing, element("figcaption", _view_words(view)), class_="pair")
