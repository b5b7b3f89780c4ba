"""Test that a late or lost rank raises an exception. The handles of gloo's collectives stand in for CUDA events."""

import re
import sys

import pytest
from helpers.commands import run

from mura_dist.distributed import nccl

LATE = """
import os, sys, time
import torch
import torch.distributed as dist
from mura_dist.distributed import nccl, process_group

class Done:  # stands in for a CUDA event behind a collective
    def __init__(self, work):
        self.query = work.is_completed

class OwnWork:  # and for one behind this rank's own kernels, which take a second
    def __init__(self):
        end = time.monotonic() + 1
        self.query = lambda: time.monotonic() > end

with process_group.join(60) as ranks:
    vector = torch.ones(3)
    nccl.wait(Done(dist.all_reduce(vector, async_op=True)), 5, OwnWork())
    assert vector.tolist() == [2, 2, 2]
    if ranks.is_first:
        begin = time.monotonic()
        try:
            nccl.wait(Done(dist.all_reduce(vector, async_op=True)), 2, OwnWork())
        finally:
            print(f"waited {time.monotonic() - begin:.1f} s", flush=True)
    else:
        time.sleep(6)
        os._exit(0)
"""


def test_missing_rank_raises_after_the_timeout() -> None:
    """The timeout starts when this rank's own work is done. The error is the one of gloo's ranks."""
    done = run("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", sys.executable, "-c", LATE)
    waited = re.findall(r"waited (\d+\.\d) s", done.stdout)
    assert len(waited) == 1, done.stderr
    assert 3.0 <= float(waited[0]) < 5.0
    assert "rank 0 lost another rank (" in done.stderr


EXIT = """
import time
from mura_dist.distributed import nccl
nccl._EXIT_S = 1.0
nccl.abandon()
print("abandoned", flush=True)
time.sleep(30)  # as a process does that hangs in NCCL on its way out
"""


def test_abandon_exits_a_process_that_hangs_at_exit() -> None:
    """This holds also without a process group to abort."""
    done = run("python", "-c", EXIT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "abandoned\n", "")


def test_nccl_async_error_handling_is_off_while_joined() -> None:
    """torchrun sets the variable so that NCCL's watchdog aborts its ranks. The process group restores it."""
    code = (
        "import os\nfrom mura_dist.distributed import process_group\nname = 'TORCH_NCCL_ASYNC_ERROR_HANDLING'\n"
        "before = os.environ[name]\nwith process_group.join(60):\n    os.write(1, f'{os.environ[name]}\\n'.encode())\n"
        "assert os.environ[name] == before == '1'"
    )
    done = run("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", sys.executable, "-c", code)
    assert (done.returncode, done.stdout.split()) == (0, ["0", "0"]), done.stderr


class Never:
    def query(self) -> bool:
        return False


def test_wait_for_own_work_has_a_timeout() -> None:
    """A rank's own work may wait for a collective of the previous step, as ZeRO's does."""
    with pytest.raises(RuntimeError, match=r"collective operation timeout: the other ranks did not join in 0\.5 s"):
        nccl.wait(Never(), 0.05, Never())
