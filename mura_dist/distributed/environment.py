"""The launch environment: rank, world size, local rank and rendezvous address, read from environment variables.

    torchrun, deepspeed       RANK, WORLD_SIZE
    mpirun (OpenMPI)          OMPI_COMM_WORLD_*
    mpiexec (MPICH, Intel)    PMI_*, MPI_LOCAL*
    srun (Slurm)              SLURM_*

Without any of them the process is rank 0 of 1. RANK and WORLD_SIZE may also be set by hand, as a job array does to share a
conversion. Contradictory variables, and variables that no launcher of this process can have set, raise UserError at once:
otherwise the process would wait for ranks that never start. An empty variable counts as unset.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import UserError

LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # of torchrun and deepspeed; RANK alone may be set by hand
OPENMPI, MPICH, SLURM, PLAIN = "OpenMPI", "MPICH or Intel MPI", "Slurm", "RANK and WORLD_SIZE"
_SOURCES = {OPENMPI: "OMPI_COMM_WORLD_*", MPICH: "PMI_RANK, PMI_SIZE", SLURM: "SLURM_PROCID, SLURM_STEP_NUM_TASKS"}
_DEFAULT_PORT = 29500  # torch's
_FIRST_PORT, _NUM_PORTS = 20000, 9000  # below Linux's ephemeral ports


@dataclass(frozen=True)
class LaunchEnv:
    """Identity of this process among its ranks.

    Attributes:
        launcher: OPENMPI, MPICH, SLURM, or PLAIN: RANK and WORLD_SIZE, which may be unset.
        rank: 0-based, over all machines.
        world_size: number of ranks.
        local_rank: 0-based, on this machine.
        local_world_size: number of ranks on this machine; 1 where unknown.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def launch_env() -> LaunchEnv:
    """Return the identity of this process among its ranks.

    Raises:
        UserError: the variables contradict each other.
    """
    env = _parse({name: value for name, value in os.environ.items() if value})
    # local_rank may exceed local_world_size: a job array computes the latter as if all nodes had equal shares.
    is_valid = 0 <= env.rank < env.world_size and env.local_rank >= 0 and 1 <= env.local_world_size <= env.world_size
    if not is_valid:
        raise UserError(
            f"{_source(env.launcher)} in the environment: rank {env.rank} of {env.world_size}, on this machine "
            f"{env.local_rank} of {env.local_world_size}, is not a valid rank (ranks count from 0). Correct these variables, "
            "or unset them to run alone."
        )
    return env


def _source(launcher: str) -> str:
    """Return the launcher's name with the variables that it sets."""
    return f"{launcher} ({_SOURCES[launcher]})" if launcher in _SOURCES else launcher


def _parse(variables: Mapping[str, str]) -> LaunchEnv:
    # Before Slurm: mpirun in a Slurm job runs inside a step of its own, with one task per node.
    if "RANK" not in variables and "OMPI_COMM_WORLD_RANK" in variables:
        world_size, local_size = (variables.get(f"OMPI_COMM_WORLD_{name}", "1") for name in ("SIZE", "LOCAL_SIZE"))
        local_rank = "OMPI_COMM_WORLD_LOCAL_RANK"
        return _parse_numbers(OPENMPI, variables, "OMPI_COMM_WORLD_RANK", world_size, local_rank, local_size)
    # Before Slurm too. But srun --mpi=pmi2 also sets PMI_RANK for its tasks, without MPI_LOCALRANKID.
    is_hydra = "MPI_LOCALRANKID" in variables or "SLURM_STEP_NUM_TASKS" not in variables
    if "RANK" not in variables and "PMI_RANK" in variables and is_hydra:
        world_size, local_size = variables.get("PMI_SIZE", "1"), variables.get("MPI_LOCALNRANKS", "1")
        return _parse_numbers(MPICH, variables, "PMI_RANK", world_size, "MPI_LOCALRANKID", local_size)
    # Set by srun alone: a batch script outside srun has SLURM_NTASKS too, but is one process.
    if "RANK" not in variables and "SLURM_STEP_NUM_TASKS" in variables:
        world_size, local_size = variables["SLURM_STEP_NUM_TASKS"], _tasks_on_node(variables)
        env = _parse_numbers(SLURM, variables, "SLURM_PROCID", world_size, "SLURM_LOCALID", local_size)
        if env.world_size > 1:
            _check_slurm_task(variables)
        return env
    if "RANK" not in variables:
        _check_no_leftovers(variables)
    local_size = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or "1"  # torchrun's, deepspeed's
    return _parse_numbers(PLAIN, variables, "RANK", variables.get("WORLD_SIZE", "1"), "LOCAL_RANK", local_size)


def _check_no_leftovers(variables: Mapping[str, str]) -> None:
    """Raise UserError where variables of a launcher are set without RANK: exported by hand, or left over from another job."""
    values_alone = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    for name, value in values_alone.items():
        if variables.get(name, value) != value:
            raise UserError(
                f"{name}={variables[name]} is set and RANK is not, so no launcher set it. Run `unset {name}` to run alone, or "
                "start the ranks with torchrun."
            )


