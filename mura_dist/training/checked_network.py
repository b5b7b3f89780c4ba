"""Use a faster execution of the network only if its results equal eager's, compared at the first micro-batch.

image (B, 1, S, S) of a new shape -> eager -> the faster execution, twice -> within tolerance: used for that shape from then on
                                                                          -> not, or it fails: eager, with a warning
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
    """The largest accepted difference of a logit, and of the gradient relative to its norm."""

    logit: float
    gradient: float


# By (step, whether it is half precision). A recording runs eager's kernels and differs in the order of atomic additions. Compiled
# kernels round differently: in bf16 two correct gradients of an untrained DenseNet-169 differ by 0.4 to 0.9 of their norm
# (CPU), so only a wrong sign or scale is detected.
TOLERANCES = {
    ("graph", False): Tolerance(1e-3, 1e-2),
    ("graph", True): Tolerance(5e-2, 0.3),
    ("compile", False): Tolerance(5e-3, 2e-2),
    ("compile", True): Tolerance(0.1, 1.5),
}


class _MismatchError(Exception):
    """The faster execution fails, or differs from eager. The text says how."""


class CheckedNetwork:
    """A network in the execution that `make` returns for a micro-batch's shape, or eager.

    Attributes:
        fell_back: Whether it uses eager for good.
    """

    def __init__(
        self, eager: Network, make: Callable[[Tensor], Network], flat: FlatParameters, step: str, *, is_half: bool
    ) -> None:
        """Wrap `eager`.

        Args:
            eager: The network, executed kernel by kernel.
            make: Returns the faster network; called with the first micro-batch of a shape.
            flat: The network's parameters.
            step: The name of the faster execution: graph or compile.
            is_half: Whether it is half precision.
        """
        self._eager, self._make, self._flat, self._step = eager, make, flat, step
        self._tolerance = TOLERANCES[step, is_half]
        self._networks: dict[tuple[torch.Size, int], Network] = {}  # by shape and address of the weights
        self.fell_back = False

    @property
    def networks(self) -> list[Network]:
        """The networks in use, one for each shape of micro-batch."""
        return list(self._networks.values())

    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits. A comparison leaves the flat gradient unchanged."""
        if self.fell_back:
            return self._eager(image)
        key = (image.shape, self._flat.weights.data_ptr())
        if key not in self._networks:
            try:
                self._networks[key] = self._checked(image)
            except _MismatchError as error:
                self.fell_back = True
                print(f"step={self._step}: {error}. The run continues with step=eager.", file=sys.stderr)  # noqa: T201
                return self._eager(image)
        return self._networks[key](image)

    def _checked(self, image: Tensor) -> Network:
        gradient = self._flat.gradient.clone()
        try:
            expected = self._gradient_of(self._eager, image)
            if not math.isfinite(float(expected[1].norm())):
                raise _MismatchError("the gradient of the first micro-batch is not finite")
            network = self._make(image)
            for _ in range(2):  # the second call depends on the state after the first
                self._compare(self._gradient_of(network, image), expected)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # the end of the recording raises another error
                raise error.__context__ from error
            raise _MismatchError(f"it fails ({str(error).splitlines()[0][:160]})") from error
        finally:
            self._flat.gradient.copy_(gradient)
        return network

    def _gradient_of(self, network: Network, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the flat gradient of a micro-batch, for a fixed gradient of the logits."""
        upstream = torch.linspace(-1, 1, len(image), device=image.device)
        self._flat.gradient.zero_()
        with torch.enable_grad():
            logit = network(image)
            torch.autograd.backward(logit, upstream)
        return logit.detach().clone(), self._flat.gradient.clone()

    def _compare(self, result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
        logit_difference = float((result[0] - expected[0]).abs().max())
        gradient_difference = float((result[1] - expected[1]).norm() / expected[1].norm())
        if not (
            logit_difference <= self._tolerance.logit and gradient_difference <= self._tolerance.gradient
        ):  # true for NaN, too
            raise _MismatchError(
                f"its first step differs from eager's: logits by {logit_difference:.2g} (limit {self._tolerance.logit:g}), "
                f"the gradient by {gradient_difference:.2g} of its norm (limit {self._tolerance.gradient:g})"
            )
