"""Dense blocks in training: torchvision's layers, computed over one buffer and kept small for the backward pass.

    input -> features[:, :c] --> read by norm1, relu, conv1 -> bottleneck -> norm2, relu, conv2 -> 32 new channels --.
                  ^---------------------------------------------------------------------------------------------------'
    features, all of them    --> read by the norm, relu (, pool), 1x1 convolution behind the block -> output

A block is one autograd function. Kept for backward: the buffer, each layer's bottleneck (N, 128, h, w), statistics; all else is
made again. What makes it cheaper than 86 concatenations, and equal to them in exact arithmetic:

- A channel's batch mean and variance are the same for every layer that reads it: they are computed once.
- relu(k x + b) = k (a - t) with a = max(x, t), t = -b / k (min where k < 0): the slope k goes into the 1x1 convolution that
  follows, the offset into its bias, and what is left of norm and relu is one comparison an element. So nothing is rounded
  between the buffer and the convolution. Pooling commutes with all of it, so it comes before the convolution.
- The gradient through mean and variance is a projection that depends on the channel only: the layers' gradients are added up
  first, and projected once, when the channel's own gradient is wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_MIN_SLOPE = 1e-20  # a slope of 0 has no kink; this one is as flat, and within the range of float32 and bfloat16


class Moments(NamedTuple):
    """Of each channel over the batch, (C,) float32 (float64 for float64): mean, and sqrt(biased variance + eps)."""

    mean: Tensor
    deviation: Tensor


class Affine(NamedTuple):
    """BatchNorm's weight and bias, (C,) each."""

    weight: Tensor
    bias: Tensor


class ReluParameters(NamedTuple):
    """relu(weight * x + bias) of normalised x, (C,) each: weight * (max(x, kink) - kink) + least; min where weight < 0."""

    weight: Tensor  # never 0
    kink: Tensor
    least: Tensor  # 0, but where the kink lies out of reach
    floor: Tensor  # added to the kink it is the lower bound of a clamp: 0, or -inf where weight < 0; the buffer's dtype
    ceiling: Tensor  # the same for the upper bound: inf, or 0 where weight < 0
    falling: bool  # some weight is negative: it takes both bounds

    @classmethod
    def of(cls, norms: Sequence[Affine], num: int, dtype: torch.dtype) -> "list[ReluParameters]":
        """num: values a channel, in `dtype`. No normalised value is beyond sqrt(num) (Samuelson), so no kink need be."""
        weight, bias = (torch.cat([norm[which] for norm in norms]) for which in (0, 1))
        weight = torch.where(weight == 0, _MIN_SLOPE, weight)
        kink = torch.clamp(-bias / weight, -(num**0.5), num**0.5)
        least = torch.relu(torch.addcmul(bias, weight, kink))
        falls, zero = weight < 0, torch.zeros_like(weight, dtype=dtype)
        floor, ceiling = torch.where(falls, -torch.inf, zero), torch.where(falls, zero, torch.inf)
        sizes = [len(norm.weight) for norm in norms]
        parts = zip(*(whole.split(sizes) for whole in (weight, kink, least, floor, ceiling, falls)), strict=True)
        looks = not weight.is_cuda and bool(falls.any())  # on a GPU, looking costs more than clamping
        return [
            ReluParameters(w, k, least, low, high, weight.is_cuda or (looks and bool(part.any())))
            for w, k, least, low, high, part in parts
        ]


