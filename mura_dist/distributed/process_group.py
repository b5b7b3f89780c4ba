"""The process group: rank, world size and device of this process, and collectives over all ranks.

There is always a process group, also for one rank: nccl on CUDA, gloo on CPU. The launcher (torchrun, deepspeed, mpirun, srun)
sets rank and world size by environment variables, see environment.py. Without a launcher the process is rank 0 of 1.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.rendezvous import rendezvous

from mura_dist.core.errors import CollectiveRunError, RankLocalUserError, RunError, UserError
from mura_dist.distributed import environment, nccl
from mura_dist.distributed.environment import LaunchEnv
from mura_dist.distributed.host_memory import keep_freed_memory
from mura_dist.distributed.processes import processor_flags

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # Linux's names of x86's and ARM's bf16 multiplication
_REASON_BYTES = 1000


def supports_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this process's device has bf16 instructions.

    Without them torch emulates bf16: on two cores of an AVX2 processor a step took 9 times as long as in fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processors = processor_flags(cpuinfo.read_text()) if cpuinfo.is_file() else []
    return bool(processors) and not _BF16_FLAGS.isdisjoint(processors[0])


@dataclass(frozen=True)
class World:
    """This rank's view of all ranks. Every collective is called by all of them.

    Attributes:
        rank: 0-based, over all machines.
        size: Number of ranks.
        local_rank: 0-based, on this machine.
        device: The rank's device.
        timeout_s: Longest wait for the other ranks, in seconds.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout_s: float

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    def record_event(self) -> torch.cuda.Event | None:
        """Record the end of this rank's own work, before collectives. Return None on a CPU."""
        return nccl.record_event() if self.device.type == "cuda" else None

    def all_reduce(self, vector: Tensor, own: torch.cuda.Event | None = None) -> None:
        """Sum `vector` over all ranks, in place. On GPUs the host waits for it, at most `timeout_s` after the event `own`."""
        own = own or self.record_event()
        dist.all_reduce(vector)
        self._wait(own)

    def _wait(self, own: torch.cuda.Event | None) -> None:
        """Wait for the collectives that were just enqueued on the device. gloo's have finished already."""
        if own is not None and self.size > 1:
            nccl.wait(nccl.record_event(), self.timeout_s, own)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each value summed over all ranks in float64, with the same bits on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Return the `values` (n,) of all ranks as an array (world size, n). n is the same on every rank."""
        local = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        gathered = [torch.empty_like(local) for _ in range(self.size)]
        own = self.record_event()
        dist.all_gather(gathered, local)
        self._wait(own)
        return torch.stack(gathered).cpu().numpy()

    def union(self, values: np.ndarray) -> np.ndarray:
        """Return the distinct values of all ranks, int64 (n,) ascending. Values are >= 0; their number may differ by rank."""
        longest = int(self.gather(np.array([len(values)], np.int64)).max())
        padded = np.full(max(longest, 1), -1, np.int64)
        padded[: len(values)] = values
        distinct = np.unique(self.gather(padded))
        return distinct[distinct >= 0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def raise_failures(self, reason: str) -> None:
        """Raise the same CollectiveRunError on every rank if any rank has a reason.

        Args:
            reason: Why this rank failed, cut at 1,000 bytes; empty if it did not.
        """
        padded = np.zeros(_REASON_BYTES, np.uint8)
        data = reason.encode()[:_REASON_BYTES]
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        reasons = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self.gather(padded)]
        if failed := [rank for rank, text in enumerate(reasons) if text]:
            more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            prefix = f"rank {failed[0]}{more}: " if self.size > 1 else ""
            raise CollectiveRunError(f"{prefix}{reasons[failed[0]]}")


@contextlib.contextmanager
def join(timeout_s: float, *, patience_s: float = 0.0) -> Iterator[World]:
    """Join the process group while the block runs.

    Args:
        timeout_s: Longest wait for the other ranks, in seconds.
        patience_s: Additional seconds for the other ranks to join at the start.

    Raises:
        RunError: another rank is lost or late.
        RankLocalUserError: the port is in use, or this rank has no GPU of its own.
    """
    # Denormal numbers slow a CPU several times. Set before any tensor exists: threads inherit it from the thread that starts
    # them, so setting it later would change a run's bits.
    torch.set_flush_denormal(True)
    env = environment.launch_env()
    rank, size = env.rank, env.world_size
    device, timeout = _device(env), timedelta(seconds=timeout_s)
    if device.type == "cpu":
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _torchrun_variables(env), _lost_rank_as_run_error(rank, size):
        if size == 1:  # no rendezvous, whatever the environment says
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            join_timeout = timedelta(seconds=timeout_s + patience_s)
            # torchrun serves its store before it starts the ranks: a store that is gone does not come back.
            store_timeout = timeout if environment.launcher_hosts_store() else join_timeout
            with _rendezvous_errors(env, store_timeout):
                store, *_ = next(rendezvous("env://", rank, size, timeout=store_timeout))
            with _rendezvous_errors(env, join_timeout):
                store.set_timeout(join_timeout)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=join_timeout)
            set_timeout(timeout_s)  # the group was created with join_timeout
        try:
            yield World(rank, size, env.local_rank, device, timeout_s)
        except BaseException:
            if backend == "nccl" and size > 1:  # leaving the group would wait for ranks that wait for this one
                nccl.abandon()  # the process is about to exit
            else:
                with contextlib.suppress(RuntimeError):  # a failed device cannot leave; the first error is raised
                    _leave()
            raise
        _leave()


def _leave() -> None:
    """Destroy the process group, through DeepSpeed if it knows it: it would reuse its groups in the next process group."""
    comm = sys.modules.get("deepspeed.comm.comm")
    (dist if comm is None or comm.cdb is None else comm).destroy_process_group()


def set_timeout(timeout_s: float) -> None:
    """Limit the wait for other ranks in all groups, also in those of a library, which begin with gloo's 30 minutes."""
    c10d = dist.distributed_c10d
    set_group_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # torch before 2.15
    margin_s = nccl.MARGIN_S if torch.cuda.is_available() else 0.0  # World.all_reduce raises first
    for group in list(c10d._world.pg_map):
        set_group_timeout(timedelta(seconds=timeout_s + margin_s), group)


