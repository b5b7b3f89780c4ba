"""Compute dense blocks in training: torchvision's layers over one buffer, with a small memory for the backward pass.

    input -> features[:, :c] --> read by norm1, relu, conv1 -> bottleneck -> norm2, relu, conv2 -> 32 new channels --.
                  ^---------------------------------------------------------------------------------------------------'
    features, all of them    --> read by the norm, relu (, pool), 1x1 convolution after the block -> output

A block is one autograd function. It keeps for backward the buffer, each layer's bottleneck (N, 128, h, w) and the statistics,
and recomputes the rest. Why it is cheaper than 86 concatenations, and equal to them in exact arithmetic:

- A channel's batch mean and variance are the same for every layer that reads it: they are computed once.
- relu(k x + b) = k (a - t) with a = max(x, t), t = -b / k (min where k < 0). The slope k goes into the 1x1 convolution that
  follows, the offset into its bias. One comparison per element remains of norm and relu, and nothing is rounded between the
  buffer and the convolution. Pooling commutes with all of it, so it comes before the convolution.
- The gradient through mean and variance is a projection that depends on the channel only. The layers' gradients are summed
  first, and projected once, when the channel's own gradient is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIN_SLOPE = 1e-20  # replaces a slope of 0, which has no kink; within the range of float32 and bfloat16


class Moments(NamedTuple):
    """Each channel's mean and sqrt(biased variance + eps) over the batch, (C,) float32 (float64 for float64)."""

    mean: Tensor
    deviation: Tensor


class Affine(NamedTuple):
    """BatchNorm's weight and bias, (C,) each."""

    weight: Tensor
    bias: Tensor


class ReluParameters(NamedTuple):
    """relu(weight * x + bias) of normalized x as weight * (max(x, kink) - kink) + least, (C,) each; min where weight < 0."""

    weight: Tensor  # never 0
    kink: Tensor
    least: Tensor  # 0, except where the kink is out of reach
    floor: Tensor  # kink + floor is the lower bound of a clamp: 0, or -inf where weight < 0; the buffer's dtype
    ceiling: Tensor  # kink + ceiling is the upper bound: inf, or 0 where weight < 0
    falling: bool  # some weight is negative: both bounds are needed

    @classmethod
    def from_norms(cls, norms: Sequence[Affine], num: int, dtype: torch.dtype) -> "list[ReluParameters]":
        """Return the parameters of each norm; the kinks are clamped to sqrt(num), which no normalized value exceeds.

        Samuelson's inequality (1968) gives the bound. `num` is the number of values per channel, in `dtype`.
        """
        weight, bias = (torch.cat([norm[index] for norm in norms]) for index in (0, 1))
        weight = torch.where(weight == 0, _MIN_SLOPE, weight)
        kink = torch.clamp(-bias / weight, -(num**0.5), num**0.5)
        least = torch.relu(torch.addcmul(bias, weight, kink))
        falls, zero = weight < 0, torch.zeros_like(weight, dtype=dtype)
        floor, ceiling = torch.where(falls, -torch.inf, zero), torch.where(falls, zero, torch.inf)
        sizes = [len(norm.weight) for norm in norms]
        by_norm = zip(*(tensor.split(sizes) for tensor in (weight, kink, least, floor, ceiling, falls)), strict=True)
        any_falls = not weight.is_cuda and bool(falls.any())  # on a GPU the check costs more than the clamp
        return [
            ReluParameters(w, k, least, low, high, weight.is_cuda or (any_falls and bool(falling.any())))
            for w, k, least, low, high, falling in by_norm
        ]


