"""A trained DenseNet in integers: the same graph computed in 8 bits, from the stem to the last block, as one ONNX file.

    radiographs -> observe (the float network: range and mean of each channel) -> a grid for each channel
        -> weights, biases and cuts on those grids -> QDQ graph: image -> logit, activation_map
        -> the head's bias, so that the mean logit stays

What makes DenseNet slow in 8 bits is that a batch norm stands *between* concatenation and convolution: every layer would go back
to float, norm, rectify and quantise all channels before it. Here nothing does. A channel x of a block lies on a grid of its
own, x = origin + step * q, q in 0..255. The norm's slope and intercept then vanish, since with cut = -intercept / slope

    relu(slope * x + intercept) = slope * (max(x, cut) - cut)        slope > 0; min instead of max where slope < 0

and max(x, cut) is a maximum of two bytes, while slope, step and cut are constants of the 1x1 convolution that reads it. What a
convolution writes already lies on its channels' grids, so concatenation copies bytes; and only the part of a channel's range
that a cut leaves over needs one. Pooling is a convolution by group. The head stays float: it is small, and its map is shown.

Weights have 7 bits: of two products of 8 by 8 the sum overflows the 16-bit sums of processors without VNNI (of all before about
2019 and many later ones). What one bit less costs, rounding gets back: of a layer's weights together, so that its outputs change
least on what it really reads, and their mean not at all (arXiv 1906.04721, section 4.2). In the stem each kernel keeps its sum,
so that even grey stays even.

ONNX Runtime and OpenVINO both turn the file's DequantizeLinear-Conv-QuantizeLinear into one integer convolution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from mura_dist.inference.engine import SessionConfig
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble

OPSET = 18
_TOP = 255  # of a byte
_WEIGHT_TOP = 63  # 2 * 255 * 63 < 2**15
_BATCH = 16
_TINY = 1e-9
_MOST_STEPS = 2**29  # of a bias; products take as many more at the most
_PLACES = 16  # of a radiograph, where what kernels read is looked at
_COLUMNS = 64  # rounded between two products of matrices
_FAINT = 1e-3  # of the largest scale of what a convolution reads
_DAMPING = 0.01  # of the mean variance: from few radiographs a covariance is known roughly


@dataclass
class ChannelStatistics:
    """Of one tensor, by channel: (C,) float64 each; of one that a convolution of k x k reads also the covariance of its inputs,
    (C k k, C k k) float32."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray | None = None


@dataclass(frozen=True)
class Grid:
    """Where a channel's values lie: value = origin + step * q with q in 0..255. (C,) float64 each, steps above 0."""

    step: np.ndarray
    origin: np.ndarray

    def __add__(self, other: "Grid") -> "Grid":
        """The channels of both, one after the other."""
        return Grid(np.concatenate([self.step, other.step]), np.concatenate([self.origin, other.origin]))


# ---- what the float network does


