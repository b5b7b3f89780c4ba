"""The ranks of a run: who am I, how many are we, on which device; sum and gather over all of us.

One rank is the general case with n = 1: nccl on CUDA, gloo on CPU, never "no process group". The launcher (torchrun,
deepspeed, mpirun, srun) tells rank and world size by environment variables, see environment.py; without one we are rank 0 of 1.
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

# What Linux calls the instructions of x86 and ARM that multiply bf16.
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}

_REASON_BYTES = 1000


def supports_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this process's device has instructions for bf16.

    Where it has none, torch goes by loops of its own: on two cores of an AVX2 processor a step took 9 times as long as in fp32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())


@dataclass(frozen=True)
class World:
    """This rank among all. `timeout_s`: how long it waits for the others."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    timeout_s: float

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mark(self) -> torch.cuda.Event | None:
        """Record where this rank's own work ends, before the first of some collectives; None on a CPU."""
        return nccl.mark() if self.device.type == "cuda" else None

    def all_reduce(self, vector: Tensor, own: torch.cuda.Event | None = None) -> None:
        """Add up `vector` over all ranks, in place. On GPUs the host waits for it, at most `timeout_s` after `own`."""
        own = own or self.mark()
        dist.all_reduce(vector)
        self._wait(own)

    def _wait(self, own: torch.cuda.Event | None) -> None:
        """Wait for collectives that the device was just given; over gloo they are done already."""
        if own is not None and self.size > 1:
            nccl.wait(nccl.mark(), self.timeout_s, own)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64; the same bits on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.all_reduce(total)
        return total.tolist()

    def any(self, mine: bool) -> bool:
        """Whether it is so on any rank; the same answer on every rank."""
        return self.sum([float(mine)])[0] > 0

    def gather(self, values: np.ndarray) -> np.ndarray:
        """(n,) on every rank, n equal -> (world size, n) on every rank. Of the dtypes torch knows."""
        mine = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        all_of_us = [torch.empty_like(mine) for _ in range(self.size)]
        own = self.mark()
        dist.all_gather(all_of_us, mine)
        self._wait(own)
        return torch.stack(all_of_us).cpu().numpy()

    def union(self, values: np.ndarray) -> np.ndarray:
        """The different values of all ranks, int64 (n,) ascending; each rank may have another number of them, none below 0."""
        most = int(self.gather(np.array([len(values)], np.int64)).max())
        mine = np.full(max(most, 1), -1, np.int64)
        mine[: len(values)] = values
        found = np.unique(self.gather(mine))
        return found[found >= 0]

    def barrier(self) -> None:
        self.sum([0.0])

    def raise_failures(self, reason: str) -> None:
        """Raise CollectiveRunError on every rank, in the same words, where one of them has a reason. Called by all ranks.

        Args:
            reason: why this rank's work failed, cut at 1,000 bytes; empty where it did not.
        """
        mine = np.zeros(_REASON_BYTES, np.uint8)
        data = reason.encode()[:_REASON_BYTES]
        mine[: len(data)] = np.frombuffer(data, np.uint8)
        reasons = [bytes(each).rstrip(b"\0").decode(errors="ignore") for each in self.gather(mine)]
        if failed := [rank for rank, each in enumerate(reasons) if each]:
            more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
            who = f"rank {failed[0]}{more}: " if self.size > 1 else ""
            raise CollectiveRunError(f"{who}{reasons[failed[0]]}")


@contextlib.contextmanager
def join(timeout_s: float, *, patience_s: float = 0.0) -> Iterator[World]:
    """Meet the other ranks; leave them when the block ends. A rank that waits longer than `timeout_s` for the others raises.

    patience_s: how much longer the others may take to come to the first meeting. Raises RunError where another rank is lost.
    """
    # Denormal numbers slow a CPU several times. Before any tensor: threads take it from the one that starts them, and a run
    # that began its threads before it would compute with other bits than one that did not.
    torch.set_flush_denormal(True)
    env = environment.launch_env()
    rank, size = env.rank, env.world_size
    device, timeout = _device(env), timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with _environment(env), _losing_others(rank, size):
        if size == 1:  # alone: nobody to meet, whatever the environment says of a meeting place
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            meeting = timedelta(seconds=timeout_s + patience_s)
            # torchrun's own stood there before it started us: not there any more, it does not come back.
            place = timeout if environment.launcher_hosts_store() else meeting
            with _meeting(env, place):
                store, *_ = next(rendezvous("env://", rank, size, timeout=place))
            with _meeting(env, meeting):
                store.set_timeout(meeting)
                dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=meeting)
            limit(timeout_s)  # the group's own limit is the meeting's too
        try:
            yield World(rank, size, env.local_rank, device, timeout_s)
        except BaseException:
            if backend == "nccl" and size > 1:  # to leave its group is to wait for ranks that wait for us
                nccl.abandon()  # this process is about to end
            else:
                with contextlib.suppress(RuntimeError):  # a device that failed cannot be left; why it failed is raised
                    _leave()
            raise
        _leave()


