"""What a step pays for being one of many: against the same processes without communication, and against a bare all-reduce.

    2, 4, 8 ... processes, each a rank with a real Engine (fleet.py); rounds A B C A B C ...
        step    as it is
        alone   the same, nothing sent (DeepSpeed's way of the gradient left out whole, the small vector not sent)
        bare    one all-reduce of the buffer that travels as the gradient
    extra = step - alone, of one round;  ratio = extra / bare

Each begins with a barrier and lasts until the last rank is done. On a GPU a ratio below 1 is what hides behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .clock import spread
from .fleet import Fleet, Job

_TURNS = ("step", "alone", "bare")
MOST = 1.2  # what the ratio is to be


def measure(job: Job, ranks: Sequence[int], *, rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each number of ranks: ranks, gradient_bytes, gradient_type, vector_bytes, and {median, min, max} of step_s, alone_s,
    bare_s, extra_s, ratio. Raises Failure where a rank ends."""
    found = []
    for number in ranks:
        with Fleet(job, number) as fleet:
            for what in _TURNS:
                fleet.play(what)  # files get into the cache, kernels are chosen, connections made
            seconds = [{what: fleet.play(what).seconds for what in _TURNS} for _ in range(rounds)]
            facts = {key: value for key, value in fleet.facts._asdict().items() if key != "device"}
            found.append({"ranks": number} | facts | _summary(seconds))
        say(f"{number} ranks: {words(found[-1])}")
    return found


def _summary(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    extras = [one["step"] - one["alone"] for one in rounds]
    ratios = [extra / one["bare"] for extra, one in zip(extras, rounds, strict=True)]
    turns = {f"{what}_s": spread([one[what] for one in rounds]) for what in _TURNS}
    return turns | {"extra_s": spread(extras), "ratio": spread(ratios)}


def words(one: dict[str, Any]) -> str:
    """A line of a table, without its number of ranks."""
    parts = [f"{key.removesuffix('_s')} {_ms(one[key])}" for key in ("step_s", "alone_s", "extra_s", "bare_s")]
    ratio = one["ratio"]
    return f"{', '.join(parts)} ms; ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _ms(value: dict[str, float]) -> str:
    return f"{1e3 * value['median']:.0f} ({1e3 * value['min']:.0f} to {1e3 * value['max']:.0f})"
