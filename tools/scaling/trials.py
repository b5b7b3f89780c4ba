"""Real runs: the trace that a prediction starts from, and the runs that it is held against.

    Probe     as many ranks as this machine has processors (GPUs), at once, nothing sent; two ranks' bare all-reduces, for what
              a byte costs -> Trace
    check     2, 4, 8 ranks in namespaces, networks one after the other: steps as they are, against the prediction; in turn with
              the probe, or what else the machine does would be in one of them only

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

import networks
import scaling
from fleet import Fleet, Job, Turn
from networks import Spaces
from scaling import Network, Trace, head_length

from mura_dist.bench.clock import spread
from mura_dist.distributed import processes

WITHIN = 0.1  # what the prediction is to be right to
_NO_NETWORK = Network.parse("none")


class Probe:
    """What a rank is worth now: a sample a round, of which the last so many make a trace."""

    def __init__(self, job: Job, stack: contextlib.ExitStack, provenance: dict[str, Any]) -> None:
        """Its ranks end with `stack`. Raises RunError where one ends before."""
        self._job, self._provenance = job, provenance
        self._at_once, self._shared = _at_once()
        apart = not networks.lacking()
        _, self._fleet = _placed(stack, job, self._at_once, apart=apart)
        self._alone = self._at_once == 1 and self._fleet.facts.device == "cuda"  # nobody to send to
        self._pair = self._fleet
        if self._at_once != 2 and not self._alone:
            _, self._pair = _placed(stack, job, 2, apart=apart)
        self._turns: list[dict[str, Turn]] = []
        self.sample()
        self._turns.clear()  # files came into the cache, kernels were chosen, connections made

    def sample(self) -> None:
        turn = {what: self._fleet.play(what) for what in ("alone", "evaluation")}
        if not self._alone:
            turn |= {what: self._pair.play(what) for what in ("bare", "tiny")}
        self._turns.append(turn)

    def trace(self, last: int) -> Trace:
        turns, job, facts = self._turns[-last:], self._job, self._fleet.facts
        alone = [turn["alone"] for turn in turns]
        pairs = [pair for turn in alone for pair in zip(turn.micros_s, turn.own_s, strict=True)]
        per_step = head_length(self._at_once) + self._at_once * job.micros
        return Trace(
            device=facts.device,
            processors=self._shared,
            architecture=job.architecture,
            size_px=job.size,
            micro_batch=job.micro_batch,
            precision=job.precision,
            micro_s=[sum(micros) / job.micros for micros, _ in pairs],
            rest_s=[own - sum(micros) for micros, own in pairs],
            evaluation_s=[own for turn in turns for own in turn["evaluation"].own_s],
            gradient_bytes=self._pair.facts.gradient_bytes,
            fixed_bytes=facts.vector_bytes - 4 * per_step,
            host_s_per_byte=self._of_pair("bare", turns)
            / self._pair.facts.gradient_bytes,  # 2 (n - 1) / n of the bytes a rank
            hop_s=self._of_pair("tiny", turns) / 2,  # 2 (n - 1) hops
            assumed=["the collectives' own work costs nothing: one GPU has nobody to send to"] if self._alone else [],
            measured={"rounds": len(turns), "ranks_at_once": self._at_once, "job": job.__dict__} | self._provenance,
        )

    def _of_pair(self, what: str, turns: Sequence[dict[str, Turn]]) -> float:
        """Median seconds, had each of two ranks a processor."""
        if self._alone:
            return 0.0
        crowd = max(1.0, 2 / self._shared) if self._shared else 1.0
        return statistics.median(turn[what].seconds for turn in turns) / crowd


def measure(job: Job, *, rounds: int, provenance: dict[str, Any], log: Callable[[str], None]) -> Trace:
    """Raises RunError where a rank ends."""
    with contextlib.ExitStack() as stack:
        probe = Probe(job, stack, provenance)
        for _ in range(rounds):
            probe.sample()
        trace = probe.trace(rounds)
    own = [a + b for a, b in zip(trace.micro_s, trace.rest_s, strict=True)]
    log(
        f"a step with nothing sent {_ms(own)}; an all-reduce of two {1e3 * trace.host_s_per_byte * trace.gradient_bytes:.1f} ms"
    )
    return trace


def _at_once() -> tuple[int, int | None]:
    """(ranks that compute at the same time without taking from each other, processors that more of them would share)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), None
    return processes.num_processors(), processes.num_processors()


