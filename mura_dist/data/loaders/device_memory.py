"""Measure how much memory of a device this rank can still allocate."""

from pathlib import Path

import torch

from mura_dist.distributed import environment


def free_bytes(device: torch.device) -> int:
    """Return a GPU's free memory including torch's cache, or on a CPU this rank's share of the available memory (Linux)."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    [available] = [line for line in lines if line.startswith("MemAvailable:")]
    return int(available.split()[1]) * 1024 // environment.local_world_size()