class NormReluConv:
    """relu(norm(x)) of C channels and the 1x1 convolution behind it, as a convolution of a = max(x, kink).

    relu(norm(x)) = slope * (a - kink) + least, (C,) float32 each; the kink in x's dtype is what `clipped` goes by.
    """

    def __init__(self, x: Tensor, moments: Moments, gate: ReluParameters, weight: Tensor, pool: bool = False) -> None:
        """x (N, C, h, w), a slice of the buffer; weight (O, C, ...): the convolution's; pool: halve h and w before it."""
        self.x, self.moments, self.gate, self.pool = x, moments, gate, pool
        self.weight = weight.flatten(1)  # (O, C)
        self.slope = gate.weight / moments.deviation
        self.kink = torch.addcmul(moments.mean, moments.deviation, gate.kink)
        self.limit = self.kink.to(x.dtype)[:, None, None]  # (C, 1, 1)
        self.scaled = (self.weight * self.slope).to(x.dtype)[:, :, None, None]  # (O, C, 1, 1)

    def clipped(self) -> Tensor:
        """a (N, C, h, w): max(x, kink), or min where the slope is negative."""
        a = _empty(self.x, self.x.shape[1])
        if not self.gate.falling:
            return torch.maximum(self.x, self.limit, out=a)
        low, high = (self.limit + bound[:, None, None] for bound in (self.gate.floor, self.gate.ceiling))
        return torch.clamp(self.x, low, high, out=a)

    def forward(self, bias: Tensor | None = None) -> Tensor:
        """(N, O, h, w), or half of h and w."""
        a = self.clipped()
        shift = torch.mv(self.weight, torch.addcmul(self.gate.least, self.slope, self.kink, value=-1))
        if bias is not None:
            shift = shift + bias
        return F.conv2d(F.avg_pool2d(a, 2) if self.pool else a, self.scaled, shift.to(a.dtype))

    def backward(self, grad: Tensor, identity: Affine) -> tuple[tuple[Tensor, Tensor], Affine, Tensor, Tensor]:
        """grad, as forward's result -> (of x with its moments held still, of the norm, of the weight (O, C), of the bias).

        identity: weight 1 and bias 0, float32 (at least C,) each.
        The first as two factors (N, C, h, w), the second of them 0 or 1: so they are multiplied where they are added up.
        """
        a = self.clipped()
        read = F.avg_pool2d(a, 2) if self.pool else a
        grad_a, raw, grad_bias = _convolution_backward(grad, read, self.scaled, 0, bias=True)
        if self.pool:
            grad_a = torch.ops.aten.avg_pool2d_backward(grad_a, a, [2, 2], [2, 2], [0, 0], False, True, None)
        passed = torch.ne(a, self.limit, out=a)  # 0 where it is clipped, else 1
        grad_bias = grad_bias.to(self.slope.dtype)
        above = torch.addr(raw.flatten(1).to(self.slope.dtype), grad_bias, self.kink, alpha=-1)  # of a - kink
        grad_weight = (above * self.slope).addr_(grad_bias, self.gate.least)
        grad_shift = _sum_products(grad_a, passed, *(whole[: len(self.slope)] for whole in identity)) / self.slope
        grad_scale = (self.weight * above).sum(0) / self.moments.deviation
        return (
            (grad_a, passed),
            Affine(grad_scale.addcmul_(self.gate.kink, grad_shift), grad_shift),
            grad_weight,
            grad_bias,
        )


def _sum_products(x: Tensor, y: Tensor, one: Tensor, zero: Tensor) -> Tensor:
    """Sum of x * y over all but the channels, (C,) float32: BatchNorm's kernel for its weight has just that."""
    which = [False, True, False]  # of the gradients: the weight's
    _, dots, _ = torch.ops.aten.native_batch_norm_backward(x, y, one, None, None, zero, one, True, 0.0, which)
    return dots


def _empty(x: Tensor, channels: int) -> Tensor:
    """Uninitialised (N, channels, h, w), in channels-last order."""
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, *, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias) of a convolution of stride 1."""
    sizes, pad, one = [len(weight)] if bias else None, [padding] * 2, [1, 1]
    mask = [True, True, bias]
    return torch.ops.aten.convolution_backward(grad, x, weight, sizes, one, pad, one, False, [0, 0], 1, mask)


def _norm_backward(grad: Tensor, x: Tensor, moments: Moments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, bias) of a BatchNorm in training; all of them (N, C, h, w) in channels-last order."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, moments.mean, 1 / moments.deviation, True, 0.0, [True, True, True]
    )


def _momentum(norm: nn.BatchNorm2d) -> float:
    assert norm.momentum is not None, "a running mean over all time is not made here"
    return norm.momentum


class Features:
    """A block's buffer: values (N, C, h, w) in channels-last order; each channel's moments; how many channels are filled."""

    def __init__(self, values: Tensor, moments: Moments, filled: int) -> None:
        self.values, self.moments, self.filled = values, moments, filled

    @classmethod
    def empty(cls, x: Tensor, channels: int) -> "Features":
        """Of x's batch, size and dtype; nothing is filled."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, deviation = (torch.zeros(channels, dtype=dtype, device=x.device) for _ in range(2))
        return cls(_empty(x, channels), Moments(mean, deviation), 0)

    def append(self, new: Tensor, eps: float, unbiased: Tensor) -> None:
        """The next channels; their unbiased variance goes to the same place of `unbiased` (C,)."""
        part = slice(self.filled, self.filled + new.shape[1])
        self.values[:, part] = new
        _, variance = torch.batch_norm_update_stats(new, self.moments.mean[part], unbiased[part], 1.0)
        torch.sqrt(variance.add_(eps), out=self.moments.deviation[part])
        self.filled = part.stop

    def take(self, total: Tensor, number: int) -> Tensor:
        """Empties the last `number` channels; returns their gradient, `total` (N, C, h, w) being that with moments held still."""
        part = slice(self.filled - number, self.filled)
        self.filled = part.start
        moments = Moments(*(moment[part] for moment in self.moments))
        grad, x = (whole[:, part].contiguous(memory_format=torch.channels_last) for whole in (total, self.values))
        return _norm_backward(grad, x, moments, moments.deviation)[0]

    def reader(self, gate: ReluParameters, weight: Tensor, *, pool: bool = False) -> NormReluConv:
        """Of the channels filled so far."""
        moments = Moments(*(moment[: self.filled] for moment in self.moments))
        return NormReluConv(self.values[:, : self.filled], moments, gate, weight, pool)


