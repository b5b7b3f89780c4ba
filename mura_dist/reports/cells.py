"""Build what the sections of a report share: the cells of their tables, picture grids, lists.

findings, pictures -> Report -> value_cell, group_cell, format_count, picture_grid -> markup
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mura_dist.data.mura import display_name
from mura_dist.metrics import intervals
from mura_dist.metrics.summary import format_number
from mura_dist.reports.findings import JsonObject
from mura_dist.reports.footnotes import WILSON, Footnotes
from mura_dist.reports.html import Html, element, figure, join
from mura_dist.reports.svg import Picture

INDEPENDENT = "assumes independent studies"
NOT_GIVEN = element("p", "Not available.", class_="soft")


@dataclass(frozen=True)
class Report:
    """The input of a section: the findings, the pictures by name, the footnotes of the page."""

    findings: JsonObject
    pictures: Mapping[str, Picture]
    notes: Footnotes = field(default_factory=Footnotes)

    @property
    def measured(self) -> JsonObject:
        """The content of metrics.json."""
        measured: JsonObject = self.findings["metrics"]
        return measured

    def value_cell(self, group: JsonObject, name: str) -> Html:
        """Return a number, with its interval below it. A footnote explains a missing number or interval."""
        value, interval = group.get(name), format_interval(group, name)
        if value is None or not interval:
            return join((format_number(value), self.missing_mark(group, name)))
        return join((format_number(value), element("small", interval, self.wilson_mark(group, name))))

    def missing_mark(self, group: JsonObject, name: str) -> Html:
        """Return the footnote mark of a missing number or interval, or nothing where no reason is known."""
        reasons = group.get("reasons") or {}
        reason = reasons.get(name if name in reasons else f"{name}_low")
        return self.notes.mark(reason) if reason else Html()

    def wilson_mark(self, group: JsonObject, name: str) -> Html:
        """Return the footnote mark of a Wilson interval, or nothing for a bootstrap interval."""
        return self.notes.mark(WILSON) if group.get(f"{name}_interval") == intervals.WILSON else Html()

    def picture_grid(self, names: Sequence[str], wide: bool = False) -> Iterator[Html]:
        """Yield a grid of the pictures that exist."""
        pictures = [self.pictures[name] for name in names if name in self.pictures]
        if pictures:
            figures = (figure(picture.inline(), picture.caption) for picture in pictures)
            yield element("div", *figures, class_="wide pictures" if wide else "pictures")


def format_interval(group: JsonObject, name: str) -> str:
    """Return `0.602 to 0.794`, or "" where there is no interval."""
    low, high = group.get(f"{name}_low"), group.get(f"{name}_high")
    return "" if low is None or high is None else f"{format_number(low)} to {format_number(high)}"


def group_cell(name: str) -> Html:
    """Return the first cell of a group's row: the name of the study type, with MURA's code in small print."""
    if name == "overall":
        return join(("All studies",))
    type_name = display_name(name)
    return join((type_name, element("small", name))) if type_name != name else join((name,))


def format_count(value: int | None) -> str:
    """Return a count with thousands separators, or `-` for None."""
    return "-" if value is None else f"{value:,}"


def bullet_list(lines: Iterable[Any], **attributes: Any) -> Html:
    """Return a bullet list."""
    return element("ul", *(element("li", line) for line in lines), **attributes)


def details_grid(blocks: Iterable[Html]) -> Html:
    """Return a grid of collapsible blocks. An open block takes the full width."""
    return element("div", *blocks, class_="folds")
