"""Real runs: the trace that a prediction starts from, and the runs that it is held against.

    measure   as many ranks as this machine has processors (GPUs), at once, nothing sent; two ranks' bare all-reduces, for
              what a byte costs -> Trace
    check     2, 4, 8 ranks in namespaces, networks one after the other: steps as they are, against the prediction

Seconds are from the first rank's start to the last one's end (fleet.py).
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import workers
from . import networks, scaling
from .clock import spread
from .fleet import Fleet, Job
from .networks import Spaces
from .scaling import Network, Trace

WITHIN = 0.1  # what the prediction is to be right to
_NO_NETWORK = Network.parse("none")


def measure(job: Job, *, rounds: int, provenance: dict[str, Any], say: Callable[[str], None]) -> Trace:
    """Raises Failure where a rank ends."""
    at_once, shared = _at_once()
    with Fleet(job, at_once) as fleet:
        for what in ("alone", "evaluation"):
            fleet.play(what)
        turns = [fleet.play("alone") for _ in range(rounds)]
        evaluation = [own for _ in range(rounds) for own in fleet.play("evaluation").own_s]
        facts = fleet.facts
    say(f"{at_once} ranks at once: {_ms([own for turn in turns for own in turn.own_s])} a step with nothing sent")
    byte_s, hop_s = (0.0, 0.0) if facts.device == "cuda" and at_once == 1 else _of_a_byte(job, rounds, say)
    losses = at_once + 1 + at_once * job.micros
    pairs = [(micros, own) for turn in turns for micros, own in zip(turn.micros_s, turn.own_s, strict=True)]
    return Trace(
        device=facts.device,
        processors=shared,
        architecture=job.architecture,
        size_px=job.size,
        micro_batch=job.micro_batch,
        precision=job.precision,
        micro_s=[sum(micros) / job.micros for micros, _ in pairs],
        rest_s=[own - sum(micros) for micros, own in pairs],
        evaluation_s=evaluation,
        gradient_bytes=facts.gradient_bytes,
        fixed_bytes=facts.vector_bytes - 4 * losses,
        host_s_per_byte=byte_s,
        hop_s=hop_s,
        assumed=[] if byte_s else ["the collectives' own work costs nothing: one GPU has nobody to send to"],
        measured={"rounds": rounds, "ranks_at_once": at_once, "job": job.__dict__} | provenance,
    )


def _at_once() -> tuple[int, int | None]:
    """(ranks that compute at the same time without taking from each other, processors that more of them would share)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), None
    return workers.processors(), workers.processors()


def _of_a_byte(job: Job, rounds: int, say: Callable[[str], None]) -> tuple[float, float]:
    """Seconds of a byte and of a hop, between two ranks over the paths that `check` uses, unlimited."""
    with contextlib.ExitStack() as stack:
        _, fleet = _placed(stack, job, 2, apart=not networks.lacking())
        for what in ("bare", "tiny"):
            fleet.play(what)
        bare = [fleet.play("bare").seconds for _ in range(rounds)]
        tiny = [fleet.play("tiny").seconds for _ in range(rounds)]
        size = fleet.facts.gradient_bytes
    say(f"2 ranks: {_ms(bare)} an all-reduce of {size / 1e6:.1f} MB, {_ms(tiny)} of 4 bytes")
    return statistics.median(bare) / size, statistics.median(tiny) / 2  # 2 (n - 1) / n bytes a rank, 2 (n - 1) hops


def check(
    trace: Trace,
    job: Job,
    ranks: Sequence[int],
    links: Sequence[Network],
    *,
    rounds: int,
    relay: Path | None = None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """For each number of ranks and network: ranks, network, step_s {median, min, max}, predicted_s, error (predicted over the
    median, less 1), parts (of the prediction), sent_bytes (a rank and step, by the kernel), predicted_bytes.

    relay: the script that makes a latency. Raises Refusal where this machine has no namespaces, Failure where a rank ends.
    """
    apart, found = any(network != _NO_NETWORK for network in links), []
    latencies = list(dict.fromkeys(network.latency_s for network in links))
    for number, latency_s in itertools.product(ranks, latencies):
        with contextlib.ExitStack() as stack:
            spaces, fleet = _placed(stack, job, number, apart=apart, latency_s=latency_s, relay=relay)
            for network in (network for network in links if network.latency_s == latency_s):
                measured = _one(trace, job, fleet, spaces, network, rounds)
                found.append({"ranks": number, "network": str(network)} | measured)
                say(words(found[-1]))
    return found


def _placed(
    stack: contextlib.ExitStack, job: Job, ranks: int, *, apart: bool, latency_s: float = 0.0, relay: Path | None = None
) -> tuple[Spaces | None, Fleet]:
    """apart: each in a namespace of its own."""
    if not apart:
        return None, stack.enter_context(Fleet(job, ranks))
    spaces = stack.enter_context(Spaces(ranks, latency_s=latency_s, relay=relay))
    return spaces, stack.enter_context(Fleet(job, ranks, spaces=spaces.names, address=spaces.address))


def _one(trace: Trace, job: Job, fleet: Fleet, spaces: Spaces | None, network: Network, rounds: int) -> dict[str, Any]:
    if spaces is not None:
        network = replace(network, mtu=spaces.mtu)
        spaces.limit(network)
    fleet.play("step")
    before = spaces.sent_bytes() if spaces else []
    seconds = [fleet.play("step").seconds for _ in range(rounds)]
    after = spaces.sent_bytes() if spaces else []
    sent = [(b - a) / rounds for a, b in zip(before, after, strict=True)]
    predicted = scaling.step(trace, fleet.ranks, job.micros, network)
    measured = spread(seconds)
    payload = trace.gradient_bytes + trace.vector_bytes(fleet.ranks, job.micros)
    return {
        "step_s": measured,
        "predicted_s": predicted.seconds,
        "error": predicted.seconds / measured["median"] - 1,
        "parts": predicted.__dict__,
        "sent_bytes": max(sent) if sent else None,
        "predicted_bytes": network.framed(2 * (fleet.ranks - 1) / fleet.ranks * payload),
    }


def words(one: dict[str, Any]) -> str:
    """A line of the table."""
    step, parts = one["step_s"], one["parts"]
    network = parts["wire_s"] + parts["latency_s"]
    told = f"{one['ranks']} ranks, {one['network']}: {step['median']:.2f} s ({step['min']:.2f} to {step['max']:.2f})"
    said = f"{told}, predicted {one['predicted_s']:.2f} ({one['error']:+.1%}), of which {network:.2f} network"
    if one["sent_bytes"] is None:
        return said
    return f"{said}; sent {one['sent_bytes'] / 1e6:.1f} MB a rank, predicted {one['predicted_bytes'] / 1e6:.1f}"


def sizes(architecture: str) -> tuple[int, int]:
    """Numbers in the flat gradient, and in BatchNorm's statistics."""
    from .. import model
    from ..batchnorm import RunningStatistics
    from ..flat import Flat

    network = model.build(architecture)
    return Flat(network, channels_last=True).weights.numel(), RunningStatistics(network).sum.numel()


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}) ms"