class Layer(NamedTuple):
    """Parameters of one dense layer: scale and shift are BatchNorm's weight and bias."""

    scale1: Tensor
    shift1: Tensor
    conv1: Tensor
    scale2: Tensor
    shift2: Tensor
    conv2: Tensor

    @property
    def norm1(self) -> Affine:
        return Affine(self.scale1, self.shift1)

    @property
    def norm2(self) -> Affine:
        return Affine(self.scale2, self.shift2)


class Tail(NamedTuple):
    """Parameters of what reads the whole block: a norm and a 1x1 convolution."""

    scale: Tensor
    shift: Tensor
    conv: Tensor  # (O, C, ...)
    bias: Tensor | None  # (O,)

    @property
    def norm(self) -> Affine:
        return Affine(self.scale, self.shift)


@dataclass(frozen=True)
class Norms:
    """The BatchNorm modules of a block: (norm1, norm2) of its layers, and the one behind it."""

    layers: Sequence[tuple[nn.BatchNorm2d, nn.BatchNorm2d]]
    tail: nn.BatchNorm2d

    def move(self, mean: Tensor, unbiased: Tensor) -> None:
        """Move the running statistics of all that read the buffer, as each would by itself."""
        readers = [*(norm1 for norm1, _ in self.layers), self.tail]
        for name, of_batch in (("running_mean", mean), ("running_var", unbiased)):
            running = [getattr(norm, name) for norm in readers]
            torch._foreach_lerp_(running, [of_batch[: len(buffer)] for buffer in running], _momentum(self.tail))
        torch._foreach_add_([norm.num_batches_tracked for norm in (*sum(self.layers, ()), self.tail)], 1)