def _leave() -> None:
    """Destroy the process group, by DeepSpeed where it knows it: it would use its groups of this one in the next."""
    comm = sys.modules.get("deepspeed.comm.comm")
    (dist if comm is None or comm.cdb is None else comm).destroy_process_group()


def limit(timeout_s: float) -> None:
    """Nobody waits longer for the others, also in groups that a library made: they begin with gloo's own 30 minutes."""
    c10d = dist.distributed_c10d
    set_timeout = getattr(c10d, "set_timeout", None) or c10d._set_pg_timeout  # torch before 2.15
    margin_s = nccl.MARGIN_S if torch.cuda.is_available() else 0.0  # World.all_reduce raises first
    for group in list(c10d._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s + margin_s), group)


def _device(env: LaunchEnv) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place, num_gpus = env.local_rank, torch.cuda.device_count()
    if num_gpus == 1 and env.launcher in (environment.SLURM, environment.OPENMPI):
        place = 0  # srun --gpus-per-task=1 shows each task its own GPU alone, as number 0
    if place >= num_gpus:
        raise RankLocalUserError(
            f"rank {env.rank} is number {place + 1} on this machine, which has {num_gpus} GPUs; start at most one rank a GPU"
        )
    torch.cuda.set_device(place)
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return torch.device("cuda", place)


@contextlib.contextmanager
def _environment(env: LaunchEnv) -> Iterator[None]:
    """torchrun's words, whoever started us: torch's rendezvous and DeepSpeed read these, and one left over may contradict them.
    Processes started later must not take them for a launcher's."""
    known = {
        "RANK": env.rank,
        "WORLD_SIZE": env.world_size,
        "LOCAL_RANK": env.local_rank,
        "LOCAL_WORLD_SIZE": env.local_world_size,
    }
    words = {name: str(number) for name, number in known.items()}
    if env.world_size > 1:
        address, port = environment.rendezvous_endpoint()
        words |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    ours = words | nccl.ENVIRONMENT
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, word in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if word is None else {name: word})


@contextlib.contextmanager
def _meeting(env: LaunchEnv, limit: timedelta) -> Iterator[None]:
    """Raises RankLocalUserError where rank 0 cannot be met at the port given, RunError where somebody does not come."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        yield
    except (RuntimeError, dist.DistError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise RankLocalUserError(
                f"rank 0 cannot be met at port {port} of {address}: another program listens there; end it, or give all ranks "
                "another port: MASTER_PORT=29501"
            ) from error
        raise RunError(
            f"rank {env.rank} of {env.world_size} could not meet the others at {address}:{port} ({_reason(error)}; it waits up to "
            f"{limit.total_seconds():.0f} s); see that all were started, that {address} is rank 0's machine, its port open"
        ) from error


def _reason(error: Exception) -> str:
    """The first line, without the library's own places in its sources."""
    return re.sub(r"(^\[[^]]*\]|\[/[^]]*\])\s*", "", str(error).splitlines()[0])[:100]


_LOST = (
    *("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out", "timed out", "Socket"),
    *("NCCL communicator was aborted", "collective operation timeout", "ncclRemoteError", "remote process exited"),
)


@contextlib.contextmanager
def _losing_others(rank: int, size: int) -> Iterator[None]:
    """A rank that ends takes the connection with it; the others' libraries say so in many ways, none of them for a reader."""
    try:
        yield
    except (RunError, UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, dist.DistError) as error:
        if "Duplicate GPU" in str(error):  # nccl's words
            raise RankLocalUserError(
                f"rank {rank} shares its GPU with another rank of this machine; give each its own: srun --gpus-per-task=1 ..., "
                "or start fewer ranks"
            ) from error
        if size == 1 or not any(word in str(error) for word in _LOST):
            raise
        raise RunError(
            f"rank {rank} lost another rank ({_reason(error)}); what ended first says why in a line of its own, or was killed; "
            "the same command goes on from the last checkpoint"
        ) from error
