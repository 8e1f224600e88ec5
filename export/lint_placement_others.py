"""Which convolutions and matrix products OpenVINO and TensorRT run on integers, and why not the others.

OpenVINO's answers were tried with version 2026.4 on a CPU; the tests hold them against the graph that it executes.
TensorRT shows what it chose only on a GPU, so that its answers are NVIDIA's rules: an operator runs in INT8 where all
its inputs are dequantized (*Working with Quantized Types*, Q/DQ layer-placement recommendations).
"""

from __future__ import annotations

from .lint_checks_qdq import EIGHT_BITS, on_channel_axis
from .lint_graph import FLOAT_OPERATORS, Graph, Node
from .lint_placement_ort import LEFT_FLOAT

# OpenVINO moves a dequantization across these; TensorRT does too, where they commute with it.
OPENVINO_MOVES = (
    *("MaxPool", "Relu", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Identity", "Dropout"),
    *("Split", "Gather", "DepthToSpace", "Pad", "Clip"),
)
TENSORRT_MOVES = (
    *("MaxPool", "Relu", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Flatten", "Identity", "Dropout"),
)


def openvino_reason(graph: Graph, node: Node) -> tuple[str, str]:
    """As :func:`.lint_placement_ort.ort_reason`, for OpenVINO."""
    if node.op not in FLOAT_OPERATORS:
        return ("float-operator", "it is composed of float operators") if node.op.endswith("Integer") else ("", "")
    data = graph.dequantized(node.inputs[0], OPENVINO_MOVES)
    second = graph.dequantized(node.inputs[1], OPENVINO_MOVES)
    if data is None:
        if second is None:
            return LEFT_FLOAT, "neither its data nor its weights are quantized"
        return "float-input", "its data is not quantized"
    if second is None:
        return "float-weights", "its second input is not quantized"
    for quantization in (data, second):
        if quantization.type not in EIGHT_BITS:
            return "float-type", f"quantized to {quantization.type.upper() or 'unknown integers'}"
    if data.scale is None or second.scale is None:
        return "float-scale", "a scale is no constant"
    if node.op == "Conv" and data.type == "int8" and data.zero_point is not None and data.zero_point.any():
        return "signed-zero-point", "its data is INT8 with a zero point that is not 0"
    if second.type != "int8":
        return "unsigned-second", f"its second input is {second.type.upper()}"
    if second.zero_point is not None and second.zero_point.any():
        return "second-zero-point", "its second input has a zero point that is not 0"
    if second.is_constant and not on_channel_axis(graph, node, second):
        return "weight-axis-float", "its weights have no scale per output channel"
    return "", ""


def tensorrt_reason(graph: Graph, node: Node) -> tuple[str, str]:
    """As :func:`.lint_placement_ort.ort_reason`, for TensorRT."""
    if node.op not in FLOAT_OPERATORS:
        return "", ""  # refused: the rule on operators says so
    data = graph.dequantized(node.inputs[0], TENSORRT_MOVES)
    second = graph.dequantized(node.inputs[1], TENSORRT_MOVES)
    if data is None and second is None:
        return LEFT_FLOAT, "neither its data nor its weights are quantized"
    if data is None:
        return "float-input", "its data is not quantized"
    if second is None:
        return "float-weights", "its second input is not quantized"
    return "", ""
