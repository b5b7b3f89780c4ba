"""Measure the communication cost of a step, against the same processes without communication and a bare all-reduce.

    2, 4, 8 ... processes, each a rank with a real Engine (fleet.py); rounds A B C A B C ...
        step      a step of the engine
        together  the same step with 4 bytes instead of each of its two all-reduces: the ranks still wait for each other
        alone     the same step with nothing sent
        bare      one all-reduce of the gradient's buffer
    extra = step - alone, of one round;  ratio = extra / bare;  waiting = together - alone
    sent = both all-reduces of the step, from the last rank's call to the last return;  its ratio = sent / bare

Each turn begins with a barrier and ends with the last rank. `extra` includes waiting for slower ranks. It is a small difference
of two large numbers, which is noisy on a busy machine. `sent` is not. On a GPU an `extra` below `bare` means that part of the
all-reduce overlaps with the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fleet import Fleet, Job, Turn

from mura_dist.bench.clock import spread

_TURNS = ("step", "together", "alone", "bare")
MOST = 1.2  # limit of the ratio


def measure(job: Job, ranks: Sequence[int], *, rounds: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure the cost of communication for each number of ranks.

    Returns:
        By number of ranks: ranks, gradient_bytes, gradient_type, vector_bytes, and {median, min, max} of step_s, together_s,
        alone_s, bare_s, extra_s, waiting_s, sent_s, ratio (of extra), waiting_ratio, sent_ratio.

    Raises:
        RunError: A rank exits.
    """
    results = []
    for number in ranks:
        with Fleet(job, number) as fleet:
            for what in _TURNS:
                fleet.play(what)  # warm up: caches, kernels, connections
            turns = [{what: fleet.play(what) for what in _TURNS} for _ in range(rounds)]
            facts = {key: value for key, value in fleet.facts._asdict().items() if key != "device"}
            results.append({"ranks": number} | facts | _summary(turns))
        log(f"{number} ranks: {format_row(results[-1])}")
    return results


def _summary(rounds: Sequence[dict[str, Turn]]) -> dict[str, Any]:
    seconds = {what: [row[what].seconds for row in rounds] for what in _TURNS}
    for name, more in (("extra", "step"), ("waiting", "together")):
        seconds[name] = [many - alone for many, alone in zip(seconds[more], seconds["alone"], strict=True)]
    seconds["sent"] = [sum(row["step"].sent_s) for row in rounds]
    ratios = {
        name: spread([value / bare for value, bare in zip(seconds[what], seconds["bare"], strict=True)])
        for name, what in (("ratio", "extra"), ("waiting_ratio", "waiting"), ("sent_ratio", "sent"))
    }
    return {f"{what}_s": spread(values) for what, values in seconds.items()} | ratios


def format_row(row: dict[str, Any]) -> str:
    """Return a line of the table, without its number of ranks."""
    parts = [f"{what} {_ms(row[f'{what}_s'])}" for what in ("step", "alone", "extra", "sent", "bare")]
    ratios = (("extra", "ratio"), ("of it waiting", "waiting_ratio"), ("sent", "sent_ratio"))
    return f"{', '.join(parts)} ms; over bare: {', '.join(f'{what} {_times(row[key])}' for what, key in ratios)}"


def _times(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"


def _ms(value: dict[str, float]) -> str:
    return f"{1e3 * value['median']:.0f} ({1e3 * value['min']:.0f} to {1e3 * value['max']:.0f})"
