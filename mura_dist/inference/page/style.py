"""Define the page's style sheet, for light and dark themes, desktop and phone.

Two fixed bars do not scroll: the terms below and, for a model of drawings, the banner above. Colors are mixed from the theme's
text color.
"""

from mura_dist.inference.page.wording import Outcome
from mura_dist.reports import heatmap
from mura_dist.reports.html import NEGATIVE_COLOR, POSITIVE_COLOR

MARKS: dict[Outcome, str] = {
    "none_flagged": NEGATIVE_COLOR,
    "flagged": POSITIVE_COLOR,
    "uncertain": "#8a8f98",
    "no_call": "#8a8f98",
}


def sheet(banner: bool) -> str:
    """Return the page's style sheet. banner: whether the page has a banner."""
    return f"<style>:root {{ --banner: {'2.4rem' if banner else '0rem'} }}{_SHEET}</style>"


def scale_gradient() -> str:
    """Return a CSS gradient of the map's colors on gray."""
    stops = []
    for step in heatmap.STEPS:
        (red, green, blue), opacity = heatmap.step_color(step)
        stops.append(f"rgb({red} {green} {blue} / {opacity:g})")
    return f"linear-gradient(to right, {', '.join(stops)}), linear-gradient(#4a4a4a, #4a4a4a)"