def stem(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """norm, relu, 3x3 max pool of stride 2 over x (N, C, h, w), which alone is kept for backward. In training mode only."""
    _check(x)
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.autocast(x.device.type, enabled=False):
        return _Stem.apply(x, norm, norm.weight, norm.bias)


def _check(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(f"BatchNorm in training wants more than 1 value a channel, this batch is {tuple(x.shape)}")


def dense_block(
    x: Tensor, layers: Sequence[Any], norm: nn.BatchNorm2d, conv: Tensor, bias: Tensor | None, *, pool: bool
) -> Tensor:
    """torchvision's dense layers over x (N, C, h, w), then norm, relu, 2x2 average pool where `pool`, 1x1 convolution.

    conv (O, C', ...) and bias (O,) are the last convolution's. Returns (N, O, h, w), or half of h and w. In training
    mode only: batch statistics; the running ones are moved in place. Under autocast it computes in autocast's dtype.
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


def _grouped(parameters: Sequence[Any]) -> tuple[list[Layer], Tail]:
    size = len(Layer._fields)
    layers = [Layer(*parameters[start : start + size]) for start in range(0, len(parameters) - len(Tail._fields), size)]
    return layers, Tail(*parameters[-len(Tail._fields) :])


def _moments(x: Tensor, norm: nn.BatchNorm2d) -> Moments:
    """Of x (N, C, h, w); the norm's running statistics are moved in place."""
    mean, variance = torch.batch_norm_update_stats(x, norm.running_mean, norm.running_var, _momentum(norm))
    return Moments(mean, variance.add_(norm.eps).sqrt_())


def _rectified(x: Tensor, moments: Moments, norm: Affine) -> Tensor:
    """relu(norm(x)), in x's dtype."""
    # With the moments in the place of the running ones: eval mode's formula; eps is in the deviation already.
    mean, deviation = moments
    y, _, _ = torch.native_batch_norm(x, *norm, mean, deviation.square(), False, 0.0, 0.0)
    return y.relu_()


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        moments = _moments(x, norm)
        ctx.save_for_backward(x, *moments, weight, bias)
        return F.max_pool2d(_rectified(x, moments, Affine(weight, bias)), 3, 2, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mean, deviation, *norm = ctx.saved_tensors
        y = _rectified(x, Moments(mean, deviation), Affine(*norm))
        window = [3, 3], [2, 2], [1, 1], [1, 1], False
        _, places = torch.ops.aten.max_pool2d_with_indices(y, *window)
        grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, *window, places)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad, weight, bias = _norm_backward(grad, x, Moments(mean, deviation), norm[0])
        return grad, None, weight, bias


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Norms, pool: bool, *parameters: Tensor | None) -> Tensor:
        layers, tail = _grouped(parameters)
        eps = norms.tail.eps
        features = Features.empty(x, x.shape[1] + sum(len(layer.conv2) for layer in layers))
        unbiased = torch.zeros_like(features.moments.mean)  # zeros: what is moved all the way from NaN is still NaN
        features.append(x, eps, unbiased)
        gates = ReluParameters.of([*(layer.norm1 for layer in layers), tail.norm], x.numel() // x.shape[1], x.dtype)
        kept: list[Tensor] = []
        for (_, norm2), gate, layer in zip(norms.layers, gates, layers, strict=False):
            bottleneck = features.reader(gate, layer.conv1).forward()
            moments = _moments(bottleneck, norm2)
            features.append(
                F.conv2d(_rectified(bottleneck, moments, layer.norm2), layer.conv2.to(x.dtype), padding=1),
                eps,
                unbiased,
            )
            kept += [bottleneck, *moments]
        norms.move(features.moments.mean, unbiased)
        ctx.pool, ctx.gates, ctx.num_kept = pool, gates, len(kept)
        ctx.save_for_backward(features.values, *features.moments, *kept, *parameters)
        return features.reader(gates[-1], tail.conv, pool=pool).forward(tail.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, mean, deviation, *rest = ctx.saved_tensors
        kept, parameters = rest[: ctx.num_kept], rest[ctx.num_kept :]
        layers, tail = _grouped(parameters)
        features = Features(values, Moments(mean, deviation), values.shape[1])
        identity = Affine(torch.ones_like(mean), torch.zeros_like(mean))
        reader = features.reader(ctx.gates[-1], tail.conv, pool=ctx.pool)
        (total, passed), norm, weight, bias = reader.backward(grad, identity)
        total.mul_(passed)  # (N, C, h, w): of the buffer, moments held still
        gradients = [[*norm, weight.view_as(tail.conv), None if tail.bias is None else bias]]
        for place in reversed(range(len(layers))):
            layer, bottleneck, moments = layers[place], kept[3 * place], Moments(*kept[3 * place + 1 : 3 * place + 3])
            grad = features.take(total, len(layer.conv2))
            grad, grad2 = _backward2(grad, bottleneck, moments, layer)
            part, norm, weight, _ = features.reader(ctx.gates[place], layer.conv1).backward(grad, identity)
            total[:, : features.filled].addcmul_(*part)
            gradients.append([*norm, weight.view_as(layer.conv1), *grad2])
        grad_x = features.take(total, features.filled)
        return grad_x, None, None, *(gradient for group in reversed(gradients) for gradient in group)


def _backward2(grad: Tensor, bottleneck: Tensor, moments: Moments, layer: Layer) -> tuple[Tensor, list[Tensor]]:
    """Through conv2, relu and norm2: the gradient of the bottleneck, and of (scale2, shift2, conv2)."""
    y = _rectified(bottleneck, moments, layer.norm2)
    grad, weight, _ = _convolution_backward(grad, y, layer.conv2.to(y.dtype), 1, bias=False)
    grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    grad, scale, shift = _norm_backward(grad, bottleneck, moments, layer.scale2)
    return grad, [scale, shift, weight.to(layer.conv2.dtype)]
