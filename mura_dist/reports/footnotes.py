"""Collect the footnotes of a page. A letter marks a missing number or interval; a list at the end explains each letter.

reason -> Footnotes.mark -> a letter next to the number; Footnotes.as_list -> the list
"""

import re
from itertools import product
from string import ascii_lowercase

from mura_dist.reports.html import Html, element

WILSON = (
    "Wilson interval, which assumes independent studies. The bootstrap over patients gives no interval here, because every "
    "study is right, every study is wrong, or there are too few studies."
)
# Reasons that differ only in their counts share one footnote.
_GENERAL = (
    (r"undefined in \d+ of \d+ resamples", "undefined in too many bootstrap resamples: too few studies"),
    (r"\d+ of \d+ resamples had one class only", "most resamples had one class only: too few studies"),
    (r"\d+ studies of the rarer label; .*", "too few studies of the rarer label for an interval by formula"),
)
_LETTERS = [*ascii_lowercase, *("".join(pair) for pair in product(ascii_lowercase, repeat=2))]


class Footnotes:
    """The footnotes of a page, in the order in which the page refers to them."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def mark(self, reason: str) -> Html:
        """Return the letter of a reason, as a link to its explanation."""
        text = _sentence(reason)
        letter = self._letters.setdefault(text, _LETTERS[min(len(self._letters), len(_LETTERS) - 1)])
        link = element("a", letter, href=f"#note-{letter}", aria_label=f"footnote {letter}", title=text)
        return element("sup", link, class_="mark")

    def as_list(self) -> Html:
        """Return the list that explains every letter, or nothing where there is none."""
        notes = [
            element("li", element("sup", letter), " ", text, id=f"note-{letter}")
            for text, letter in self._letters.items()
        ]
        return element("ul", *notes, class_="notes") if notes else Html()


def _sentence(reason: str) -> str:
    for pattern, general in _GENERAL:
        reason = re.sub(f"^{pattern}$", general, reason)
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}."
