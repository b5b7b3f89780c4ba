"""Write how often the model was wrong as counts: "Of 22 normal hand studies in the test set, 3 were flagged".

    counts, interval -> Frequency -> sentence

With fewer than MIN_FOR_SHARE studies, the sentence has no percentage.
"""

import math
from dataclasses import dataclass

from mura_dist.metrics.intervals import compute_wilson_interval

MIN_FOR_SHARE = 30
TOO_FEW = "too few studies for a percentage"
WILSON = "Wilson interval"


@dataclass(frozen=True)
class Frequency:
    """`num` of `total` studies. low, high: the bootstrap's 95 % interval of the share, or None."""

    num: int
    total: int
    low: float | None = None
    high: float | None = None

    def sentence(self, subject: str, verb: str) -> str:
        """Return a sentence without its full stop.

        Args:
            subject: The counted studies in the plural: "normal hand studies in the test set".
            verb: A past participle: "flagged".
        """
        if self.total == 0:
            return f"How many {subject} are {verb} is unknown: there are none"
        share = f": {self.share()}" if self.total >= MIN_FOR_SHARE else f" ({TOO_FEW})"
        return f"Of {self.total:,} {_singular(subject) if self.total == 1 else subject}, {self.count()} {verb}{share}"

    def count(self) -> str:
        """Return `3 were`, `none were`, `all 4 were`, `1 was`."""
        if self.num == 0:
            return "none was" if self.total == 1 else "none were"
        if self.num == 1:
            return "1 was"
        return f"all {self.total:,} were" if self.num == self.total else f"{self.num:,} were"

    def share(self) -> str:
        """Return the share and its interval: the bootstrap's, or else a Wilson interval with its name."""
        share = _percent(self.num / self.total)
        if self.low is not None and self.high is not None:
            return f"{share} (95 % interval {_percent(self.low)} to {_percent(self.high)})"
        low, high = compute_wilson_interval(self.num, self.total)
        return f"{share} (95 % {WILSON} {_percent(low)} to {_percent(high)}, which assumes independent studies)"


def _singular(subject: str) -> str:
    return subject.replace(" studies ", " study ", 1)


def _percent(share: float) -> str:
    """Return a share in percent. "0 %" and "100 %" are exact, not rounded."""
    if 1e-9 < share < 0.005:
        return "under 1 %"
    if 0.995 < share < 1 - 1e-9:
        return "over 99 %"
    return f"{math.floor(100 * share + 0.5)} %"
