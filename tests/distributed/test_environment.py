"""Who a process is, by the words of each launcher; trainings that those start: mpirun for real, srun by its words."""

import fcntl
import itertools
import math
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import laws
from helpers.commands import BIN, NO_GPU, TINY, free_port, run, warm_script
from helpers.runs import losses

from mura_dist.core.errors import RankLocalUserError, RunError, UserError
from mura_dist.distributed import environment, process_group

WORDS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name in WORDS or name.startswith(("SLURM_", "OMPI_", "PMIX_", "PMI_", "MPI_")):
            monkeypatch.delenv(name)


def slurm(rank: int, node: int, local_rank: int) -> dict[str, str]:
    """As srun of Slurm 22.05 says it: 11 tasks on three nodes."""
    step = {"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-09]"}
    return step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)}


def openmpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    said = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in said.items()}


def hydra(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """As the mpiexec of MPICH 5.0 and of Intel MPI 2021 says it."""
    said = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local_rank, "MPI_LOCALNRANKS": local_size}
    return {name: str(number) for name, number in said.items()}


SAID = {
    "nothing": ({}, (0, 1, 0, 1)),
    "torchrun": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),
    "deepspeed": ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, (5, 8, 1, 4)),
    "a job array, by hand": ({"RANK": "2", "WORLD_SIZE": "5"}, (2, 5, 0, 1)),
    "a batch script outside srun": ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
    "srun": (slurm(7, 1, 3), (7, 11, 3, 4)),
    "srun, its smaller node": (slurm(10, 2, 2), (10, 11, 2, 3)),
    "mpirun": (openmpi(3, 6, 1, 2), (3, 6, 1, 2)),
    "mpiexec": (hydra(3, 6, 1, 2), (3, 6, 1, 2)),
    "mpiexec in a Slurm job": (slurm(2, 2, 0) | hydra(5, 6, 1, 2), (5, 6, 1, 2)),
    "srun --mpi=pmi2": (slurm(7, 1, 3) | {"PMI_RANK": "7", "PMI_SIZE": "11"}, (7, 11, 3, 4)),
    "empty words": (dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"), ""), (0, 1, 0, 1)),
    "a shell of srun --pty, of one task": (
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_PTY_PORT": "44152"},
        (0, 1, 0, 1),
    ),
    "mpirun in a Slurm job": (slurm(2, 2, 0) | openmpi(5, 6, 1, 2), (5, 6, 1, 2)),
    "torchrun under srun": (slurm(2, 2, 0) | {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1"}, (9, 12, 1, 1)),
}


@pytest.mark.parametrize("case", SAID)
def test_each_launcher_is_understood(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, wanted = SAID[case]
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    told = environment.ranks()
    assert (told.rank, told.size, told.local_rank, told.local_size) == wanted
    assert (environment.rank(), environment.world_size()) == (told.rank, told.size)
    assert (environment.local_rank(), environment.ranks_here()) == (told.local_rank, told.local_size)
    assert environment.is_first() == (told.rank == 0)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"RANK": "3", "WORLD_SIZE": "3"}, ("rank 3 of 3", "count from 0")),
        ({"RANK": "1"}, ("rank 1 of 1", "run alone")),
        ({"RANK": "-1", "WORLD_SIZE": "3"}, ("rank -1 of 3",)),
        ({"RANK": "one", "WORLD_SIZE": "3"}, ("RANK and WORLD_SIZE", "one, 3", "whole numbers")),
        (openmpi(6, 6, 0, 1), ("OpenMPI (OMPI_COMM_WORLD_*)", "rank 6 of 6")),
        (hydra(6, 6, 0, 1), ("MPICH or Intel MPI (PMI_RANK, PMI_SIZE)", "rank 6 of 6")),
        ({"PMI_RANK": "1"}, ("PMI_RANK", "rank 1 of 1")),
        ({"PMI_RANK": "0", "PMI_SIZE": "many"}, ("PMI_RANK, PMI_SIZE", "0, many", "whole numbers")),
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "RANK is not", "`unset WORLD_SIZE` to run alone", "torchrun")),
        ({"LOCAL_RANK": "1"}, ("LOCAL_RANK=1", "`unset LOCAL_RANK`")),
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, ("LOCAL_WORLD_SIZE=2", "RANK is not")),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, ("rank 0 of 2, on this machine 0 of 8",)),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("SLURM_STEP_NUM_TASKS=4", "SLURM_PROCID is not", "srun")),
        (slurm(1, 0, 1) | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, ("SLURM_STEP_TASKS_PER_NODE=4(x", "4(x2),3")),
        (slurm(1, 0, 1) | {"SLURM_NODEID": "one"}, ("SLURM_NODEID=one",)),
    ],
)
def test_what_cannot_be_is_refused(
    said: dict[str, str],
    words: tuple[str, ...],
    shard_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    laws.refusal(capsys, ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}"], *words)


def test_several_ranks_only_where_a_launcher_says_which_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a grid of what may be left over: a rank that exists, or a refusal that names a variable of the environment."""
    grid = {
        "RANK": ("0", "2"),
        "WORLD_SIZE": ("1", "4"),
        "LOCAL_RANK": ("0", "1"),
        "LOCAL_WORLD_SIZE": ("4",),
        "OMPI_COMM_WORLD_RANK": ("1",),
        "OMPI_COMM_WORLD_SIZE": ("2",),
        "PMI_RANK": ("0", "3"),
        "PMI_SIZE": ("2",),
        "SLURM_PROCID": ("0", "1"),
        "SLURM_STEP_NUM_TASKS": ("1", "2"),
    }
    which = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    num_several = num_alone = num_refused = 0
    for values in itertools.product(*((None, *each) for each in grid.values())):
        said = {name: value for name, value in zip(grid, values, strict=True) if value is not None}
        monkeypatch.setattr(os, "environ", said)
        try:
            told = environment.ranks()
        except UserError as refusal:
            num_refused += any(name in str(refusal) for name in (*said, "OMPI_COMM_WORLD_*"))
            continue
        assert 0 <= told.rank < told.size
        num_several += told.size > 1
        num_alone += told.size == 1
        assert told.size == 1 or any(said.get(name) == str(told.rank) for name in which), said
    assert num_several + num_alone + num_refused == math.prod(1 + len(each) for each in grid.values()), (
        "each names a variable"
    )
    assert min(num_several, num_refused) > 1000


def in_terminal(*words: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a controlling terminal; its output goes to pipes."""
    ours, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    try:
        return subprocess.run(
            words, stdin=terminal, capture_output=True, text=True, env=env, preexec_fn=take_terminal, check=False
        )
    finally:
        os.close(ours)
        os.close(terminal)


@pytest.mark.parametrize(
    ("num_tasks", "port", "starts", "is_refused"),
    [
        (4, "44152", "bash", True),
        (1, "44152", "bash", False),
        (4, "", "bash", False),  # no step of a terminal: a task's own script
        (4, "44152", "slurmstepd", False),  # a task itself, of `srun --pty mura-dist ...`
    ],
)
def test_a_shell_of_srun_with_a_terminal_is_no_task_of_several(
    num_tasks: int, port: str, starts: str, is_refused: bool, tmp_path: Path
) -> None:
    """Left as it is, a training in it would wait for the other tasks, which have ended."""
    parent = tmp_path / starts
    parent.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    parent.chmod(0o755)
    step = {"SLURM_STEP_NUM_TASKS": str(num_tasks), "SLURM_PROCID": "0", "SLURM_PTY_PORT": port}
    line = "from mura_dist.distributed import environment; print(environment.ranks().size)"
    told = in_terminal(parent, sys.executable, "-c", line, env={**os.environ, **step})
    assert (told.returncode != 0) == is_refused, told.stderr
    if is_refused:
        for word in ("SLURM_STEP_NUM_TASKS=4", "`srun --pty`", "unset SLURM_STEP_NUM_TASKS", "--ntasks 1"):
            assert word in told.stderr
    else:
        assert told.stdout == f"{num_tasks}\n"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]node[10-19]", "rack2node10"),
        ("a-b.c[001-100].example,d", "a-b.c001.example"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_where_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(said: dict[str, str]) -> tuple[str, int]:
        with monkeypatch.context() as patched:
            for name, value in said.items():
                patched.setenv(name, value)
            return environment.meeting_place()

    job = slurm(7, 1, 3) | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    address, port = meet(job)
    assert address == "gpu07"
    assert 20000 <= port < 29000, "not one that Linux gives to anybody who asks"
    assert meet(slurm(0, 0, 0) | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}) == (address, port), "the same for all"
    assert meet(job | {"SLURM_STEP_ID": "1"})[1] != port, "steps of a job may run beside each other"
    assert meet(job | {"MASTER_ADDR": "ib0-gpu07", "MASTER_PORT": "1234"}) == ("ib0-gpu07", 1234)
    assert meet(openmpi(1, 2, 1, 2))[0] == "127.0.0.1", "all on this machine"
    assert meet({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}) == ("a", 29500)
    with pytest.raises(UserError, match="mpiexec -genv MASTER_ADDR HOST"):
        meet(hydra(1, 4, 1, 2))
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        meet(openmpi(1, 4, 1, 2))
    with pytest.raises(UserError, match=r"rank 1 of 2 \(told by RANK and WORLD_SIZE\).*export MASTER_ADDR=HOST"):
        meet({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="MASTER_PORT=70000: must lie between"):
        meet(job | {"MASTER_PORT": "70000"})


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_meeting_that_fails_says_where_and_why(monkeypatch: pytest.MonkeyPatch, taken_port: int) -> None:
    def join(rank: int, port: int, patience_s: float = 0.0) -> None:
        said = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in said.items():
            monkeypatch.setenv(name, str(value))
        with process_group.join(1.0, patience_s=patience_s):
            raise AssertionError("nobody is there")

    with pytest.raises(
        RankLocalUserError, match=rf"port {taken_port} of 127.0.0.1: another program listens.*MASTER_PORT=29501"
    ):
        join(0, taken_port)
    free = free_port()
    for rank in (0, 1):
        with pytest.raises(
            RunError, match=rf"rank {rank} of 2 could not meet the others at 127.0.0.1:{free} \(.*up to 1 s\)"
        ):
            join(rank, free)
    begin = time.monotonic()
    with pytest.raises(RunError, match=r"up to 3 s\)"):
        join(1, free, patience_s=2)
    assert time.monotonic() - begin > 3, "rank 0 may come later"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RunError, match=r"up to 1 s\)"):
        join(1, free, patience_s=60)  # torchrun listened before its ranks began


