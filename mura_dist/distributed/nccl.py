"""Lose another rank over NCCL as over gloo: with an exception in Python after a time limit.

By itself NCCL's watchdog aborts the process when a peer is lost, while Python waits in CUDA: no message, no status file. Here
the watchdog only takes note (ENVIRONMENT), and Python waits by looking, so that it can raise.

    collective, enqueued -> wait: this rank's own kernels, without limit -> the collective, at most timeout_s -> or an exception
    a block that raised  -> abandon: NCCL's kernels end, which wait for the lost rank -> the process can exit
"""

import contextlib
import faulthandler
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

# Set before the process group is made, also where something else is set: torchrun sets 1, which is the abort.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
MARGIN_S = 30.0  # how much later than ours its own timeout comes, which only writes to stderr then
_LOOK_S = 2e-5
_EXIT_S = 60.0  # a process that does not exit by itself after abandon is ended


def mark() -> torch.cuda.Event:
    """Record where this rank's own work ends on the current stream; before its first collective of a step."""
    event = torch.cuda.Event()
    event.record()
    return event


def wait(work: dist.Work, timeout_s: float, own: torch.cuda.Event | None = None) -> None:
    """Return when `work` is done on the device.

    Args:
        timeout_s: seconds that the other ranks are waited for.
        own: what this rank does before it can take part; the seconds count from its end.

    Raises what torch raises of a peer that is lost or late: DistBackendError over NCCL, RuntimeError over gloo.
    """
    while own is not None and not own.query():
        time.sleep(_LOOK_S)
    deadline = time.monotonic() + timeout_s
    while not work.is_completed() and time.monotonic() < deadline:  # an error completes it too
        time.sleep(_LOOK_S)
    work.wait(timedelta(milliseconds=1))  # raises where it is late or failed, and ends NCCL's kernels then


def abandon() -> None:
    """End the kernels that wait for lost ranks, and this process in a minute should it hang in NCCL on its way out."""
    faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()
