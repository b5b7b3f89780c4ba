"""Build self-contained HTML pages: one file, no network, no script; light and dark, print and phone.

`element` escapes every text, so no name of a file or folder can become markup. `Html` is text that already is markup.
"""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Blue and orange can be told apart with every kind of color vision, on white and on black.
NEGATIVE_COLOR, POSITIVE_COLOR = "#3f83b5", "#d9722b"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --line: #d5dae0; --wash: #f3f5f7; --paper: #fff;
        --warn: #8a3c00; --warn-wash: #fff1e3 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --line: #39424c; --wash: #1d232a;
        --paper: #12161b; --warn: #ffc48a; --warn-wash: #3a2610 } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; padding: 1.5rem 1rem 2.5rem; max-width: 62rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem }
p, ul { margin: .5rem 0; max-width: 46rem } small, .soft { color: var(--soft) }
.columns { max-width: none; columns: 24rem; column-gap: 2.5rem; font-size: .92rem } .columns li { break-inside: avoid }
.mark { font-size: .72rem; line-height: 0; margin-left: .12rem; font-weight: 400 } .mark a { padding: 0 .1rem }
.notes { list-style: none; padding: 0; font-size: .92rem } .notes li:target { background: var(--wash) }
.banner { border-left: .35rem solid var(--warn); background: var(--warn-wash); color: var(--warn); font-weight: 600;
          padding: .7rem 1rem; margin: 1rem 0; max-width: none }
.banner::first-letter { text-transform: uppercase }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: 1rem 0 }
.tiles > div { background: var(--wash); border-radius: .4rem; padding: .7rem .9rem }
.tiles strong { display: block; font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.scroll { overflow-x: auto; margin: .6rem 0 }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .92rem }
.caption { color: var(--soft); font-size: .92rem; margin: .8rem 0 0 } .caption + .scroll { margin-top: .3rem }
th, td { padding: .32rem .8rem .32rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
         white-space: nowrap }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom }
th:first-child { position: sticky; left: 0; background: var(--paper); white-space: normal; max-width: 16rem;
                 overflow-wrap: break-word }
th:first-child, .facts td { text-align: left } tbody th { font-weight: 500 }
.facts td, .facts td small { white-space: normal; overflow-wrap: anywhere }
.facts th:first-child { vertical-align: top; max-width: none }
td small, th small { display: block; font-weight: 400 } td small { white-space: nowrap }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: .4rem 1.2rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)) }
figure { margin: .6rem 0; break-inside: avoid } figure svg { display: block; width: 100%; height: auto }
figcaption { font-size: .88rem; color: var(--soft) }
details { margin: .6rem 0; border: 1px solid var(--line); border-radius: .4rem; padding: .45rem .8rem }
summary { cursor: pointer; font-size: .94rem } summary small { font-weight: 400 } details[open] > summary { margin-bottom: .5rem }
.folds { display: grid; gap: .5rem .8rem; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr));
         align-items: start; margin: .7rem 0 }
.folds > details { margin: 0; min-width: 0 } .folds > details[open] { grid-column: 1 / -1 }
a { color: inherit; text-underline-offset: .2em; text-decoration-color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.4rem 0 0; padding: .6rem 0;
      border-top: 1px solid var(--line); border-bottom: 1px solid var(--line) }
svg text { font-variant-numeric: tabular-nums }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: .8rem; color: var(--soft);
         font-size: .88rem }
@media (max-width: 34rem) { th:first-child { max-width: 38vw; min-width: 5rem }
  .stack, .stack tbody { display: block } .stack thead { display: none }
  .stack tr { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .35rem .35rem;
              padding: .5rem 0; border-bottom: 1px solid var(--line) }
  .stack th, .stack td { border: 0; padding: 0; text-align: left } .stack td:empty { display: none }
  .stack td { grid-column: span 3 } .stack td.short { grid-column: span 1; overflow-wrap: normal }
  details .stack td.short { grid-column: span 2 }
  .stack th:first-child { grid-column: 1 / -1; position: static; max-width: none; font-weight: 600 }
  .stack th:first-child small { display: inline; margin-left: .4rem }
  .stack td::before { content: attr(data-name); display: block; font-size: .72rem; color: var(--soft);
                      white-space: normal }
  .stack td, .stack td small { white-space: normal }
  .facts tr { display: block; padding: .3rem 0; border-bottom: 1px solid var(--line) }
  .facts th, .facts td { display: block; border: 0; padding: 0; white-space: normal } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --wash: #fff; --paper: #fff; --warn: #000;
    --warn-wash: #fff } html { font-size: 10pt } body { max-width: none; padding: 0 } h3, .caption { break-after: avoid }
  h2 { break-after: avoid } .banner, .tiles > div { border: 1px solid }
  .pictures { grid-template-columns: repeat(3, 1fr) } .wide { grid-template-columns: repeat(2, 1fr) }
  .scroll { overflow: visible } th:first-child { position: static } table { font-size: 8.5pt }
  tr { break-inside: avoid } nav { display: none }
  .folds { display: block }
  details { border: 0; padding: 0 } details::details-content { content-visibility: visible; display: block; height: auto } }
"""


_VOID = ("img", "meta")
_MAX_PHONE_COLUMNS = 2
_SHORT_CELL, _SHORT_NAME = 6, 8  # characters; a short cell takes a sixth of a phone's width
# Control characters and those that change the text direction, with which a name could disguise itself.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Markup. Any other string is text and gets escaped."""


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """Return an element: `element("p", "a < b", class_="soft")` is `<p class="soft">a &lt; b</p>`."""
    named = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return Html(f"<{tag}{named}>" if tag in _VOID else f"<{tag}{named}>{join(children)}</{tag}>")


