"""Weights out of an ONNX file, without the ``onnx`` package.

An ONNX file is one protobuf message. Of its many fields only these are needed: ``ModelProto.graph`` (7);
``GraphProto.node`` (1) and ``.initializer`` (5); ``NodeProto.input`` (1), ``.output`` (2) and ``.op_type``
(4); ``TensorProto.dims`` (1), ``.data_type`` (2), ``.name`` (8) and ``.raw_data`` (9). A reader of the wire
format skips every other field by its length. Source: onnx.proto of the ONNX specification, and the protobuf
encoding guide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# TensorProto.DataType, as far as weights use it.
_DTYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxNode:
    """One operation of the graph: its type and the names of the values it reads and writes."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxGraph:
    """Operations in graph order, and the stored constant tensors (weights) by name."""

    nodes: tuple[OnnxNode, ...]
    initializers: dict[str, Tensor]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Read one base-128 integer: (value, position after it)."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("ONNX file: truncated or not a protobuf message")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) for a message; a value is an integer, or the bytes of a longer field."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        value: int | memoryview
        if wire == _VARINT:
            value, at = _varint(data, at)
        else:
            if wire == _BYTES:
                size, at = _varint(data, at)
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise ValueError(f"ONNX file: wire type {wire} is not a protobuf one")
            if at + size > len(data):
                raise ValueError(f"ONNX file: truncated, a field of {size} bytes has {len(data) - at} left")
            value = data[at : at + size]
            at += size
        yield tag >> 3, value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("ONNX file: an integer stands where a message or a string should")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("ONNX file: bytes stand where an integer should")
    return value


def _text(value: int | memoryview) -> str:
    return str(_message(value), "utf-8")


def _node(data: memoryview) -> OnnxNode:
    inputs, outputs, op_type = [], [], ""
    for field, value in _fields(data):
        if field == 1:
            inputs.append(_text(value))
        elif field == 2:
            outputs.append(_text(value))
        elif field == 4:
            op_type = _text(value)
    return OnnxNode(op_type, tuple(inputs), tuple(outputs))


def _tensor(data: memoryview) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, raw, code = "", None, 0
    for field, value in _fields(data):
        if field == 1 and isinstance(value, int):
            shape.append(value)
        elif field == 1:  # packed: every dimension in one run of bytes
            packed, at = _message(value), 0
            while at < len(packed):
                size, at = _varint(packed, at)
                shape.append(size)
        elif field == 2:
            code = _number(value)
        elif field == 8:
            name = _text(value)
        elif field == 9:
            raw = _message(value)
    dtype = _DTYPES.get(code)
    if dtype is None or raw is None:
        where = "no raw data" if raw is None else f"data type {code}"
        raise ValueError(f"ONNX file: initializer {name!r} has {where}; read are raw tensors of {sorted(_DTYPES)}")
    if len(raw) != prod(shape) * dtype.itemsize:
        raise ValueError(f"ONNX file: initializer {name!r} of shape {tuple(shape)} and {dtype} has {len(raw)} bytes")
    # A copy of its own: a view would keep the whole file in memory, and need not be aligned.
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
    return name, tensor.reshape(shape)


def read_onnx(data: bytes | bytearray | memoryview) -> OnnxGraph:
    """Read the operations and the initializers of an ONNX model from the bytes of its file.

    Raises ValueError for bytes that are truncated or no ONNX model, and for weights kept outside the file.
    """
    graph = None
    for field, value in _fields(memoryview(data)):
        if field == 7:
            graph = _message(value)
    if graph is None:
        raise ValueError("ONNX file: it holds no graph")
    nodes: list[OnnxNode] = []
    initializers: dict[str, Tensor] = {}
    for field, value in _fields(graph):
        if field == 1:
            nodes.append(_node(_message(value)))
        elif field == 5:
            name, tensor = _tensor(_message(value))
            initializers[name] = tensor
    return OnnxGraph(tuple(nodes), initializers)
