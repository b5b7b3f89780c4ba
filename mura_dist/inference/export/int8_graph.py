"""The building blocks of an int8 graph: grids of bytes, and the ONNX nodes that compute on them.

ChannelStatistics, the norms that read a tensor -> build_grid -> Grid -> GraphBuilder: rectify, convolve
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from mura_dist.inference.export.int8_rounding import (
    MIN_STEP,
    largest_weight,
    round_to_kernel_sums,
    round_with_covariance,
)
from mura_dist.inference.export.int8_statistics import ChannelStatistics
from mura_dist.models.card import WEIGHT_BITS

BYTE_MAX = 255
_MAX_BIAS_STEPS = 2**29  # the products of a convolution sum up to at most as many
_MIN_RELATIVE_SCALE = 1e-3  # of the largest scale of a convolution's inputs


@dataclass(frozen=True)
class Grid:
    """The values that bytes represent, by channel: value = origin + step * q with q in 0..255.

    Attributes:
        step: (C,) float64, above 0.
        origin: (C,) float64.
    """

    step: np.ndarray
    origin: np.ndarray

    def __add__(self, grid: "Grid") -> "Grid":
        return Grid(np.concatenate([self.step, grid.step]), np.concatenate([self.origin, grid.origin]))


def build_grid(statistics: ChannelStatistics, norms: Sequence[tuple[np.ndarray, np.ndarray]]) -> Grid:
    """Return the grid of the observed range, without what the relu behind every norm cuts off.

    Args:
        statistics: Of the tensor.
        norms: (slope, intercept) of each norm that reads the tensor, (C,) float64 each.
    """
    low, high = statistics.low.copy(), statistics.high.copy()
    if norms:
        cuts = [(slope, _cut(slope, intercept)) for slope, intercept in norms]
        lowest = np.min([np.where(slope > 0, cut, -np.inf) for slope, cut in cuts], axis=0)
        highest = np.max([np.where(slope < 0, cut, np.inf) for slope, cut in cuts], axis=0)
        low, high = np.clip(lowest, low, high), np.clip(highest, low, high)
    high = np.maximum(high, low)
    min_step = np.maximum(MIN_STEP, 1e-6 * np.maximum(np.abs(low), np.abs(high)))  # for a constant channel
    return Grid(np.maximum((high - low) / BYTE_MAX, min_step), low)


def _cut(slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Return the zero of slope * x + intercept. Callers ignore it for a slope of 0."""
    return -intercept / np.where(slope == 0, 1.0, slope)


