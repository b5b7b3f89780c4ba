"""Networks on one machine: a namespace a rank, links to a bridge, each rank's link out held to a rate (Linux, as root).

    mura<pid>-hub   the bridge                 mura<pid>-0 ... -N   a rank each: eth0, 10.231.0.1 ...
    Spaces(ranks) -> names -> limit(network), as often as wanted -> all gone at the end

Nothing is made outside the namespaces, which carry this process's id. A rank sends to one other and hears one other at a time, as
an all-reduce goes round, so that holding what it sends holds what it hears.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Self

from ..refusal import Failure, Refusal
from .scaling import Network

DEVICE = "eth0"
_NAMESPACE = 0x40000000  # CLONE_NEWNET; os.setns is Python 3.12's
_BURST_S, _LEAST_BURST = 0.001, 1 << 18  # what a link may send at once: a GSO packet of 64 KiB must fit
_QUEUE_S = 0.2


def enter(space: str) -> None:
    """Put this thread, and those it will start, into a namespace."""
    with open(f"/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NAMESPACE):
            raise Failure(f"namespace {space}: {os.strerror(ctypes.get_errno())}")


def lacking() -> str:
    """Why there can be no namespaces here, and what to do; empty where there can."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2, or leave the networks out with --network none"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces take root; run this as root, or leave the networks out with --network none"
    return ""


class Spaces:
    """`names`: the ranks' namespaces, `address`: where the first rank is met. Raises Refusal where there can be none, Failure."""

    def __init__(self, ranks: int) -> None:
        if reason := lacking():
            raise Refusal(reason)
        stem = f"mura{os.getpid()}"
        self._hub, self.names = f"{stem}-hub", [f"{stem}-{rank}" for rank in range(ranks)]
        self.address = "10.231.0.1"

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._remove()

    def _make(self) -> None:
        for space in (self._hub, *self.names):
            _run("ip", "netns", "add", space)
            _run("ip", "-n", space, "link", "set", "lo", "up")
        _run("ip", "-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        for rank, space in enumerate(self.names):
            port = f"port{rank}"
            _run("ip", "link", "add", DEVICE, "netns", space, "type", "veth", "peer", "name", port, "netns", self._hub)
            _run("ip", "-n", space, "address", "add", f"10.231.0.{rank + 1}/24", "dev", DEVICE)
            _run("ip", "-n", space, "link", "set", DEVICE, "up")
            _run("ip", "-n", self._hub, "link", "set", port, "master", "bridge", "up")

    def _remove(self) -> None:
        """A namespace takes its links with it; what was not made is not there."""
        for space in (*self.names, self._hub):
            with contextlib.suppress(Failure):
                _run("ip", "netns", "delete", space)

    def limit(self, network: Network) -> None:
        """From now on. Refusal where this kernel cannot: a latency takes its netem."""
        for space in self.names:
            with contextlib.suppress(Failure):  # there may be no limit yet
                _run("tc", "-n", space, "qdisc", "delete", "dev", DEVICE, "root")
            if not math.isinf(network.bandwidth_bit_s):
                rate = round(network.bandwidth_bit_s)
                burst = max(_LEAST_BURST, round(rate / 8 * _BURST_S))
                words = ("rate", f"{rate}bit", "burst", str(burst), "latency", f"{_QUEUE_S * 1e3:g}ms")
                _run("tc", "-n", space, "qdisc", "add", "dev", DEVICE, "root", "handle", "1:", "tbf", *words)
            if network.latency_s:
                self._delay(space, network)

    def _delay(self, space: str, network: Network) -> None:
        under = ("root",) if math.isinf(network.bandwidth_bit_s) else ("parent", "1:1")
        words = ("netem", "delay", f"{network.latency_s * 1e6:.0f}us", "limit", "100000")
        try:
            _run("tc", "-n", space, "qdisc", "add", "dev", DEVICE, *under, *words)
        except Failure as error:
            raise Refusal(
                f"--network {network}: this kernel does not delay packets ({error}); leave the latency out, or use one with netem"
            ) from error

    def sent_bytes(self) -> list[int]:
        """By rank: what the kernel counts as sent so far, headers and all."""
        path = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"
        return [int(_run("ip", "netns", "exec", space, "cat", path)) for space in self.names]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(f"`{' '.join(words)}`: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def leftovers() -> list[str]:
    """Namespaces of ours that are there now."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"mura{os.getpid()}-*")) if folder.is_dir() else []
