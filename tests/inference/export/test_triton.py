"""Test the Triton model repository against the server's rules, restated from its source and documentation."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from helpers.models import S, card_of, tiny

from mura_dist.core import files as atomic
from mura_dist.core.errors import UserError
from mura_dist.inference.export import triton
from mura_dist.inference.export.onnx import BATCH_SIZES, build_onnx
from mura_dist.inference.onnx_model import OnnxModel
from mura_dist.models.card import Card
from mura_dist.models.ensemble import Ensemble

SCHEMA_REASON = "needs tritonclient, of the dev extra: it carries the published schema"


@pytest.fixture(scope="module")
def data(model: Path) -> bytes:
    return model.read_bytes()


@pytest.fixture(scope="module")
def other_model() -> bytes:
    """Return a model with other weights and another threshold."""
    return build_onnx(tiny(seed=1), card_of().model_copy(update={"thresholds": {"XR_HAND": 0.75}}))


@pytest.fixture
def repository(data: bytes, tmp_path: Path) -> Path:
    triton.write(tmp_path / "models", data)
    return tmp_path / "models"


def relative_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def parse_config(text: str) -> Any:
    """Parse a configuration by the published ModelConfig, where an unknown field is an error."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason=SCHEMA_REASON)
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def model_shape(tensor: Any, max_batch_size: int) -> list[int]:
    """Check the server's rules for one tensor, and return the model's shape of it without the batch."""
    assert tensor.dims, "no empty dims"
    assert all(dim == -1 or dim >= 1 for dim in tensor.dims)
    if not tensor.HasField("reshape"):
        return list(tensor.dims)
    shape = list(tensor.reshape.shape)
    assert shape or (max_batch_size > 0 and list(tensor.dims) == [1]), (
        "an empty reshape needs one value and a batch dimension"
    )
    return shape


def check_repository(folder: Path) -> Any:
    """Check the rules of the server and its ONNX Runtime backend for a model's folder, and return its configuration."""
    config = parse_config((folder / "config.pbtxt").read_text())
    assert config.name in ("", folder.name)
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    versions = [int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    versions_served = list(config.version_policy.specific.versions) or [max(versions)]
    assert set(versions_served) <= set(versions)
    assert config.max_batch_size > 0
    for size in config.dynamic_batching.preferred_batch_size:
        assert 0 < size <= config.max_batch_size
    for version in versions_served:
        session = onnxruntime.InferenceSession(folder / str(version) / (config.default_model_filename or "model.onnx"))
        for config_tensors, session_tensors in (
            (config.input, session.get_inputs()),
            (config.output, session.get_outputs()),
        ):
            by_name = {tensor.name: tensor for tensor in session_tensors}
            assert {tensor.name for tensor in config_tensors} == set(by_name)
            for tensor in config_tensors:
                kind = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32"}[by_name[tensor.name].type]
                assert (
                    tensor.data_type
                    == tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_name[kind].number
                )
                full = [-1 if isinstance(dim, str) else dim for dim in by_name[tensor.name].shape]
                assert full == [-1, *model_shape(tensor, config.max_batch_size)], "compared exactly, batch first"
    for warmup in config.model_warmup:
        assert 0 < warmup.batch_size <= config.max_batch_size
        assert warmup.inputs.keys() == {tensor.name for tensor in config.input}
        for tensor in config.input:
            warmup_input = warmup.inputs[tensor.name]
            assert (warmup_input.data_type, list(warmup_input.dims)) == (tensor.data_type, list(tensor.dims))
            assert warmup_input.WhichOneof("input_data_type") in ("zero_data", "random_data"), "no file is needed"
    return config


@pytest.mark.parametrize("num_members", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_repository_follows_the_servers_rules(num_members: int, data: bytes, tmp_path: Path) -> None:
    if num_members == 2:
        data = build_onnx(Ensemble([tiny(0), tiny(1)]).eval(), card_of())
    triton.write(tmp_path, data)
    assert relative_files(tmp_path) == ["mura_dist/1/model.onnx", "mura_dist/config.pbtxt"]
    assert (tmp_path / "mura_dist" / "1" / "model.onnx").read_bytes() == data
    config = check_repository(tmp_path / "mura_dist")
    assert config.HasField("dynamic_batching")
    assert config.max_batch_size == max(BATCH_SIZES)  # larger batches were not compared with torch
    [accelerator] = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name: "mura_dist"', 'name: "other"'),
        ("dims: [ 1 ] reshape { shape: [ ] }", "dims: [ 1 ]"),  # the model's output is (N,), not (N, 1)
        ("dims: [ 1 ] reshape { shape: [ ] }", "dims: [ ]"),
        ("TYPE_UINT8", "TYPE_FP32"),
        ("max_batch_size: 64", "max_batch_size: 0"),
        ("versions: [ 1 ]", "versions: [ 2 ]"),
        ("dynamic_batching {", "dynamic_batching { preferred_batch_size: [ 65 ]"),
        (f"dims: [ 1, {S}, {S} ] zero_data", f"dims: [ {S}, {S} ] zero_data"),
    ],
)
def test_invalid_configuration_breaks_a_rule(old: str, new: str, repository: Path) -> None:
    path = repository / "mura_dist" / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        check_repository(path.parent)


