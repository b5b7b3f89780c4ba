"""The ranks of a run: who am I, how many are we, on which device; sum and gather over all of us.

One rank is the general case with n = 1: nccl on CUDA, gloo on CPU, never "no process group". The launcher (torchrun,
deepspeed) tells rank and world size by environment variables; without one we are rank 0 of 1.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from . import launcher
from .refusal import Refusal


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks, in float64; the same bits on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, values: np.ndarray) -> np.ndarray:
        """(n,) on every rank, n equal -> (world size, n) on every rank. Of the dtypes torch knows."""
        mine = torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
        all_of_us = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_of_us, mine)
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


@contextlib.contextmanager
def join(timeout_s: float) -> Iterator[World]:
    """Meet the other ranks; leave them when the block ends. A rank that waits longer than `timeout_s` for the others raises."""
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, alone)
    rank, size, local_rank = launcher.rank(), launcher.world_size(), launcher.local_rank()
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise Refusal(
                f"rank {rank} is number {local_rank + 1} on this machine, which has {torch.cuda.device_count()} GPUs; "
                "start at most one rank a GPU"
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    backend, timeout = ("nccl" if cuda else "gloo"), timedelta(seconds=timeout_s)
    if size == 1:  # alone: nobody to meet, whatever the environment says of a meeting place
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size, local_rank, device)
    finally:
        dist.destroy_process_group()