def _device(env: LaunchEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, num_gpus = env.local_rank, torch.cuda.device_count()
    if num_gpus == 1 and env.launcher in (environment.SLURM, environment.OPENMPI):
        index = 0  # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0
    if index >= num_gpus:
        raise RankLocalUserError(
            f"rank {env.rank} is number {index + 1} on this machine, which has {num_gpus} GPUs. Start at most one rank per GPU."
        )
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return torch.device("cuda", index)


@contextlib.contextmanager
def _torchrun_variables(env: LaunchEnv) -> Iterator[None]:
    """Set torchrun's environment variables for the block, under any launcher: torch and DeepSpeed read them.

    They are restored afterwards, so that processes that start later do not take them for a launcher's.
    """
    numbers = {
        "RANK": env.rank,
        "WORLD_SIZE": env.world_size,
        "LOCAL_RANK": env.local_rank,
        "LOCAL_WORLD_SIZE": env.local_world_size,
    }
    variables = {name: str(number) for name, number in numbers.items()}
    if env.world_size > 1:
        address, port = environment.rendezvous_endpoint()
        variables |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    variables |= nccl.ENVIRONMENT
    previous = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextlib.contextmanager
def _rendezvous_errors(env: LaunchEnv, timeout: timedelta) -> Iterator[None]:
    """Raise RankLocalUserError where the port is in use, and RunError where a rank does not join."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        yield
    except (RuntimeError, dist.DistError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise RankLocalUserError(
                f"port {port} of {address} is in use by another program, so rank 0 cannot listen there. End that program, or "
                "give all ranks another port: MASTER_PORT=29501"
            ) from error
        raise RunError(
            f"rank {env.rank} of {env.world_size} could not meet the other ranks at {address}:{port} within "
            f"{timeout.total_seconds():.0f} s ({_reason(error)}). Check that all ranks were started, that {address} is rank 0's "
            "machine, and that its port is open."
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line of the message, without the library's source locations."""
    return re.sub(r"(^\[[^]]*\]|\[/[^]]*\])\s*", "", str(error).splitlines()[0])[:100]


_LOST_RANK = (
    *("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timed out", "Socket"),
    *("NCCL communicator was aborted", "collective operation timeout", "ncclRemoteError", "remote process exited"),
)


@contextlib.contextmanager
def _lost_rank_as_run_error(rank: int, size: int) -> Iterator[None]:
    """Turn the libraries' many errors about a lost connection into one RunError."""
    try:
        yield
    except (RunError, UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, dist.DistError) as error:
        if "Duplicate GPU" in str(error):  # nccl's text
            raise RankLocalUserError(
                f"rank {rank} shares its GPU with another rank of this machine. Give each its own (srun --gpus-per-task=1 ...), "
                "or start fewer ranks."
            ) from error
        if size == 1 or not any(text in str(error) for text in _LOST_RANK):
            raise
        raise RunError(
            f"rank {rank} lost another rank ({_reason(error)}). The rank that failed first gives the reason in its own line, or "
            "was killed. The same command resumes from the last checkpoint."
        ) from error