class _Watch:
    """Range and mean of named tensors (B, C, h, w), and second moments of what kernels read of them, over batches."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]] = {}
        self.moments: dict[str, _Moments] = {}
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, name: str, x: Tensor, kernel: int = 0) -> Tensor:
        """`kernel`: of the convolution that reads x; 0: its weights are rounded one by one."""
        parts = (x.amin((0, 2, 3)), x.amax((0, 2, 3)), x.mean((0, 2, 3), dtype=torch.float64))
        low, high, mean = (part.double().numpy() for part in parts)
        self.found.setdefault(name, []).append((low, high, mean, len(x)))
        if kernel:
            self._moments(name, x, kernel)
        return x

    def _moments(self, name: str, x: Tensor, kernel: int) -> None:
        batch, _, height, width = x.shape
        places = torch.randperm(batch * height * width, generator=self.random)[: _PLACES * batch]
        image, row, column = places // (height * width), places // width % height, places % width
        padded = F.pad(x, [kernel // 2] * 4)
        taps = [
            padded[image, :, row + down, column + right] for down in range(kernel) for right in range(kernel)
        ]  # k k of (P, C)
        read = torch.stack(taps, dim=2).flatten(1)  # (P, C k k)
        if name not in self.moments:
            self.moments[name] = _Moments(read.mean(0))
        self.moments[name].add(read)

    def observed(self) -> dict[str, ChannelStatistics]:
        return {
            name: ChannelStatistics(
                np.min([low for low, *_ in rows], axis=0),
                np.max([high for _, high, *_ in rows], axis=0),
                np.average([mean for _, _, mean, _ in rows], axis=0, weights=[number for *_, number in rows]),
                self._covariance(name),
            )
            for name, rows in self.found.items()
        }

    def _covariance(self, name: str) -> np.ndarray | None:
        return self.moments.pop(name).covariance() if name in self.moments else None


class _Moments:
    """Second moments of rows (P, K), about `centre`, near their mean: where a channel varies by a millionth of its mean, sums
    of plain squares in 32 bits would have lost it."""

    def __init__(self, centre: Tensor) -> None:
        self.centre, self.number = centre, 0
        self.total, self.products = torch.zeros_like(centre), torch.zeros(len(centre), len(centre))

    def add(self, rows: Tensor) -> None:
        rows = rows - self.centre
        self.products.addmm_(rows.T, rows)
        self.total += rows.sum(0)
        self.number += len(rows)

    def covariance(self) -> np.ndarray:
        mean = self.total / self.number
        covariance: np.ndarray = self.products.div_(self.number).sub_(torch.outer(mean, mean)).numpy()
        return covariance


@torch.no_grad()
def observe(network: DenseNet, images: np.ndarray) -> dict[str, ChannelStatistics]:
    """Range and mean of the channels of every tensor that gets a grid. images: uint8 (N, 1, S, S); network: eval, CPU, fp32."""
    watch, parts = _Watch(), network.features
    for batch in torch.from_numpy(images).split(_BATCH):
        x = (batch.float() - network.mean) * network.scale  # (B, 3, S, S)
        x = watch("stem", parts.pool0(F.relu(parts.norm0(parts.conv0(x)))))
        for number in (1, 2, 3, 4):
            features = [x]
            for name, layer in parts.get_submodule(f"denseblock{number}").named_children():
                y = watch(f"{number}.{name}.in", F.relu(layer.norm1(torch.cat(features, 1))), 1)
                y = watch(f"{number}.{name}.middle", F.relu(layer.norm2(layer.conv1(y))), 3)
                features.append(watch(f"{number}.{name}.out", layer.conv2(y)))
            if number < 4:
                transition = parts.get_submodule(f"transition{number}")
                y = watch(f"{number}.in", F.avg_pool2d(F.relu(transition.norm(torch.cat(features, 1))), 2), 1)
                x = watch(f"{number}.out", transition.conv(y))
    return watch.observed()


def _affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept (C,) of a batch norm in eval mode."""
    slope = _numpy(norm.weight) / np.sqrt(_numpy(norm.running_var) + norm.eps)
    return slope, _numpy(norm.bias) - _numpy(norm.running_mean) * slope


