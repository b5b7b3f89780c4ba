"""What a step pays for being one of many: against the same processes without communication, and against a bare all-reduce.

    2, 4, 8 ... processes, each a rank with a real Engine (fleet.py); rounds A B C A B C ...
        step      as it is
        together  the same, 4 bytes instead of each of its two all-reduces: ranks wait for each other where a step does
        alone     the same, nothing sent (DeepSpeed's way of the gradient left out whole, the small vector not sent)
        bare      one all-reduce of the buffer that travels as the gradient
    extra = step - alone, of one round;  ratio = extra / bare;  of it waiting = together - alone
    sent = of the step's two all-reduces, from the last rank's call to the last one's return;  its ratio = sent / bare

Each begins with a barrier and lasts until the last rank is done. `extra` has all that many ranks cost, waiting for the slower
ones too, but is the small difference of two large numbers, which a busy machine blurs; `sent` is not. On a GPU an `extra` below
`bare` is what hides behind the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fleet import Fleet, Job, Turn

from mura_dist.bench.clock import spread

_TURNS = ("step", "together", "alone", "bare")
MOST = 1.2  # what the ratio is to be


def measure(job: Job, ranks: Sequence[int], *, rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each number of ranks: ranks, gradient_bytes, gradient_type, vector_bytes, and {median, min, max} of step_s, together_s,
    alone_s, bare_s, extra_s, waiting_s, sent_s, ratio (of extra), waiting_ratio, sent_ratio. Raises RunError where a rank ends."""
    found = []
    for number in ranks:
        with Fleet(job, number) as fleet:
            for what in _TURNS:
                fleet.play(what)  # files get into the cache, kernels are chosen, connections made
            turns = [{what: fleet.play(what) for what in _TURNS} for _ in range(rounds)]
            facts = {key: value for key, value in fleet.facts._asdict().items() if key != "device"}
            found.append({"ranks": number} | facts | _summary(turns))
        log(f"{number} ranks: {words(found[-1])}")
    return found


def _summary(rounds: Sequence[dict[str, Turn]]) -> dict[str, Any]:
    seconds = {what: [one[what].seconds for one in rounds] for what in _TURNS}
    for name, more in (("extra", "step"), ("waiting", "together")):
        seconds[name] = [many - alone for many, alone in zip(seconds[more], seconds["alone"], strict=True)]
    seconds["sent"] = [sum(one["step"].sent_s) for one in rounds]
    ratios = {
        name: spread([part / bare for part, bare in zip(seconds[what], seconds["bare"], strict=True)])
        for name, what in (("ratio", "extra"), ("waiting_ratio", "waiting"), ("sent_ratio", "sent"))
    }
    return {f"{what}_s": spread(values) for what, values in seconds.items()} | ratios


def words(one: dict[str, Any]) -> str:
    """A line of a table, without its number of ranks."""
    parts = [f"{what} {_ms(one[f'{what}_s'])}" for what in ("step", "alone", "extra", "sent", "bare")]
    ratios = (("extra", "ratio"), ("of it waiting", "waiting_ratio"), ("sent", "sent_ratio"))
    return f"{', '.join(parts)} ms; over bare: {', '.join(f'{what} {_times(one[key])}' for what, key in ratios)}"


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _ms(value: dict[str, float]) -> str:
    return f"{1e3 * value['median']:.0f} ({1e3 * value['min']:.0f} to {1e3 * value['max']:.0f})"
