"""Test LaunchEnv from the variables of each launcher, the rendezvous, and trainings under srun and mpirun."""

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

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launch_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name in VARIABLES or name.startswith(("SLURM_", "OMPI_", "PMIX_", "PMI_", "MPI_")):
            monkeypatch.delenv(name)


def slurm(rank: int, node: int, local_rank: int) -> dict[str, str]:
    """Return the variables of a task that srun of Slurm 22.05 sets: 11 tasks on three nodes."""
    step = {"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_STEP_NODELIST": "gpu[07-09]"}
    return step | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)}


def openmpi(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    variables = {"RANK": rank, "SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_SIZE": local_size}
    return {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in variables.items()}


def hydra(rank: int, size: int, local_rank: int, local_size: int) -> dict[str, str]:
    """Return the variables that the mpiexec of MPICH 5.0 and of Intel MPI 2021 sets."""
    variables = {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": local_rank, "MPI_LOCALNRANKS": local_size}
    return {name: str(number) for name, number in variables.items()}


LAUNCHERS = {
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


@pytest.mark.parametrize("case", LAUNCHERS)
def test_launch_env_of_each_launcher(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables, expected = LAUNCHERS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    env = environment.launch_env()
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == expected
    assert (environment.rank(), environment.world_size()) == (env.rank, env.world_size)
    assert (environment.local_rank(), environment.local_world_size()) == (env.local_rank, env.local_world_size)
    assert environment.is_first() == (env.rank == 0)


@pytest.mark.parametrize(
    ("variables", "texts"),
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
def test_contradictory_variables_are_refused(
    variables: dict[str, str],
    texts: tuple[str, ...],
    shard_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    laws.refusal(capsys, ["train", *TINY, f"shards={shard_folder}", f"run={tmp_path / 'run'}"], *texts)


def test_several_ranks_only_with_a_launcher_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of leftover variables gives a rank that exists, or a UserError that names a variable."""
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
    rank_variables = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    num_several = num_alone = num_refused = 0
    for values in itertools.product(*((None, *values_of_name) for values_of_name in grid.values())):
        variables = {name: value for name, value in zip(grid, values, strict=True) if value is not None}
        monkeypatch.setattr(os, "environ", variables)
        try:
            env = environment.launch_env()
        except UserError as refusal:
            num_refused += any(name in str(refusal) for name in (*variables, "OMPI_COMM_WORLD_*"))
            continue
        assert 0 <= env.rank < env.world_size
        num_several += env.world_size > 1
        num_alone += env.world_size == 1
        assert env.world_size == 1 or any(variables.get(name) == str(env.rank) for name in rank_variables), variables
    assert num_several + num_alone + num_refused == math.prod(
        1 + len(values_of_name) for values_of_name in grid.values()
    ), "each names a variable"
    assert min(num_several, num_refused) > 1000


def run_in_terminal(*command: str | Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with a controlling terminal and return it with its output from pipes."""
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    try:
        return subprocess.run(
            command, stdin=terminal, capture_output=True, text=True, env=env, preexec_fn=take_terminal, check=False
        )
    finally:
        os.close(master)
        os.close(terminal)


@pytest.mark.parametrize(
    ("num_tasks", "port", "starts", "is_refused"),
    [
        (4, "44152", "bash", True),
        (1, "44152", "bash", False),
        (4, "", "bash", False),  # a script within a task, without a terminal
        (4, "44152", "slurmstepd", False),  # a task of `srun --pty mura-dist ...`
    ],
)
def test_srun_terminal_shell_of_several_tasks_is_refused(
    num_tasks: int, port: str, starts: str, is_refused: bool, tmp_path: Path
) -> None:
    """A training in the shell would wait for the other tasks, which have exited."""
    parent = tmp_path / starts
    parent.write_text('#!/bin/sh\n"$@"\nexit $?\n')
    parent.chmod(0o755)
    step = {"SLURM_STEP_NUM_TASKS": str(num_tasks), "SLURM_PROCID": "0", "SLURM_PTY_PORT": port}
    line = "from mura_dist.distributed import environment; print(environment.launch_env().world_size)"
    result = run_in_terminal(parent, sys.executable, "-c", line, env={**os.environ, **step})
    assert (result.returncode != 0) == is_refused, result.stderr
    if is_refused:
        for word in ("SLURM_STEP_NUM_TASKS=4", "`srun --pty`", "unset SLURM_STEP_NUM_TASKS", "--ntasks 1"):
            assert word in result.stderr
    else:
        assert result.stdout == f"{num_tasks}\n"


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
def test_first_host_of_a_slurm_node_list(nodes: str, first: str) -> None:
    assert environment.first_host(nodes) == first


def test_rendezvous_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def meet(variables: dict[str, str]) -> tuple[str, int]:
        with monkeypatch.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            return environment.rendezvous_endpoint()

    job = slurm(7, 1, 3) | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
    address, port = meet(job)
    assert address == "gpu07"
    assert 20000 <= port < 29000, "outside Linux's ephemeral ports"
    assert meet(slurm(0, 0, 0) | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}) == (address, port), "equal on all ranks"
    assert meet(job | {"SLURM_STEP_ID": "1"})[1] != port, "steps of a job may run at the same time"
    assert meet(job | {"MASTER_ADDR": "ib0-gpu07", "MASTER_PORT": "1234"}) == ("ib0-gpu07", 1234)
    assert meet(openmpi(1, 2, 1, 2))[0] == "127.0.0.1", "all on this machine"
    assert meet({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}) == ("a", 29500)
    with pytest.raises(UserError, match="mpiexec -genv MASTER_ADDR HOST"):
        meet(hydra(1, 4, 1, 2))
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=HOST"):
        meet(openmpi(1, 4, 1, 2))
    with pytest.raises(UserError, match=r"rank 1 of 2 \(set by RANK and WORLD_SIZE\).*export MASTER_ADDR=HOST"):
        meet({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="MASTER_PORT=70000 is not a port"):
        meet(job | {"MASTER_PORT": "70000"})


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_failed_rendezvous_names_endpoint_and_reason(monkeypatch: pytest.MonkeyPatch, used_port: int) -> None:
    def join(rank: int, port: int, patience_s: float = 0.0) -> None:
        variables = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        with process_group.join(1.0, patience_s=patience_s):
            raise AssertionError("no other rank exists")

    with pytest.raises(
        RankLocalUserError, match=rf"port {used_port} of 127.0.0.1 is in use by another program.*MASTER_PORT=29501"
    ):
        join(0, used_port)
    free = free_port()
    for rank in (0, 1):
        with pytest.raises(
            RunError, match=rf"rank {rank} of 2 could not meet the other ranks at 127.0.0.1:{free} within 1 s \("
        ):
            join(rank, free)
    start_s = time.monotonic()
    with pytest.raises(RunError, match=r"within 3 s \("):
        join(1, free, patience_s=2)
    assert time.monotonic() - start_s > 3, "rank 0 may come later"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(RunError, match=r"within 1 s \("):
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
def test_late_rank_extends_only_the_first_meeting(late: int) -> None:
    """Ranks wait longer than timeout_s at the first meeting only: a late rank may wait for a stale lock."""
    command = ("torchrun", "--standalone", "--nproc-per-node", 2, "--no-python", sys.executable, "-c", LATE, late)
    done = run(*command)
    assert done.stdout.count("met") == 2, done.stderr
    waited = re.findall(r"waited (\d+\.\d) s", done.stdout)
    assert len(waited) == 1, done.stderr
    assert 2.5 < float(waited[0]) < 7.5
    assert f"rank {1 - late} lost another rank (" in done.stderr


# ---- trainings


@pytest.mark.slow
def test_losses_identical_under_srun_and_torchrun(
    reference_run: Callable[..., Path], shard_folder: Path, tmp_path: Path
) -> None:
    """srun's variables alone suffice, without RANK and MASTER_ADDR."""
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
    outputs = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert outputs[0][0].startswith(f"{tmp_path / 'run'}: 2 epochs")
    assert outputs[1][0] == "", "only rank 0 prints"
    assert losses(tmp_path / "run") == losses(reference_run(2))


@pytest.mark.nightly(part="launchers")
def test_losses_identical_under_mpirun_and_torchrun(
    reference_run: Callable[..., Path], shard_folder: Path, tmp_path: Path
) -> None:
    if not shutil.which("mpirun"):
        pytest.skip("needs OpenMPI: apt-get install openmpi-bin")
    command = [
        shutil.which("mpirun"),
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        2,
        BIN / "mura-dist",
        "train",
        *TINY,
    ]
    done = run(*command, f"shards={shard_folder}", f"run={tmp_path / 'run'}", "--quiet")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(reference_run(2))