class NormReluConv:
    """relu(norm(x)) of C channels and the 1x1 convolution after it, as a convolution of a = max(x, kink).

    relu(norm(x)) = slope * (a - kink) + least, (C,) float32 each. `clip` uses the kink in x's dtype.
    """

    def __init__(self, x: Tensor, moments: Moments, relu: ReluParameters, weight: Tensor, pool: bool = False) -> None:
        """Take x (N, C, h, w), a slice of the buffer, and the convolution's weight (O, C, ...). `pool` halves h and w."""
        self.x, self.moments, self.relu, self.pool = x, moments, relu, pool
        self.weight = weight.flatten(1)  # (O, C)
        self.slope = relu.weight / moments.deviation
        self.kink = torch.addcmul(moments.mean, moments.deviation, relu.kink)
        self.limit = self.kink.to(x.dtype)[:, None, None]  # (C, 1, 1)
        self.scaled = (self.weight * self.slope).to(x.dtype)[:, :, None, None]  # (O, C, 1, 1)

    def clip(self) -> Tensor:
        """Return a (N, C, h, w): max(x, kink), or min where the slope is negative."""
        a = _empty(self.x, self.x.shape[1])
        if not self.relu.falling:
            return torch.maximum(self.x, self.limit, out=a)
        low, high = (self.limit + bound[:, None, None] for bound in (self.relu.floor, self.relu.ceiling))
        return torch.clamp(self.x, low, high, out=a)

    def forward(self, bias: Tensor | None = None) -> Tensor:
        """Return the output, (N, O, h, w), or half of h and w."""
        a = self.clip()
        shift = torch.mv(self.weight, torch.addcmul(self.relu.least, self.slope, self.kink, value=-1))
        if bias is not None:
            shift = shift + bias
        return F.conv2d(F.avg_pool2d(a, 2) if self.pool else a, self.scaled, shift.to(a.dtype))

    def backward(self, grad: Tensor, identity: Affine) -> tuple[tuple[Tensor, Tensor], Affine, Tensor, Tensor]:
        """Return the gradients of x with constant moments, of the norm, of the weight (O, C) and of the bias.

        Args:
            grad: of the output.
            identity: weight 1 and bias 0, float32 (at least C,) each.

        Returns:
            The gradient of x as two factors (N, C, h, w), the second 0 or 1, so that the caller multiplies while it adds. Then
            the gradients of the norm, the weight and the bias.
        """
        a = self.clip()
        pooled = F.avg_pool2d(a, 2) if self.pool else a
        grad_a, raw, grad_bias = _convolution_backward(grad, pooled, self.scaled, 0, bias=True)
        if self.pool:
            grad_a = torch.ops.aten.avg_pool2d_backward(grad_a, a, [2, 2], [2, 2], [0, 0], False, True, None)
        passed = torch.ne(a, self.limit, out=a)  # 0 where it is clipped, else 1
        grad_bias = grad_bias.to(self.slope.dtype)
        above = torch.addr(raw.flatten(1).to(self.slope.dtype), grad_bias, self.kink, alpha=-1)  # of a - kink
        grad_weight = (above * self.slope).addr_(grad_bias, self.relu.least)
        grad_shift = _sum_products(grad_a, passed, *(tensor[: len(self.slope)] for tensor in identity)) / self.slope
        grad_scale = (self.weight * above).sum(0) / self.moments.deviation
        return (
            (grad_a, passed),
            Affine(grad_scale.addcmul_(self.relu.kink, grad_shift), grad_shift),
            grad_weight,
            grad_bias,
        )


def _sum_products(x: Tensor, y: Tensor, unit: Tensor, zero: Tensor) -> Tensor:
    """Sum x * y over all but the channels, (C,) float32, with BatchNorm's kernel for the gradient of its weight."""
    mask = [False, True, False]  # of the gradients: only the weight's
    _, sums, _ = torch.ops.aten.native_batch_norm_backward(x, y, unit, None, None, zero, unit, True, 0.0, mask)
    return sums


def _empty(x: Tensor, channels: int) -> Tensor:
    """Return an uninitialized (N, channels, h, w) in channels-last order."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, weight, bias) of a convolution of stride 1."""
    sizes, pad, unit = [len(weight)] if bias else None, [padding] * 2, [1, 1]
    mask = [True, True, bias]
    return torch.ops.aten.convolution_backward(grad, x, weight, sizes, unit, pad, unit, False, [0, 0], 1, mask)


def _norm_backward(grad: Tensor, x: Tensor, moments: Moments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, weight, bias) of a BatchNorm in training; inputs in channels-last order."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, moments.mean, 1 / moments.deviation, True, 0.0, [True, True, True]
    )


def _momentum(norm: nn.BatchNorm2d) -> float:
    assert norm.momentum is not None, "a cumulative running mean is not supported"
    return norm.momentum