def join(children: Iterable[Any]) -> Html:
    """Return the children one after the other; text is escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(value: Any) -> str:
    """Return `value` as escaped text, with U+FFFD for each control character."""
    return html.escape(_CONTROLS.sub("\ufffd", str(value)))


def page(title: str, *body: Any, remark: str = "", style: str = "") -> str:
    """Return the content of an HTML file.

    Args:
        title: The title.
        body: The content of the body.
        remark: A comment in the first lines, for readers who open the file as text.
        style: Additional CSS.
    """
    assert "--" not in remark, remark
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{element('title', title)}<style>{_STYLE}{style}</style>"
    )
    first = f"<!DOCTYPE html>\n<!-- {remark} -->" if remark else "<!DOCTYPE html>"
    return f'{first}\n<html lang="en"><head>{head}</head>\n<body>\n{join(body)}\n</body></html>\n'


def section(title: Any, *body: Any, **attributes: Any) -> Html:
    """Return a section with a heading."""
    return element("section", element("h2", title), *body, Html("\n"), **attributes)


def details(title: Any, *body: Any) -> Html:
    """Return a collapsible block. Print shows its content."""
    return element("details", element("summary", title), *body)


def banner(text: str) -> Html:
    """Return a highlighted warning."""
    return element("p", text, class_="banner", role="note")


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], caption: str = "") -> Html:
    """Return a table. The first column holds the row headers.

    On a phone, each row of a table with more than two columns becomes a block, with each value under its column's name.
    """
    stacks = len(header) > _MAX_PHONE_COLUMNS
    names = [_text_of(cell) if stacks else "" for cell in header]
    head = element("thead", element("tr", *(element("th", cell, scope="col") for cell in header)))
    body = []
    for row in rows:
        cells = (_cell(name, cell) for name, cell in zip(names[1:], row[1:], strict=True))
        body.append(element("tr", element("th", row[0], scope="row"), *cells))
    region = {"role": "region", "aria_label": caption} if caption else {}
    layout = {"class_": "stack"} if stacks else {}
    framed_table = element(
        "div", element("table", head, element("tbody", *body), **layout), class_="scroll", tabindex="0", **region
    )
    # A caption inside the table would be as wide as the table and scroll with it.
    return join((element("p", caption, class_="caption"), framed_table)) if caption else framed_table


def _cell(name: str, cell: Any) -> Html:
    """Return a cell. name: its column's name if the table becomes blocks on a phone, else ""."""
    if not name:
        return element("td", cell)
    short = not isinstance(cell, Html) and len(str(cell)) <= _SHORT_CELL and len(name) <= _SHORT_NAME
    return element("td", cell, data_name=name, **({"class_": "short"} if short else {}))


def _text_of(cell: Any) -> str:
    """Return the text of a header cell without its markup."""
    if not isinstance(cell, Html):
        return str(cell)
    return html.unescape(re.sub("<[^>]*>", "", cell.replace("<small>", ", ")))


def format_value(value: Any) -> str:
    """Return a setting as readable text, without JSON syntax."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_value, value)) or "none"
    return str(value)


def facts_table(values: Mapping[str, Any]) -> Html:
    """Return a table of names and values."""
    rows = [element("tr", element("th", key, scope="row"), element("td", value)) for key, value in values.items()]
    return element("table", element("tbody", *rows), class_="facts")


def tile(name: str, value: str, below: Any) -> Html:
    """Return a tile with a large value and small text below it."""
    return element("div", name, element("strong", value), element("small", below))


def figure(svg: Html, caption: str = "") -> Html:
    """Return an SVG plot with its caption."""
    return element("figure", svg, *([element("figcaption", caption)] if caption else []))


def bars(names: Sequence[str], series: Mapping[str, Sequence[int]], alt: str) -> Html:
    """Return a bar chart as inline SVG.

    Args:
        names: One for each group of bars. Every second, third, ... is drawn if there are more than twelve.
        series: At most two; each has one count for each name.
        alt: Text for screen readers.
    """
    colors = (NEGATIVE_COLOR, POSITIVE_COLOR)
    assert 0 < len(series) <= len(colors), list(series)
    width, top, floor = 420, 30, 166
    peak = max((value for values in series.values() for value in values), default=0) or 1
    group_px, stride = width / max(len(names), 1), -(-len(names) // 12)
    bar_px = group_px * 0.82 / len(series)
    parts = [_rect(0, floor, width, 1, "currentColor")]
    for number, (label, values) in enumerate(series.items()):
        if len(series) > 1:
            parts += [_rect(150 * number, 2, 9, 9, colors[number]), _text(150 * number + 14, 11, label, "start")]
        for index, value in enumerate(values):
            x, height = index * group_px + group_px * 0.09 + number * bar_px, (floor - top) * value / peak
            parts.append(_rect(x, floor - height, bar_px, height, colors[number]))
            if value and bar_px >= 7 * len(f"{peak:,}"):
                parts.append(_text(x + bar_px / 2, floor - height - 3, f"{value:,}", "middle"))
    for index in range(0, len(names), stride):
        parts.append(_text((index + 0.5) * group_px, floor + 16, names[index], "middle"))
    return element("svg", *parts, viewBox=f"0 0 {width} {floor + 24}", role="img", aria_label=alt, font_size="11")


def _rect(x: float, y: float, width: float, height: float, fill: str) -> Html:
    return element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", fill=fill)


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill="currentColor")
