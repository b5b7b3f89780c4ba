"""Test int8 quantization: outputs close to the float network for extreme norms, and integer operators throughout."""

import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers.models import S, tiny
from torch import nn

from mura_dist.inference.export import int8
from mura_dist.inference.export.int8_graph import GraphBuilder, Grid, build_grid
from mura_dist.inference.export.int8_rounding import largest_weight
from mura_dist.inference.export.int8_statistics import ChannelStatistics, collect_statistics
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble


def blotches(number: int, seed: int = 0) -> np.ndarray:
    """Return images with structure at several scales: uint8 (N, 1, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(number, 1, S // step, S // step, generator=generator) for step in (1, 4, 16)]
    image = sum(nn.functional.interpolate(noise, S, mode="bilinear") for noise in coarse)
    return (image / 3 * 255).round().to(torch.uint8).numpy()  # type: ignore[union-attr]


def trained(seed: int = 0) -> DenseNet:
    """Return a network whose norms have slopes of both signs, zero slopes, and updated statistics."""
    model = tiny(seed).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
                module.weight[:: 5 + seed % 3] = 0
                module.bias.copy_(torch.randn(module.num_features, generator=generator) * 0.5)
        for step in range(4):
            model(torch.from_numpy(blotches(16, 100 + step)))
        model.classifier.weight *= 3
    return model.eval()


def run_onnx(model: onnx.ModelProto, images: np.ndarray, *, optimized: bool = True) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:  # no fusion: integers only where bytes are stored
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logit, activation_map = session.run(["logit", "activation_map"], {"image": images})
    return logit, activation_map


def float_outputs(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logit, activation_map = model(torch.from_numpy(images))
    return logit.numpy(), activation_map.numpy()


@pytest.mark.parametrize("seed", range(3))
def test_outputs_close_to_float_network(seed: int) -> None:
    model, images = trained(seed), blotches(64, seed)
    int8_model = int8.build_int8_graph(model, blotches(128, seed + 50))
    onnx.checker.check_model(int8_model, full_check=True)
    logit, cells = run_onnx(int8_model, images)
    expected_logit, expected_cells = float_outputs(model, images)
    assert logit.dtype == cells.dtype == np.float32
    assert (logit.shape, cells.shape) == (expected_logit.shape, expected_cells.shape)
    assert np.abs(logit - expected_logit).mean() < 0.08 * expected_logit.std() + 0.01
    assert np.corrcoef(logit, expected_logit)[0, 1] > 0.97
    assert np.corrcoef(cells.ravel(), expected_cells.ravel())[0, 1] > 0.97
    np.testing.assert_allclose(cells.mean(axis=(1, 2)), logit, atol=1e-5)


def with_faint_slopes(seed: int, slope: float) -> DenseNet:
    """Return a trained network with some norm slopes set to `slope`, which makes their biases dominate."""
    model = trained(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[1 :: 7 + seed % 3] = slope
    return model


@pytest.mark.parametrize(("slope", "seed"), [(1e-3, 0), (1e-4, 1), (1e-5, 2), (1e-6, 0), (1e-7, 1), (1e-8, 2)])
def test_tiny_norm_slope_is_as_accurate_as_zero(seed: int, slope: float) -> None:
    """float32 resolves such a channel poorly, so no rounding, mean or bias may depend on it."""
    images, errors = blotches(64, seed), []
    for each in (slope, 0.0):
        model = with_faint_slopes(seed, each)
        int8_model = int8.build_int8_graph(model, blotches(128, seed + 50))
        errors.append(np.abs(run_onnx(int8_model, images)[0] - float_outputs(model, images)[0]).mean())
    assert errors[0] <= 1.5 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("seed", range(3))
def test_integer_sums_do_not_overflow(seed: int) -> None:
    """The processor's integer instructions give the same logits as the unoptimized graph."""
    int8_model = int8.build_int8_graph(trained(seed), blotches(64))
    images = np.concatenate([blotches(16, 9), np.full((1, 1, S, S), 255, np.uint8), np.zeros((1, 1, S, S), np.uint8)])
    np.testing.assert_allclose(
        run_onnx(int8_model, images)[0], run_onnx(int8_model, images, optimized=False)[0], atol=0.05
    )


