"""A trained DenseNet in int8: the same graph computed in 8 bits from the stem to the last block, as one ONNX file.

    radiographs -> int8_statistics.py (the float network: range and mean of each channel) -> int8_graph.py (a grid per channel)
        -> weights (int8_rounding.py), biases and cuts on these grids -> QDQ graph: image -> logit, activation_map
        -> the bias of the head, so that the mean logit stays

DenseNet is slow in 8 bits because a batch norm stands *between* concatenation and convolution. A plain conversion dequantizes,
normalizes, rectifies and quantizes all earlier channels again in every layer. Here each channel x of a block has its own grid,
x = origin + step * q with q in 0..255. Slope and intercept of the norm vanish, since with cut = -intercept / slope

    relu(slope * x + intercept) = slope * (max(x, cut) - cut)        slope > 0; min instead of max for slope < 0

max(x, cut) is a maximum of two bytes. slope, step and cut are constants, which the following 1x1 convolution absorbs. A
convolution writes its output on the grids of its channels, so that concatenation copies bytes. A grid spans only the range that
the norms do not cut off. Pooling is a grouped convolution. The head stays float, since it is small and its map is displayed.

Weights are rounded together per layer, so that the layer's outputs change least for its real inputs and their mean does not
change (bias correction: arXiv 1906.04721, section 4.2). In the stem each kernel keeps its sum, so that a uniform gray stays
uniform.

ONNX Runtime and OpenVINO fuse the file's DequantizeLinear-Conv-QuantizeLinear into one integer convolution.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mura_dist.inference.engine import SessionConfig
from mura_dist.inference.engine_onnxruntime import OnnxRuntime
from mura_dist.inference.export.int8_graph import BYTE_MAX, GraphBuilder, Grid, build_grid, scale_covariance
from mura_dist.inference.export.int8_rounding import MIN_STEP, largest_weight
from mura_dist.inference.export.int8_statistics import BATCH, ChannelStatistics, collect_statistics
from mura_dist.models.card import WEIGHT_BITS
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble

OPSET = 18


def build_int8_graph(
    model: DenseNet | Ensemble, images: np.ndarray, weight_bits: int = WEIGHT_BITS[0]
) -> onnx.ModelProto:
    """Return the integer graph of a network or an ensemble. It has the contract of onnx.build_onnx, and no metadata yet.

    Args:
        model: In eval mode, on the CPU, fp32.
        images: uint8 (N, 1, S, S), radiographs of the train split. Their ranges become the grids, and their mean logit stays.
        weight_bits: 7, or 8 for processors that `processor.check_weight_bits` accepts.
    """
    networks = list(_networks(model))
    prefixes = [f"member{number}." if len(networks) > 1 else "" for number in range(len(networks))]
    builders = [GraphBuilder(prefix, largest_weight(weight_bits)) for prefix in prefixes]
    graphs = [_build_corrected(network, images, graph) for network, graph in zip(networks, builders, strict=True)]
    with torch.no_grad():
        map_shape = model(torch.from_numpy(images[:1]))[1].shape[1:]
    if len(graphs) > 1:
        graphs.append(_average(prefixes))
    return _assemble(graphs, "", images.shape[-1], tuple(map_shape))


def _networks(model: DenseNet | Ensemble) -> Iterator[DenseNet]:
    if isinstance(model, Ensemble):
        yield from model.networks  # type: ignore[misc]
    else:
        yield model


def _build_corrected(network: DenseNet, images: np.ndarray, graph: GraphBuilder) -> GraphBuilder:
    """Build a network's nodes. The bias of the head corrects the change of the mean logit of `images`."""
    prefix = graph.prefix
    build_network(graph, network, collect_statistics(network, images))
    batches = torch.from_numpy(images).split(BATCH)
    with torch.no_grad():
        exact = [network(batch) for batch in batches]
    model = _assemble([graph], prefix, images.shape[-1], tuple(exact[0][1].shape[1:]))
    engine = OnnxRuntime(model.SerializeToString(), "the integer graph", "cpu", SessionConfig().resolved(on_cpu=True))
    logits = np.concatenate([engine.run(batch.numpy(), [f"{prefix}logit"])[0] for batch in batches])
    exact_logits = torch.cat([logit for logit, _ in exact]).double().numpy()
    shift = exact_logits.mean() - logits.mean(dtype=np.float64)
    bias = next(tensor for tensor in graph.tensors if tensor.name == f"{prefix}head")
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) + shift).astype(np.float32), bias.name))
    return graph


