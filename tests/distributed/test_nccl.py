"""nccl.py: a late or lost rank is an exception in Python. Shown with gloo's collectives, whose handles say when they are done."""

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


def test_a_rank_that_does_not_come_is_waited_for_so_long() -> None:
    """From the end of this rank's own work on; then it ends with the line that gloo's ranks end with."""
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


def test_a_process_that_hangs_on_its_way_out_is_ended() -> None:
    """Also where nothing can be aborted."""
    done = run("python", "-c", EXIT)
    assert (done.returncode, done.stdout, done.stderr) == (1, "abandoned\n", "")


def test_the_watchdog_only_takes_note_while_ranks_are_joined() -> None:
    """torchrun asks it to abort its ranks."""
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


def test_this_ranks_own_work_is_not_waited_for_without_end() -> None:
    """It may lie behind a collective of the step before, as ZeRO's do."""
    with pytest.raises(RuntimeError, match=r"collective operation timeout: the other ranks did not join in 0\.5 s"):
        nccl.wait(Never(), 0.05, Never())