def _numpy(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.detach().double().numpy()
    return values


# ---- grids


def _grid(observed: ChannelStatistics, readers: Sequence[tuple[np.ndarray, np.ndarray]]) -> Grid:
    """The grid of channels that norms of (slope, intercept) read: the observed range, less what all of them cut away."""
    low, high = observed.low.copy(), observed.high.copy()
    if readers:
        cuts = [_cut(slope, intercept) for slope, intercept in readers]
        lowest = np.min(
            [np.where(slope > 0, cut, -np.inf) for (slope, _), cut in zip(readers, cuts, strict=True)], axis=0
        )
        highest = np.max(
            [np.where(slope < 0, cut, np.inf) for (slope, _), cut in zip(readers, cuts, strict=True)], axis=0
        )
        low, high = np.clip(lowest, low, high), np.clip(highest, low, high)
    high = np.maximum(high, low)
    floor = np.maximum(_TINY, 1e-6 * np.maximum(np.abs(low), np.abs(high)))  # a channel that never moved
    return Grid(np.maximum((high - low) / _TOP, floor), low)


def _cut(slope: np.ndarray, intercept: np.ndarray) -> np.ndarray:
    """Where slope * x + intercept changes its sign; a slope of 0 has no such place, and its reader uses none."""
    return -intercept / np.where(slope == 0, 1.0, slope)


# ---- the graph


@dataclass
class _Graph:
    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def const(self, value: np.ndarray | np.generic, name: str | None = None) -> str:
        name = name or self._name("const")
        value = np.asarray(value)
        self.tensors.append(numpy_helper.from_array(value if value.ndim == 0 else np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or self._name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def _name(self, what: str) -> str:
        self.count += 1
        return f"{self.prefix}{what}_{self.count}"

    def convolution(
        self,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray,
        mean: np.ndarray,
        covariance: np.ndarray | None,
        **attributes: Any,
    ) -> str:
        """Bytes to bytes: q_out = clip(round(weight * q_in + bias)). weight: (O, I, k, k) float64; bias: (O,) float64.

        mean: (I,) of the input, whose mean output rounding leaves as it is; covariance: (I k k, I k k) of what a kernel
        reads, for rounding; None: of a picture, where each kernel's sum counts.
        """
        top = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        # (O,); weights far smaller than their bias, in 32 bits, get steps that it fits into
        step = np.maximum(np.where(top == 0, 1.0, top / _WEIGHT_TOP), np.abs(bias) / _MOST_STEPS)
        exact = weight / step[:, None, None, None]
        rounded = _rounded_evenly(exact) if covariance is None else _rounded_together(exact, covariance)
        bias = bias + ((exact - rounded).sum(axis=(2, 3)) @ mean) * step
        scale = self.const(step.astype(np.float32))
        taps = self.const(rounded.astype(np.int8))
        added = self.const(np.rint(bias / step).astype(np.int32))
        none = {kind: self.const(np.zeros(len(weight), kind)) for kind in ("int8", "int32")}
        result = self.add(
            "Conv",
            self.floats(x),
            self.add("DequantizeLinear", taps, scale, none["int8"], axis=0),
            self.add("DequantizeLinear", added, scale, none["int32"], axis=0),
            kernel_shape=list(weight.shape[2:]),
            **attributes,
        )
        return self.bytes(result)

    def floats(self, x: str) -> str:
        return self.add("DequantizeLinear", x, self.const(np.float32(1)), self.const(np.uint8(0)))

    def bytes(self, x: str) -> str:
        return self.add("QuantizeLinear", x, self.const(np.float32(1)), self.const(np.uint8(0)))

    def rectified(self, x: str, slope: np.ndarray, intercept: np.ndarray, grid: Grid) -> "_Rectified":
        """relu(slope * x + intercept), x bytes on `grid`, as bytes and what they mean."""
        cut = (_cut(slope, intercept) - grid.origin) / grid.step  # in steps
        on = np.clip(np.rint(cut), 0, _TOP)
        # A channel that is never cut in its range keeps its exact zero; one that is always cut stands still on it.
        zero = np.where((slope > 0) & (cut < 0) | (slope < 0) & (cut > _TOP), cut, on)
        low, high = np.where(slope > 0, on, 0).astype(np.uint8), np.where(slope < 0, on, _TOP).astype(np.uint8)
        if low.any():
            x = self.add("Max", x, self.const(low[:, None, None]))
        if (high < _TOP).any():
            x = self.add("Min", x, self.const(high[:, None, None]))
        constant = np.where(slope == 0, np.maximum(intercept, 0), 0.0)
        return _Rectified(x, slope * grid.step, np.where(slope == 0, 0.0, zero), constant)


@dataclass(frozen=True)
class _Rectified:
    """value = scale * (q - zero) + constant, by channel, q the bytes called `name`."""

    name: str
    scale: np.ndarray
    zero: np.ndarray
    constant: np.ndarray

    def read_by(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of a 1x1 convolution of the values, weight (O, C): the weight and bias of the same one of the bytes."""
        scaled = weight * self.scale
        return scaled, weight @ self.constant - scaled @ self.zero

    def statistics(self, observed: ChannelStatistics) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the bytes, of the values'."""
        scale = np.where(self.scale == 0, np.inf, self.scale)
        # What 32 bits left of a mean, in steps far smaller than it, may lie anywhere: no byte does.
        mean = np.clip((observed.mean - self.constant) / scale + np.where(self.scale == 0, 0.0, self.zero), 0, _TOP)
        # Hardly read at all, and what 32 bits know of how such a channel varies would be blown up out of all proportion.
        faint = np.abs(self.scale) < _FAINT * np.abs(self.scale).max()
        return mean, _scaled(observed.covariance, np.where(faint, np.inf, scale))


def _scaled(covariance: np.ndarray | None, step: np.ndarray) -> np.ndarray:
    """Of values in steps of `step` (I,): of an (I k k, I k k) covariance, that of the numbers of steps."""
    assert covariance is not None
    each = np.repeat(step, len(covariance) // len(step))
    scaled: np.ndarray = covariance / np.outer(each, each)
    variance = scaled.diagonal()
    still = (variance < 0) | (
        variance > _TOP**2
    )  # no byte varies so: a channel that never moved, on a grid of no width
    scaled[still] = scaled[:, still] = 0
    return scaled


def _rounded_evenly(exact: np.ndarray) -> np.ndarray:
    """(O, I, k, k) rounded so that each kernel's sum is the exact one's, rounded: the taps nearest to 1/2 give way."""
    rounded = np.rint(exact)
    for kernel, wanted in zip(rounded.reshape(-1, exact[0, 0].size), exact.reshape(-1, exact[0, 0].size), strict=True):
        error = wanted - kernel
        missing = int(np.rint(error.sum()))
        kernel[np.argsort(-error * np.sign(missing))[: abs(missing)]] += np.sign(missing)
    return np.clip(rounded, -_WEIGHT_TOP, _WEIGHT_TOP)


def _rounded_together(exact: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(O, I, k, k) rounded one input after the other, the largest first; those still to come make up, as far as they go
    together with it, for what each rounding took from the output (arXiv 2210.17323, algorithm 1)."""
    flat = exact.reshape(len(exact), -1)
    order = np.argsort(-covariance.diagonal())
    ordered = covariance[np.ix_(order, order)].astype(np.float64)
    ordered[np.diag_indices_from(ordered)] += _DAMPING * max(ordered.diagonal().mean(), _TINY)
    upper = _root_of_inverse(ordered)
    left, done = flat[:, order].copy(), np.empty_like(flat)
    for start in range(0, len(order), _COLUMNS):  # what follows a block of columns hears of it once, as one product
        stop = min(start + _COLUMNS, len(order))
        errors = np.empty((len(flat), stop - start))
        for place in range(start, stop):
            done[:, place] = np.clip(np.rint(left[:, place]), -_WEIGHT_TOP, _WEIGHT_TOP)
            error = errors[:, place - start] = (left[:, place] - done[:, place]) / upper[place, place]
            left[:, place + 1 : stop] -= np.outer(error, upper[place, place + 1 : stop])
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    rounded = np.empty_like(done)
    rounded[:, order] = done
    return rounded.reshape(exact.shape)


def _root_of_inverse(matrix: np.ndarray) -> np.ndarray:
    """Upper triangular, its transpose times itself the inverse of a symmetric `matrix`; of one that rounding has spoilt, with as
    much more on its diagonal as it takes."""
    more = matrix.diagonal().mean()
    while True:
        try:
            return np.linalg.cholesky(np.linalg.inv(matrix)).T
        except np.linalg.LinAlgError:
            matrix = matrix + more * np.eye(len(matrix))
            more *= 10


def network_nodes(network: DenseNet, observed: dict[str, ChannelStatistics], prefix: str = "") -> _Graph:
    """Nodes and constants of one network; "<prefix>logit" (N,) and "<prefix>activation_map" (N, h, w) come out."""
    graph, parts = _Graph(prefix), network.features
    x, grid = _stem(graph, network, observed["stem"])
    for number in (1, 2, 3, 4):
        layers = list(parts.get_submodule(f"denseblock{number}").named_children())
        last = parts.get_submodule(f"transition{number}").norm if number < 4 else parts.norm5
        norms = [layer.norm1 for _, layer in layers] + [last]
        for place, (name, layer) in enumerate(layers):
            seen = {what: observed[f"{number}.{name}.{what}"] for what in ("in", "middle", "out")}
            y, added = _layer(graph, layer, x, grid, seen, norms[place + 1 :])
            x, grid = graph.add("Concat", x, y, axis=1), grid + added
        if number < 4:
            following = list(parts.get_submodule(f"denseblock{number + 1}").children())
            after = parts.get_submodule(f"transition{number + 1}").norm if number < 3 else parts.norm5
            readers = _readers([layer.norm1 for layer in following] + [after], 0, norms[-1].num_features // 2)
            transition = parts.get_submodule(f"transition{number}")
            x, grid = _transition(
                graph, transition, x, grid, observed[f"{number}.in"], observed[f"{number}.out"], readers
            )
    _head(graph, network, x, grid)
    return graph


def _readers(norms: Sequence[Any], first: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each norm does with the `number` channels from the `first` on: (slope, intercept)."""
    return [tuple(part[first : first + number] for part in _affine(norm)) for norm in norms]  # type: ignore[misc]


def _stem(graph: _Graph, network: DenseNet, observed: ChannelStatistics) -> tuple[str, Grid]:
    """The image is bytes already. A second channel, 255 everywhere, carries ImageNet's means: where the kernel hangs over the
    border both are 0, as the normalised image is."""
    parts = network.features
    block = [layer.norm1 for layer in parts.denseblock1.children()] + [parts.transition1.norm]
    grid = _grid(observed, _readers(block, 0, len(observed.low)))
    slope, intercept = _affine(parts.norm0)
    weight = _numpy(parts.conv0.weight) * slope[:, None, None, None]  # (C, 3, 7, 7) of the normalised image
    scale, mean = _numpy(network.scale).ravel(), _numpy(network.mean).ravel()
    grey = np.einsum("oikl,i->okl", weight, scale)
    ones = -np.einsum("oikl,i->okl", weight, scale * mean) / _TOP
    weight = np.stack([grey, ones], axis=1) / grid.step[:, None, None, None]  # (C, 2, 7, 7)
    image = graph.add(
        "Concat", "image", graph.add("Max", "image", graph.const(np.full((1, 1, 1), _TOP, np.uint8))), axis=1
    )
    bias = (intercept - grid.origin) / grid.step
    # Rectified by the grid: no observed minimum after a relu is below 0.
    y = graph.convolution(image, weight, bias, np.array([0.0, _TOP]), None, strides=[2, 2], pads=[3] * 4)
    return graph.add("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), grid


def _layer(
    graph: _Graph, layer: Any, x: str, grid: Grid, seen: dict[str, ChannelStatistics], later: Sequence[Any]
) -> tuple[str, Grid]:
    """norm, relu, 1x1, norm, relu, 3x3. `later`: the norms that will read what it adds."""
    slope, intercept = _affine(layer.norm2)
    inside = Grid(np.maximum(seen["middle"].high / _TOP, _TINY), np.zeros(len(slope)))  # 0 is 0: padding, and the relu
    y = graph.rectified(x, *_affine(layer.norm1), grid)
    weight, bias = y.read_by(_numpy(layer.conv1.weight)[:, :, 0, 0] * (slope / inside.step)[:, None])
    bias = bias + intercept / inside.step
    middle = graph.convolution(y.name, weight[:, :, None, None], bias, *y.statistics(seen["in"]))
    first, number = len(grid.step), layer.conv2.out_channels
    added = _grid(seen["out"], _readers(later, first, number))
    weight = _numpy(layer.conv2.weight) * inside.step[None, :, None, None] / added.step[:, None, None, None]
    mean, covariance = seen["middle"].mean / inside.step, _scaled(seen["middle"].covariance, inside.step)
    return graph.convolution(middle, weight, -added.origin / added.step, mean, covariance, pads=[1] * 4), added


def _transition(
    graph: _Graph,
    transition: Any,
    x: str,
    grid: Grid,
    before: ChannelStatistics,
    after: ChannelStatistics,
    readers: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[str, Grid]:
    y = graph.rectified(x, *_affine(transition.norm), grid)
    pooled = _pool(graph, y.name, len(grid.step))
    new = _grid(after, readers)
    weight, bias = y.read_by(_numpy(transition.conv.weight)[:, :, 0, 0] / new.step[:, None])
    bias = bias - new.origin / new.step
    return graph.convolution(pooled, weight[:, :, None, None], bias, *y.statistics(before)), new


def _pool(graph: _Graph, x: str, channels: int) -> str:
    """The mean of 2 x 2, as a convolution by group: ONNX Runtime's pooling of bytes takes three times as long."""
    ones = graph.const(np.ones((channels, 1, 2, 2), np.int8))
    taps = graph.add("DequantizeLinear", ones, graph.const(np.float32(0.25)), graph.const(np.int8(0)))
    mean = graph.add("Conv", graph.floats(x), taps, group=channels, kernel_shape=[2, 2], strides=[2, 2])
    return graph.bytes(mean)


def _head(graph: _Graph, network: DenseNet, x: str, grid: Grid) -> None:
    slope, intercept = _affine(network.features.norm5)
    scale, shift = slope * grid.step, slope * grid.origin + intercept
    y = graph.add("Mul", graph.floats(x), graph.const(scale.astype(np.float32)[:, None, None]))
    y = graph.add("Relu", graph.add("Add", y, graph.const(shift.astype(np.float32)[:, None, None])))
    weight, bias = (part.detach().numpy() for part in (network.classifier.weight, network.classifier.bias))
    head = (graph.const(weight[:, :, None, None]), graph.const(bias, f"{graph.prefix}head"))
    cells = graph.add("Conv", y, *head, kernel_shape=[1, 1])  # (N, 1, h, w)
    cells = graph.add("Squeeze", cells, graph.const(np.array([1])), output=f"{graph.prefix}activation_map")
    graph.add("ReduceMean", cells, graph.const(np.array([1, 2])), output=f"{graph.prefix}logit", keepdims=0)


def build_int8_graph(model: DenseNet | Ensemble, images: np.ndarray) -> onnx.ModelProto:
    """The integer graph of a network, or of an ensemble, in eval mode on the CPU in fp32.

    images: uint8 (N, 1, S, S), radiographs of the train split, whose ranges become the grids' and whose mean logit stays. The
    file's contract is onnx.graph's; it bears no metadata yet.
    """
    networks = list(_networks(model))
    prefixes = [f"member{place}." if len(networks) > 1 else "" for place in range(len(networks))]
    made = [_settled(network, images, prefix) for network, prefix in zip(networks, prefixes, strict=True)]
    with torch.no_grad():
        cells = model(torch.from_numpy(images[:1]))[1].shape[1:]
    return _whole([*made, _average(prefixes)] if len(made) > 1 else made, "", images.shape[-1], tuple(cells))


def _whole(parts: Sequence[_Graph], prefix: str, size: int, cells: tuple[int, ...]) -> onnx.ModelProto:
    """A file whose outputs are those of `prefix`; `cells` is (h, w)."""
    whole = helper.make_graph(
        [node for part in parts for node in part.nodes],
        "mura_dist",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, size, size])],
        [
            helper.make_tensor_value_info(f"{prefix}logit", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info(f"{prefix}activation_map", TensorProto.FLOAT, ["batch", *cells]),
        ],
        [tensor for part in parts for tensor in part.tensors],
    )
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _settled(network: DenseNet, images: np.ndarray, prefix: str) -> _Graph:
    """A network's nodes, its head moved by what rounding moved the mean logit of `images` in all."""
    made, batches = network_nodes(network, observe(network, images), prefix), torch.from_numpy(images).split(_BATCH)
    with torch.no_grad():
        exact = [network(batch) for batch in batches]
    file = _whole([made], prefix, images.shape[-1], tuple(exact[0][1].shape[1:]))
    engine = OnnxRuntime(file.SerializeToString(), "the integer graph", "cpu", SessionConfig().resolved(on_cpu=True))
    found = [engine.run(batch.numpy(), [f"{prefix}logit"])[0] for batch in batches]
    shift = torch.cat([logit for logit, _ in exact]).double().numpy().mean() - np.concatenate(found).mean(
        dtype=np.float64
    )
    bias = next(tensor for tensor in made.tensors if tensor.name == f"{prefix}head")
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) + shift).astype(np.float32), bias.name))
    return made


def _networks(model: DenseNet | Ensemble) -> Iterator[DenseNet]:
    if isinstance(model, Ensemble):
        yield from model.networks  # type: ignore[misc]
    else:
        yield model


def _average(prefixes: Sequence[str]) -> _Graph:
    """The members' mean probability as a logit, and their mean map: see DESIGN of an ensemble."""
    graph = _Graph("mean.")
    axis = graph.const(np.array([0]))
    rows = [graph.add("Unsqueeze", f"{prefix}logit", axis) for prefix in prefixes]
    logits = graph.add("Concat", *rows, axis=0)  # (M, N)
    # log sigmoid(l) = -softplus(-l)
    sides = [
        graph.add("ReduceLogSumExp", graph.add("Neg", graph.add("Softplus", side)), axis, keepdims=0)
        for side in (graph.add("Neg", logits), logits)
    ]
    graph.add("Sub", *sides, output="logit")
    graph.add("Mean", *(f"{prefix}activation_map" for prefix in prefixes), output="activation_map")
    return graph
