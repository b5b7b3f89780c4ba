"""Compute dense blocks in training: torchvision's layers over one buffer, with a small memory for the backward pass.

    input, normalized -> features[:, :c] --> norm1's weight and bias, relu, conv1 -> bottleneck -> norm2, relu, conv2
                              ^                                                                                 |
                              '---------------------------- normalized <--------------------------- 32 new channels
    features, all of them                --> norm's weight and bias, relu (, pool), 1x1 convolution after the block -> output

A block is one autograd function. It keeps for backward the buffer, each layer's bottleneck (N, 128, h, w) and the statistics,
and recomputes the rest. Why it is cheaper than 86 concatenations, and equal to them in exact arithmetic:

- A channel's batch mean and variance are the same for every layer that reads it. It is normalized once, when it is appended.
- relu(k x + b) = k (a - t) with a = max(x, t), t = -b / k (min where k < 0). The slope k goes into the 1x1 convolution that
  follows, the offset into its bias. One comparison per element remains of norm and relu. Pooling commutes with all of it, so it
  comes before the convolution.
- A 1x1 convolution is a product of matrices (pixels, channels), which starts faster than a convolution does.
- The gradient through mean and variance is a projection that depends on the channel only. The layers' gradients are summed
  first, and projected once, when the channel's own gradient is needed.
- Before norm2 a bias has no gradient. So the gradients of norm1 and conv1 need no sum over the bottleneck's.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_T = TypeVar("_T")
_MAX_PIXELS = 512  # up to here products of matrices are faster than torch's backward of a 3x3 convolution on a CPU
_MIN_SLOPE = 1e-20  # replaces a slope of 0, which has no kink; within the range of float32 and bfloat16


class Affine(NamedTuple):
    """BatchNorm's weight and bias, (C,) each."""

    weight: Tensor
    bias: Tensor


class Moments(NamedTuple):
    """Each channel's mean and 1 / sqrt(biased variance + eps) over the batch, (C,) float32 (float64 for float64)."""

    mean: Tensor
    inverse: Tensor

    def first(self, number: int) -> "Moments":
        """Return those of the first channels."""
        return Moments(self.mean.narrow(0, 0, number), self.inverse.narrow(0, 0, number))


