"""Use a faster execution of the network only where it is the network: compared with eager at the first micro-batch.

image (B, 1, S, S) of a new shape -> eager -> the other execution, twice -> near enough: used for that shape from then on
                                                                         -> not, or it fails: eager, and a line says so
"""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mura_dist.training.flat_parameters import FlatParameters

Network = Callable[[Tensor], Tensor]  # image (B, 1, S, S) uint8 -> logit (B,) float32


class Tolerance(NamedTuple):
    """The largest difference of a logit, and that of the gradient relative to its norm."""

    logit: float
    gradient: float


# By (step, whether it computes in half precision). A recording runs eager's own kernels, and differs in the order of atomic
# additions. Compiled kernels round otherwise: in bf16 two right gradients of a fresh DenseNet-169 differ by 0.4 to 0.9 of their
# norm (on a CPU), so that only a wrong sign or scale can be seen there.
TOLERANCES = {
    ("graph", False): Tolerance(1e-3, 1e-2),
    ("graph", True): Tolerance(5e-2, 0.3),
    ("compile", False): Tolerance(5e-3, 2e-2),
    ("compile", True): Tolerance(0.1, 1.5),
}


class _NotTheNetworkError(Exception):
    """The other execution fails, or differs from eager; the text says how."""


class CheckedNetwork:
    """A network in the execution that `make` returns for a micro-batch's shape, or eager."""

    def __init__(
        self, eager: Network, make: Callable[[Tensor], Network], flat: FlatParameters, step: str, *, is_half: bool
    ) -> None:
        """`make` is given the first micro-batch of a shape; `step` is what messages call it; `flat`: the network's parameters."""
        self._eager, self._make, self._flat, self._step = eager, make, flat, step
        self._tolerance = TOLERANCES[step, is_half]
        self._networks: dict[tuple[torch.Size, int], Network] = {}  # by shape, and where the weights lie
        self.fell_back = False

    @property
    def networks(self) -> list[Network]:
        """The networks in use, one for each shape of micro-batch."""
        return list(self._networks.values())

    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits; the flat gradient is as it was before."""
        if self.fell_back:
            return self._eager(image)
        key = (image.shape, self._flat.weights.data_ptr())
        if key not in self._networks:
            try:
                self._networks[key] = self._checked(image)
            except _NotTheNetworkError as error:
                self.fell_back = True
                print(f"step={self._step}: {error}; this run continues with step=eager", file=sys.stderr)  # noqa: T201
                return self._eager(image)
        return self._networks[key](image)

    def _checked(self, image: Tensor) -> Network:
        before = self._flat.gradient.clone()
        try:
            wanted = self._gradient_of(self._eager, image)
            if not math.isfinite(float(wanted[1].norm())):
                raise _NotTheNetworkError("the gradient of the first micro-batch is not finite")
            network = self._make(image)
            for _ in range(2):  # the second call sees what the first left behind
                self._compare(self._gradient_of(network, image), wanted)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # the end of a recording failed over it
                raise error.__context__ from error
            raise _NotTheNetworkError(f"it fails ({str(error).splitlines()[0][:160]})") from error
        finally:
            self._flat.gradient.copy_(before)
        return network

    def _gradient_of(self, network: Network, image: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, the flat gradient) of a micro-batch, for some gradient of the logits."""
        upstream = torch.linspace(-1, 1, len(image), device=image.device)
        self._flat.gradient.zero_()
        with torch.enable_grad():
            logit = network(image)
            torch.autograd.backward(logit, upstream)
        return logit.detach().clone(), self._flat.gradient.clone()

    def _compare(self, result: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
        worst = float((result[0] - wanted[0]).abs().max())
        relative = float((result[1] - wanted[1]).norm() / wanted[1].norm())
        if not (worst <= self._tolerance.logit and relative <= self._tolerance.gradient):  # so written, NaN is too far
            raise _NotTheNetworkError(
                f"its first step differs from eager's: logits by {worst:.2g} (limit {self._tolerance.logit:g}), "
                f"the gradient by {relative:.2g} of its norm (limit {self._tolerance.gradient:g})"
            )