def test_unknown_configuration_field_is_an_error(repository: Path) -> None:
    text = (repository / "mura_dist" / "config.pbtxt").read_text()
    parse_config(text)
    with pytest.raises(Exception, match=r"no field named .max_batchsize"):
        parse_config(text.replace("max_batch_size", "max_batchsize"))


def test_configuration_holds_card_fields(repository: Path, data: bytes) -> None:
    model = OnnxModel.load(repository / "mura_dist" / "1" / "model.onnx")
    card_fields = json.loads(parse_config(triton.config(data)).parameters["mura_dist"].string_value)
    assert card_fields.pop("model_sha256") == model.sha256
    assert "metrics" not in card_fields  # many kilobytes in every configuration response
    for key, value in card_fields.items():
        assert value == json.loads(model.card.to_json())[key]


@pytest.mark.slow
def test_configuration_escapes_quotes_and_backslashes(data: bytes) -> None:
    study_type = 'a "b" \\ é {0}\n'
    card = card_of().model_copy(update={"study_types": [study_type]})
    card_fields = json.loads(parse_config(triton.config(build_onnx(tiny(), card))).parameters["mura_dist"].string_value)
    assert card_fields["study_types"] == [study_type]


# ---- existing files


def test_write_replaces_the_exported_model_only(repository: Path, data: bytes, other_model: bytes) -> None:
    (repository / "theirs" / "1").mkdir(parents=True)
    (repository / "theirs" / "config.pbtxt").write_text("theirs")
    (repository / "mura_dist" / "2").mkdir()  # a version that was not exported
    triton.write(repository, other_model)
    assert (repository / "theirs" / "config.pbtxt").read_text() == "theirs"
    assert relative_files(repository / "mura_dist") == ["1/model.onnx", "config.pbtxt"]
    assert (repository / "mura_dist" / "1" / "model.onnx").read_bytes() == other_model != data
    assert "version_policy { specific { versions: [ 1 ] } }" in (repository / "mura_dist" / "config.pbtxt").read_text()


@pytest.mark.parametrize("failing", ["write_bytes", "write_text"])
def test_killed_write_never_mixes_model_and_configuration(
    failing: str, repository: Path, data: bytes, other_model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each write that may be the last, the model has no configuration but its own."""

    def raise_interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, failing, raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        triton.write(repository, other_model)
    monkeypatch.undo()
    assert relative_files(repository) == ["mura_dist/1/model.onnx"]
    assert (repository / "mura_dist" / "1" / "model.onnx").read_bytes() == (
        data if failing == "write_bytes" else other_model
    )
    triton.write(repository, other_model)
    assert (repository / "mura_dist" / "config.pbtxt").read_text() == triton.config(other_model)


def test_foreign_configuration_is_not_overwritten(tmp_path: Path, data: bytes) -> None:
    config = tmp_path / "mura_dist" / "config.pbtxt"
    config.parent.mkdir()
    config.write_text('name: "mura_dist"\n')
    with pytest.raises(
        UserError, match=r"^--triton .*config\.pbtxt was not written by mura-dist, .*\. Give another folder, or move"
    ):
        triton.write(tmp_path, data)
    assert relative_files(tmp_path) == ["mura_dist/config.pbtxt"]


def test_model_without_metadata_is_refused(data: bytes) -> None:
    import onnx

    model = onnx.load_from_string(data)
    del model.metadata_props[:]
    with pytest.raises(UserError, match=r"^the exported model was not exported by mura-dist"):
        triton.config(model.SerializeToString())
    assert isinstance(OnnxModel.from_bytes(data, "ours").card, Card)