class NormRelu(NamedTuple):
    """relu(weight * x + bias) of normalized x as weight * (max(x, kink) - kink) + least, (C,) each; min where weight < 0."""

    weight: Tensor  # never 0
    kink: Tensor
    offset: Tensor  # least - weight * kink
    least: Tensor  # 0, except where the kink is out of reach
    limit: Tensor  # the kink in the buffer's dtype
    low: Tensor  # the lower bound of a clamp: the kink, or -inf where weight < 0; the buffer's dtype
    high: Tensor  # the upper bound: inf, or the kink where weight < 0
    falling: bool  # some weight is negative: both bounds are needed

    @classmethod
    def from_norms(cls, norms: Sequence[Affine], num: int, dtype: torch.dtype) -> "list[NormRelu]":
        """Return the parameters of each norm; the kinks are clamped to sqrt(num), which no normalized value exceeds.

        Samuelson's inequality (1968) gives the bound. `num` is the number of values per channel, in `dtype`.
        """
        weight, bias = (torch.cat([norm[index] for norm in norms]) for index in (0, 1))
        weight = torch.where(weight == 0, _MIN_SLOPE, weight)
        kink = torch.clamp(-bias / weight, -(num**0.5), num**0.5)
        least = torch.relu(torch.addcmul(bias, weight, kink))
        offset = torch.addcmul(least, weight, kink, value=-1)
        falls, limit = weight < 0, kink.to(dtype)
        low, high = torch.where(falls, -torch.inf, limit), torch.where(falls, limit, torch.inf)
        sizes = [len(norm.weight) for norm in norms]
        fields = (tensor.split(sizes) for tensor in (weight, kink, offset, least, limit, low, high, falls))
        any_falls = not weight.is_cuda and bool(falls.any())  # on a GPU the check costs more than the clamp
        return [
            cls(w, k, o, least, at, low, high, weight.is_cuda or (any_falls and bool(falling.any())))
            for w, k, o, least, at, low, high, falling in zip(*fields, strict=True)
        ]

    def clip(self, x: Tensor) -> Tensor:
        """Return a of x (P, C): max(x, kink), or min where the norm's weight is negative."""
        return torch.clamp(x, self.low, self.high) if self.falling else torch.maximum(x, self.limit)

    def convolve(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the 1x1 convolution of relu(norm(x)), (P, O), and its scaled weight (O, C): times the norm's, in a's dtype.

        Args:
            a: clipped and perhaps pooled, (P, C).
            weight: the convolution's weight (O, C, ...).
            bias: the convolution's bias (O,).
        """
        weight = weight.flatten(1)
        shift = torch.mv(weight, self.offset)
        scaled = torch.mul(weight, self.weight, out=torch.empty_like(weight, dtype=a.dtype))
        return F.linear(a, scaled, (shift if bias is None else shift + bias).to(a.dtype)), scaled

    def passed_(self, a: Tensor) -> Tensor:
        """Return, in place of a (P, C), 0 where it is clipped, else 1."""
        return torch.ne(a, self.limit, out=a)

    def grad_parameters(
        self, inner: Tensor, passing: Tensor, weight: Tensor, grad_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the norm's weight and bias and of the convolution's weight.

        Args:
            inner: the product of the output's gradient and a over the pixels, (O, C).
            passing: the gradient of a where it is not clipped, summed over the pixels, (C,).
            weight: the convolution's weight (O, C, ...).
            grad_bias: the output's gradient summed over the pixels, (O,). None if it is 0, as before a norm.
        """
        inner = inner.to(weight.dtype)
        if grad_bias is not None:
            inner = torch.addr(inner, grad_bias, self.kink, alpha=-1)  # of a - kink
        grad_shift = passing / self.weight
        grad_scale = (weight.flatten(1) * inner).sum(0).addcmul_(self.kink, grad_shift)
        grad_weight = inner.mul_(self.weight)
        if grad_bias is not None:
            grad_weight.addr_(grad_bias, self.least)
        return grad_scale, grad_shift, grad_weight.view_as(weight)


def _pixels(x: Tensor) -> Tensor:
    """Return x (N, C, h, w), in channels-last order, as a matrix (N * h * w, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _images(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a matrix (N * h * w, C) as (N, C, h, w), for a size (N, h, w)."""
    return x.unflatten(0, size).permute(0, 3, 1, 2)


def _norm_backward(grad: Tensor, x: Tensor, moments: Moments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of (x, weight, bias) of a BatchNorm in training; inputs in channels-last order."""
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, *moments, True, 0.0, [True, True, True]
    )


def _momentum(norm: nn.BatchNorm2d) -> float:
    assert norm.momentum is not None, "a cumulative running mean is not supported"
    return norm.momentum


class Features:
    """The buffer of a block: normalized values (N, C, h, w) in channels-last order, of which the first channels are filled.

    Attributes:
        values: the normalized values.
        inverses: 1 / sqrt(biased variance + eps) of the channels before they were normalized, a vector for each `append`.
        num_filled: the number of filled channels.
    """

    def __init__(self, values: Tensor, inverses: Sequence[Tensor], num_filled: int) -> None:
        self.values, self.inverses, self.num_filled = values, [*inverses], num_filled
        self._pixels, self._size = _pixels(values), (len(values), *values.shape[2:])

    @classmethod
    def empty(cls, x: Tensor, channels: int) -> "Features":
        """Allocate an empty buffer of x's batch, size and dtype."""
        shape = (x.shape[0], channels, *x.shape[2:])
        values = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        return cls(values, [], 0)

    @property
    def pixels(self) -> Tensor:
        """The channels filled so far, (P, C)."""
        return self._pixels.narrow(1, 0, self.num_filled)

    def append(self, new: Tensor, eps: float, mean: Tensor, unbiased: Tensor) -> None:
        """Normalize and append channels; write their mean and unbiased variance to two vectors of zeros."""
        # "Running" statistics of momentum 1. They are multiplied by 0, and 0 x NaN is NaN.
        normalized, _, inverse = torch.native_batch_norm(new, None, None, mean, unbiased, True, 1.0, eps)
        self.values.narrow(1, self.num_filled, new.shape[1]).copy_(normalized)
        self.inverses.append(inverse)
        self.num_filled += new.shape[1]

    def pop_gradient(self, total: Tensor, identity: Moments) -> Tensor:
        """Drop the channels of the last `append` and return their gradient before the norm.

        Args:
            total: the gradient after the norm, (P, C).
            identity: mean 0 and deviation 1, (at least C,) each.
        """
        inverse = self.inverses.pop()
        number = len(inverse)
        self.num_filled -= number
        channels = 1, self.num_filled, number
        values = self.values.narrow(*channels).contiguous(memory_format=torch.channels_last)
        grad = _images(total.narrow(*channels).contiguous(), self._size)
        return _norm_backward(grad, values, identity.first(number), inverse)[0]

    def sum_products(self, x: Tensor, y: Tensor, identity: Moments) -> Tensor:
        """Sum x * y (P, C) over the pixels, (C,) float32, with BatchNorm's kernel for the gradient of its weight."""
        zero, unit = identity.first(x.shape[1])
        mask = [False, True, False]  # of the gradients of a BatchNorm: only its weight's
        images = _images(x, self._size), _images(y, self._size)
        return torch.ops.aten.native_batch_norm_backward(*images, unit, None, None, zero, unit, True, 0.0, mask)[1]


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


class SavedTensors(NamedTuple):
    """Tensors that one dense layer saves for backward."""

    bottleneck: Tensor  # (N, 128, h, w), before norm2
    mean: Tensor  # of the bottleneck, (128,)
    inverse: Tensor  # 1 / sqrt(variance)
    variance: Tensor  # biased, plus eps
    scaled: Tensor  # conv1's weight times norm1's in the buffer's dtype, (128, C)
    kernel: Tensor  # conv2's weight in the buffer's dtype
    out_inverse: Tensor  # 1 / sqrt(biased variance + eps) of the new channels


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


def _group(tensors: Sequence[Any], kind: Callable[..., _T], size: int) -> list[_T]:
    """Return consecutive groups of `size` tensors, each as a `kind`."""
    return [kind(*tensors[start : start + size]) for start in range(0, len(tensors), size)]


def _group_parameters(parameters: Sequence[Any]) -> tuple[list[Layer], Tail]:
    num_tail = len(Tail._fields)
    return _group(parameters[:-num_tail], Layer, len(Layer._fields)), Tail(*parameters[-num_tail:])


def _train_norm_relu(x: Tensor, norm: nn.BatchNorm2d, affine: Affine) -> tuple[Tensor, Moments]:
    """Return relu(norm(x)) of x (N, C, h, w) and its moments, and update the norm's running statistics in place."""
    running = norm.running_mean, norm.running_var
    y, *moments = torch.native_batch_norm(x, *affine, *running, True, _momentum(norm), norm.eps)
    return y.relu_(), Moments(*moments)


def _norm_relu(x: Tensor, moments: Moments, affine: Affine) -> Tensor:
    """Return relu(norm(x)) once more, in x's dtype."""
    # Eval mode's formula with the moments as running statistics; eps is in them already.
    y, _, _ = torch.native_batch_norm(x, *affine, moments.mean, moments.inverse.pow(-2), False, 0.0, 0.0)
    return y.relu_()


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.BatchNorm2d, weight: Tensor, bias: Tensor) -> Tensor:
        y, moments = _train_norm_relu(x, norm, Affine(weight, bias))
        ctx.save_for_backward(x, *moments, weight, bias)
        return F.max_pool2d(y, 3, 2, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mean, inverse, *affine = ctx.saved_tensors
        y = _norm_relu(x, Moments(mean, inverse), Affine(*affine))
        window = [3, 3], [2, 2], [1, 1], [1, 1], False
        _, indices = torch.ops.aten.max_pool2d_with_indices(y, *window)
        grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, y, *window, indices)
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad, weight, bias = _norm_backward(grad, x, Moments(mean, inverse), affine[0])
        return grad, None, weight, bias


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norms: Norms, pool: bool, *parameters: Tensor | None) -> Tensor:
        layers, tail = _group_parameters(parameters)
        batch, channels, height, width = x.shape
        widths = [channels, *(len(layer.conv2) for layer in layers)]
        features = Features.empty(x, sum(widths))
        statistics = x.new_zeros((2, sum(widths)), dtype=torch.promote_types(x.dtype, torch.float32))
        means, variances = (statistic.split(widths) for statistic in statistics)
        features.append(x, norms.tail.eps, means[0], variances[0])
        affines = [*(layer.norm1 for layer in layers), tail.norm]
        relus = NormRelu.from_norms(affines, x.numel() // channels, x.dtype)
        saved: list[SavedTensors] = []
        for (_, norm2), relu, layer, *statistic in zip(
            norms.layers, relus, layers, means[1:], variances[1:], strict=False
        ):
            output, scaled = relu.convolve(relu.clip(features.pixels), layer.conv1)
            bottleneck = _images(output, (batch, height, width))
            y, moments = _train_norm_relu(bottleneck, norm2, layer.norm2)
            kernel = layer.conv2.to(x.dtype)
            features.append(F.conv2d(y, kernel, padding=1), norms.tail.eps, *statistic)
            variance = moments.inverse.pow(-2)
            saved.append(SavedTensors(bottleneck, *moments, variance, scaled, kernel, features.inverses[-1]))
        norms.update_running(*statistics)
        a = relus[-1].clip(features.pixels)
        if pool:
            a = _pixels(F.avg_pool2d(_images(a, (batch, height, width)), 2))
            height, width = height // 2, width // 2
        ctx.pool, ctx.relus = pool, relus
        output, scaled = relus[-1].convolve(a, tail.conv, tail.bias)
        ctx.save_for_backward(features.values, features.inverses[0], scaled, *itertools.chain(*saved), *parameters)
        return _images(output, (batch, height, width))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, inverse, scaled, *tensors = ctx.saved_tensors
        num_layers = len(ctx.relus) - 1
        num_saved = num_layers * len(SavedTensors._fields)
        saved = _group(tensors[:num_saved], SavedTensors, len(SavedTensors._fields))
        layers, tail = _group_parameters(tensors[num_saved:])
        features = Features(values, [inverse, *(each.out_inverse for each in saved)], values.shape[1])
        identity = Moments(inverse.new_zeros(values.shape[1]), inverse.new_ones(values.shape[1]))
        total, gradients = _backward_tail(grad, features, ctx.relus[-1], scaled, tail, identity, pool=ctx.pool)
        for layer, relu, own in zip(reversed(layers), reversed(ctx.relus[:-1]), reversed(saved), strict=True):
            grad = features.pop_gradient(total, identity)
            grad, *grads = _backward2(grad, own, layer.norm2)
            a = relu.clip(features.pixels)
            grad = _pixels(grad)
            grad_a, inner = grad @ own.scaled, grad.T @ a
            passed = relu.passed_(a)
            passing = features.sum_products(grad_a, passed, identity)
            total.narrow(1, 0, features.num_filled).addcmul_(grad_a, passed)
            gradients = [*relu.grad_parameters(inner, passing, layer.conv1), *grads, *gradients]
        return features.pop_gradient(total, identity), None, None, *gradients


def _backward_tail(
    grad: Tensor,
    features: Features,
    relu: NormRelu,
    scaled: Tensor,
    tail: Tail,
    identity: Moments,
    *,
    pool: bool,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of the features, (P, C), and of the tail's parameters."""
    size = (len(features.values), *features.values.shape[2:])
    a = relu.clip(features.pixels)
    images = _images(a, size)
    grad = _pixels(grad.contiguous(memory_format=torch.channels_last))
    grad_a, inner = grad @ scaled, grad.T @ (_pixels(F.avg_pool2d(images, 2)) if pool else a)
    if pool:
        pooled = _images(grad_a, (size[0], size[1] // 2, size[2] // 2))
        window = [2, 2], [2, 2], [0, 0], False, True, None
        grad_a = _pixels(torch.ops.aten.avg_pool2d_backward(pooled, images, *window))
    passed = relu.passed_(a)
    passing = features.sum_products(grad_a, passed, identity)
    grad_bias = grad.sum(0, dtype=passing.dtype)
    gradients = relu.grad_parameters(inner, passing, tail.conv, grad_bias)
    return grad_a.mul_(passed), [*gradients, None if tail.bias is None else grad_bias]


def _backward2(grad: Tensor, saved: SavedTensors, norm: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the bottleneck and of (scale2, shift2, conv2), through conv2, relu and norm2."""
    y, _, _ = torch.native_batch_norm(saved.bottleneck, *norm, saved.mean, saved.variance, False, 0.0, 0.0)
    grad, grad_kernel = _convolution_backward(grad, y.relu_(), saved.kernel)
    grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    grad, scale, shift = _norm_backward(grad, saved.bottleneck, Moments(saved.mean, saved.inverse), norm.weight)
    return grad, scale, shift, grad_kernel.to(norm.weight.dtype)


def _convolution_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x (N, C, h, w) and kernel (O, C, 3, 3) of a convolution with padding 1."""
    batch, width, *size = grad.shape
    if grad.is_cuda or batch * size[0] * size[1] > _MAX_PIXELS:
        options = None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        return torch.ops.aten.convolution_backward(grad, x, kernel, *options)[:2]
    windows = F.pad(grad, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # (N, O, h, w, 3, 3)
    columns = windows.permute(0, 2, 3, 4, 5, 1).reshape(-1, 9 * width)
    matrix = kernel.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * width, -1)
    grad_kernel = (columns.T @ _pixels(x)).view(3, 3, width, -1).permute(2, 3, 0, 1).flip(2, 3)
    return _images(columns @ matrix, (batch, *size)), grad_kernel
