"""A torch network as an ONNX file: float32, slimmed and checked; the batch is 1, or on request any.

Opset 18 is the one that torch's exporter writes without converting; an earlier one it cannot write, and per-channel
Q/DQ needs 13. Which runtimes read a file, ``midge lint`` says (TensorRT 8 documents opsets up to 17 alone). Equal
weights give equal bytes: what the exporter notes about the machine is removed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import UserError, require
from ..runtime.files import atomic_file
from ..runtime.manifest import MAX_BATCH

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

OPSET = 18
INPUT = "image"
BATCH = "batch"


def export_onnx(
    model: nn.Module, input_px: int, *output_names: str, opset: int = OPSET, dynamic_batch: bool = False
) -> ModelProto:
    """Export a network.

    Args:
        model: in eval mode on the CPU; (N, 3, H, W) float32 -> (N, K) float32, or a tuple of (N, C, h, w).
        input_px: H and W.
        output_names: names of the outputs.
        opset: version of the operators, from 18.
        dynamic_batch: whether the graph takes any number of images, instead of one.

    Returns:
        The checked ONNX graph: input ``image`` (1, 3, H, W), output (1, K); with ``batch`` for 1 where it is dynamic.

    Raises:
        UserError: a package is missing, or torch cannot follow the network's code.
    """
    torch = require("torch", "train")
    onnx = require("onnx", "export")
    onnxslim = require("onnxslim", "export")
    require("onnxscript", "export")
    image = torch.zeros(2 if dynamic_batch else 1, 3, input_px, input_px)  # a side of 1 would be taken as fixed
    try:
        program = torch.onnx.export(
            model,
            (image,),
            input_names=[INPUT],
            output_names=list(output_names),
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim(BATCH, min=1, max=MAX_BATCH)},) if dynamic_batch else None,
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # its kinds depend on what in the network's code it cannot follow
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"torch cannot export this network to ONNX ({reason}): choose another backbone.") from error
    proto = onnxslim.slim(program.model_proto)
    without_notes(proto)
    if dynamic_batch and not proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError("torch exports this network for one image at a time only: leave out --dynamic-batch.")
    onnx.checker.check_model(proto, full_check=True)
    return proto


def without_notes(proto: ModelProto) -> None:
    """Remove what says where and by what a graph was made, in place."""
    onnx = require("onnx", "export")
    graph = proto.graph
    # The one that came with the opset: a later one is refused by older runtimes for no gain.
    proto.ir_version = onnx.helper.find_min_ir_version_for(list(proto.opset_import), ignore_unknown=True)
    proto.producer_name, proto.producer_version = "midge", ""
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def save_onnx(proto: ModelProto, path: Path) -> None:
    """Write a graph, the same bytes for the same graph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_bytes(proto.SerializeToString(deterministic=True))