def _assemble(graphs: Sequence[GraphBuilder], prefix: str, size: int, map_shape: tuple[int, ...]) -> onnx.ModelProto:
    """Return a model whose outputs are `prefix`logit and `prefix`activation_map."""
    graph = helper.make_graph(
        [node for graph in graphs for node in graph.nodes],
        "mura_dist",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, size, size])],
        [
            helper.make_tensor_value_info(f"{prefix}logit", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info(f"{prefix}activation_map", TensorProto.FLOAT, ["batch", *map_shape]),
        ],
        [tensor for graph in graphs for tensor in graph.tensors],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def _average(prefixes: Sequence[str]) -> GraphBuilder:
    """Build the logit of the members' mean probability, and their mean map, as models/ensemble.py defines them."""
    graph = GraphBuilder("mean.")
    axis = graph.const(np.array([0]))
    rows = [graph.add("Unsqueeze", f"{prefix}logit", axis) for prefix in prefixes]
    logits = graph.add("Concat", *rows, axis=0)  # (M, N)
    # log sigmoid(l) = -softplus(-l)
    log_sums = [
        graph.add("ReduceLogSumExp", graph.add("Neg", graph.add("Softplus", signed)), axis, keepdims=0)
        for signed in (graph.add("Neg", logits), logits)
    ]
    graph.add("Sub", *log_sums, output="logit")
    graph.add("Mean", *(f"{prefix}activation_map" for prefix in prefixes), output="activation_map")
    return graph


# ---- one network


def build_network(graph: GraphBuilder, network: DenseNet, statistics: dict[str, ChannelStatistics]) -> None:
    """Add the nodes of one network, with the outputs `prefix`logit (N,) and `prefix`activation_map (N, h, w)."""
    features = network.features
    x, grid = _stem(graph, network, statistics["stem"])
    for number in (1, 2, 3, 4):
        layers = list(features.get_submodule(f"denseblock{number}").named_children())
        last_norm = features.get_submodule(f"transition{number}").norm if number < 4 else features.norm5
        norms = [layer.norm1 for _, layer in layers] + [last_norm]
        for index, (name, layer) in enumerate(layers):
            layer_statistics = {key: statistics[f"{number}.{name}.{key}"] for key in ("in", "middle", "out")}
            y, new_grid = _layer(graph, layer, x, grid, layer_statistics, norms[index + 1 :])
            x, grid = graph.add("Concat", x, y, axis=1), grid + new_grid
        if number < 4:
            next_layers = list(features.get_submodule(f"denseblock{number + 1}").children())
            next_last = features.get_submodule(f"transition{number + 1}").norm if number < 3 else features.norm5
            next_norms = [layer.norm1 for layer in next_layers] + [next_last]
            readers = affine_slices(next_norms, 0, norms[-1].num_features // 2)
            transition = features.get_submodule(f"transition{number}")
            before, after = statistics[f"{number}.in"], statistics[f"{number}.out"]
            x, grid = _transition(graph, transition, x, grid, before, after, readers)
    _head(graph, network, x, grid)


def affine_slices(norms: Sequence[Any], first: int, num_channels: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return slope and intercept of each norm for the channels `first` to `first + num_channels`."""
    channels = slice(first, first + num_channels)
    return [(slope[channels], intercept[channels]) for slope, intercept in map(_affine, norms)]


def _affine(norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return slope and intercept, (C,) float64 each, of a batch norm in eval mode."""
    slope = _numpy(norm.weight) / np.sqrt(_numpy(norm.running_var) + norm.eps)
    return slope, _numpy(norm.bias) - _numpy(norm.running_mean) * slope


def _numpy(tensor: Any) -> np.ndarray:
    values: np.ndarray = tensor.detach().double().numpy()
    return values


def _stem(graph: GraphBuilder, network: DenseNet, statistics: ChannelStatistics) -> tuple[str, Grid]:
    """Build the stem on the bytes of the image.

    A second channel, 255 everywhere, carries ImageNet's means. Where a kernel exceeds the border both channels are 0, like the
    normalized image.
    """
    features = network.features
    norms = [layer.norm1 for layer in features.denseblock1.children()] + [features.transition1.norm]
    grid = build_grid(statistics, affine_slices(norms, 0, len(statistics.low)))
    slope, intercept = _affine(features.norm0)
    weight = _numpy(features.conv0.weight) * slope[:, None, None, None]  # (C, 3, 7, 7) of the normalized image
    scale, mean = _numpy(network.scale).ravel(), _numpy(network.mean).ravel()
    gray_weight = np.einsum("oikl,i->okl", weight, scale)
    mean_weight = -np.einsum("oikl,i->okl", weight, scale * mean) / BYTE_MAX
    weight = np.stack([gray_weight, mean_weight], axis=1) / grid.step[:, None, None, None]  # (C, 2, 7, 7)
    white = graph.add("Max", "image", graph.const(np.full((1, 1, 1), BYTE_MAX, np.uint8)))
    image = graph.add("Concat", "image", white, axis=1)
    bias = (intercept - grid.origin) / grid.step
    # The grid itself rectifies: the minimum behind a relu is never below 0.
    y = graph.convolve(image, weight, bias, np.array([0.0, BYTE_MAX]), None, strides=[2, 2], pads=[3] * 4)
    return graph.add("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), grid


def _layer(
    graph: GraphBuilder,
    layer: Any,
    x: str,
    grid: Grid,
    statistics: dict[str, ChannelStatistics],
    later_norms: Sequence[Any],
) -> tuple[str, Grid]:
    """Build norm, relu, 1x1 convolution, norm, relu, 3x3 convolution. `later_norms` read the output."""
    slope, intercept = _affine(layer.norm2)
    # Byte 0 is the value 0, as padding and relu require.
    middle_grid = Grid(np.maximum(statistics["middle"].high / BYTE_MAX, MIN_STEP), np.zeros(len(slope)))
    y = graph.rectify(x, *_affine(layer.norm1), grid)
    weight, bias = y.fold(_numpy(layer.conv1.weight)[:, :, 0, 0] * (slope / middle_grid.step)[:, None])
    bias = bias + intercept / middle_grid.step
    middle = graph.convolve(y.name, weight[:, :, None, None], bias, *y.byte_statistics(statistics["in"]))
    readers = affine_slices(later_norms, len(grid.step), layer.conv2.out_channels)
    new_grid = build_grid(statistics["out"], readers)
    weight = _numpy(layer.conv2.weight) * middle_grid.step[None, :, None, None] / new_grid.step[:, None, None, None]
    mean = statistics["middle"].mean / middle_grid.step
    covariance = scale_covariance(statistics["middle"].covariance, middle_grid.step)
    bias = -new_grid.origin / new_grid.step
    return graph.convolve(middle, weight, bias, mean, covariance, pads=[1] * 4), new_grid


def _transition(
    graph: GraphBuilder,
    transition: Any,
    x: str,
    grid: Grid,
    before: ChannelStatistics,
    after: ChannelStatistics,
    readers: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[str, Grid]:
    """Build norm, relu, pooling and 1x1 convolution. `readers` are the norms that read the output."""
    y = graph.rectify(x, *_affine(transition.norm), grid)
    pooled = _pool(graph, y.name, len(grid.step))
    new_grid = build_grid(after, readers)
    weight, bias = y.fold(_numpy(transition.conv.weight)[:, :, 0, 0] / new_grid.step[:, None])
    bias = bias - new_grid.origin / new_grid.step
    return graph.convolve(pooled, weight[:, :, None, None], bias, *y.byte_statistics(before)), new_grid


def _pool(graph: GraphBuilder, x: str, num_channels: int) -> str:
    """Build 2 x 2 mean pooling as a grouped convolution. ONNX Runtime's pooling of bytes takes three times as long."""
    taps = graph.const(np.ones((num_channels, 1, 2, 2), np.int8))
    weight = graph.add("DequantizeLinear", taps, graph.const(np.float32(0.25)), graph.const(np.int8(0)))
    mean = graph.add("Conv", graph.dequantize(x), weight, group=num_channels, kernel_shape=[2, 2], strides=[2, 2])
    return graph.quantize(mean)


def _head(graph: GraphBuilder, network: DenseNet, x: str, grid: Grid) -> None:
    """Build the last norm, the classifier as a 1x1 convolution, and the mean of its map, in float."""
    slope, intercept = _affine(network.features.norm5)
    scale, shift = slope * grid.step, slope * grid.origin + intercept
    y = graph.add("Mul", graph.dequantize(x), graph.const(scale.astype(np.float32)[:, None, None]))
    y = graph.add("Relu", graph.add("Add", y, graph.const(shift.astype(np.float32)[:, None, None])))
    weight, bias = (tensor.detach().numpy() for tensor in (network.classifier.weight, network.classifier.bias))
    head = (graph.const(weight[:, :, None, None]), graph.const(bias, f"{graph.prefix}head"))
    cells = graph.add("Conv", y, *head, kernel_shape=[1, 1])  # (N, 1, h, w)
    cells = graph.add("Squeeze", cells, graph.const(np.array([1])), output=f"{graph.prefix}activation_map")
    graph.add("ReduceMean", cells, graph.const(np.array([1, 2])), output=f"{graph.prefix}logit", keepdims=0)
