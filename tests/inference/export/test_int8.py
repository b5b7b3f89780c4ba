"""quantise: in integers it is still the same network, whatever its norms do; nothing in it computes in floats that need not."""

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
from mura_dist.inference.export.int8_statistics import ChannelStatistics, collect_statistics
from mura_dist.models.densenet import DenseNet
from mura_dist.models.ensemble import Ensemble


def blotches(number: int, seed: int = 0) -> np.ndarray:
    """Images with something in them at every scale: uint8 (N, 1, S, S)."""
    random = torch.Generator().manual_seed(seed)
    coarse = [torch.rand(number, 1, S // step, S // step, generator=random) for step in (1, 4, 16)]
    image = sum(nn.functional.interpolate(module, S, mode="bilinear") for module in coarse)
    return (image / 3 * 255).round().to(torch.uint8).numpy()  # type: ignore[union-attr]


def trained(seed: int = 0) -> DenseNet:
    """Norms as training leaves them: slopes of both signs, some of none, statistics of what was seen."""
    model = tiny(seed).train()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(module.num_features, generator=random))
                module.weight[:: 5 + seed % 3] = 0
                module.bias.copy_(torch.randn(module.num_features, generator=random) * 0.5)
        for step in range(4):
            model(torch.from_numpy(blotches(16, 100 + step)))
        model.classifier.weight *= 3
    return model.eval()


def run(model: onnx.ModelProto, images: np.ndarray, *, optimized: bool = True) -> tuple[np.ndarray, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:  # every node as it stands: integers only where bytes are stored
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    logit, activation_map = session.run(["logit", "activation_map"], {"image": images})
    return logit, activation_map


def float_outputs(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logit, activation_map = model(torch.from_numpy(images))
    return logit.numpy(), activation_map.numpy()


@pytest.mark.parametrize("seed", range(3))
def test_it_is_still_the_same_network(seed: int) -> None:
    model, images = trained(seed), blotches(64, seed)
    int8_model = int8.build_int8_graph(model, blotches(128, seed + 50))
    onnx.checker.check_model(int8_model, full_check=True)
    logit, cells = run(int8_model, images)
    wanted_logit, wanted_cells = float_outputs(model, images)
    assert logit.dtype == cells.dtype == np.float32
    assert (logit.shape, cells.shape) == (wanted_logit.shape, wanted_cells.shape)
    assert np.abs(logit - wanted_logit).mean() < 0.08 * wanted_logit.std() + 0.01
    assert np.corrcoef(logit, wanted_logit)[0, 1] > 0.97
    assert np.corrcoef(cells.ravel(), wanted_cells.ravel())[0, 1] > 0.97
    np.testing.assert_allclose(cells.mean(axis=(1, 2)), logit, atol=1e-5)


def with_faint_slopes(seed: int, slope: float) -> DenseNet:
    """The same, but that of some channels hardly anything is read: next to their norm's bias, or nothing (0)."""
    model = trained(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data[1 :: 7 + seed % 3] = slope
    return model


@pytest.mark.parametrize(("slope", "seed"), [(1e-3, 0), (1e-4, 1), (1e-5, 2), (1e-6, 0), (1e-7, 1), (1e-8, 2)])
def test_a_slope_of_next_to_nothing_is_as_good_as_none(seed: int, slope: float) -> None:
    """32 bits know little of how such a channel varies; no rounding, mean or bias may hang on it."""
    images, errors = blotches(64, seed), []
    for each in (slope, 0.0):
        model = with_faint_slopes(seed, each)
        int8_model = int8.build_int8_graph(model, blotches(128, seed + 50))
        errors.append(np.abs(run(int8_model, images)[0] - float_outputs(model, images)[0]).mean())
    assert errors[0] <= 1.5 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("seed", range(3))
def test_no_sum_of_products_overflows(seed: int) -> None:
    """What the processor's integer instructions give is what the file says."""
    int8_model = int8.build_int8_graph(trained(seed), blotches(64))
    images = np.concatenate([blotches(16, 9), np.full((1, 1, S, S), 255, np.uint8), np.zeros((1, 1, S, S), np.uint8)])
    np.testing.assert_allclose(run(int8_model, images)[0], run(int8_model, images, optimized=False)[0], atol=0.05)


def test_every_product_is_of_integers() -> None:
    options = onnxruntime.SessionOptions()
    int8_model = int8.build_int8_graph(trained(), blotches(32))
    op_counts = optimized_kinds(int8_model, options)
    model = trained()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert op_counts["QLinearConv"] == convolutions + 3  # the pools too
    assert op_counts["Conv"] + op_counts["FusedConv"] == 1  # the head
    assert op_counts["QuantizeLinear"] == 0
    assert op_counts["DequantizeLinear"] <= 1
    assert op_counts["BatchNormalization"] == 0


def optimized_kinds(int8_model: onnx.ModelProto, options: onnxruntime.SessionOptions) -> Counter[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(int8_model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("number", [1, 7])
def test_a_logit_does_not_depend_on_its_batch(number: int) -> None:
    int8_model, images = int8.build_int8_graph(trained(), blotches(32)), blotches(64, 3)
    alone = np.concatenate([run(int8_model, images[at : at + number])[0] for at in range(0, 64, number)])
    np.testing.assert_allclose(alone, run(int8_model, images)[0], atol=1e-6)


def test_an_ensemble_averages_probabilities() -> None:
    member_a, member_b = trained(0), trained(1)
    calibration, images = blotches(64), blotches(32, 5)
    logits = [
        run(int8.build_int8_graph(model, calibration), images)[0].astype(np.float64) for model in (member_a, member_b)
    ]
    mean = np.mean([1 / (1 + np.exp(-logit)) for logit in logits], axis=0)
    image = int8.build_int8_graph(Ensemble([member_a, member_b]).eval(), calibration)
    onnx.checker.check_model(image, full_check=True)
    op_counts, cells = run(image, images)
    np.testing.assert_allclose(1 / (1 + np.exp(-op_counts.astype(np.float64))), mean, atol=1e-6)
    maps = [run(int8.build_int8_graph(model, calibration), images)[1] for model in (member_a, member_b)]
    np.testing.assert_allclose(cells, np.mean(maps, axis=0), atol=1e-5)


def test_an_ensembles_logit_keeps_both_ends() -> None:
    member_a, member_b = trained(0), trained(1)
    for model, bias in ((member_a, 80.0), (member_b, 90.0)):
        nn.init.constant_(model.classifier.bias, bias)
    op_counts, _ = run(int8.build_int8_graph(Ensemble([member_a, member_b]).eval(), blotches(16)), blotches(4, 1))
    assert np.isfinite(op_counts).all()
    assert (op_counts > 60).all()


def test_an_even_picture_stays_even() -> None:
    """The stem's kernels keep their sums: no grey level is an edge, and the border is the network's own."""
    model = trained()
    int8_model = int8.build_int8_graph(model, blotches(64))
    images = np.stack([np.full((1, S, S), level, np.uint8) for level in (0, 40, 128, 200)])
    with torch.no_grad():
        parts = model.features
        stem = parts.norm0(parts.conv0((torch.from_numpy(images).float() - model.mean) * model.scale)).relu()
    name = next(node.output[0] for node in int8_model.graph.node if node.op_type == "QuantizeLinear")
    grid = build_grid(
        collect_statistics(model, blotches(64))["stem"], int8.affine_slices(_readers_of_the_stem(model), 0, 8)
    )
    int8_model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    session = onnxruntime.InferenceSession(int8_model.SerializeToString(), providers=["CPUExecutionProvider"])
    op_counts = session.run([name], {"image": images})[0].astype(np.float64)
    step, origin = grid.step[:, None, None], grid.origin[:, None, None]
    bytes_wanted = np.clip((stem.numpy() - origin) / step, 0, 255)
    assert np.abs(op_counts - bytes_wanted).max() <= 12  # of 255, at the border
    assert np.abs(op_counts - bytes_wanted)[:, :, 4:-4, 4:-4].max() <= 2.5


def _readers_of_the_stem(model: DenseNet) -> list[nn.Module]:
    return [layer.norm1 for layer in model.features.denseblock1.children()] + [model.features.transition1.norm]


@pytest.mark.parametrize("slope", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("intercept", [-300.0, -3.0, 0.0, 3.0, 300.0])
def test_a_cut_is_the_norm_and_the_relu(slope: float, intercept: float) -> None:
    """Cut in range, below all of it, above all of it: what the bytes mean is relu(slope * x + intercept), to half a step."""
    grid = Grid(np.array([0.1]), np.array([-5.0]))
    graph = GraphBuilder("")
    cut = graph.rectify("x", np.array([slope]), np.array([intercept]), grid)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.tensors}
    stored = np.arange(256)
    through = stored.astype(np.float64)
    for node in graph.nodes:
        through = {"Max": np.maximum, "Min": np.minimum}[node.op_type](through, constants[node.input[1]].item())
    op_counts = cut.scale * (through - cut.zero) + cut.constant
    exact = np.maximum(slope * (grid.origin + grid.step * stored) + intercept, 0)
    assert np.abs(op_counts - exact).max() <= abs(slope) * 0.1 / 2 + 1e-9
    weight, bias = cut.fold(np.array([[0.5]]))
    np.testing.assert_allclose(weight[0] * through + bias, 0.5 * op_counts)


def test_a_grid_spans_what_is_seen_and_not_cut_away() -> None:
    statistics = ChannelStatistics(np.array([-4.0, -4.0, -4.0, 2.0]), np.array([4.0, 4.0, 4.0, 2.0]), np.zeros(4))
    member_a = (np.array([1.0, 1.0, -1.0, 1.0]), np.array([1.0, 9.0, 2.0, 0.0]))  # cuts at -1, -9, 2 (above), 0
    member_b = (np.array([1.0, 1.0, -1.0, 1.0]), np.array([-1.0, 9.0, 3.0, 0.0]))  # at 1, -9, 3, 0
    grid = build_grid(statistics, [member_a, member_b])
    np.testing.assert_allclose(grid.origin, [-1, -4, -4, 2])
    np.testing.assert_allclose(grid.origin[:3] + 255 * grid.step[:3], [4, 4, 3])
    assert 0 < grid.step[3] < 1e-3  # a channel that never moved


def test_the_file_does_not_depend_on_the_machine_or_the_run() -> None:
    first, again = (int8.build_int8_graph(trained(), blotches(16)).SerializeToString() for _ in range(2))
    assert first == again


openvino = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("openvino") is None, reason="the openvino extra is not installed"
)


@openvino
def test_openvino_computes_the_same_integers() -> None:
    from openvino import Core

    int8_model, images = int8.build_int8_graph(trained(), blotches(64)), blotches(16, 9)
    compiled = Core().compile_model(Core().read_model(int8_model.SerializeToString()), "CPU")
    op_counts = compiled.create_infer_request().infer([images])[0]
    np.testing.assert_allclose(op_counts, run(int8_model, images)[0], atol=0.1)
    kinds = Counter(
        node.get_rt_info()["layerType"].astype(str) + " " + node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ordered_ops()
    )
    assert kinds["Convolution u8"] + kinds["Convolution i8"] >= 10, kinds
