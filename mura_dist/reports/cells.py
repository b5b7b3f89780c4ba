"""What the sections of a report share: the report as they get it, and cells of its tables.

findings, pictures -> Report -> name_cell, stacked, num -> the cells of a table          shown, folds -> pictures, folded parts
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mura_dist.data.mura import display_name
from mura_dist.metrics import intervals
from mura_dist.metrics.summary import format_number
from mura_dist.reports.footnotes import WILSON, Footnotes
from mura_dist.reports.html import Html, element, figure, join
from mura_dist.reports.svg import Picture

INDEPENDENT = "assumes independent studies"
NOT_GIVEN = element("p", "Not given to this report.", class_="soft")
Found = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What a section is made of: findings.findings, the pictures by name, and the footnotes it may add to."""

    findings: Found
    pictures: Mapping[str, Picture]
    notes: Footnotes = field(default_factory=Footnotes)

    @property
    def measured(self) -> Found:
        """The content of metrics.json."""
        measured: Found = self.findings["metrics"]
        return measured

    def stacked(self, group: Found, name: str) -> Html:
        """Return a number with its interval in small print below it, and a footnote's mark for what is missing."""
        value, interval = group.get(name), between(group, name)
        if value is None or not interval:
            return join((format_number(value), self.absence(group, name)))
        return join((format_number(value), element("small", interval, self.wilson_mark(group, name))))

    def absence(self, group: Found, name: str) -> Html:
        """Return the footnote's mark of a missing number or interval; nothing where no reason is known."""
        reasons = group.get("reasons") or {}
        reason = reasons.get(name if name in reasons else f"{name}_low")
        return self.notes.mark(reason) if reason else Html()

    def wilson_mark(self, group: Found, name: str) -> Html:
        """Return the footnote's mark of an interval that is Wilson's; nothing for a bootstrap's."""
        return self.notes.mark(WILSON) if group.get(f"{name}_interval") == intervals.WILSON else Html()

    def shown(self, names: Sequence[str], wide: bool = False) -> Iterator[Html]:
        """Yield those of the pictures that exist, side by side."""
        chosen = [self.pictures[name] for name in names if name in self.pictures]
        if chosen:
            figures = (figure(picture.inline(), picture.caption) for picture in chosen)
            yield element("div", *figures, class_="wide pictures" if wide else "pictures")


def between(group: Found, name: str) -> str:
    """Return `0.602 to 0.794`; "" where there is no interval."""
    low, high = group.get(f"{name}_low"), group.get(f"{name}_high")
    return "" if low is None or high is None else f"{format_number(low)} to {format_number(high)}"


def group_cell(name: str) -> Html:
    """Return a group's name for the first cell of its row: a study type in words, MURA's code in small print."""
    if name == "overall":
        return join(("All studies",))
    type_name = display_name(name)
    return join((type_name, element("small", name))) if type_name != name else join((name,))


def num(value: int | None) -> str:
    """Return a count with its thousands separated, `-` where there is none."""
    return "-" if value is None else f"{value:,}"


def bullets(lines: Iterable[Any], **attributes: Any) -> Html:
    """Return a list of one item a line."""
    return element("ul", *(element("li", line) for line in lines), **attributes)


def folds(parts: Iterable[Html]) -> Html:
    """Return folded parts side by side where there is room; an open one takes the whole width."""
    return element("div", *parts, class_="folds")
