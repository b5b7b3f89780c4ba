"""What started this process, by its environment: which rank it is, of how many, how many share this machine, where they meet.

torchrun, deepspeed (RANK, WORLD_SIZE), OpenMPI's mpirun (OMPI_COMM_WORLD_*) and Slurm's srun (SLURM_*) each have words of their
own; without any we are rank 0 of 1. RANK and WORLD_SIZE may be set by hand too: a job array shares a conversion so.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from mura_dist.core.errors import Refusal

VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # torchrun's and deepspeed's own; RANK alone may be set by hand
_DEFAULT_PORT = 29500  # torch's
_FIRST_PORT, _PORTS = 20000, 9000  # below the ports Linux gives to whoever asks for any


@dataclass(frozen=True)
class Ranks:
    """Who this process is. `by`: OpenMPI, Slurm, or the words RANK and WORLD_SIZE, which may be missing."""

    by: str
    rank: int
    size: int
    local_rank: int
    local_size: int


def ranks() -> Ranks:
    """Raises Refusal where the environment says what cannot be."""
    told = _told(os.environ)
    if not (0 <= told.rank < told.size and told.local_rank >= 0):
        raise Refusal(
            f"this process is told by {told.by} to be rank {told.rank} of {told.size}, on this machine {told.local_rank} of "
            f"{told.local_size}; ranks count from 0: set them right, or unset them to run alone"
        )
    return told


def _told(known: Mapping[str, str]) -> Ranks:
    # Before Slurm: what mpirun starts in a Slurm job is inside a step of its own, with a task a node.
    if "RANK" not in known and "OMPI_COMM_WORLD_RANK" in known:
        all_of_us, here = (known.get(f"OMPI_COMM_WORLD_{name}", "1") for name in ("SIZE", "LOCAL_SIZE"))
        return _numbers("OpenMPI", known, "OMPI_COMM_WORLD_RANK", all_of_us, "OMPI_COMM_WORLD_LOCAL_RANK", here)
    # srun's alone: a batch script outside srun, which knows SLURM_NTASKS too, is one process.
    if "RANK" not in known and "SLURM_STEP_NUM_TASKS" in known:
        here = _tasks_of_node(known)
        return _numbers("Slurm", known, "SLURM_PROCID", known["SLURM_STEP_NUM_TASKS"], "SLURM_LOCALID", here)
    here = known.get("LOCAL_WORLD_SIZE") or known.get("LOCAL_SIZE") or "1"  # torchrun's word, deepspeed's
    return _numbers("RANK and WORLD_SIZE", known, "RANK", known.get("WORLD_SIZE", "1"), "LOCAL_RANK", here)


def _numbers(by: str, known: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str) -> Ranks:
    words = (known.get(rank, "0"), size, known.get(local_rank, "0"), local_size)
    try:
        return Ranks(by, *map(int, words))
    except ValueError:
        raise Refusal(
            f"{by} in the environment: {', '.join(words)} (rank, world size, on this machine) are not all whole numbers; set "
            "them right, or unset them to run alone"
        ) from None


def _tasks_of_node(known: Mapping[str, str]) -> str:
    """ "4(x2),3": 4 tasks on each of two nodes, 3 on a third -> ours."""
    tasks = known.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")
    counts = [part.partition("(x")[::2] for part in tasks]
    each = [number for number, times in counts for _ in range(int(times.rstrip(")") or 1))]
    node = int(known.get("SLURM_NODEID", "0"))
    return each[node] if node < len(each) else each[-1]


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

    Raises Refusal where neither tells it.
    """
    told, known = ranks(), os.environ
    address = known.get("MASTER_ADDR") or _address(told, known)
    port = known.get("MASTER_PORT") or str(_port(known))
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise Refusal(
            f"MASTER_PORT={port}: must lie between 1 and 65535; give a free port of {address}, or leave it out"
        )
    return address, int(port)


def _address(told: Ranks, known: Mapping[str, str]) -> str:
    if told.local_size == told.size:
        return "127.0.0.1"
    nodes = known.get("SLURM_STEP_NODELIST") or known.get("SLURM_JOB_NODELIST")
    if told.by == "Slurm" and nodes:
        return first_host(nodes)
    remedy = "mpirun -x MASTER_ADDR=HOST ..." if told.by == "OpenMPI" else "export MASTER_ADDR=HOST MASTER_PORT=29500"
    raise Refusal(
        f"rank {told.rank} of {told.size} (told by {told.by}) does not know where the ranks meet: MASTER_ADDR is not set; name "
        f"rank 0's host: {remedy}"
    )


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[07-09,12],login1" -> "gpu07"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group()) if first else nodes


def _port(known: Mapping[str, str]) -> int:
    """The same on all ranks of a job's step, another one for another: torch's own default would serve one job a machine."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    said = [known[name] for name in names if name in known]
    return _FIRST_PORT + zlib.crc32("/".join(said).encode()) % _PORTS if said else _DEFAULT_PORT
