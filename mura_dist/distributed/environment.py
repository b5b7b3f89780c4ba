"""What started this process, by its environment: which rank it is, of how many, how many share this machine, where they meet.

torchrun, deepspeed (RANK, WORLD_SIZE), OpenMPI's mpirun (OMPI_COMM_WORLD_*), MPICH's and Intel MPI's mpiexec (PMI_*, MPI_LOCAL*)
and Slurm's srun (SLURM_*) each have words of their own; without any we are rank 0 of 1. RANK and WORLD_SIZE may be set by hand
too: a job array shares a conversion so. Words that contradict each other, or that no launcher of this process can have set, are
refused at once: a rank that others are to join would wait for them in vain. An empty word counts as none.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mura_dist.core.errors import UserError

VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # torchrun's and deepspeed's own; RANK alone may be set by hand
OPENMPI, MPICH, SLURM, PLAIN = "OpenMPI", "MPICH or Intel MPI", "Slurm", "RANK and WORLD_SIZE"
_NUMBERS = {OPENMPI: "OMPI_COMM_WORLD_*", MPICH: "PMI_RANK, PMI_SIZE", SLURM: "SLURM_PROCID, SLURM_STEP_NUM_TASKS"}
_DEFAULT_PORT = 29500  # torch's
_FIRST_PORT, _PORTS = 20000, 9000  # below the ports Linux gives to whoever asks for any


@dataclass(frozen=True)
class Ranks:
    """The identity of this process among its ranks. `by`: OpenMPI, MPICH or Intel MPI, Slurm, or the words RANK and WORLD_SIZE,
    which may be missing.

    local_size is 1 where nothing tells it.
    """

    by: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def ranks() -> Ranks:
    """Return who this process is. Raises UserError where the environment says what cannot be."""
    told = _told({name: value for name, value in os.environ.items() if value})
    # local_rank may exceed local_size, which a job array's page works out as if nodes had equal shares.
    if not (0 <= told.rank < told.size and told.local_rank >= 0 and 1 <= told.local_size <= told.size):
        raise UserError(
            f"this process is told by {_source(told.by)} to be rank {told.rank} of {told.size}, on this machine "
            f"{told.local_rank} of {told.local_size}; ranks count from 0: set them right, or unset them to run alone"
        )
    return told


def _source(by: str) -> str:
    """Name who set the numbers, and the variables that say them."""
    return f"{by} ({_NUMBERS[by]})" if by in _NUMBERS else by


def _told(variables: Mapping[str, str]) -> Ranks:
    # Before Slurm: what mpirun starts in a Slurm job is inside a step of its own, with a task a node.
    if "RANK" not in variables and "OMPI_COMM_WORLD_RANK" in variables:
        all_of_us, here = (variables.get(f"OMPI_COMM_WORLD_{name}", "1") for name in ("SIZE", "LOCAL_SIZE"))
        return _numbers(OPENMPI, variables, "OMPI_COMM_WORLD_RANK", all_of_us, "OMPI_COMM_WORLD_LOCAL_RANK", here)
    # Before Slurm too; but srun --mpi=pmi2 sets PMI_RANK for its tasks as well, without MPI_LOCALRANKID.
    hydra = "MPI_LOCALRANKID" in variables or "SLURM_STEP_NUM_TASKS" not in variables
    if "RANK" not in variables and "PMI_RANK" in variables and hydra:
        all_of_us, here = variables.get("PMI_SIZE", "1"), variables.get("MPI_LOCALNRANKS", "1")
        return _numbers(MPICH, variables, "PMI_RANK", all_of_us, "MPI_LOCALRANKID", here)
    # srun's alone: a batch script outside srun, which knows SLURM_NTASKS too, is one process.
    if "RANK" not in variables and "SLURM_STEP_NUM_TASKS" in variables:
        here = _tasks_of_node(variables)
        ranks = _numbers(SLURM, variables, "SLURM_PROCID", variables["SLURM_STEP_NUM_TASKS"], "SLURM_LOCALID", here)
        if ranks.size > 1:
            _refuse_shell(variables)
        return ranks
    if "RANK" not in variables:
        _refuse_leftovers(variables)
    here = variables.get("LOCAL_WORLD_SIZE") or variables.get("LOCAL_SIZE") or "1"  # torchrun's word, deepspeed's
    return _numbers(PLAIN, variables, "RANK", variables.get("WORLD_SIZE", "1"), "LOCAL_RANK", here)


def _refuse_leftovers(variables: Mapping[str, str]) -> None:
    """Raise UserError where words of a launcher are set and RANK is not: somebody exported them, or they are a former job's."""
    alone = {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    for name, value in alone.items():
        if variables.get(name, value) != value:
            raise UserError(
                f"{name}={variables[name]} is set and RANK is not, so no launcher set it; `unset {name}` to run alone, or start "
                "the ranks with torchrun"
            )


def _refuse_shell(variables: Mapping[str, str]) -> None:
    """Raise UserError in a step of several tasks where srun does not tell which one this is, or where this is not one of them.

    `srun --pty bash` in an allocation of n tasks is a step of n shells: this one has the terminal, the others end at once, and
    what is started here would wait for them. A task itself is started by slurmstepd.
    """
    number = variables["SLURM_STEP_NUM_TASKS"]
    if "SLURM_PROCID" not in variables:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={number} is set and SLURM_PROCID is not, so srun did not start this process; `unset "
            "SLURM_STEP_NUM_TASKS` to run alone, or start the tasks with srun"
        )
    if "SLURM_PTY_PORT" in variables and _has_terminal() and _parent_name() != "slurmstepd":
        raise UserError(
            f"this is the shell of `srun --pty` in a step of SLURM_STEP_NUM_TASKS={number} tasks; the other tasks are not there; "
            "`unset SLURM_STEP_NUM_TASKS` to run alone, or leave the shell: srun --ntasks 1 --pty bash, or srun mura-dist ..."
        )


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal, wherever its output goes."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
        return True
    return False


