"""The metadata of an ONNX file, from its bytes: what a session is to be made for is known before the session is made.

    bytes of protobuf's ModelProto -> its fields one after the other, the graph skipped by its length -> metadata_props -> value
                                   -> all its tensors, their values skipped -> the file one of them names, if any

The package onnx, which would parse all of the file, is not in the base.
"""

from collections.abc import Iterator

_METADATA_PROPS, _EXTERNAL_DATA, _KEY, _VALUE = 14, 13, 1, 2  # numbers of the fields, in onnx.proto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types


def read(data: bytes, key: str) -> str | None:
    """Return the value of `key` in the metadata of the ONNX file `data`, or None where it has none.

    Raises:
        ValueError: where `data` is no protobuf message, or is cut short.
    """
    if not data:
        raise ValueError("it is empty")
    value = None
    for number, content in _fields(memoryview(data)):
        if number == _METADATA_PROPS:
            entry = {field: bytes(text) for field, text in _fields(content)}
            if entry.get(_KEY) == key.encode():
                value = entry.get(_VALUE, b"").decode()  # of several, the last: as protobuf's maps have it
    return value


# Where a tensor can be, by message: the fields that lead on, in onnx.proto, and the message each holds.
_WAYS: dict[str, dict[int, str]] = {
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
    """Return where a tensor of the ONNX file `data` has its values outside of it, or None: ours has all within.

    A runtime would read any file that is named there. Raises ValueError as `read`.
    """
    todo = [("model", memoryview(data))]
    while todo:
        kind, message = todo.pop()
        if kind == "entry":
            entry = {field: bytes(text) for field, text in _fields(message)}
            return entry.get(_VALUE, b"").decode(errors="replace")
        ways = _WAYS[kind]
        todo += [(ways[number], content) for number, content in _fields(message) if number in ways]
    return None


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield (number, content) of each field of bytes; numbers are skipped."""
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
            raise ValueError("it is cut short")
        if wire_type == _BYTES:
            yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at byte `at`, 7 bits a byte, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut short")
        value |= (message[at] & 0x7F) << shift
        at += 1
        if message[at - 1] < 0x80:
            return value, at
    raise ValueError(f"no protobuf number ends at byte {at}")
