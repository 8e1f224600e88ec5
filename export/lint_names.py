"""Names as they stand in an ONNX file, which may hold anything."""

from __future__ import annotations

from ..runtime.errors import UserError, require


def text(value: str) -> str:
    """A name from a file, which protobuf gives as bytes where it is none.

    Raises:
        UserError: it is not UTF-8.
    """
    if not isinstance(value, str):
        raise UserError(f"The model has a name that is no UTF-8 ({bytes(value)[:40]!r}): export the model again.")
    return value


def type_name(data_type: int) -> str:
    """ONNX's number of a type -> its name, e.g. ``"uint8"``; "" for none."""
    onnx = require("onnx", "export")
    names = onnx.TensorProto.DataType
    return names.Name(data_type).lower() if data_type in names.values() and data_type else ""