class Features:
    """The buffer of a block: values (N, C, h, w) in channels-last order, each channel's moments, the filled channels."""

    def __init__(self, values: Tensor, moments: Moments, num_filled: int) -> None:
        self.values, self.moments, self.num_filled = values, moments, num_filled

    @classmethod
    def empty(cls, x: Tensor, channels: int) -> "Features":
        """Allocate an empty buffer of x's batch, size and dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, deviation = (torch.zeros(channels, dtype=dtype, device=x.device) for _ in range(2))
        return cls(_empty(x, channels), Moments(mean, deviation), 0)

    def append(self, new: Tensor, eps: float, unbiased: Tensor) -> None:
        """Append channels; write their unbiased variance to the same channels of `unbiased` (C,)."""
        channels = slice(self.num_filled, self.num_filled + new.shape[1])
        self.values[:, channels] = new
        _, variance = torch.batch_norm_update_stats(new, self.moments.mean[channels], unbiased[channels], 1.0)
        torch.sqrt(variance.add_(eps), out=self.moments.deviation[channels])
        self.num_filled = channels.stop

    def pop_gradient(self, total: Tensor, number: int) -> Tensor:
        """Drop the last `number` channels and return their gradient; `total` (N, C, h, w) is that with constant moments."""
        channels = slice(self.num_filled - number, self.num_filled)
        self.num_filled = channels.start
        moments = Moments(*(moment[channels] for moment in self.moments))
        grad, x = (tensor[:, channels].contiguous(memory_format=torch.channels_last) for tensor in (total, self.values))
        return _norm_backward(grad, x, moments, moments.deviation)[0]

    def norm_relu_conv(self, relu: ReluParameters, weight: Tensor, *, pool: bool = False) -> NormReluConv:
        """Return the operation that reads the channels filled so far."""
        moments = Moments(*(moment[: self.num_filled] for moment in self.moments))
        return NormReluConv(self.values[:, : self.num_filled], moments, relu, weight, pool)


class Layer(NamedTuple):
    """The parameters of one dense layer; scale and shift are BatchNorm's weight and bias."""

    scale1: Tensor
    shift1: Tensor
    conv1: Tensor
    scale2: Tensor
    shift2: Tensor
    conv2: Tensor

    @property
    def norm1(self) -> Affine:
        """The parameters of the first norm."""
        return Affine(self.scale1, self.shift1)

    @property
    def norm2(self) -> Affine:
        """The parameters of the second norm."""
        return Affine(self.scale2, self.shift2)


class Tail(NamedTuple):
    """The parameters of the norm and the 1x1 convolution that read the complete block."""

    scale: Tensor
    shift: Tensor
    conv: Tensor  # (O, C, ...)
    bias: Tensor | None  # (O,)

    @property
    def norm(self) -> Affine:
        """The parameters of the norm."""
        return Affine(self.scale, self.shift)


@dataclass(frozen=True)
class Norms:
    """The BatchNorm modules of a block: (norm1, norm2) of its layers, and the one after it."""

    layers: Sequence[tuple[nn.BatchNorm2d, nn.BatchNorm2d]]
    tail: nn.BatchNorm2d

    def update_running(self, mean: Tensor, unbiased: Tensor) -> None:
        """Update the running statistics of all norms that read the buffer, as each would by itself."""
        reading = [*(norm1 for norm1, _ in self.layers), self.tail]
        for name, batch in (("running_mean", mean), ("running_var", unbiased)):
            running = [getattr(norm, name) for norm in reading]
            torch._foreach_lerp_(running, [batch[: len(buffer)] for buffer in running], _momentum(self.tail))
        torch._foreach_add_([norm.num_batches_tracked for norm in (*sum(self.layers, ()), self.tail)], 1)


