"""A host's link with a delay, a loss and a rate, in user space: for kernels whose `tc` knows no netem.

python tools/robustness/slow_link.py HOST SWITCH PORT [--delay-ms 5] [--loss 0.01] [--rate-mbit 300] [--mtu 1500]

HOST and SWITCH are network namespaces. Makes eth0 in HOST and PORT in SWITCH (TAP devices), prints "ready", and carries
frames between them, each way with the same delay, loss and rate, until it is killed; the devices go with it. Needs root.
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
_QUEUE_BYTES = 4 << 20  # what waits at a link, then frames are dropped


def tap(namespace: str, name: str) -> int:
    """The file descriptor of a new TAP device in a namespace; this process stays in it."""
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
    """One direction: frames on their way, with the time each is due, and when the line is free for the next one."""

    source: int
    target: int
    delay_s: float
    loss: float
    bytes_per_s: float
    coming: deque[tuple[float, bytes]] = field(default_factory=deque)
    waiting_bytes: int = 0
    free: float = 0.0

    def take(self, now: float) -> None:
        """All frames there are."""
        while True:
            try:
                frame = os.read(self.source, 1 << 17)
            except BlockingIOError:
                return
            if random.random() < self.loss or self.waiting_bytes + len(frame) > _QUEUE_BYTES:
                continue
            self.free = max(self.free, now) + len(frame) / self.bytes_per_s
            self.coming.append((self.free + self.delay_s, frame))
            self.waiting_bytes += len(frame)

    def give(self, now: float) -> float:
        """All frames that are due; the seconds to the next one."""
        while self.coming and self.coming[0][0] <= now:
            frame = self.coming.popleft()[1]
            self.waiting_bytes -= len(frame)
            try:
                os.write(self.target, frame)
            except OSError:  # its device is down: a frame is lost
                continue
        return self.coming[0][0] - now if self.coming else 1.0


def carry(ways: list[Direction]) -> None:
    while True:
        select.select(
            [direction.source for direction in ways],
            [],
            [],
            min(direction.give(time.monotonic()) for direction in ways),
        )
        for direction in ways:
            direction.take(time.monotonic())


def main() -> None:
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
    kind = (options.delay_ms / 1000, options.loss, options.rate_mbit * 1e6 / 8)
    print("ready", flush=True)
    carry([Direction(ends[0], ends[1], *kind), Direction(ends[1], ends[0], *kind)])


if __name__ == "__main__":
    main()
