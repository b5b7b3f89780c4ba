"""How often the model was wrong, in counts that a reader can check: "Of 22 normal hand studies in the test set, 3 were flagged".

    counts, interval -> Frequency -> sentence

A share of fewer than MIN_FOR_SHARE studies is not written in percent: the count says all there is.
"""

import math
from dataclasses import dataclass

from mura_dist.metrics.intervals import compute_wilson_interval

MIN_FOR_SHARE = 30
TOO_FEW = "too few to say more"
WILSON = "Wilson's, which assumes independent studies"


@dataclass(frozen=True)
class Frequency:
    """`num` of `total` studies; low, high: the bootstrap's 95 % interval of the share, None where it has none."""

    num: int
    total: int
    low: float | None = None
    high: float | None = None

    def sentence(self, subject: str, verb: str) -> str:
        """Return a sentence without its full stop.

        Args:
            subject: What is counted, in the plural: "normal hand studies in the test set".
            verb: What happened to `num` of them: "flagged".
        """
        if self.total == 0:
            return f"How many {subject} are {verb} is unknown: there are none"
        rest = f": {self.share()}" if self.total >= MIN_FOR_SHARE else f"; {TOO_FEW}"
        return f"Of {self.total:,} {_singular(subject) if self.total == 1 else subject}, {self.count()} {verb}{rest}"

    def count(self) -> str:
        """Return `3 were`, `none were`, `all 4 were`, `1 was`."""
        if self.num == 0:
            return "none was" if self.total == 1 else "none were"
        if self.num == 1:
            return "1 was"
        return f"all {self.total:,} were" if self.num == self.total else f"{self.num:,} were"

    def share(self) -> str:
        """Return the share and its interval: the bootstrap's, else Wilson's by name."""
        low, high, name = self.low, self.high, ""
        if low is None or high is None:
            (low, high), name = compute_wilson_interval(self.num, self.total), f"; {WILSON}"
        return f"{_percent(self.num / self.total)} (95 % interval {_percent(low)} to {_percent(high)}{name})"


def _singular(subject: str) -> str:
    return subject.replace(" studies ", " study ", 1)


def _percent(share: float) -> str:
    """Return a share in percent: never "0 %" of what did happen, nor "100 %" of what did not always happen."""
    if 1e-9 < share < 0.005:
        return "under 1 %"
    if 0.995 < share < 1 - 1e-9:
        return "over 99 %"
    return f"{math.floor(100 * share + 0.5)} %"