LATE = """
import os, sys, time
from mura_dist.distributed import process_group
late, rank = int(sys.argv[1]), int(os.environ["RANK"])
time.sleep(6 * (rank == late))
with process_group.join(3, patience_s=60) as ranks:
    print("met", flush=True)
    ranks.barrier()
    begin = time.monotonic()
    if rank != late:
        try:
            ranks.barrier()
        finally:
            print(f"waited {time.monotonic() - begin:.1f} s", flush=True)
    time.sleep(8)
"""


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.nightly(part="launchers"))])
def test_a_late_rank_is_waited_for_once(late: int) -> None:
    """Longer than timeout_s at the first meeting: it may doubt another's lock. Later nobody waits so long."""
    words = ("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", sys.executable, "-c", LATE, late)
    done = run(*words)
    assert done.stdout.count("met") == 2, done.stderr
    waited = re.findall(r"waited (\d+\.\d) s", done.stdout)
    assert len(waited) == 1, done.stderr
    assert 2.5 < float(waited[0]) < 7.5
    assert f"rank {1 - late} lost another rank (" in done.stderr


# ---- trainings


@pytest.mark.slow
def test_tasks_of_srun_train_as_ranks_do(whole: Callable[..., Path], shard_folder: Path, tmp_path: Path) -> None:
    """By srun's words alone: no RANK, no MASTER_ADDR. They end with the losses of torchrun's ranks."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "nowhere"}
    step = job | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    tasks = [
        subprocess.Popen(
            [*warm_script("mura-dist"), "train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "--quiet"],
            env={**os.environ, **NO_GPU, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], told
    assert told[0][0].startswith(f"{tmp_path / 'run'}: 2 epochs")
    assert told[1][0] == "", "the first one speaks"
    assert losses(tmp_path / "run") == losses(whole(2))


@pytest.mark.nightly(part="launchers")
def test_mpirun_trains_as_torchrun_does(whole: Callable[..., Path], shard_folder: Path, tmp_path: Path) -> None:
    if not shutil.which("mpirun"):
        pytest.skip("needs OpenMPI: apt-get install openmpi-bin")
    words = [
        shutil.which("mpirun"),
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        2,
        BIN / "mura-dist",
        "train",
        *TINY,
    ]
    done = run(*words, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(whole(2))