_SHEET = """
:root { --terms: 2.2rem; --soft: color-mix(in srgb, currentColor 72%, transparent);
        --line: color-mix(in srgb, currentColor 18%, transparent); --wash: color-mix(in srgb, currentColor 5%, transparent) }
.terms, .banner { position: fixed; left: 0; right: 0; z-index: 1100000; display: flex; align-items: center;
  justify-content: center; padding: 0 1rem; text-align: center; color: #fff; font: 600 .88rem/1.25 system-ui, sans-serif }
.terms { bottom: 0; height: var(--terms); background: #7a3500 }
.banner { top: 0; height: var(--banner); background: #174a7c }
[data-testid=stApp] { top: var(--banner); bottom: var(--terms) }
[data-testid=stMain], div:has(> [data-testid=stMain]) { height: 100% }
[data-testid=stHeader] { height: 0; min-height: 0; background: none }
[data-testid=stMainBlockContainer] { max-width: 68rem; padding: 1.6rem 1.5rem 2rem }
[data-testid=stHeading] h1 { font-size: 1.9rem; line-height: 1.2; padding: 0 0 .5rem } h2 { font-size: 1.2rem !important }
.purpose { margin: -.35rem 0 .3rem; max-width: 60rem; font-size: 1.05rem; line-height: 1.5; color: var(--soft) }
[data-testid=stElementContainer]:has(.terms) { position: absolute }
.soft { color: var(--soft); font-size: .9rem; margin: 0 }

/* the first screen: one action, then examples */
.st-key-upload-zone [data-testid=stFileUploaderDropzone]:not(:has([data-testid=stFileChip])) {
  min-height: 8.5rem; flex-direction: column; align-items: center;
  justify-content: center; gap: .6rem; background: var(--wash); border: 2px dashed var(--line) }
[data-testid=stFileUploaderDropzone]:not(:has([data-testid=stFileChip])) button { padding-inline: 1.6rem; background: #1f6fb2;
  border-color: #1f6fb2; color: #fff }
.st-key-upload-zone [data-testid=stFileUploaderDropzoneInstructions] { flex: none; align-self: center }
[data-testid=stFileUploader] [data-testid=stWidgetLabel] p { font-size: 1rem; font-weight: 600 }
/* Streamlit's text for a failed upload quotes a status code. `refused` replaces it. */
.refused { margin: 0; border-left: .3rem solid #c0392b; background: color-mix(in srgb, #c0392b 12%, transparent);
  padding: .6rem .9rem; border-radius: .3rem }
body:not(:has([data-testid=stFileChip][aria-invalid=true])) [data-testid=stElementContainer]:has(.refused) { display: none }
[data-testid=stFileChip] [role=alert], [data-testid=stTooltipErrorContent] { display: none }
[class*=st-key-cards-] { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.2rem, 1fr)); gap: .8rem }
[class*=st-key-example-] { position: relative; gap: 0; padding: 0; overflow: hidden; border: 1px solid var(--line);
  border-radius: .5rem; transition: border-color .15s, box-shadow .15s }
[class*=st-key-example-]:hover, [class*=st-key-example-]:focus-within { border-color: #3f83b5; box-shadow: 0 0 0 1px #3f83b5 }
[class*=st-key-example-] :is([data-testid=stElementContainer], .stButton, [data-testid=stTooltipHoverTarget]) { position: static }
[class*=st-key-example-] [data-testid=stElementToolbar] { display: none }
[class*=st-key-example-] img { aspect-ratio: 1; object-fit: cover; border-radius: 0; background: #000 }
[class*=st-key-example-] button { min-height: 0; padding: .45rem .6rem .55rem; border: 0; background: none; text-align: left;
  justify-content: flex-start }
[class*=st-key-example-] button p { font-size: .86rem; line-height: 1.3; white-space: normal; text-align: left }
[class*=st-key-example-] button::after { content: ""; position: absolute; inset: 0 }

/* the answer */
.outcome { border-left: .45rem solid var(--mark); border-radius: .4rem; padding: 1rem 1.2rem;
  background: color-mix(in srgb, var(--mark) 11%, transparent) }
.outcome h2 { padding: 0 0 .2rem; margin: 0; font-size: 1.75rem !important; line-height: 1.2 }
.outcome p { margin: .55rem 0 0; line-height: 1.45 } .outcome .lead { font-size: 1.05rem; margin: 0 0 .5rem }
.outcome .frequency { font-weight: 600 } .outcome small { display: block; margin-top: .5rem; font-size: .9rem; line-height: 1.45;
  color: var(--soft) }
.gauge { position: relative; height: .7rem; margin: .25rem 0 .35rem; border-radius: .35rem;
  background: color-mix(in srgb, currentColor 14%, transparent) }
.gauge > * { position: absolute; top: 0; bottom: 0 }
.gauge .band { background: color-mix(in srgb, currentColor 22%, transparent) }
.gauge .threshold { width: 2px; margin-left: -1px; top: -.2rem; bottom: -.2rem; background: currentColor }
.gauge .here { width: 1.1rem; height: 1.1rem; top: -.2rem; margin-left: -.55rem; border-radius: 50%; background: var(--mark);
  border: 2px solid #fff; box-shadow: 0 0 0 1px rgb(0 0 0 / 35%) }
.gauge-words { position: relative; height: 1.15rem; font-size: .8rem; line-height: 1.15rem; color: var(--soft) }
.gauge-words span { position: absolute; transform: translateX(-50%); white-space: nowrap }
.gauge-words span:is(.low) { transform: none; left: 0 } .gauge-words span:is(.high) { transform: none; right: 0 }
.scale { margin: .2rem 0 0 } .scale .bar { height: .8rem; border-radius: .2rem }
.scale .ends { display: grid; grid-template-columns: 1fr auto 1fr; gap: .6rem; font-size: .84rem; margin-top: .25rem }
.scale .ends :last-child { text-align: right }
.scale p { font-size: .84rem; color: var(--soft); margin: .4rem 0 0; line-height: 1.4 }
[class*=st-key-picture-] img { background: #000; object-fit: contain; border-radius: .4rem }
[class*=st-key-picture-] [data-testid=stElementToolbar] { top: .4rem; right: .4rem }
.st-key-picture-main img { max-height: min(34rem, 70vh) }
[class*=st-key-picture-] [data-testid=stMarkdownContainer] p { font-size: .92rem }
.st-key-bar { flex-wrap: nowrap; padding: .5rem .8rem; border-radius: .5rem; background: var(--wash) }
.st-key-bar p { margin: 0; font-weight: 600 }

@media (max-width: 40rem) {
  :root { --terms: 2.9rem } .terms, .banner { font-size: .8rem; padding: 0 .7rem }
  [data-testid=stMainBlockContainer] { padding: 1.1rem 1rem 1.5rem } [data-testid=stHeading] h1 { font-size: 1.5rem }
  [class*=st-key-cards-] { grid-template-columns: repeat(3, 1fr); gap: .5rem }
  [class*=st-key-example-] button { padding: .3rem .4rem .4rem } [class*=st-key-example-] button p { font-size: .78rem }
  .purpose { font-size: 1rem }
}
@media (max-width: 30rem) { :root:has(.banner) { --banner: 2.7rem } }
"""
