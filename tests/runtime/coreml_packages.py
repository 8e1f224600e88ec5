"""Core ML packages written by hand, in the wire format, so that the reader is tested without coremltools."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"bool": 1, "string": 2, "fp16": 10, "fp32": 11, "int8": 21, "int32": 23, "uint8": 31}
BLOB_TYPES = {"fp16": 1, "fp32": 2, "uint8": 3, "int8": 4}

Kind = tuple[str, Sequence[int]]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def entry(number: int, key: str, value: bytes) -> bytes:
    return field(number, field(1, key) + field(2, value))


def kind_of(kind: Kind) -> bytes:
    dtype, shape = kind
    sides = b"".join(field(3, field(1, field(1, side))) for side in shape)
    return field(1, field(1, TYPES[dtype]) + field(2, len(shape)) + sides)


def stored(kind: Kind, offset: int, name: str = "@model_path/weights/weight.bin") -> bytes:
    """A constant in the file of weights."""
    return field(2, kind_of(kind)) + field(5, field(1, name) + field(2, offset))


def immediate(value: Any) -> bytes:
    """A constant in the model itself: a string, or an array."""
    if isinstance(value, str):
        return field(2, kind_of(("string", ()))) + field(3, field(1, field(4, field(1, value))))
    array = np.asarray(value)
    names = {"f4": "fp32", "f2": "fp16", "i4": "int32", "b1": "bool", "i1": "int8", "u1": "uint8"}
    dtype = names[array.dtype.str[1:]]
    if dtype == "fp32":
        tensor = field(1, field(1, array.tobytes()))
    elif dtype in ("int32", "bool"):
        packed = b"".join(varint(int(number)) for number in array.ravel())
        tensor = field(2 if dtype == "int32" else 3, field(1, packed))
    else:
        tensor = field(7, field(1, array.tobytes()))
    return field(2, kind_of((dtype, array.shape))) + field(3, field(1, tensor))


def operation(op: str, inputs: Mapping[str, str | bytes], output: str, kind: Kind, **attributes: bytes) -> bytes:
    """An operator; a text is the name of another value, bytes are a constant."""
    message = field(1, op)
    for parameter, bound in inputs.items():
        message += entry(2, parameter, field(1, field(1 if isinstance(bound, str) else 2, bound)))
    message += field(3, field(1, output) + field(2, kind_of(kind)))
    return message + b"".join(entry(5, name, value) for name, value in attributes.items())


def model(
    operations: Sequence[bytes], *, sides: Sequence[int], output: str, metadata: Mapping[str, str] | None = None
) -> bytes:
    """A model with the input ``image`` in 32-bit floats."""
    features = field(1, field(1, "image") + field(3, field(4, field(1, sides[-1]))))
    notes = b"".join(field(100, field(1, key) + field(2, value)) for key, value in (metadata or {}).items())
    block = field(2, output) + b"".join(field(3, op) for op in operations)
    function = field(1, field(1, "image") + field(2, kind_of(("fp32", sides)))) + field(2, "CoreML7")
    function += entry(3, "CoreML7", block)
    return field(1, 8) + field(2, features + field(100, notes)) + field(502, field(1, 1) + entry(2, "main", function))


def weights(*arrays: np.ndarray) -> tuple[bytes, list[int]]:
    """A file of weights, and the offset of each."""
    names = {"f4": "fp32", "f2": "fp16", "i1": "int8", "u1": "uint8"}
    data, offsets = bytearray(struct.pack("<II", len(arrays), 2).ljust(64, b"\0")), []
    for array in arrays:
        offsets.append(len(data))
        described = struct.pack(
            "<IIQQ", 0xDEADBEEF, BLOB_TYPES[names[array.dtype.str[1:]]], array.nbytes, len(data) + 64
        )
        data += described.ljust(64, b"\0") + array.tobytes()
        data += bytes(-len(data) % 64)
    return bytes(data), offsets


def write_package(folder: Path, proto: bytes, blobs: bytes = b"", path: str = "com.apple.CoreML/model.mlmodel") -> Path:
    inside = folder / "Data/com.apple.CoreML"
    (inside / "weights").mkdir(parents=True, exist_ok=True)
    (inside / "model.mlmodel").write_bytes(proto)
    (inside / "weights/weight.bin").write_bytes(blobs)
    manifest = {"fileFormatVersion": "1.0.0", "rootModelIdentifier": "a", "itemInfoEntries": {"a": {"path": path}}}
    (folder / "Manifest.json").write_text(json.dumps(manifest))
    return folder
