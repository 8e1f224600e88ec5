"""A Core ML package read into plain data: its ML Program's operators and constants, its metadata (no coremltools).

The formats are Apple's: ``Manifest.json`` names the files; ``model.mlmodel`` is a protocol buffer (Model.proto,
MIL.proto in the coremltools repository, whose field numbers stand here); ``weight.bin`` holds, at the offset that a
constant names, 64 bytes of description (a mark, the type, size and offset of the data), all little-endian.

A package may come from elsewhere: sizes, offsets and paths are checked before use, and nothing leaves the folder.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import UserError
from .fields import Fields
from .files import read_json
from .wire import Message, WireError

MAX_MODEL_BYTES = 64 << 20
MAX_OPERATIONS = 100_000
MAX_RANK = 5  # Core ML's own limit
MAX_ELEMENTS = 1 << 28

PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*", re.ASCII)
MODEL_PATH = "@model_path/"

# MIL.proto, enum DataType -> name.
TYPES = {1: "bool", 2: "string", 10: "fp16", 11: "fp32", 21: "int8", 23: "int32", 31: "uint8"}
DTYPES = {
    "bool": np.dtype(bool),
    "fp16": np.dtype("<f2"),
    "fp32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
    "int32": np.dtype("<i4"),
    "uint8": np.dtype("u1"),
}

# Of weight.bin: the description at a constant's offset, its mark, and its types.
BLOB = struct.Struct("<IIQQ")
BLOB_MARK = 0xDEADBEEF
BLOB_TYPES = {1: "fp16", 2: "fp32", 3: "uint8", 4: "int8"}


class TensorType(NamedTuple):
    """Type of a value.

    Attributes:
        dtype: one of ``TYPES``, or ``"other"`` for what is no tensor of these (a dictionary, a list).
        shape: its sides, all of them known.
    """

    dtype: str
    shape: tuple[int, ...]


Constant = np.ndarray | str | list[str]
"""A constant tensor; strings are plain ones, or lists of them."""


class Name(str):
    """Name of another value, where a string could be meant."""

    __slots__ = ()


@dataclass(frozen=True, eq=False)
class Operation:
    """One operator of a program.

    Attributes:
        kind: its MIL type, e.g. ``"conv"``.
        inputs: parameter -> what is bound to it, a single value or (``values`` of ``concat``) several.
        constants: parameter -> value that stands in the operator itself.
        outputs: name and type of each result.
    """

    kind: str
    inputs: Mapping[str, tuple[Name | Constant, ...]]
    constants: Mapping[str, Constant]
    outputs: tuple[tuple[str, TensorType], ...]


@dataclass(frozen=True, eq=False)
class Program:
    """The main function of a model.

    Attributes:
        inputs: name -> type.
        outputs: names of the values that it returns.
        operations: in an order in which they can run.
        image_inputs: inputs that Core ML feeds an RGB image of 8 bits, (1, 3, H, W) with values 0..255.
        metadata: user-defined strings.
    """

    inputs: Mapping[str, TensorType]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]
    image_inputs: tuple[str, ...]
    metadata: Mapping[str, str]


def read_program(package: Path) -> Program:
    """Read the ML Program of a package.

    Args:
        package: the ``.mlpackage`` folder.

    Raises:
        UserError: it is none, is damaged, leaves its folder, or is no plain ML Program.
    """
    model_path = _model_path(package)
    try:
        if model_path.stat().st_size > MAX_MODEL_BYTES:
            raise WireError(f"it has more than {MAX_MODEL_BYTES} bytes")
        return _read_model(Message(memoryview(model_path.read_bytes())), _Weights(package, model_path.parent))
    except (WireError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The Core ML model '{package}' cannot be read ({reason}): copy or export it again.") from None


def _model_path(package: Path) -> Path:
    """Path of the model's protocol buffer, as the manifest names it."""
    what = f"Core ML manifest '{package / 'Manifest.json'}'"
    fields = Fields(read_json(package / "Manifest.json", "Core ML manifest", 1 << 20), what)
    root = fields.text("rootModelIdentifier", 200)
    relative = fields.fields("itemInfoEntries").fields(root).text("path", 500)
    return _inside(package, package / "Data", relative)


def _inside(package: Path, folder: Path, relative: str) -> Path:
    """A file that a package names, which must lie in it and be reached through no link."""
    path = package.resolve() / folder.relative_to(package) / relative
    if not PATH.fullmatch(relative) or path.resolve() != path or not path.is_file():
        raise UserError(
            f"The Core ML model '{package}' names the file {relative[:100]!r}: it must be a plain one inside it."
        )
    return path