def scale_covariance(covariance: np.ndarray | None, step: np.ndarray) -> np.ndarray:
    """Return the covariance of values in units of `step` (I,), from an (I k k, I k k) covariance of the values."""
    assert covariance is not None
    steps = np.repeat(step, len(covariance) // len(step))
    scaled: np.ndarray = covariance / np.outer(steps, steps)
    variance = scaled.diagonal()
    is_constant = (variance < 0) | (
        variance > BYTE_MAX**2
    )  # impossible for bytes: a constant channel, whose step is tiny
    scaled[is_constant] = scaled[:, is_constant] = 0
    return scaled


@dataclass(frozen=True)
class RectifiedBytes:
    """Bytes behind a norm and a relu, by channel: value = scale * (q - zero) + constant.

    Attributes:
        name: Name of the tensor of bytes.
        scale: (C,) float64.
        zero: (C,) float64.
        constant: (C,) float64.
    """

    name: str
    scale: np.ndarray
    zero: np.ndarray
    constant: np.ndarray

    def fold(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return weight (O, C) and bias (O,) on bytes of a 1x1 convolution with `weight` (O, C) on values."""
        scaled = weight * self.scale
        return scaled, weight @ self.constant - scaled @ self.zero

    def byte_statistics(self, statistics: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and covariance of the bytes, from the statistics of the values."""
        scale = np.where(self.scale == 0, np.inf, self.scale)
        mean = (statistics.mean - self.constant) / scale + np.where(self.scale == 0, 0.0, self.zero)
        mean = np.clip(mean, 0, BYTE_MAX)  # float32 errors of a mean can be many tiny steps
        # A channel that is hardly read would have a covariance of float32 errors, divided by a tiny scale.
        is_negligible = np.abs(self.scale) < _MIN_RELATIVE_SCALE * np.abs(self.scale).max()
        return mean, scale_covariance(statistics.covariance, np.where(is_negligible, np.inf, scale))


@dataclass
class GraphBuilder:
    """A list of nodes and constants. `prefix` begins every name.

    Attributes:
        prefix: Prefix of all names.
        weight_max: Largest weight of a convolution in steps.
        nodes: Nodes so far, in the order of computation.
        tensors: Constants so far.
        num_names: Number of names generated so far.
    """

    prefix: str
    weight_max: int = largest_weight(WEIGHT_BITS[0])
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    num_names: int = 0

    def const(self, value: np.ndarray | np.generic, name: str | None = None) -> str:
        """Add a constant and return its name."""
        name = name or self._new_name("const")
        value = np.asarray(value)
        self.tensors.append(numpy_helper.from_array(value if value.ndim == 0 else np.ascontiguousarray(value), name))
        return name

    def add(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        output = output or self._new_name(op_type.lower())
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def _new_name(self, stem: str) -> str:
        self.num_names += 1
        return f"{self.prefix}{stem}_{self.num_names}"

    def convolve(
        self,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray,
        mean: np.ndarray,
        covariance: np.ndarray | None,
        **attributes: Any,
    ) -> str:
        """Add a convolution of bytes to bytes: q_out = clip(round(weight * q_in + bias)).

        Args:
            x: Name of the input bytes.
            weight: (O, I, k, k) float64.
            bias: (O,) float64.
            mean: (I,) of the input. Rounding the weights does not change the mean output.
            covariance: (I k k, I k k) of what a kernel reads; None for the image, whose kernels keep their sums.
            **attributes: Of the Conv node.
        """
        maxima = np.abs(weight).reshape(len(weight), -1).max(axis=1)  # (O,)
        # The step is at least so large that the bias fits into 32 bits, even if the weights are far smaller.
        step = np.maximum(np.where(maxima == 0, 1.0, maxima / self.weight_max), np.abs(bias) / _MAX_BIAS_STEPS)
        exact = weight / step[:, None, None, None]
        if covariance is None:
            rounded = round_to_kernel_sums(exact, self.weight_max)
        else:
            rounded = round_with_covariance(exact, covariance, self.weight_max)
        bias = bias + ((exact - rounded).sum(axis=(2, 3)) @ mean) * step
        scale = self.const(step.astype(np.float32))
        int_weight = self.const(rounded.astype(np.int8))
        int_bias = self.const(np.rint(bias / step).astype(np.int32))
        zero = {dtype: self.const(np.zeros(len(weight), dtype)) for dtype in ("int8", "int32")}
        result = self.add(
            "Conv",
            self.dequantize(x),
            self.add("DequantizeLinear", int_weight, scale, zero["int8"], axis=0),
            self.add("DequantizeLinear", int_bias, scale, zero["int32"], axis=0),
            kernel_shape=list(weight.shape[2:]),
            **attributes,
        )
        return self.quantize(result)

    def dequantize(self, x: str) -> str:
        """Add a node that converts bytes to the floats 0..255."""
        return self.add("DequantizeLinear", x, self.const(np.float32(1)), self.const(np.uint8(0)))

    def quantize(self, x: str) -> str:
        """Add a node that rounds and clips floats to bytes."""
        return self.add("QuantizeLinear", x, self.const(np.float32(1)), self.const(np.uint8(0)))

    def rectify(self, x: str, slope: np.ndarray, intercept: np.ndarray, grid: Grid) -> RectifiedBytes:
        """Add relu(slope * x + intercept) for bytes x on `grid`: a maximum or minimum of bytes."""
        cut = (_cut(slope, intercept) - grid.origin) / grid.step  # in steps
        byte_cut = np.clip(np.rint(cut), 0, BYTE_MAX)
        # A channel that is never cut in its range keeps its exact zero. One that is always cut is constant at byte_cut.
        is_uncut = (slope > 0) & (cut < 0) | (slope < 0) & (cut > BYTE_MAX)
        zero = np.where(is_uncut, cut, byte_cut)
        low = np.where(slope > 0, byte_cut, 0).astype(np.uint8)
        high = np.where(slope < 0, byte_cut, BYTE_MAX).astype(np.uint8)
        if low.any():
            x = self.add("Max", x, self.const(low[:, None, None]))
        if (high < BYTE_MAX).any():
            x = self.add("Min", x, self.const(high[:, None, None]))
        constant = np.where(slope == 0, np.maximum(intercept, 0), 0.0)
        return RectifiedBytes(x, slope * grid.step, np.where(slope == 0, 0.0, zero), constant)
