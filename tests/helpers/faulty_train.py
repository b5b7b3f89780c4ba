"""`mura-dist train` with a fault: at the FAULT_CALLs (1-based, comma-separated) of FAULT_RANK's training forward, FAULT happens.

nan       the logits are NaN              gradient  the logits are valid, their gradient is infinite
memory    torch.OutOfMemoryError          error     another exception
evaluation  the logits are NaN, at calls of its forward in evaluations instead
bf16      the rank's processor supports bf16, the others' do not

FAULT_LEAVE_S: seconds that each rank needs to leave the process group.
"""

import os
import time
from typing import Any

import torch
from torch import Tensor

from mura_dist.cli.main import entry
from mura_dist.distributed import process_group
from mura_dist.models.densenet import DenseNet

FAULT, RANK = os.environ["FAULT"], os.environ["FAULT_RANK"]
CALLS = {int(call) for call in os.environ["FAULT_CALL"].split(",")}
calls = 0
forward = DenseNet.forward


def faulty(self: DenseNet, image: Tensor) -> Any:
    global calls
    logit, activation_map = forward(self, image)
    if self.training == (FAULT == "evaluation") or os.environ.get("RANK", "0") != RANK:
        return logit, activation_map
    calls += 1
    if calls not in CALLS:
        return logit, activation_map
    if FAULT == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if FAULT == "error":
        raise ValueError("a fault of the test")
    if FAULT == "gradient":
        logit.register_hook(lambda gradient: gradient * float("inf"))
        return logit, activation_map
    return logit * float("nan"), activation_map


if FAULT == "bf16":
    process_group.supports_bf16 = lambda: os.environ.get("RANK", "0") == RANK  # type: ignore[assignment]
    CALLS = set()
DenseNet.forward = faulty  # type: ignore[method-assign]

leave = process_group._leave


def slow_leave() -> None:
    time.sleep(float(os.environ.get("FAULT_LEAVE_S", "0")))
    leave()


process_group._leave = slow_leave

if __name__ == "__main__":
    entry()