def _parent_name() -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    return ""


def _numbers(by: str, variables: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Ranks:
    words = (variables.get(rank, "0"), size, variables.get(local_rank, "0"), local_size)
    try:
        return Ranks(by, *map(int, words))
    except ValueError:
        raise UserError(
            f"{_source(by)} in the environment: {', '.join(words)} (rank, world size, both on this machine) are not all whole "
            "numbers; set them right, or unset them to run alone"
        ) from None


def _tasks_of_node(variables: Mapping[str, str]) -> str:
    """ "4(x2),3": 4 tasks on each of two nodes, 3 on a third -> ours."""
    tasks, node = variables.get("SLURM_STEP_TASKS_PER_NODE", "1"), variables.get("SLURM_NODEID", "0")
    if not re.fullmatch(r"\d+(\(x\d{1,6}\))?(,\d+(\(x\d{1,6}\))?)*", tasks) or not node.isdecimal():
        raise UserError(
            f"SLURM_STEP_TASKS_PER_NODE={tasks} and SLURM_NODEID={node}: no list such as 4(x2),3 and no number; set them right, "
            "or unset SLURM_STEP_NUM_TASKS to run alone"
        )
    counts = [part.partition("(x")[::2] for part in tasks.split(",")]
    each = [number for number, times in counts for _ in range(int(times.rstrip(")") or 1))]
    return each[min(int(node), len(each) - 1)]


def rank() -> int:
    return ranks().rank


def world_size() -> int:
    return ranks().size


def local_rank() -> int:
    return ranks().local_rank


def ranks_here() -> int:
    """Ranks on this machine, which share its processors and GPUs."""
    return ranks().local_size


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return rank() == 0


def is_there() -> bool:
    """Whether torchrun or deepspeed started this process, and so is to outlive it. srun and mpirun end their tasks themselves."""
    return any(name in os.environ for name in VARIABLES)


def holds_the_meeting_place() -> bool:
    """Whether the launcher itself (torchrun) listens where the ranks meet, rather than rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meeting_place() -> tuple[str, int]:
    """(address, port) at which the ranks meet: MASTER_ADDR and MASTER_PORT, or what follows from the scheduler's words.

    Raises UserError where neither tells it.
    """
    told, variables = ranks(), os.environ
    address = variables.get("MASTER_ADDR") or _address(told, variables)
    port = variables.get("MASTER_PORT") or str(_port(variables))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"MASTER_PORT={port}: must lie between 1 and 65535; give a free port of {address}, or leave it out"
        )
    return address, int(port)


def _address(told: Ranks, variables: Mapping[str, str]) -> str:
    if told.local_size == told.size:
        return "127.0.0.1"
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if told.by == SLURM and nodes:
        return first_host(nodes)
    remedies = {OPENMPI: "mpirun -x MASTER_ADDR=HOST ...", MPICH: "mpiexec -genv MASTER_ADDR HOST ..."}
    remedy = remedies.get(told.by, "export MASTER_ADDR=HOST MASTER_PORT=29500")
    raise UserError(
        f"rank {told.rank} of {told.size} (told by {told.by}) does not know where the ranks meet: MASTER_ADDR is not set; name "
        f"rank 0's host: {remedy}"
    )


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[07-09,12],login1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def _port(variables: Mapping[str, str]) -> int:
    """The same on all ranks of a job's step, another one for another: torch's own default would serve one job a machine."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    said = [variables[name] for name in names if name in variables]
    return _FIRST_PORT + zlib.crc32("/".join(said).encode()) % _PORTS if said else _DEFAULT_PORT
