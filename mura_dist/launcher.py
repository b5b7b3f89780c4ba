"""What the launcher (torchrun, deepspeed, none) tells a process by its environment: who it is among how many."""

import os

VARIABLES = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # torchrun's and deepspeed's own; RANK alone may be set by hand


def is_there() -> bool:
    """Whether torchrun or deepspeed started this process, and so is to outlive it."""
    return any(name in os.environ for name in VARIABLES)


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int:
    """Ranks on this machine: torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def share_here() -> tuple[int, int]:
    """As `share`, of this machine's processes alone: they share its processors and GPUs."""
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return local_rank(), ranks_here()
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(",")  # "4(x2),3": of each machine
    counts = [part.partition("(x")[::2] for part in tasks]
    each = [int(number) for number, times in counts for _ in range(int(times.rstrip(")") or 1))]
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return int(os.environ.get("SLURM_LOCALID", "0")), each[node] if node < len(each) else each[-1]


def is_first() -> bool:
    """Whether this process is the one that speaks and writes for all."""
    return rank() == 0


def share() -> tuple[int, int]:
    """(which, of how many) this process is of those that share a work without talking: torchrun's ranks, or Slurm's tasks.

    SLURM_STEP_NUM_TASKS is set by srun alone; a batch script outside srun, which knows SLURM_NTASKS too, is one process.
    """
    if "RANK" in os.environ:
        return rank(), world_size()
    return int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
