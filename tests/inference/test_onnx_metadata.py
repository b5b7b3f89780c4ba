"""Test onnx_metadata, which reads a model's metadata without the package onnx."""

import random
from pathlib import Path

import onnx
import pytest
from helpers.models import card_of

from mura_dist.inference import onnx_metadata
from mura_dist.inference.engine_onnxruntime import import_onnxruntime
from mura_dist.models.card import KEY, Card


def test_card_equals_onnx_runtimes_metadata(model: Path) -> None:
    data = model.read_bytes()
    text = onnx_metadata.read(data, KEY)
    assert Card.parse(text, "the model").size == card_of().size
    session = import_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])
    assert text == session.get_modelmeta().custom_metadata_map[KEY]


@pytest.mark.parametrize("value", ["", "é", "x" * 300, "y" * 70_000], ids=["empty", "not ASCII", "long", "longer"])
def test_value_of_a_key_among_several(value: str) -> None:
    proto = onnx.ModelProto(ir_version=9, producer_name="z", domain="d", model_version=1 << 40)
    proto.graph.name = "g" * 200
    for key, text in (("other", "no"), ("wanted", value), ("wanted too", "no")):
        proto.metadata_props.add(key=key, value=text)
    data = proto.SerializeToString()
    assert onnx_metadata.read(data, "wanted") == value
    assert onnx_metadata.read(data, "want") is None


def test_fields_of_all_wire_types_are_skipped() -> None:
    number, fixed64, fixed32 = b"\x08\x96\x01", b"\x11" + b"\xff" * 8, b"\x1d" + b"\xff" * 4
    proto = onnx.ModelProto()
    proto.metadata_props.add(key="k", value="v")
    data = number + fixed64 + fixed32 + proto.SerializeToString() + number
    assert onnx_metadata.read(data, "k") == "v"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"not a model", "no protobuf field begins at byte"),
        (b"\x00", "no protobuf field"),
        (b"\x72\x7fshort", "truncated"),
        (b"\x80", "truncated"),
        (b"\x80" * 11, "no protobuf number ends"),
    ],
)
def test_invalid_protobuf_raises_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onnx_metadata.read(data, KEY)


def test_truncated_or_random_data_never_crashes(model: Path) -> None:
    data, draw = model.read_bytes(), random.Random(1)
    cuts = [data[: draw.randrange(len(data))] for _ in range(200)]
    noise = [draw.randbytes(draw.randrange(1, 60)) for _ in range(2000)]
    for chunk in cuts + noise:
        try:
            assert isinstance(onnx_metadata.read(chunk, KEY), str | None)
        except ValueError:
            continue