def check(
    trace: Trace | None,
    job: Job,
    ranks: Sequence[int],
    links: Sequence[Network],
    *,
    rounds: int,
    relay: Path | None = None,
    provenance: dict[str, Any] | None = None,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """For each number of ranks and network: ranks, network, step_s {median, min, max}, predicted_s, error (predicted over the
    median, less 1), parts (of the prediction), sent_bytes (a rank and step, by the kernel), predicted_bytes.

    trace None: of a probe that works in turn with each run. relay: the script that makes a latency. Raises UserError where this
    machine has no namespaces, RunError where a rank ends.
    """
    apart, rows = any(network != _NO_NETWORK for network in links), []
    latencies = list(dict.fromkeys(network.latency_s for network in links))
    with contextlib.ExitStack() as outer:
        probe = None if trace else Probe(job, outer, provenance or {})
        for number, latency_s in itertools.product(ranks, latencies):
            with contextlib.ExitStack() as stack:
                spaces, fleet = _placed(stack, job, number, apart=apart, latency_s=latency_s, relay=relay)
                for network in (network for network in links if network.latency_s == latency_s):
                    run = _Run(job, fleet, spaces, network)
                    seconds = [run.step(probe) for _ in range(rounds)]
                    rows.append(run.held_against(trace or probe.trace(rounds), seconds))  # type: ignore[union-attr]
                    log(format_row(rows[-1]))
    return rows


def _placed(
    stack: contextlib.ExitStack, job: Job, ranks: int, *, apart: bool, latency_s: float = 0.0, relay: Path | None = None
) -> tuple[Spaces | None, Fleet]:
    """apart: each in a namespace of its own."""
    if not apart:
        return None, stack.enter_context(Fleet(job, ranks))
    spaces = stack.enter_context(Spaces(ranks, latency_s=latency_s, relay=relay))
    return spaces, stack.enter_context(Fleet(job, ranks, spaces=spaces.names, address=spaces.address))


class _Run:
    """Some ranks over one network."""

    def __init__(self, job: Job, fleet: Fleet, spaces: Spaces | None, network: Network) -> None:
        self._job, self._fleet, self._spaces, self._name = job, fleet, spaces, str(network)
        self._network = replace(network, mtu=spaces.mtu) if spaces else network
        self._sent: list[int] = []
        if spaces is not None:
            spaces.limit(network)
        fleet.play("step")

    def step(self, probe: Probe | None) -> float:
        """Seconds of one."""
        if probe is not None:
            probe.sample()
        before = self._spaces.sent_bytes() if self._spaces else []
        seconds = self._fleet.play("step").seconds
        after = self._spaces.sent_bytes() if self._spaces else []
        self._sent += [max(b - a for a, b in zip(before, after, strict=True))] if before else []
        return seconds

    def held_against(self, trace: Trace, seconds: Sequence[float]) -> dict[str, Any]:
        ranks, measured = self._fleet.ranks, spread(seconds)
        predicted = scaling.step(trace, ranks, self._job.micros, self._network)
        return {
            "ranks": ranks,
            "network": self._name,
            "step_s": measured,
            "predicted_s": predicted.seconds,
            "error": predicted.seconds / measured["median"] - 1,
            "parts": predicted.__dict__,
            "sent_bytes": statistics.median(self._sent) if self._sent else None,
            "predicted_bytes": scaling.sent_bytes(trace, ranks, self._job.micros),
        }


def format_row(row: dict[str, Any]) -> str:
    """A line of the table."""
    step, parts = row["step_s"], row["parts"]
    network = parts["wire_s"] + parts["latency_s"]
    measured_text = (
        f"{row['ranks']} ranks, {row['network']}: {step['median']:.2f} s ({step['min']:.2f} to {step['max']:.2f})"
    )
    line = f"{measured_text}, predicted {row['predicted_s']:.2f} ({row['error']:+.1%}), of which {network:.2f} network"
    if row["sent_bytes"] is None:
        return line
    return f"{line}; sent {row['sent_bytes'] / 1e6:.1f} MB a rank, predicted {row['predicted_bytes'] / 1e6:.1f}"


def sizes(architecture: str) -> tuple[int, int]:
    """Numbers in the flat gradient, and in BatchNorm's statistics."""
    from mura_dist.models import densenet
    from mura_dist.training.batchnorm import RunningStatistics
    from mura_dist.training.flat_parameters import FlatParameters

    network = densenet.build(architecture)
    return FlatParameters(network, channels_last=True).weights.numel(), RunningStatistics(network).sum.numel()


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f}) ms"
