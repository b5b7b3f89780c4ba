"""The metadata of an ONNX file, read from its bytes before a session is created.

    bytes of a ModelProto -> its fields, without parsing the graph -> metadata_props -> value
                          -> all its tensors, without their values -> the external file that one names, if any

The package onnx would parse the whole file, and is not among the base requirements.
"""

from collections.abc import Iterator

_METADATA_PROPS, _EXTERNAL_DATA, _KEY, _VALUE = 14, 13, 1, 2  # field numbers in onnx.proto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def read(data: bytes, key: str) -> str | None:
    """Return the value of `key` in the metadata of the ONNX file `data`, or None if it is missing.

    Raises:
        ValueError: `data` is no protobuf message, or is truncated.
    """
    if not data:
        raise ValueError("it is empty")
    value = None
    for number, content in _fields(memoryview(data)):
        if number == _METADATA_PROPS:
            entry = {field: bytes(text) for field, text in _fields(content)}
            if entry.get(_KEY) == key.encode():
                value = entry.get(_VALUE, b"").decode()  # the last entry wins, as in a protobuf map
    return value


# Fields of each message that can contain a tensor: number in onnx.proto -> kind of message.
_TENSOR_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor", 6: "graph", 11: "graph", 22: "sparse", 23: "sparse"},
    "tensor": {_EXTERNAL_DATA: "entry"},
    "entry": {},
}


def external_file(data: bytes) -> str | None:
    """Return the external file that holds the values of a tensor of the ONNX file `data`, or None.

    A runtime would read any file that is named there. `mura-dist export` writes none. Raises ValueError like `read`.
    """
    pending = [("model", memoryview(data))]
    while pending:
        kind, message = pending.pop()
        if kind == "entry":
            entry = {field: bytes(text) for field, text in _fields(message)}
            return entry.get(_VALUE, b"").decode(errors="replace")
        fields = _TENSOR_FIELDS[kind]
        pending += [(fields[number], content) for number, content in _fields(message) if number in fields]
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of each length-delimited field. Numeric fields are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if not number or wire_type not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no protobuf field begins at byte {at}")
        if wire_type == _VARINT:
            _, at = _varint(message, at)
            continue
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
        if length is None:
            length, at = _varint(message, at)
        if at + length > len(message):
            raise ValueError("it is truncated")
        if wire_type == _BYTES:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the varint that begins at byte `at`, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is truncated")
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError(f"no protobuf number ends at byte {at}")