class _Weights:
    """The constants that lie in files of their own.

    Args:
        package: the folder that they must lie in.
        folder: of the model's protocol buffer, which their names are relative to.
    """

    def __init__(self, package: Path, folder: Path) -> None:
        self._package = package
        self._folder = package / folder.relative_to(package.resolve())
        self._files: dict[str, np.memmap] = {}

    def read(self, value: Message, kind: TensorType) -> np.ndarray:
        """One constant, described by MIL's BlobFileValue."""
        name, offset = value.text(1), value.integer(2)
        if name not in self._files:
            if not name.startswith(MODEL_PATH):
                raise WireError(f"a constant lies in {name[:100]!r}, which is not below {MODEL_PATH}")
            path = _inside(self._package, self._folder, name.removeprefix(MODEL_PATH))
            if not path.stat().st_size:
                raise WireError("its file of weights is empty")
            self._files[name] = np.memmap(path, np.uint8, mode="r")
        data = self._files[name]
        if offset > len(data) - BLOB.size:
            raise WireError(f"a constant starts at byte {offset} of {len(data)}")
        mark, blob_type, size, start = BLOB.unpack(data[offset : offset + BLOB.size].tobytes())
        found = BLOB_TYPES.get(blob_type, f"type {blob_type}")
        if mark != BLOB_MARK or found != kind.dtype:
            raise WireError(f"the constant at byte {offset} is {found}, not {kind.dtype}")
        if size != math.prod(kind.shape) * DTYPES[kind.dtype].itemsize or size > len(data) - start:
            raise WireError(
                f"the constant at byte {offset} has {size} bytes from {start} on, its shape is {kind.shape}"
            )
        return data[start : start + size].view(DTYPES[kind.dtype]).reshape(kind.shape)


def _read_model(model: Message, weights: _Weights) -> Program:
    """Model.proto's Model: 2 is the description, 502 the ML Program."""
    if 502 not in model:
        raise WireError("it is no ML Program")
    description = model.message(2)
    functions = model.message(502).entries(2)
    if set(functions) != {"main"}:
        raise WireError(f"it has the functions {sorted(functions)[:5]}, not main alone")
    function = functions["main"]
    blocks, opset = function.entries(3), function.text(2)
    if opset not in blocks:
        raise WireError(f"it has no block for its opset {opset[:50]!r}")
    block = blocks[opset]
    operations = block.messages(3)
    if len(operations) > MAX_OPERATIONS:
        raise WireError(f"it has {len(operations)} operators, more than {MAX_OPERATIONS}")
    images = [feature.text(1) for feature in description.messages(1) if 4 in feature.message(3)]
    return Program(
        inputs={value.text(1): _type(value.message(2)) for value in function.messages(1)},
        outputs=tuple(block.texts(2)),
        operations=tuple(_operation(operation, weights) for operation in operations),
        image_inputs=tuple(images),
        metadata={entry.text(1): entry.text(2) for entry in description.message(100).messages(100)},
    )


def _operation(operation: Message, weights: _Weights) -> Operation:
    """MIL.proto's Operation: its parameters are inputs, or attributes of operators that are constants."""
    kind = operation.text(1)
    if 4 in operation:
        raise WireError(f"the operator {kind[:50]!r} has a block of its own")
    inputs = {}
    for parameter, argument in operation.entries(2).items():
        bound = argument.messages(1)
        inputs[parameter] = tuple(
            _constant(binding.message(2), weights) if 2 in binding else Name(binding.text(1)) for binding in bound
        )
    attributes = operation.entries(5)
    attributes.pop("name", None)
    return Operation(
        kind=kind,
        inputs=inputs,
        constants={name: _constant(value, weights) for name, value in attributes.items()},
        outputs=tuple((value.text(1), _type(value.message(2))) for value in operation.messages(3)),
    )


def _type(value_type: Message) -> TensorType:
    """MIL.proto's ValueType."""
    tensor = value_type.message(1)
    dtype = TYPES.get(tensor.integer(1), "other")
    dimensions = tensor.messages(3)
    if len(dimensions) > MAX_RANK or any(1 not in dimension for dimension in dimensions):
        raise WireError("a value has a side that is not known, or too many sides")
    shape = tuple(dimension.message(1).integer(1) for dimension in dimensions)
    if math.prod(shape) > MAX_ELEMENTS:
        raise WireError(f"a value has the shape {shape}: at most {MAX_ELEMENTS} numbers are allowed")
    return TensorType(dtype, shape)


def _constant(value: Message, weights: _Weights) -> Constant:
    """MIL.proto's Value: 3 stands in the model itself, 5 in a file of weights."""
    kind = _type(value.message(2))
    if 5 in value:
        if kind.dtype not in BLOB_TYPES.values():
            raise WireError(f"a constant of the file of weights is {kind.dtype}")
        return weights.read(value.message(5), kind)
    tensor = value.message(3).message(1)
    if kind.dtype == "string":
        strings = tensor.message(4).texts(1)
        _check_count(len(strings), kind)
        return strings if kind.shape else strings[0]
    if kind.dtype == "fp32":
        numbers = tensor.message(1).floats(1)
    elif kind.dtype in ("int32", "bool"):
        integers = tensor.message(2 if kind.dtype == "int32" else 3).integers(1)
        if any(not -(1 << 31) <= integer < 1 << 31 for integer in integers):
            raise WireError("a constant does not fit 32 bits")
        numbers = np.array(integers, np.int32).astype(DTYPES[kind.dtype])
    elif kind.dtype in DTYPES:
        packed = tensor.message(7).data(1)
        if len(packed) % DTYPES[kind.dtype].itemsize:
            raise WireError(f"a constant has {len(packed)} bytes, which are no {kind.dtype}")
        numbers = np.frombuffer(packed, DTYPES[kind.dtype])
    else:
        raise WireError(f"a constant has a type that is not known ({value.message(2).message(1).integer(1)})")
    _check_count(numbers.size, kind)
    return numbers.reshape(kind.shape)


def _check_count(count: int, kind: TensorType) -> None:
    if count != math.prod(kind.shape):
        raise WireError(f"a constant holds {count} values, its shape is {kind.shape}")
