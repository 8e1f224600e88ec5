"""A torch network as an ONNX file: static batch 1, float32, batch normalization folded, slimmed and checked.

Opset 18 is the one that torch's exporter writes without converting, and what every runtime in use reads: ONNX Runtime
from 1.14, TensorRT from 8.6, OpenVINO from 2023. Per-channel Q/DQ needs 13. Equal weights give equal bytes: what the
exporter notes about the machine is removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import UserError, require
from ..runtime.files import atomic_file

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

OPSET = 18
IR_VERSION = 8  # the one that came with opset 18; a later one is refused by older runtimes for no gain
INPUT = "image"


def export_onnx(model: nn.Module, input_px: int, output_name: str) -> ModelProto:
    """Export a network.

    Args:
        model: in eval mode on the CPU; (N, 3, H, W) float32 -> (N, K) float32.
        input_px: H and W.
        output_name: name of the output.

    Returns:
        The checked ONNX graph: input ``image`` (1, 3, H, W), output (1, K).

    Raises:
        UserError: a package is missing, or torch cannot follow the network's code.
    """
    torch = require("torch", "train")
    onnx = require("onnx", "export")
    onnxslim = require("onnxslim", "export")
    require("onnxscript", "export")
    image = torch.zeros(1, 3, input_px, input_px)
    try:
        program = torch.onnx.export(
            model,
            (image,),
            input_names=[INPUT],
            output_names=[output_name],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # its kinds depend on what in the network's code it cannot follow
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"torch cannot export this network to ONNX ({reason}): choose another backbone.") from error
    proto = onnxslim.slim(program.model_proto)
    without_notes(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def without_notes(proto: ModelProto) -> None:
    """Remove what says where and by what a graph was made, in place."""
    graph = proto.graph
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "midge", ""
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def save_onnx(proto: ModelProto, path: Path) -> None:
    """Write a graph, the same bytes for the same graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(proto.SerializeToString(deterministic=True))