INT16_MAX = 2**15 - 1
BITS = [pytest.param(7, True, id="7 bits"), pytest.param(8, False, id="8 bits")]


def int8_weights(int8_model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the int8 weights (O, I, k, k) by the name of their Conv node."""
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in int8_model.graph.initializer}
    nodes = {node.output[0]: node for node in int8_model.graph.node}
    convolutions = [node for node in nodes.values() if node.op_type == "Conv" and node.input[1] in nodes]
    return {node.name: constants[nodes[node.input[1]].input[0]].astype(np.int64) for node in convolutions}


@pytest.mark.parametrize(("bits", "fits"), BITS)
def test_sum_of_any_two_products_fits_into_16_bits(bits: int, fits: bool) -> None:
    """Without VNNI the processor adds the products of two inputs in 16 bits. Which two depends on the kernel."""
    weights = int8_weights(int8.build_int8_graph(trained(), blotches(64), bits))
    bounds = []
    for kernels in weights.values():
        largest_two = np.sort(np.abs(kernels.reshape(len(kernels), -1)), axis=1)[:, -2:]
        bounds.append(255 * largest_two.sum(axis=1).max())
    limit = largest_weight(bits)
    assert max(np.abs(kernels).max() for kernels in weights.values()) == limit
    assert max(bounds) <= 2 * 255 * limit
    assert (2 * 255 * limit <= INT16_MAX) == fits
    assert (max(bounds) <= INT16_MAX) == fits


@pytest.mark.parametrize(("bits", "fits"), BITS)
def test_only_8_bits_saturate_without_vnni(bits: int, fits: bool) -> None:
    """The two largest products of the bytes that the 1x1 convolutions read for blotches exceed 16 bits only for 8 bits."""
    int8_model = int8.build_int8_graph(trained(), blotches(64), bits)
    nodes = {node.output[0]: node for node in int8_model.graph.node}
    weights = {name: w[:, :, 0, 0] for name, w in int8_weights(int8_model).items() if w.shape[2:] == (1, 1)}  # (O, I)
    inputs = [nodes[nodes[name].input[0]].input[0] for name in weights]
    int8_model.graph.output.extend(onnx.helper.make_tensor_value_info(x, onnx.TensorProto.UINT8, None) for x in inputs)
    session = onnxruntime.InferenceSession(int8_model.SerializeToString(), providers=["CPUExecutionProvider"])
    num_saturated = 0
    for kernels, x in zip(weights.values(), session.run(inputs, {"image": blotches(4, 9)}), strict=True):
        channels = np.moveaxis(x.astype(np.int64), 1, -1).reshape(-1, x.shape[1])  # (P, I)
        products = np.sort(channels[:, None] * kernels, axis=2)  # (P, O, I)
        lowest, highest = products[..., :2].sum(axis=2), products[..., -2:].sum(axis=2)
        num_saturated += np.count_nonzero((lowest < -INT16_MAX - 1) | (highest > INT16_MAX))
    assert (num_saturated == 0) == fits, num_saturated


def test_8_bits_are_closer_to_the_float_network() -> None:
    model, images, calibration = trained(), blotches(64, 9), blotches(128, 50)
    errors = [
        np.abs(run_onnx(int8.build_int8_graph(model, calibration, bits), images, optimized=False)[1] - exact).mean()
        for exact in [float_outputs(model, images)[1]]
        for bits in (7, 8)
    ]
    assert errors[1] < errors[0], errors


def test_optimized_graph_uses_integer_operators() -> None:
    options = onnxruntime.SessionOptions()
    int8_model = int8.build_int8_graph(trained(), blotches(32))
    op_counts = count_optimized_operators(int8_model, options)
    model = trained()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert op_counts["QLinearConv"] == convolutions + 3  # including the pools
    assert op_counts["Conv"] + op_counts["FusedConv"] == 1  # the head
    assert op_counts["QuantizeLinear"] == 0
    assert op_counts["DequantizeLinear"] <= 1
    assert op_counts["BatchNormalization"] == 0


def count_optimized_operators(int8_model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> Counter[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(int8_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("number", [1, 7])
def test_logits_identical_across_batch_sizes(number: int) -> None:
    int8_model, images = int8.build_int8_graph(trained(), blotches(32)), blotches(64, 3)
    small_batches = np.concatenate([run_onnx(int8_model, images[at : at + number])[0] for at in range(0, 64, number)])
    np.testing.assert_allclose(small_batches, run_onnx(int8_model, images)[0], atol=1e-6)


def test_ensemble_averages_probabilities() -> None:
    member_a, member_b = trained(0), trained(1)
    calibration, images = blotches(64), blotches(32, 5)
    logits = [
        run_onnx(int8.build_int8_graph(model, calibration), images)[0].astype(np.float64)
        for model in (member_a, member_b)
    ]
    mean = np.mean([1 / (1 + np.exp(-logit)) for logit in logits], axis=0)
    int8_model = int8.build_int8_graph(Ensemble([member_a, member_b]).eval(), calibration)
    onnx.checker.check_model(int8_model, full_check=True)
    logit, cells = run_onnx(int8_model, images)
    np.testing.assert_allclose(1 / (1 + np.exp(-logit.astype(np.float64))), mean, atol=1e-6)
    maps = [run_onnx(int8.build_int8_graph(model, calibration), images)[1] for model in (member_a, member_b)]
    np.testing.assert_allclose(cells, np.mean(maps, axis=0), atol=1e-5)


def test_ensemble_of_extreme_logits_is_finite() -> None:
    member_a, member_b = trained(0), trained(1)
    for model, bias in ((member_a, 80.0), (member_b, 90.0)):
        nn.init.constant_(model.classifier.bias, bias)
    logit, _ = run_onnx(int8.build_int8_graph(Ensemble([member_a, member_b]).eval(), blotches(16)), blotches(4, 1))
    assert np.isfinite(logit).all()
    assert (logit > 60).all()


def test_uniform_image_has_uniform_stem_output() -> None:
    """The stem's kernels keep their sums, and the border equals that of the network."""
    model = trained()
    int8_model = int8.build_int8_graph(model, blotches(64))
    images = np.stack([np.full((1, S, S), level, np.uint8) for level in (0, 40, 128, 200)])
    with torch.no_grad():
        features = model.features
        stem = features.norm0(features.conv0((torch.from_numpy(images).float() - model.mean) * model.scale)).relu()
    name = next(node.output[0] for node in int8_model.graph.node if node.op_type == "QuantizeLinear")
    grid = build_grid(
        collect_statistics(model, blotches(64))["stem"], int8.affine_slices(_norms_of_the_stem(model), 0, 8)
    )
    int8_model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(int8_model.SerializeToString(), providers=["CPUExecutionProvider"])
    stem_bytes = session.run([name], {"image": images})[0].astype(np.float64)
    step, origin = grid.step[:, None, None], grid.origin[:, None, None]
    expected_bytes = np.clip((stem.numpy() - origin) / step, 0, 255)
    assert np.abs(stem_bytes - expected_bytes).max() <= 12  # of 255, at the border
    assert np.abs(stem_bytes - expected_bytes)[:, :, 4:-4, 4:-4].max() <= 2.5


def _norms_of_the_stem(model: DenseNet) -> list[nn.Module]:
    return [layer.norm1 for layer in model.features.denseblock1.children()] + [model.features.transition1.norm]


@pytest.mark.parametrize("slope", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("intercept", [-300.0, -3.0, 0.0, 3.0, 300.0])
def test_rectified_bytes_equal_norm_and_relu(slope: float, intercept: float) -> None:
    """The bytes mean relu(slope * x + intercept), to half a step, for a cut below, in and above the range."""
    grid = Grid(np.array([0.1]), np.array([-5.0]))
    graph = GraphBuilder("")
    rectified_grid = graph.rectify("x", np.array([slope]), np.array([intercept]), grid)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.tensors}
    levels = np.arange(256)
    through = levels.astype(np.float64)
    for node in graph.nodes:
        through = {"Max": np.maximum, "Min": np.minimum}[node.op_type](through, constants[node.input[1]].item())
    rectified = rectified_grid.scale * (through - rectified_grid.zero) + rectified_grid.constant
    exact = np.maximum(slope * (grid.origin + grid.step * levels) + intercept, 0)
    assert np.abs(rectified - exact).max() <= abs(slope) * 0.1 / 2 + 1e-9
    weight, bias = rectified_grid.fold(np.array([[0.5]]))
    np.testing.assert_allclose(weight[0] * through + bias, 0.5 * rectified)


def test_grid_covers_observed_values_above_the_cut() -> None:
    statistics = ChannelStatistics(np.array([-4.0, -4.0, -4.0, 2.0]), np.array([4.0, 4.0, 4.0, 2.0]), np.zeros(4))
    member_a = (np.array([1.0, 1.0, -1.0, 1.0]), np.array([1.0, 9.0, 2.0, 0.0]))  # cuts at -1, -9, 2 (above), 0
    member_b = (np.array([1.0, 1.0, -1.0, 1.0]), np.array([-1.0, 9.0, 3.0, 0.0]))  # at 1, -9, 3, 0
    grid = build_grid(statistics, [member_a, member_b])
    np.testing.assert_allclose(grid.origin, [-1, -4, -4, 2])
    np.testing.assert_allclose(grid.origin[:3] + 255 * grid.step[:3], [4, 4, 3])
    assert 0 < grid.step[3] < 1e-3  # a constant channel


def test_int8_graph_is_deterministic() -> None:
    first, second = (int8.build_int8_graph(trained(), blotches(16)).SerializeToString() for _ in range(2))
    assert first == second


needs_openvino = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("openvino") is None, reason="the openvino extra is not installed"
)


