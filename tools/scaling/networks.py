"""Networks on one machine: a namespace a rank, links to a bridge, each rank's link out held to a rate (Linux, as root).

    mura<pid>.<k>-hub   the bridge             mura<pid>.<k>-0 ... -N   a rank each: eth0, 10.231.0.1 ...
    Spaces(ranks) -> names -> limit(network), as often as wanted -> all gone at the end

Nothing is made outside the namespaces, which carry this process's id. A rank sends to one other and hears one other at a time, as
an all-reduce goes round, so that holding what it sends holds what it hears. Rates are tc's (tbf); a latency is a relay's in user
space (tools/robustness/slow_link.py), a process a link, for not every kernel has netem; its links take large frames.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Self

from scaling import Network

from mura_dist.core.errors import RunError, UserError

DEVICE = "eth0"
_NAMESPACE = 0x40000000  # CLONE_NEWNET; os.setns is Python 3.12's
_BURST_S, _LEAST_BURST = 0.001, 1 << 18  # what a link may send at once: a GSO packet of 64 KiB must fit
_QUEUE_S = 0.2
_FAR_MTU = 65_000
_NUMBERS = itertools.count()  # of the networks of this process


def enter(space: str) -> None:
    """Put this thread, and those it will start, into a namespace."""
    with open(f"/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _NAMESPACE):
            raise RunError(f"namespace {space}: {os.strerror(ctypes.get_errno())}")


def lacking() -> str:
    """Return why this machine cannot create namespaces and the remedy, or an empty text."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install iproute2, or leave the networks out with --network none"
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces take root; run this as root, or leave the networks out with --network none"
    return ""


class Spaces:
    """`names`: the ranks' namespaces, `address`: where the first rank is met; `mtu` of the links.

    latency_s: one way, from a rank to the bridge and on, by `relay` (the script's path). Raises UserError where there can be no
    namespaces, RunError.
    """

    def __init__(self, ranks: int, *, latency_s: float = 0.0, relay: Path | None = None) -> None:
        if reason := lacking():
            raise UserError(reason)
        stem = f"mura{os.getpid()}.{next(_NUMBERS)}"
        self._hub, self.names = f"{stem}-hub", [f"{stem}-{rank}" for rank in range(ranks)]
        self._latency_s, self._relay = latency_s, relay
        self._relays: list[subprocess.Popen[str]] = []
        self.address, self.mtu = "10.231.0.1", _FAR_MTU if latency_s else 1500

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
            (self._far if self._latency_s else self._near)(space, f"port{rank}")
            _run("ip", "-n", space, "address", "add", f"10.231.0.{rank + 1}/24", "dev", DEVICE)
            _run("ip", "-n", self._hub, "link", "set", f"port{rank}", "master", "bridge", "up")

    def _near(self, space: str, port: str) -> None:
        _run("ip", "link", "add", DEVICE, "netns", space, "type", "veth", "peer", "name", port, "netns", self._hub)
        _run("ip", "-n", space, "link", "set", DEVICE, "up")

    def _far(self, space: str, port: str) -> None:
        """A link whose frames a process carries; half of the latency here, half on the way from the bridge to the other."""
        assert self._relay is not None, "a latency wants a relay"
        options = ("--delay-ms", f"{1e3 * self._latency_s / 2:g}", "--mtu", str(self.mtu))
        command = [sys.executable, str(self._relay), space, self._hub, port, *options]
        relay = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._relays.append(relay)
        if relay.stdout is None or relay.stdout.readline() != "ready\n":
            raise RunError(f"{self._relay} made no link for {space}; it says why above")

    def _remove(self) -> None:
        """A namespace takes its links with it; what was not made is not there."""
        for relay in self._relays:
            relay.kill()
            relay.wait()
        for space in (*self.names, self._hub):
            with contextlib.suppress(RunError):
                _run("ip", "netns", "delete", space)

    def limit(self, network: Network) -> None:
        """Limit each rank's link to the rate of a network."""
        for space in self.names:
            with contextlib.suppress(RunError):  # there may be no limit yet
                _run("tc", "-n", space, "qdisc", "delete", "dev", DEVICE, "root")
            if not math.isinf(network.bandwidth_bit_s):
                rate = round(network.bandwidth_bit_s)
                burst = max(_LEAST_BURST, round(rate / 8 * _BURST_S))
                arguments = ("rate", f"{rate}bit", "burst", str(burst), "latency", f"{_QUEUE_S * 1e3:g}ms")
                _run("tc", "-n", space, "qdisc", "add", "dev", DEVICE, "root", "tbf", *arguments)

    def sent_bytes(self) -> list[int]:
        """Return by rank the bytes that the kernel has sent, with headers."""
        path = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"
        return [int(_run("ip", "netns", "exec", space, "cat", path)) for space in self.names]


def _run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"`{' '.join(arguments)}`: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def leftovers() -> list[str]:
    """Return the existing namespaces of this process."""
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.glob(f"mura{os.getpid()}.*")) if folder.is_dir() else []
