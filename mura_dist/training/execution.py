"""Execute the network on a micro-batch: kernel by kernel, as recorded CUDA graphs, or compiled.

    settings -> build -> network: image (B, 1, S, S) uint8 -> logit (B,) float32, differentiable

Each of them opens autocast itself, inside DeepSpeed. DeepSpeed disables an outer autocast, because it calls
`torch.is_autocast_enabled()`, which is CUDA's flag on every device.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from mura_dist.core.config import Settings
from mura_dist.training.checked_network import CheckedNetwork, Network
from mura_dist.training.flat_parameters import FlatParameters
from mura_dist.training.graph import Recording

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build(model: nn.Module, flat: FlatParameters, settings: Settings) -> Network:
    """Return the model as a network in the execution of the settings step, compile and precision.

    Args:
        model: The model in training mode, image -> (logit, activation_map). Its parameters are views of `flat`.
        flat: Its parameters as one vector.
        settings: The recipe.
    """
    device, is_half = flat.weights.device, settings.precision in DTYPES

    def wrap(module: Any) -> Network:
        def network(image: Tensor) -> Tensor:
            with autocast(settings.precision, device, cache=settings.step != "graph"):
                logit: Tensor = module(image)[0]
            return logit

        return network

    eager = wrap(model)
    if settings.step == "graph":
        return CheckedNetwork(eager, lambda image: Recording(eager, image), flat, "graph", is_half=is_half)
    if settings.compile_mode is not None:
        compiled = wrap(_compiled(model, settings.compile_mode, device))
        return CheckedNetwork(eager, lambda image: compiled, flat, "compile", is_half=is_half)
    return eager


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of a precision. For fp32 it has no effect.

    Args:
        precision: A value of the setting precision.
        device: The device of the tensors.
        cache: Cache the cast of each weight until the context ends. A recorded graph must contain the casts.
    """
    if precision not in DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=cache)


def _compiled(model: nn.Module, mode: str, device: torch.device) -> Any:
    # The other modes concern CUDA graphs and Triton.
    return torch.compile(model, mode=mode if device.type == "cuda" else "default", dynamic=False)