def stem(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Compute norm, relu and 3x3 max pool of stride 2 over x (N, C, h, w), keeping only x for backward. Training mode only."""
    _check(x)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, enabled=False):
        return _Stem.apply(x, norm, norm.weight, norm.bias)


def _check(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(f"BatchNorm in training needs more than 1 value per channel; this batch is {tuple(x.shape)}")


def dense_block(
    x: Tensor, layers: Sequence[Any], norm: nn.BatchNorm2d, conv: Tensor, bias: Tensor | None, *, pool: bool
) -> Tensor:
    """Compute torchvision's dense layers, then norm, relu, an optional 2x2 average pool and a 1x1 convolution.

    Training mode only: it uses batch statistics and updates the running ones in place. Under autocast it computes in autocast's
    dtype.

    Args:
        x: (N, C, h, w).
        layers: torchvision's dense layers.
        norm: the norm after the block.
        conv: weight of the last convolution, (O, C', ...).
        bias: of the last convolution, (O,).
        pool: whether to pool.

    Returns:
        (N, O, h, w), or half of h and w.
    """
    _check(x)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    norms = Norms([(layer.norm1, layer.norm2) for layer in layers], norm)
    parameters = [
        parameter
        for layer in layers
        for module in (layer.norm1, layer.conv1, layer.norm2, layer.conv2)
        for parameter in module.parameters()
    ]
    with torch.autocast(device, enabled=False):
        return _Block.apply(x, norms, pool, *parameters, norm.weight, norm.bias, conv, bias)


def _group_parameters(parameters: Sequence[Any]) -> tuple[list[Layer], Tail]:
    size = len(Layer._fields)
    layers = [Layer(*parameters[start : start + size]) for start in range(0, len(parameters) - len(Tail._fields), size)]
    return layers, Tail(*parameters[-len(Tail._fields) :])


def _compute_moments(x: Tensor, norm: nn.BatchNorm2d) -> Moments:
    """Compute the moments of x (N, C, h, w), and update the norm's running statistics in place."""
    mean, variance = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, _momentum(norm))
    return Moments(mean, variance.add_(norm.eps).sqrt_())


def _norm_relu(x: Tensor, moments: Moments, norm: Affine) -> Tensor:
    """Return relu(norm(x)), in x's dtype."""
    # Eval mode's formula with the moments as running statistics; eps is in the deviation already.
    mean, deviation = moments
    y, _, _ = torch.native_batch_norm(x, *norm, mean, deviation.square(), False, 0.0, 0.0)
    return y.relu_()


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        moments = _compute_moments(x, norm)
        ctx.save_for_backward(x, *moments, weight, bias)
        return F.max_pool2d(_norm_relu(x, moments, Affine(weight, bias)), 3, 2, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mean, deviation, *norm = ctx.saved_tensors
        y = _norm_relu(x, Moments(mean, deviation), Affine(*norm))
        window = [3, 3], [2, 2], [1, 1], [1, 1], False
        _, indices = torch.ops.aten.max_pool2d_with_indices(y, *window)
        grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, *window, indices)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad, weight, bias = _norm_backward(grad, x, Moments(mean, deviation), norm[0])
        return grad, None, weight, bias


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Norms, pool: bool, *parameters: Tensor | None) -> Tensor:
        layers, tail = _group_parameters(parameters)
        eps = norms.tail.eps
        features = Features.empty(x, x.shape[1] + sum(len(layer.conv2) for layer in layers))
        unbiased = torch.zeros_like(features.moments.mean)  # zeros: a lerp from NaN with weight 1 is still NaN
        features.append(x, eps, unbiased)
        relus = ReluParameters.from_norms(
            [*(layer.norm1 for layer in layers), tail.norm], x.numel() // x.shape[1], x.dtype
        )
        saved: list[Tensor] = []
        for (_, norm2), relu, layer in zip(norms.layers, relus, layers, strict=False):
            bottleneck = features.norm_relu_conv(relu, layer.conv1).forward()
            moments = _compute_moments(bottleneck, norm2)
            features.append(
                F.conv2d(_norm_relu(bottleneck, moments, layer.norm2), layer.conv2.to(x.dtype), padding=1),
                eps,
                unbiased,
            )
            saved += [bottleneck, *moments]
        norms.update_running(features.moments.mean, unbiased)
        ctx.pool, ctx.relus, ctx.num_saved = pool, relus, len(saved)
        ctx.save_for_backward(features.values, *features.moments, *saved, *parameters)
        return features.norm_relu_conv(relus[-1], tail.conv, pool=pool).forward(tail.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, mean, deviation, *tensors = ctx.saved_tensors
        saved, parameters = tensors[: ctx.num_saved], tensors[ctx.num_saved :]
        layers, tail = _group_parameters(parameters)
        features = Features(values, Moments(mean, deviation), values.shape[1])
        identity = Affine(torch.ones_like(mean), torch.zeros_like(mean))
        operation = features.norm_relu_conv(ctx.relus[-1], tail.conv, pool=ctx.pool)
        (total, passed), norm, weight, bias = operation.backward(grad, identity)
        total.mul_(passed)  # (N, C, h, w): of the buffer, with constant moments
        gradients = [[*norm, weight.view_as(tail.conv), None if tail.bias is None else bias]]
        for index in reversed(range(len(layers))):
            layer, bottleneck, moments = layers[index], saved[3 * index], Moments(*saved[3 * index + 1 : 3 * index + 3])
            grad = features.pop_gradient(total, len(layer.conv2))
            grad, grad2 = _backward2(grad, bottleneck, moments, layer)
            factors, norm, weight, _ = features.norm_relu_conv(ctx.relus[index], layer.conv1).backward(grad, identity)
            total[:, : features.num_filled].addcmul_(*factors)
            gradients.append([*norm, weight.view_as(layer.conv1), *grad2])
        grad_x = features.pop_gradient(total, features.num_filled)
        return grad_x, None, None, *(gradient for group in reversed(gradients) for gradient in group)


def _backward2(grad: Tensor, bottleneck: Tensor, moments: Moments, layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the bottleneck and of (scale2, shift2, conv2), through conv2, relu and norm2."""
    y = _norm_relu(bottleneck, moments, layer.norm2)
    grad, weight, _ = _convolution_backward(grad, y, layer.conv2.to(y.dtype), 1, bias=False)
    grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    grad, scale, shift = _norm_backward(grad, bottleneck, moments, layer.scale2)
    return grad, [scale, shift, weight.to(layer.conv2.dtype)]
