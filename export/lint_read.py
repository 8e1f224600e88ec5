"""Read an ONNX file that may be hostile: its size before its bytes, its paths before its other files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import UserError, require
from ..runtime.printable import printable
from .lint_graph import Graph

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_BYTES = (2 << 30) - 1  # what protobuf parses
MAX_NODES = 200_000


def read_graph(path: Path) -> Graph:
    """Read a file.

    Raises:
        UserError: it is missing, too large, no ONNX, empty, in disorder, or names data outside of its folder.
    """
    onnx = require("onnx", "export")
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"No ONNX file at '{path}': it {found}. Give an .onnx file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"'{path}' has {size} bytes, more than the {MAX_BYTES} that are read: store weights beside it.")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, whose class depends on its implementation
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"'{path}' is not an ONNX file ({reason}): give an .onnx file.") from None
    if not model.graph.node or not model.opset_import:
        raise UserError(f"'{path}' is not an ONNX file, or holds no graph: give an .onnx file.")
    if len(model.graph.node) > MAX_NODES:
        raise UserError(f"'{path}' has {len(model.graph.node)} nodes: more than the {MAX_NODES} that are looked at.")
    check_external(model, path)
    return Graph(model, path)


def check_external(model: ModelProto, path: Path) -> None:
    """Check the paths of tensors that are stored in other files; the files are not read.

    Raises:
        UserError: a path leaves the model's folder, or there is no such file.
    """
    folder = path.parent.resolve()
    constants = [attribute.t for node in model.graph.node if node.op_type == "Constant" for attribute in node.attribute]
    for tensor in [*model.graph.initializer, *constants]:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        what = f"'{path}' keeps the tensor '{printable(tensor.name)}' in '{printable(location)}'"
        target = (folder / location).resolve() if location and "\0" not in location else folder
        if Path(location).is_absolute() or not target.is_relative_to(folder) or target == folder:
            raise UserError(f"{what}: outside of the model's folder. Use no such file.")
        if not target.is_file():
            raise UserError(f"{what}, which is not there: copy it.")
