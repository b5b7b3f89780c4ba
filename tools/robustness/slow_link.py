"""Emulate a network link with delay, loss and rate in user space, for kernels whose `tc` has no netem.

python tools/robustness/slow_link.py HOST SWITCH PORT [--delay-ms 5] [--loss 0.01] [--rate-mbit 300] [--mtu 1500]

HOST and SWITCH are network namespaces. The tool creates the TAP devices eth0 in HOST and PORT in SWITCH and prints "ready". Then
it carries frames between them until it is killed. Both directions have the same delay, loss and rate. The devices disappear with
the process. It needs root.
"""

import argparse
import ctypes
import fcntl
import os
import random
import select
import struct
import time
from collections import deque
from dataclasses import dataclass, field

_TUNSETIFF, _TAP, _NO_HEADER = 0x400454CA, 0x0002, 0x1000  # linux/if_tun.h
_NEW_NET = 0x40000000  # CLONE_NEWNET
_QUEUE_BYTES = 4 << 20  # size of a link's queue; further frames are dropped


def tap(namespace: str, name: str) -> int:
    """Create a TAP device in a namespace and return its file descriptor. This process stays in the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    space = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(space, _NEW_NET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    os.close(space)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return device


@dataclass
class Direction:
    """One direction of the link. `queue` has frames with the time each is due. The line is free at `line_free_at`."""

    source: int
    target: int
    delay_s: float
    loss: float
    bytes_per_s: float
    queue: deque[tuple[float, bytes]] = field(default_factory=deque)
    waiting_bytes: int = 0
    line_free_at: float = 0.0

    def receive(self, now: float) -> None:
        """Queue all frames that have arrived, or drop them."""
        while True:
            try:
                frame = os.read(self.source, 1 << 17)
            except BlockingIOError:
                return
            if random.random() < self.loss or self.waiting_bytes + len(frame) > _QUEUE_BYTES:
                continue
            self.line_free_at = max(self.line_free_at, now) + len(frame) / self.bytes_per_s
            self.queue.append((self.line_free_at + self.delay_s, frame))
            self.waiting_bytes += len(frame)

    def send_due(self, now: float) -> float:
        """Send all frames that are due. Return the seconds until the next is due."""
        while self.queue and self.queue[0][0] <= now:
            frame = self.queue.popleft()[1]
            self.waiting_bytes -= len(frame)
            try:
                os.write(self.target, frame)
            except OSError:  # its device is down: a frame is lost
                continue
        return self.queue[0][0] - now if self.queue else 1.0


def carry(directions: list[Direction]) -> None:
    """Carry frames until the process is killed."""
    while True:
        select.select(
            [direction.source for direction in directions],
            [],
            [],
            min(direction.send_due(time.monotonic()) for direction in directions),
        )
        for direction in directions:
            direction.receive(time.monotonic())


def main() -> None:
    """Create the devices and carry frames between them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host")
    parser.add_argument("switch")
    parser.add_argument("port")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0, help="share of the frames, 0 to 1")
    parser.add_argument("--rate-mbit", type=float, default=float("inf"))
    parser.add_argument("--mtu", type=int, default=1500)
    options = parser.parse_args()
    ends = [tap(options.host, "eth0"), tap(options.switch, options.port)]
    for space, name in ((options.host, "eth0"), (options.switch, options.port)):
        os.system(f"ip -n {space} link set {name} mtu {options.mtu} up")
    properties = (options.delay_ms / 1000, options.loss, options.rate_mbit * 1e6 / 8)
    print("ready", flush=True)
    carry([Direction(ends[0], ends[1], *properties), Direction(ends[1], ends[0], *properties)])


if __name__ == "__main__":
    main()
