"""Test foreign ONNX files: a file that is not an exported model is refused, and a batch that takes too long fails."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.models import S, card_of, noise
from onnx import TensorProto, helper
from PIL import Image

from mura_dist.cli.main import FAILED, INVALID, main
from mura_dist.core.errors import RunError, UserError
from mura_dist.inference import batch_limit, onnx_metadata
from mura_dist.inference.engine import SessionConfig
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.models.card import KEY


def save_model(graph: onnx.GraphProto, path: Path) -> Path:
    """Write a graph as an exported model with a card."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    helper.set_model_props(model, {KEY: card_of().to_json()})
    path.write_bytes(model.SerializeToString())
    return path


def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


IMAGE = value("image", TensorProto.UINT8, "N", 1, S, S)
LOGIT, MAP = value("logit", TensorProto.FLOAT, "N"), value("activation_map", TensorProto.FLOAT, "N", "h", "w")
MEAN = [
    helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
    helper.make_node("ReduceMean", ["pixels", "channel"], ["activation_map"], keepdims=0),
    helper.make_node("ReduceMean", ["pixels", "all"], ["logit"], keepdims=0),
]
AXES = [
    helper.make_tensor("channel", TensorProto.INT64, [1], [1]),
    helper.make_tensor("all", TensorProto.INT64, [3], [1, 2, 3]),
]


def mean_graph(**changes: object) -> onnx.GraphProto:
    """Return a graph whose outputs are mean gray levels, with `changes` to its arguments."""
    parts = {"nodes": MEAN, "name": "mean", "inputs": [IMAGE], "outputs": [LOGIT, MAP], "initializer": AXES}
    return helper.make_graph(**(parts | changes))


def endless_graph() -> onnx.GraphProto:
    """Return a graph that computes its logit in 2**62 iterations."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes_on"]), helper.make_node("Add", ["level", "one"], ["higher"])],
        "body",
        [value("round", TensorProto.INT64), value("going", TensorProto.BOOL), value("level", TensorProto.FLOAT, "N")],
        [value("goes_on", TensorProto.BOOL), value("higher", TensorProto.FLOAT, "N")],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    nodes = [*MEAN[:2], helper.make_node("ReduceMean", ["pixels", "all"], ["grey"], keepdims=0)]
    nodes.append(helper.make_node("Loop", ["trips", "", "grey"], ["logit"], body=body))
    return mean_graph(nodes=nodes, initializer=[*AXES, helper.make_tensor("trips", TensorProto.INT64, [], [2**62])])


def test_graph_with_valid_signature_loads(tmp_path: Path) -> None:
    """This shows that the refusals below are due to their changes."""
    logit, cells = OnnxModel.load(save_model(mean_graph(), tmp_path / "m.onnx")).outputs(images := noise(3))
    np.testing.assert_allclose(logit, images.mean(axis=(1, 2, 3)), rtol=1e-5)
    assert cells.shape == (3, S, S)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": [value("picture", TensorProto.UINT8, "N", 1, S, S)]},
        {"inputs": [value("image", TensorProto.UINT8, "N", 1, 2 * S, 2 * S)]},
        {"inputs": [value("image", TensorProto.UINT8, "N", 1, 2**40, 2**40)]},
        {"inputs": [value("image", TensorProto.UINT8, "N", 3, S, S)]},
        {"inputs": [IMAGE, value("more", TensorProto.FLOAT, 2**40)]},
        {"inputs": []},
        {"outputs": [LOGIT]},
        {"outputs": [value("logit", TensorProto.FLOAT, "N", 1), MAP]},
        {"nodes": [helper.make_node("Unknown", ["image"], ["logit"], domain="stranger")]},
        {"nodes": []},
    ],
)
def test_graph_with_invalid_signature_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a mura-dist model|not an ONNX model") as refusal:
        OnnxModel.load(save_model(mean_graph(**change), tmp_path / "m.onnx"))
    assert "\n" not in str(refusal.value)


def external_tensor(location: str, key: str = "location") -> onnx.TensorProto:
    tensor = helper.make_tensor("channel", TensorProto.INT64, [1], [1])
    tensor.ClearField("int64_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = key, location
    return tensor


def graph_with_subgraph(tensor: onnx.TensorProto) -> onnx.GraphProto:
    constant = helper.make_node("Constant", [], ["inner"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [value("inner", TensorProto.INT64, 1)])
    condition = helper.make_node("If", ["yes"], ["ignored"], then_branch=inner, else_branch=inner)
    return mean_graph(
        nodes=[*MEAN, condition], initializer=[*AXES, helper.make_tensor("yes", TensorProto.BOOL, [], [True])]
    )


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "weights.bin", ""])
@pytest.mark.parametrize(
    "build",
    [
        lambda tensor: mean_graph(initializer=[tensor, AXES[1]]),
        lambda tensor: mean_graph(
            nodes=[helper.make_node("Constant", [], ["channel"], value=tensor), *MEAN], initializer=AXES[1:]
        ),
        graph_with_subgraph,
    ],
)
def test_external_weights_are_refused(
    build: Callable[[onnx.TensorProto], onnx.GraphProto], location: str, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "weights.bin").write_bytes(bytes(8))
    path = save_model(build(external_tensor(location)), tmp_path / "m.onnx")
    assert onnx_metadata.external_file(path.read_bytes()) == location
    with pytest.raises(UserError, match="has its weights in another file"):
        OnnxModel.load(path)


def test_exported_model_has_no_external_weights(model: Path) -> None:
    assert onnx_metadata.external_file(model.read_bytes()) is None


def test_batch_above_the_time_limit_raises_run_error(tmp_path: Path) -> None:
    model = OnnxModel.load(
        save_model(endless_graph(), tmp_path / "m.onnx"), session_config=SessionConfig(batch_size=1), limit_s=0.3
    )
    start_s = time.monotonic()
    for _ in range(2):  # a second call fails in the same way
        with pytest.raises(
            RunError, match=r"m\.onnx: a batch took more than 0\.3 s\. Give a smaller --batch-size or a longer"
        ):
            model.logits(noise(1))
    assert time.monotonic() - start_s < 8


@pytest.mark.slow
def test_predict_with_endless_model_prints_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(1)[0, 0]).save(tmp_path / "in/a.png")
    path = save_model(endless_graph(), tmp_path / "m.onnx")
    arguments = [
        "predict",
        str(path),
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--batch-limit",
        "1",
        "--quiet",
    ]
    assert main(arguments) == FAILED
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main([*arguments[:-2], "0"]) == INVALID


STUCK = """
import sys, time
from mura_dist.inference import batch_limit
batch_limit.GRACE_S = 0.2
with batch_limit.BatchLimit(0.2, "m.onnx").watched(lambda: None):
    time.sleep(60)
"""


def test_process_exits_when_the_engine_does_not_return() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [f"mura-dist: {batch_limit.BatchLimit(0.2, 'm.onnx').message}"],
    )