@needs_openvino
def test_openvino_agrees_with_integer_operators() -> None:
    from openvino import Core

    int8_model, images = int8.build_int8_graph(trained(), blotches(64)), blotches(16, 9)
    compiled = Core().compile_model(Core().read_model(int8_model.SerializeToString()), "CPU")
    logit = compiled.create_infer_request().infer([images])[0]
    np.testing.assert_allclose(logit, run_onnx(int8_model, images)[0], atol=0.1)
    kinds = Counter(
        node.get_rt_info()["layerType"].astype(str) + " " + node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
    )
    assert kinds["Convolution u8"] + kinds["Convolution i8"] >= 10, kinds


_RUN_ON_AVX2 = """
import sys
import numpy as np
import openvino
core = openvino.Core()
compiled = core.compile_model(core.read_model(sys.argv[1]), "CPU")
print(*np.unique(compiled.create_infer_request().infer([np.full((1, 64, 8, 8), 255, np.uint8)])[0]))
"""


@needs_openvino
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the kernels are those of x86")
@pytest.mark.parametrize(("bits", "fits"), BITS)
def test_avx2_kernels_overflow_with_8_bits(bits: int, fits: bool, tmp_path: Path) -> None:
    """OpenVINO limited to AVX2 computes the mean of 64 white channels: white, if the sums of products fit."""
    graph = GraphBuilder("", largest_weight(bits))
    y = graph.convolve("x", np.full((64, 64, 1, 1), 1 / 64), np.zeros(64), np.zeros(64), None)
    y = graph.convolve(y, np.full((64, 64, 1, 1), 1 / 64), np.zeros(64), np.zeros(64), None)
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, [1, 64, 8, 8]) for name in ("x", y)]
    proto = onnx.helper.make_graph(graph.nodes, "mean", ends[:1], ends[1:], graph.tensors)
    onnx.save(
        onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", int8.OPSET)], ir_version=10),
        tmp_path / "mean.onnx",
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", _RUN_ON_AVX2, str(tmp_path / "mean.onnx")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    levels = [int(level) for level in result.stdout.split()]
    assert (levels == [255]) == fits, levels
