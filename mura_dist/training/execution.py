"""Execute the network on a micro-batch: kernel by kernel, as recorded CUDA graphs, or compiled.

    settings -> build -> network: image (B, 1, S, S) uint8 -> logit (B,) float32, differentiable

All of them open autocast themselves, inside DeepSpeed: DeepSpeed disables an autocast that is open around it, since it asks
`torch.is_autocast_enabled()`, which is the flag of CUDA whatever the device.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mura_dist.core.config import Settings
from mura_dist.training.flat_parameters import Flat
from mura_dist.training.graph import RecordedNetwork, Recording, RecordingError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Network = Callable[[Tensor], Tensor]


def build(model: nn.Module, flat: Flat, settings: Settings) -> Network:
    """Return `model` as the settings step, compile and precision execute it.

    Args:
        model: the network in training mode, image -> (logit, activation_map); its parameters are views of `flat`.
    """
    device = flat.weights.device
    mode = settings.compile_mode
    computed = model if mode is None else _compiled(model, mode, device)

    def eager(image: Tensor) -> Tensor:
        with autocast(settings.precision, device, cache=settings.step != "graph"):
            logit: Tensor = computed(image)[0]
        return logit

    if settings.step == "graph":
        return GraphOrEager(eager, flat, is_half=settings.precision in DTYPES)
    return eager


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of a precision; of fp32, one that changes nothing.

    Args:
        cache: keep each weight's cast until the context ends. A recorded graph must not: the cast is part of it.
    """
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=cache)


def _compiled(model: nn.Module, mode: str, device: torch.device) -> Any:
    # The other modes are about CUDA graphs and Triton.
    return torch.compile(model, mode=mode if device.type == "cuda" else "default", dynamic=False)


class GraphOrEager:
    """Record the network at its first micro-batch; fall back to eager, with one line, where the recording is not the network."""

    def __init__(self, eager: Network, flat: Flat, *, is_half: bool) -> None:
        self._eager, self._recorded = eager, RecordedNetwork(eager, flat, is_half=is_half)
        self.fell_back = False

    @property
    def recordings(self) -> list[Recording]:
        """What was recorded, one for each shape of micro-batch."""
        return self._recorded.recordings

    def __call__(self, image: Tensor) -> Tensor:
        if not self.fell_back:
            try:
                return self._recorded(image)
            except RecordingError as error:
                self.fell_back = True
                print(f"step=graph: {error}; this run continues with step=eager", file=sys.stderr)  # noqa: T201
        return self._eager(image)
