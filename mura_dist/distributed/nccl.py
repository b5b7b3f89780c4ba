"""Lose another rank over NCCL as over gloo: with an exception in Python after a time limit.

By itself NCCL's watchdog aborts the process when a peer is lost, while Python waits in CUDA: no message, no status file. Here
the watchdog only takes note (ENVIRONMENT), and Python waits by looking, so that it can raise.

    own kernels -> mark -> collectives, enqueued -> mark -> wait: for the first mark, then timeout_s at most for the second
    a block that raised -> abandon: NCCL's kernels end, which wait for the lost rank -> the process can exit
"""

import contextlib
import faulthandler
import os
import time
from typing import Protocol

import torch
import torch.distributed as dist

# Set before the process group is made, also where something else is set: torchrun sets 1, which is the abort.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
MARGIN_S = 30.0  # how much later than ours its own timeout comes, which only writes to stderr then
_LOOK_S = 2e-5
_OWN_TIMES = 10  # of timeout_s, for this rank's own kernels: they may wait for the collectives of a step before
_EXIT_S = 60.0  # a process that does not exit by itself after abandon is ended


class Mark(Protocol):
    """A point in the work of a device, as a CUDA event is one."""

    def query(self) -> bool:
        """Tell whether the device has come there."""


def mark() -> torch.cuda.Event:
    """Record where the current stream is now."""
    event = torch.cuda.Event()
    event.record()
    return event


def wait(done: Mark, timeout_s: float, own: Mark | None = None) -> None:
    """Return when the device has come to `done`, which lies behind collectives.

    Nothing is aborted here: NCCL's communicators have to be aborted together, or one waits for the other (`abandon`).

    Args:
        timeout_s: seconds that the other ranks are waited for.
        own: the end of what this rank does before it can take part; the seconds count from there.

    Raises:
        dist.DistBackendError: another rank is lost or late.
    """
    if own is not None:
        _wait(own, _OWN_TIMES * timeout_s)
    _wait(done, timeout_s)


def _wait(event: Mark, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            raise dist.DistBackendError(f"collective operation timeout: the others did not come for {timeout_s:g} s")
        time.sleep(_LOOK_S)


def abandon() -> None:
    """End the kernels that wait for lost ranks, and this process in a minute should it hang in NCCL on its way out."""
    faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()
