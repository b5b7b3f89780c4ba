"""Hosts on this machine: network namespaces on one bridge, each with its own address, names, process ids and mounts.

    host1 10.99.0.1 -- veth --+
    host2 10.99.0.2 -- veth --+-- bridge (a namespace of its own)        needs root and iproute2
    ...                       +

The namespaces do not reach the network of the machine. A process on a host sees its own hostname and only the host's processes.
`power_off` removes the link and then kills all of them, so that no peer is notified.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from helpers.commands import BIN, NO_GPU, ROOT

NETWORK = "10.99.0"


def ip(*arguments: object) -> None:
    subprocess.run(["ip", *map(str, arguments)], check=True, capture_output=True, text=True)


class Hosts:
    """`num` hosts, numbered from 1, that the function `hosts` creates and removes.

    `slow` maps a host to arguments of tools/robustness/slow_link.py.
    """

    def __init__(self, num: int, slow: Mapping[int, Sequence[object]]) -> None:
        self.numbers, self.slow = range(1, num + 1), slow
        self._links: list[subprocess.Popen[str]] = []
        self._tag = f"md{os.getpid()}"
        self._started: dict[int, list[subprocess.Popen[str]]] = {number: [] for number in self.numbers}

    def space(self, number: int) -> str:
        return f"{self._tag}h{number}"

    @property
    def _switch(self) -> str:
        return f"{self._tag}s"

    def etc(self, number: int) -> Path:
        """Return the folder that `ip netns exec` mounts as the host's /etc."""
        return Path("/etc/netns") / self.space(number)

    def build(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        names = "".join(f"{NETWORK}.{number} host{number}\n" for number in self.numbers)
        for number in self.numbers:
            space = self.space(number)
            ip("netns", "add", space)
            self.etc(number).mkdir(parents=True)
            (self.etc(number) / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            self._link(number)
            ip("-n", self._switch, "link", "set", f"p{number}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def _link(self, number: int) -> None:
        space, port = self.space(number), f"p{number}"
        if number not in self.slow:
            ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", port, "netns", self._switch)
            return
        arguments = [
            sys.executable,
            ROOT / "tools/robustness/slow_link.py",
            space,
            self._switch,
            port,
            *self.slow[number],
        ]
        link = subprocess.Popen([str(word) for word in arguments], stdout=subprocess.PIPE, text=True)
        self._links.append(link)
        assert link.stdout is not None
        assert link.stdout.readline() == "ready\n"

    def remove(self) -> None:
        for number in self.numbers:
            self._kill(number)
        for link in self._links:
            link.kill()
            link.communicate()
        for space in (self._switch, *map(self.space, self.numbers)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)
        for number in self.numbers:
            shutil.rmtree(self.etc(number), ignore_errors=True)

    def start(
        self, number: int, *arguments: object, log: Path, env: Mapping[str, str] | None = None, first: str = ""
    ) -> subprocess.Popen[str]:
        """Start a command on a host and append its output to `log`.

        `first` is a shell command before it, for example a mount on that host only.
        """
        inside = f'hostname host{number} && {first or ":"} && exec "$@"'
        apart = (
            "unshare",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child=SIGKILL",
            "sh",
            "-c",
            inside,
            "sh",
        )
        environment = {
            **os.environ,
            **NO_GPU,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
        }
        with open(log, "a") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.space(number), *apart, *map(str, arguments)],
                env=environment,
                stdout=file,
                stderr=file,
                text=True,
                start_new_session=True,
            )
        self._started[number].append(process)
        return process

    def _kill(self, number: int) -> None:
        for process in self._started[number]:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def disconnect(self, number: int) -> None:
        """Take the host's link down without notifying any peer."""
        ip("-n", self._switch, "link", "set", f"p{number}", "down")

    def reconnect(self, number: int) -> None:
        """Bring the host's link up again."""
        ip("-n", self._switch, "link", "set", f"p{number}", "up")

    def power_off(self, number: int) -> None:
        self.disconnect(number)
        self._kill(number)


@contextlib.contextmanager
def hosts(num: int, slow: Mapping[int, Sequence[object]] | None = None) -> Iterator[Hosts]:
    """Create hosts and remove them at the end. Skip the test where namespaces are unavailable."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("hosts of our own need root, iproute2 and util-linux: run as root, apt-get install iproute2")
    created = Hosts(num, slow or {})
    try:
        try:
            created.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this system makes no network namespaces: {error.stderr.strip()}")
        yield created
    finally:
        created.remove()