def _check_slurm_task(variables: Mapping[str, str]) -> None:
    """Raise UserError in a step of several tasks where srun did not start this process as one of them.

    `srun --pty bash` in an allocation of n tasks is a step of n shells. The first one has the terminal and the others exit at
    once, so a command in it would wait for them. slurmstepd is the parent of a task itself.
    """
    num_tasks = variables["SLURM_STEP_NUM_TASKS"]
    if "SLURM_PROCID" not in variables:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={num_tasks} is set and SLURM_PROCID is not, so srun did not start this process. Run `unset "
            "SLURM_STEP_NUM_TASKS` to run alone, or start the tasks with srun."
        )
    if "SLURM_PTY_PORT" in variables and _has_terminal() and _parent_name() != "slurmstepd":
        raise UserError(
            f"this is the shell of `srun --pty` in a step of SLURM_STEP_NUM_TASKS={num_tasks} tasks, and the other tasks do not "
            "run. Run `unset SLURM_STEP_NUM_TASKS` to run alone, or leave the shell and use srun --ntasks 1 --pty bash or srun "
            "mura-dist ..."
        )


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal, even if its output is redirected."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    return False


def _parent_name() -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    return ""


def _parse_numbers(
    launcher: str, variables: Mapping[str, str], rank: str, world_size: str, local_rank: str, local_size: str
) -> LaunchEnv:
    """Parse the variables named `rank` and `local_rank`, and the values `world_size` and `local_size`."""
    values = (variables.get(rank, "0"), world_size, variables.get(local_rank, "0"), local_size)
    try:
        return LaunchEnv(launcher, *map(int, values))
    except ValueError:
        raise UserError(
            f"{_source(launcher)} in the environment: {', '.join(values)} (rank, world size, both on this machine) are not all "
            "whole numbers. Correct these variables, or unset them to run alone."
        ) from None


def _tasks_on_node(variables: Mapping[str, str]) -> str:
    """Return the number of tasks on this node. "4(x2),3": 4 on each of two nodes, 3 on a third."""
    tasks, node = variables.get("SLURM_STEP_TASKS_PER_NODE", "1"), variables.get("SLURM_NODEID", "0")
    if not re.fullmatch(r"\d+(\(x\d{1,6}\))?(,\d+(\(x\d{1,6}\))?)*", tasks) or not node.isdecimal():
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks} and SLURM_NODEID={node} are not a list such as 4(x2),3 and a number. Correct "
            "them, or unset SLURM_STEP_NUM_TASKS to run alone."
        )
    counts = [group.partition("(x")[::2] for group in tasks.split(",")]
    tasks_by_node = [count for count, times in counts for _ in range(int(times.rstrip(")") or 1))]
    return tasks_by_node[min(int(node), len(tasks_by_node) - 1)]


def rank() -> int:
    """Return the 0-based rank of this process over all machines."""
    return launch_env().rank


def world_size() -> int:
    """Return the number of ranks."""
    return launch_env().world_size


def local_rank() -> int:
    """Return the 0-based rank of this process on this machine."""
    return launch_env().local_rank


def local_world_size() -> int:
    """Return the number of ranks on this machine. They share its processors and GPUs."""
    return launch_env().local_world_size


def is_first() -> bool:
    """Return whether this process is rank 0, which prints and writes for all ranks."""
    return rank() == 0


def has_launcher() -> bool:
    """Return whether torchrun or deepspeed started this process, and so must outlive it.

    srun and mpirun end their tasks themselves.
    """
    return any(name in os.environ for name in LAUNCHER_VARIABLES)


def launcher_hosts_store() -> bool:
    """Return whether the launcher (torchrun), rather than rank 0, serves the rendezvous store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def rendezvous_endpoint() -> tuple[str, int]:
    """Return the (address, port) of the rendezvous: MASTER_ADDR and MASTER_PORT, else derived from the scheduler's variables.

    Raises:
        UserError: neither names a valid endpoint.
    """
    variables = os.environ
    address = variables.get("MASTER_ADDR") or _address(launch_env(), variables)
    port = variables.get("MASTER_PORT") or str(_port(variables))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"MASTER_PORT={port} is not a port (1 to 65535). Set it to a free port of {address}, or unset it for the default."
        )
    return address, int(port)


def _address(env: LaunchEnv, variables: Mapping[str, str]) -> str:
    if env.local_world_size == env.world_size:
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if env.launcher == SLURM and nodes:
        return first_host(nodes)
    remedies = {OPENMPI: "mpirun -x MASTER_ADDR=HOST ...", MPICH: "mpiexec -genv MASTER_ADDR HOST ..."}
    remedy = remedies.get(env.launcher, "export MASTER_ADDR=HOST MASTER_PORT=29500")
    raise UserError(
        f"rank {env.rank} of {env.world_size} (set by {env.launcher}) has no rendezvous address: MASTER_ADDR is not set. Name "
        f"rank 0's host: {remedy}"
    )


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: "gpu[07-09,12],login1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def _port(variables: Mapping[str, str]) -> int:
    """Return a port that is equal on all ranks of a job step and differs between steps.

    torch's default port would allow one job per machine.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    values = [variables[name] for name in names if name in variables]
    return _FIRST_PORT + zlib.crc32("/".join(values).encode()) % _NUM_PORTS if values else _DEFAULT_PORT
