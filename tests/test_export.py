"""export: the graph, the gate, the card, the Triton folder."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from mura_dist import model as network
from mura_dist import mura
from mura_dist.card import FORMAT, KEY, Card, TrainedOn
from mura_dist.export import OPSET, export, graph, parity, probe_images, triton
from mura_dist.points import PAPER, Points
from mura_dist.refusal import Failure, Refusal
from mura_dist.runtime import Model

S = 64


def card_of(size: int = S, kind: str = "radiographs") -> Card:
    return Card(
        size=size,
        study_types=["XR_HAND", "XR_WRIST"],
        thresholds={"XR_HAND": 0.5, "XR_WRIST": 0.25},
        metrics={"overall": {"kappa": None, "reasons": {"kappa": "é"}}},
        trained_on=TrainedOn(kind=kind, manifest_sha256="0" * 64, num_radiographs=9, splits={"train": 8, "tune": 1}),
        selected_on="tune",
        recipe={"epochs": 3, "seed": 0},
        checkpoint="step-00000012",
    )


def tiny(seed: int = 0) -> network.DenseNet:
    """Not as it was born: BatchNorm has seen data, so its statistics matter."""
    model = network.build("tiny", seed=seed)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randint(0, 256, (8, 1, S, S), dtype=torch.uint8))
    return model.eval()


def noise(number: int, size: int = S, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 1, size, size), dtype=np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[network.DenseNet, Path, dict]:
    model, path = tiny(), tmp_path_factory.mktemp("export") / "run" / "model.onnx"
    return model, path, export(model, card_of(), path)


def test_export_says_what_it_measured(exported: tuple[network.DenseNet, Path, dict]) -> None:
    _, path, report = exported
    assert set(report) == {"max_logit_difference", "bytes", "opset", "seconds"}
    assert 0 <= report["max_logit_difference"] <= 1e-4
    assert report["bytes"] == path.stat().st_size
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]  # self-contained: nothing beside it


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 16])
def test_onnx_runtime_agrees_with_torch(exported: tuple[network.DenseNet, Path, dict], batch_size: int) -> None:
    model, path, _ = exported
    images = noise(batch_size, seed=batch_size)
    with torch.inference_mode():
        wanted_logit, wanted_map = (part.numpy() for part in model(torch.from_numpy(images)))
    logit, activation_map = Model.load(path).outputs(images)
    assert logit.shape == (batch_size,)
    assert logit.dtype == activation_map.dtype == np.float32
    np.testing.assert_allclose(logit, wanted_logit, atol=1e-4)
    np.testing.assert_allclose(activation_map, wanted_map, atol=1e-4)
    np.testing.assert_allclose(activation_map.mean(axis=(1, 2)), logit, atol=1e-5)
    assert np.ptp(wanted_map) > 1e-3  # a map that is one value everywhere would agree with anything
    np.testing.assert_array_equal(Model.load(path).logits(images), logit)


def test_densenet169(tmp_path: Path) -> None:
    model = network.build("densenet169").eval()
    report = export(model, card_of(), tmp_path / "model.onnx")
    assert report["max_logit_difference"] <= 1e-4
    assert 45e6 < report["bytes"] < 60e6  # 12.5 million fp32 parameters, once
    images = noise(3)
    with torch.inference_mode():
        np.testing.assert_allclose(
            Model.load(tmp_path / "model.onnx").logits(images), model(torch.from_numpy(images))[0], atol=1e-4
        )


def test_file_is_valid_and_carries_nothing_of_this_machine(exported: tuple[network.DenseNet, Path, dict]) -> None:
    data = exported[1].read_bytes()
    proto = onnx.load_from_string(data)
    onnx.checker.check_model(proto, full_check=True)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [OPSET]
    assert (proto.producer_name, proto.doc_string) == ("mura-dist", mura.TERMS)
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)
    for place in (Path(torch.__file__).parents[1], Path(network.__file__).parent, Path.home()):
        assert str(place).encode() + b"/" not in data
    inputs = [(entry.name, entry.type, entry.shape) for entry in onnxruntime.InferenceSession(data).get_inputs()]
    assert inputs == [("image", "tensor(uint8)", ["batch", 1, S, S])]


def test_card_comes_back(exported: tuple[network.DenseNet, Path, dict]) -> None:
    model = Model.load(exported[1])
    assert model.card == card_of().model_copy(update={"opset": OPSET})
    assert (model.size, model.card.terms, model.card.licence) == (S, mura.TERMS, mura.LICENCE)


def test_graph_is_the_same_twice_and_made_in_silence(
    exported: tuple[network.DenseNet, Path, dict], capfd: pytest.CaptureFixture[str]
) -> None:
    assert graph(tiny(), card_of()) == exported[1].read_bytes()
    assert capfd.readouterr() == ("", "")


def test_gate_refuses_another_model(exported: tuple[network.DenseNet, Path, dict]) -> None:
    model, path, _ = exported
    images, data = probe_images(S), path.read_bytes()
    assert parity(model, data, images) <= 1e-4
    other = tiny()
    with torch.no_grad():
        other.classifier.bias += 2e-3
    with pytest.raises(
        Failure, match=r"^logit of the exported model is .* where torch gives .*limit .* is 0\.0001; nothing"
    ):
        parity(other, data, images)
    assert parity(other, data, images, tolerance=4e-3) == pytest.approx(2e-3, rel=0.01)


def test_gate_sees_a_map_that_only_the_average_hides(exported: tuple[network.DenseNet, Path, dict]) -> None:
    class Transposed(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logit, activation_map = exported[0](image)
            return logit, activation_map.transpose(1, 2)

    with pytest.raises(Failure, match=r"^activation_map of the exported model"):
        parity(Transposed(), exported[1].read_bytes(), probe_images(S))


def test_gate_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old one")
    broken = tiny()
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(Failure, match=r"is nan where torch gives nan.*nothing was written"):
        export(broken, card_of(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the old one"]


def _with_metadata(path: Path, out: Path, properties: dict[str, str]) -> Path:
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, properties)
    onnx.save(proto, out)
    return out


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ({}, r"is not a model exported by mura-dist export \(no mura_dist metadata\); give the model\.onnx"),
        (
            {KEY: json.dumps({"format": FORMAT + 1})},
            rf"has metadata of format {FORMAT + 1}, .* reads up to {FORMAT}; update",
        ),
        ({KEY: "{"}, r"has damaged mura_dist metadata \(.*\); export the model again"),
        ({KEY: "[]"}, r"has damaged mura_dist metadata"),
        ({KEY: json.dumps({"format": 1, "size": 0})}, r"has damaged mura_dist metadata \(size: .*greater"),
    ],
)
def test_files_that_are_not_ours(
    exported: tuple[network.DenseNet, Path, dict], tmp_path: Path, properties: dict[str, str], text: str
) -> None:
    path = _with_metadata(exported[1], tmp_path / "other.onnx", properties)
    with pytest.raises(Refusal, match=rf"^{re.escape(str(path))} {text}"):
        Model.load(path)


def test_newer_keys_are_ignored_and_nan_is_refused() -> None:
    fields = json.loads(card_of().text()) | {"from_the_future": 1}
    assert Card.parse(json.dumps(fields), "model.onnx") == card_of()
    with pytest.raises(ValueError, match="Out of range float"):
        card_of().model_copy(update={"recipe": {"learning_rate": float("nan")}}).text()


def test_cards_of_before_there_was_calibration() -> None:
    fields = json.loads(card_of().text())
    for key in ("calibration", "operating_point"):
        del fields[key]
    for old in (fields, fields | {"calibration": {}, "bands": {}}):
        card = Card.parse(json.dumps(old), "model.onnx")
        assert (card.calibration, card.operating_point) == (Points(), PAPER)
        assert card.calibration.bands == {}


def test_damaged_points_are_refused() -> None:
    fields = json.loads(card_of().text()) | {"calibration": {"by_study_type": {"XR_HAND": {"num_normal": -1}}}}
    with pytest.raises(
        Refusal, match=r"damaged mura_dist metadata \(calibration\.by_study_type\.XR_HAND\.num_normal: "
    ):
        Card.parse(json.dumps(fields), "model.onnx")


def test_triton_folder(exported: tuple[network.DenseNet, Path, dict], tmp_path: Path) -> None:
    path = exported[1]
    triton(tmp_path, path, card_of())
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert files == ["mura_dist/1/model.onnx", "mura_dist/config.pbtxt"]
    assert (tmp_path / files[0]).read_bytes() == path.read_bytes()
    text = (tmp_path / files[1]).read_text()
    declared = {
        name: (kind, dims)
        for name, kind, dims in re.findall(r'name: "(\w+)" data_type: (\w+) dims: \[ ([^]]*) \]', text)
    }
    height, width = Model.load(path).outputs(noise(1))[1].shape[1:]
    assert declared == {
        "image": ("TYPE_UINT8", f"1, {S}, {S}"),
        "logit": ("TYPE_FP32", "1"),
        "activation_map": ("TYPE_FP32", f"{height}, {width}"),
    }
    assert 'platform: "onnxruntime_onnx"' in text
    assert text.count("{") == text.count("}")
