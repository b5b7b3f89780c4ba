"""Render the pages of a gallery, with links between them. LOCAL ONLY, every one.

    studies -> cards -> pages, numbered from 1 -> gallery.html, gallery/page-2.html, gallery/page-3.html, ...

A page has at most MAX_STUDIES_PER_PAGE studies and MAX_PAGE_BYTES bytes. It contains all that it shows, and links only to the
other pages.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mura_dist.data.mura import display_name
from mura_dist.evaluation import saliency
from mura_dist.evaluation.gallery_studies import CALL_TEXT, LABEL_TEXT, GalleryStudy, GalleryView
from mura_dist.reports import heatmap, local_only
from mura_dist.reports.findings import PHANTOM_STAMPS
from mura_dist.reports.html import Html, banner, element, section, tile

MAX_STUDIES_PER_PAGE = 24  # at most
MAX_PAGE_BYTES = 3_000_000  # of a page
_MAX_VIEWS = 12  # of a study on a page; its picture file has them all
_SIDE_PX, _MAP_PX = 320, 60  # of an embedded radiograph, at most; of a map, which the browser enlarges smoothly
_FIRST = "gallery.html"
_HEADINGS_BYTES = 2000  # of the sections of a page
KIND_TITLES = {
    "missed": "Missed: labeled abnormal, not flagged (lowest probability first)",
    "false-alarm": "False alarms: labeled normal, called abnormal (highest probability first)",
    "hit-abnormal": "Hits: labeled abnormal, called abnormal (random sample)",
    "hit-normal": "Hits: labeled normal, not flagged (random sample)",
}
_STYLE = """
body { max-width: 84rem }
.cards { columns: 24rem; column-gap: 1.2rem }
.study { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .8rem; margin: 0 0 1.1rem; break-inside: avoid }
.study h3 { margin: 0 } .study > p { margin: .1rem 0; max-width: none; overflow-wrap: anywhere }
.views { display: grid; gap: .3rem .8rem; grid-template-columns: 1fr }
.alone .views { grid-template-columns: 1fr 1fr }
.views figure { margin: .4rem 0 0 } .views svg { background: #000; border-radius: .2rem }
.scale { background: var(--paper); padding: .3rem 0; margin: .8rem 0 }
.scale svg { display: block; width: 100%; max-width: 34rem; height: auto } .scale figcaption { margin-bottom: .2rem }
.caveat { border: 1px solid var(--warn); border-radius: .4rem; padding: .6rem .9rem; max-width: none }
.pages { align-items: center } .pages strong { padding: 0 .2rem }
@media print { .cards { columns: 2 } }
"""


def page_path(number: int) -> str:
    """Return the path of page `number` in the folder of gallery.html."""
    return _FIRST if number == 1 else f"gallery/page-{number}.html"


def render_pages(studies: Sequence[GalleryStudy], content: dict[str, Any]) -> list[str]:
    """Render the pages, at least one. `content` is that of gallery.json."""
    drawable = _has_maps(content)
    cards = [(study, _card(study, drawable)) for study in studies]
    head, title = [*_head(content), *_missing_kinds(studies), *_numbers(content)], f"Gallery: {content['title']}"
    max_bytes = MAX_PAGE_BYTES - _HEADINGS_BYTES - len(_page(title, 1, 99, head, [], drawable).encode())
    groups = _paginate(cards, max_bytes)
    return [
        _page(title, number, len(groups), head if number == 1 else [*_banners(content)], group, drawable)
        for number, group in enumerate(groups, start=1)
    ]


StudyCards = list[tuple[GalleryStudy, Html]]


def _paginate(cards: StudyCards, max_bytes: int) -> list[StudyCards]:
    """Split the cards, in order, into pages of at most CARDS and `max_bytes` bytes."""
    groups: list[StudyCards] = [[]]
    size = 0
    for study, card in cards:
        num_bytes = len(card.encode())
        if groups[-1] and (len(groups[-1]) == MAX_STUDIES_PER_PAGE or size + num_bytes > max_bytes):
            groups.append([])
            size = 0
        groups[-1].append((study, card))
        size += num_bytes
    return groups


def _page(title: str, number: int, count: int, head: Sequence[Html], cards: StudyCards, drawable: bool) -> str:
    navigation = _navigation(number, count)
    scale = [_scale()] if drawable else []
    page_title = f"{title}, page {number} of {count}" if count > 1 else title
    return local_only.page(
        page_title, *head, *navigation, *scale, *_sections(cards, drawable), *navigation, style=_STYLE
    )


def _navigation(number: int, count: int) -> list[Html]:
    """Return the links to the page before, to every page and to the page after; nothing where there is one page."""
    if count == 1:
        return []
    links = [_link("previous", number, number - 1)] if number > 1 else []
    links += [
        element("strong", page, aria_current="page") if page == number else _link(str(page), number, page)
        for page in range(1, count + 1)
    ]
    links += [_link("next", number, number + 1)] if number < count else []
    return [element("nav", "Pages: ", *links, aria_label="Pages of the gallery", class_="pages")]


def _link(text: str, source: int, target: int) -> Html:
    path = page_path(target)
    href = path if source == 1 else f"../{path}" if target == 1 else path.removeprefix("gallery/")
    return element("a", text, href=href)


# ---- head


def _has_maps(content: dict[str, Any]) -> bool:
    return bool(heatmap.drawable(np.zeros(content["map"]["cells"])))


def _banners(content: dict[str, Any]) -> Iterator[Html]:
    if stamp := PHANTOM_STAMPS.get((content["trained_on"] == "phantoms", content["measured_on"] == "phantoms")):
        yield banner(stamp)
    if content["note"]:
        yield banner(content["note"])


def _head(content: dict[str, Any]) -> Iterator[Html]:
    yield from _banners(content)
    text = "The most confident errors of this model, and some studies it got right."
    if not _has_maps(content):
        h, w = content["map"]["cells"]
        least = f"{heatmap.MIN_CELLS} x {heatmap.MIN_CELLS}"
        yield element("p", f"{text} Each view shows the radiograph.")
        yield element(
            "p",
            f"No maps are shown: this model's class activation maps have {h} x {w} cells here, too few to locate anything (at "
            f"least {least} are needed). Larger radiographs (shards --size) give more cells.",
            class_="caveat",
            role="note",
        )
        return
    is_ensemble = content["num_networks"] > 1
    yield element(
        "p",
        f"{text} Each view shows the radiograph alone, and beside it the same under its class activation map: how much each "
        "cell raises or lowers the logit. The logit is "
        f"{'about the mean of all cells, and the map is the mean of the networks' if is_ensemble else 'the mean of all cells'}.",
    )
    yield element("p", content["map"]["caveat"], class_="caveat", role="note")


def _missing_kinds(studies: Sequence[GalleryStudy]) -> Iterator[Html]:
    """Yield a sentence on the kinds without a study."""
    kinds = {study.kind for study in studies}
    if missing := [title.partition(" (")[0] for kind, title in KIND_TITLES.items() if kind not in kinds]:
        yield element("p", f"No studies of these kinds: {'; '.join(missing)}.", class_="soft")


def _numbers(content: dict[str, Any]) -> Iterator[Html]:
    """Yield how stable the maps are; nothing where no map is shown."""
    if not _has_maps(content):
        return
    stability = content["stability"]
    summaries = {
        "mirrored": stability["mirror"],
        f"rotated by ±{stability['rotation']['angle_deg']:g}°": stability["rotation"],
    }
    measured = {name: summary for name, summary in summaries.items() if summary["mean"] is not None}
    tiles = [
        tile(f"Stability, {name}", f"{summary['mean']:.2f}", _interval(summary)) for name, summary in measured.items()
    ]
    body = [element("div", *tiles, class_="tiles")] if tiles else []
    missing = [
        element("p", _no_number(name, summary), class_="soft")
        for name, summary in summaries.items()
        if name not in measured
    ]
    notes = [element("p", *_spread(content, measured), class_="soft"), _interpretation(content)] if measured else []
    yield section("How far to trust a map", *body, *missing, *notes)


def _interval(summary: dict[str, Any]) -> str:
    num = f"{summary['num_radiographs']} radiographs"
    if summary["mean_low"] is None:
        return f"{num} of one patient: no interval"
    return f"95 %: {summary['mean_low']:.2f} to {summary['mean_high']:.2f}, {num}"


def _no_number(name: str, summary: dict[str, Any]) -> str:
    """Explain why a stability has no number."""
    if summary["num_cells"] < saliency.MIN_CELLS:
        return (
            f"Stability of a radiograph {name}: not measured, since {summary['num_cells']} cells of its map stay within the "
            f"canvas and a correlation needs {saliency.MIN_CELLS}."
        )
    return f"Stability of a radiograph {name}: not measured, since no map has contrast."


def _spread(content: dict[str, Any], measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    first = next(iter(measured.values()))
    yield (
        f"Correlations ({content['stability']['correlation']}), their mean over {first['num_radiographs']} radiographs of "
        f"{first['num_patients']} patients, drawn at random from the split; in small print the 95 % interval of that mean, by "
        "bootstrap over patients. Half of the radiographs lie between "
    )
    yield "; ".join(
        f"{summary['quartile_1']:.2f} and {summary['quartile_3']:.2f} ({name})" for name, summary in measured.items()
    )
    yield "."
    if flat := max(summary["num_without_contrast"] for summary in measured.values()):
        yield f" {flat} maps have no contrast and therefore no correlation."


def _interpretation(content: dict[str, Any]) -> Html:
    """Explain what the numbers mean."""
    text = (
        "At 1 the map of the mirrored or rotated radiograph is the mirrored or rotated map. A high number is expected and proves "
        "little. A low number means that the map depends on how the film lay."
    )
    name = element("strong", f"Stability ({content['stability']['note']}). ")
    return element("ul", element("li", name, text))


def _scale() -> Html:
    """Draw the colors of a map by its logit, over black and over white, as they are on a radiograph."""
    slot = 40
    width = slot * len(heatmap.STEPS)
    strip = local_only.data_uri(heatmap.scale_strip(width))
    parts = [element("image", href=strip, width=width, height=18, preserveAspectRatio="none")]
    parts.append(element("rect", x=0.5, y=0.5, width=width - 1, height=17, fill="none", stroke="#8995a1"))
    parts += [
        element("text", f"{edge:g}".replace("-", "−"), x=index * slot, y=32, text_anchor="middle", fill="currentColor")
        for index, edge in enumerate(heatmap.edges(), start=1)
    ]
    alt = "Colors of a map by its logit: blue below 0, orange above, clear near 0, stronger further from 0"
    drawing = element("svg", *parts, viewBox=f"0 0 {width} 36", role="img", aria_label=alt, font_size="13")
    caption = "One scale for all maps, a cell's logit: blue lowers it, orange raises it, clear is near 0."
    return element("figure", element("figcaption", caption), drawing, class_="scale")


# ---- cards


def _sections(cards: StudyCards, drawable: bool) -> Iterator[Html]:
    """Yield the cards under the heading of their kind."""
    for kind, title in KIND_TITLES.items():
        if group := [card for study, card in cards if study.kind == kind]:
            yield section(title, element("div", *group, class_="cards" if drawable else "cards alone"))


def _card(study: GalleryStudy, drawable: bool) -> Html:
    views_on_page = study.views[:_MAX_VIEWS]
    views = [_figure(study, view, index, drawable) for index, view in enumerate(views_on_page)]
    num_more = len(study.views) - len(views_on_page)
    more = [element("p", f"{num_more} more views: gallery/{study.name}.png.", class_="soft")] if num_more else []
    type_name = display_name(study.study_type)
    code = [" ", element("small", study.study_type)] if type_name != study.study_type else []
    return element(
        "article",
        element("h3", type_name, *code),
        element(
            "p",
            f"{CALL_TEXT[study.call].capitalize()} at probability {study.probability:.3f}. Label: {LABEL_TEXT[study.label]}.",
        ),
        element("p", element("small", f"{study.study}{study.corrupt_note} (gallery/{study.name}.png)")),
        element("div", *views, class_="views"),
        *more,
        class_="study",
        aria_label=f"{study.caption}{study.corrupt_note}",
    )


def _figure(study: GalleryStudy, view: GalleryView, index: int, drawable: bool) -> Html:
    """Draw the radiograph alone and, where maps are shown, under its map; the page holds its pixels once."""
    size, gap, name = _SIDE_PX, _SIDE_PX // 40, f"{study.name}-{index}"
    parts = [
        element(
            "image", id=name, href=local_only.data_uri(_downscale(view.pixels), lossy=True), width=size, height=size
        )
    ]
    alt = f"{study.caption}; view {view.number}: the radiograph"
    if drawable:
        colors = local_only.data_uri(heatmap.render_layer(view.cells, (_MAP_PX, _MAP_PX)))
        at = {"x": size + gap, "width": size, "height": size}
        parts += [element("use", href=f"#{name}", x=size + gap), element("image", href=colors, **at)]
        alt += f" alone, and under its class activation map, logit {view.logit:+.2f}"
    width = 2 * size + gap if drawable else size
    drawing = element("svg", *parts, viewBox=f"0 0 {width} {size}", role="img", aria_label=alt)
    return element("figure", drawing, element("figcaption", view.caption))


def _downscale(pixels: np.ndarray) -> np.ndarray:
    """Shrink a radiograph to at most _SIDE_PX pixels a side."""
    if len(pixels) <= _SIDE_PX:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS))
