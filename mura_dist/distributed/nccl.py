"""Detection of a lost rank over NCCL by a timeout that raises in Python, as over gloo.

By default NCCL's watchdog aborts the process when a peer is lost, while Python waits in CUDA: no message, no status file. With
ENVIRONMENT the watchdog only records the failure, and Python polls, so that it can raise.

    own kernels -> mark -> collectives, enqueued -> mark -> wait: for the first mark, then at most timeout_s for the second
    after an exception -> abandon: aborts NCCL's kernels, which wait for the lost rank -> the process can exit
"""

import contextlib
import faulthandler
import os
import time
from typing import Protocol

import torch
import torch.distributed as dist

# Set before the process group is created, and overriding any other value: torchrun sets 1, which aborts.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
MARGIN_S = 30.0  # how much later than ours NCCL's own timeout expires, which then only writes to stderr
_POLL_S = 2e-5
_OWN_WORK_FACTOR = 10  # in units of timeout_s: this rank's kernels may wait for collectives of the previous step
_EXIT_S = 60.0  # time after `abandon` in which the process has to exit


class DeviceEvent(Protocol):
    """A point in the work of a device, such as a CUDA event."""

    def query(self) -> bool:
        """Return whether the device has reached this point."""


def record_event() -> torch.cuda.Event:
    """Record an event on the current stream."""
    event = torch.cuda.Event()
    event.record()
    return event


def wait(done: DeviceEvent, timeout_s: float, own: DeviceEvent | None = None) -> None:
    """Wait until the device has reached `done`, an event behind collectives.

    Nothing is aborted here. All communicators must be aborted together (`abandon`), or they wait for each other.

    Args:
        done: Event behind the collectives.
        timeout_s: Longest wait for the other ranks, in seconds.
        own: End of this rank's own work before the collectives. The timeout starts there.

    Raises:
        dist.DistBackendError: another rank is lost or late.
    """
    if own is not None:
        _wait(own, _OWN_WORK_FACTOR * timeout_s)
    _wait(done, timeout_s)


def _wait(event: DeviceEvent, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            raise dist.DistBackendError(
                f"collective operation timeout: the other ranks did not join in {timeout_s:g} s"
            )
        time.sleep(_POLL_S)


def abandon() -> None:
    """Abort the kernels that wait for lost ranks, and end this process after _EXIT_S in case it hangs in NCCL."""
    faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(Exception):
        dist.distributed_c10d._abort_process_group()
