"""Which convolutions and matrix products ONNX Runtime's CPU kernels run on integers, and why not the others.

ONNX Runtime replaces a node by its integer form where everything around it is quantized in the way that form needs.
What is needed was read in its optimizer (``qdq_transformer``: ``qdq_selectors.cc``, ``qdq_propagation.cc``,
``weight_bias_quantization.cc``; ``matmul_add_fusion.cc``) and tried with version 1.32: the tests hold every answer
given here against the graph that it then executes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from .lint_checks_file import Found
from .lint_checks_qdq import EIGHT_BITS, on_channel_axis, weights
from .lint_graph import INTEGER_OPERATORS, MAX_STEPS, QUANTIZE, Graph, Node, Quantization, Use

# Rounding is moved across these, which only move numbers; and these are dropped first.
MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
DROPPED = ("Identity", "Dropout")
FOLDS = ("Relu", "Clip")
LOWEST = {"int8": -128, "uint8": 0}
HIGHEST = {"int8": 127, "uint8": 255}

LEFT_FLOAT = "left-float"


def ort_reason(graph: Graph, node: Node) -> tuple[str, str]:
    """Why a node runs in float.

    Returns:
        The reason, a rule's name, and what there is; ("", "") where the node runs on integers.
    """
    if node.op in INTEGER_OPERATORS:
        return "", ""
    data, second = _quantized(graph, node.inputs[0]), _quantized(graph, node.inputs[1])
    stored_float = graph.constant(node.inputs[1]) is not None
    if data is None:
        if second is None:
            return LEFT_FLOAT, "neither its data nor its weights are quantized"
        return "float-input", "its data is not quantized"
    if second is None and not (stored_float and node.op in {"Conv", "Gemm"}):
        return "float-weights", "its second input is not quantized"
    if node.op == "ConvTranspose":
        return "no-kernel", "there is no integer kernel for it"
    for quantization in (data, second):
        if quantization is not None and quantization.type not in EIGHT_BITS:
            return "float-type", f"quantized to {quantization.type.upper() or 'unknown integers'}"
    if data.scale is not None and data.scale.size != 1:
        if second is None:
            return LEFT_FLOAT, "its weights are float, and its data has a scale per channel"
        return "float-scale", "its data has a scale per channel"
    if data.scale is not None and np.isnan(data.scale).any():
        return "float-scale", "the scale of its data is not a number"
    reason, detail = _product_reason(graph, node, data, second)
    if not reason and _stays_signed(graph, data, node.inputs[0], _rounding_after(graph, node)):
        return "signed-fanout", "INT8 data, or an INT8 output, that several nodes take"
    return reason, detail


def _product_reason(graph: Graph, node: Node, data: Quantization, second: Quantization | None) -> tuple[str, str]:
    on_axis = second is None or on_channel_axis(graph, node, second)
    if node.op == "MatMul":
        add = _added_bias(graph, node)
        if not on_axis:
            return "weight-axis-float", "its weights have no scale per column"
        if add is not None:
            return _bias_reason(graph, add.node, add.node.inputs[1 - add.position], on_axis) or ("", "")
        taken = graph.uses.get(node.outputs[0], [])
        rounds = any(use.node.op == QUANTIZE for use in taken)
        folds = len(taken) == 1 and taken[0].node.op in FOLDS
        return _output_reason(graph, node) if rounds or folds else ("", "")
    if node.op == "Gemm" and (node.number("alpha", 1) != 1 or node.number("beta", 1) != 1):
        return "float-gemm", "alpha or beta is not 1"
    bias = node.inputs[2] if len(node.inputs) > 2 else ""
    if bias:
        reason = _bias_reason(graph, node, bias, on_axis)
        if reason:
            return reason
        if node.op == "Conv" and not bias_scale_fits(graph, data, second, bias):
            return "bias-scale", "the bias has another scale than data times weights"
    if node.op == "Gemm" and second is not None:
        taken = [use.node.op for use in graph.uses.get(node.outputs[0], [])]
        if not any(op in {QUANTIZE, *FOLDS} for op in taken):
            return "", ""
    return _output_reason(graph, node)


def _bias_reason(graph: Graph, node: Node, bias: str, on_axis: bool) -> tuple[str, str] | None:
    """Why the bias keeps a node in float. A float bias is quantized on loading where the output is, after all."""
    quantization = graph.dequantized(bias)
    if quantization is not None:
        if quantization.type == "int32":
            return None
        return "float-bias", f"the bias is quantized to {quantization.type.upper()}"
    if graph.constant(bias) is None:
        return "float-bias", "the bias is computed"
    if not on_axis:
        return "float-bias", "its weights have no scale per output channel, so the float bias cannot be quantized"
    why, detail = _output_reason(graph, node)
    if not why:
        return None
    # A convolution needs its output rounded whatever its bias is.
    return (why, detail) if node.op == "Conv" else ("float-bias-output", f"the bias is float and {detail}")


def bias_scale_fits(graph: Graph, data: Quantization, second: Quantization | None, bias: str) -> bool:
    """Whether a quantized bias has the scale in which the products add up: data times weights, within 1 %."""
    quantization = graph.dequantized(bias)
    scales = (quantization.scale if quantization else None, data.scale, second.scale if second else None)
    if any(scale is None for scale in scales):
        return True
    given, data_scale, weight_scale = (np.asarray(scale, np.float64).ravel() for scale in scales)
    expected = data_scale * weight_scale
    if given.size not in {1, expected.size} and expected.size != 1:
        return True
    return bool(np.allclose(given, expected, rtol=1e-2, atol=1e-6))


def _output_reason(graph: Graph, node: Node) -> tuple[str, str]:
    """Why a node's output cannot be rounded within it; ("", "") where it can."""
    name, activation, moved = node.outputs[0], None, False
    for _ in range(MAX_STEPS):
        uses = graph.uses.get(name, [])
        if name in graph.outputs or name in graph.used_inside:
            return "float-output", "its output leaves the network unrounded"
        if not uses:
            return "float-output", "nothing takes its output"
        after = uses[0].node
        if len(uses) > 1 and not _same_rounding(graph, uses):
            return "shared-output", f"its output also feeds {_others(uses)}"
        if after.op == QUANTIZE:
            return _rounding_reason(graph, activation, graph.quantizations[after])
        if after.op in FOLDS and not moved:
            activation = after
        elif after.op in MOVES:
            moved = True
        elif after.op not in DROPPED:
            return "float-output", f"{after.op} takes its output unrounded"
        name = after.outputs[0]
    return "float-output", "its output is not rounded soon"


def _rounding_reason(graph: Graph, activation: Node | None, rounding: Quantization) -> tuple[str, str]:
    if rounding.type not in EIGHT_BITS or (rounding.scale is not None and rounding.scale.size != 1):
        return "float-output", "its output is rounded per channel, or not to 8 bits"
    if activation is not None and not folds_into(graph, activation, rounding):
        return "unfolded-activation", f"{activation.op} '{activation.name}' does not fold into the rounding after it"
    return "", ""


def _rounding_after(graph: Graph, node: Node) -> Quantization | None:
    """The rounding of a node's output; None where it is moved to the node from further on, or there is none."""
    name = node.outputs[0]
    for _ in range(MAX_STEPS):
        uses = graph.uses.get(name, [])
        if not uses or uses[0].node.op in MOVES:
            return None
        if uses[0].node.op == QUANTIZE:
            return graph.quantizations[uses[0].node]
        if uses[0].node.op not in {*FOLDS, *DROPPED, "Add"}:
            return None
        name = uses[0].node.outputs[0]
    return None


def _stays_signed(graph: Graph, data: Quantization, name: str, rounding: Quantization | None) -> bool:
    """Whether INT8 remains where x86 has kernels for UINT8 only.

    There ONNX Runtime turns a QuantizeLinear and its DequantizeLinear from INT8 to UINT8, but only a pair: after a
    QuantizeLinear that several nodes read it does not.
    """
    if data.type == "int8":
        source = graph.producer.get(data.node.inputs[0])
        direct = name == data.node.outputs[0]
        if source is None or (_num_readers(graph, source) if direct else len(graph.uses.get(name, []))) != 1:
            return True
    return rounding is not None and rounding.type == "int8" and _num_readers(graph, rounding.node) != 1


def _num_readers(graph: Graph, rounding: Node) -> int:
    """How many nodes read the integers of a QuantizeLinear, each through a DequantizeLinear of its own."""
    readers = [use.node for use in graph.uses.get(rounding.outputs[0], [])]
    inside = rounding.outputs[0] in graph.outputs
    return inside + sum(max(1, len(graph.uses.get(node.outputs[0], []))) if node.outputs else 1 for node in readers)


def _same_rounding(graph: Graph, uses: list[Use]) -> bool:
    """Whether all that take a tensor round it by the same stored scale, so that one rounding does for all."""
    roundings = [graph.quantizations.get(use.node) for use in uses if use.node.op == QUANTIZE]
    return len(roundings) == len(uses) and all(
        # Signed ones are turned into unsigned ones, each for itself, before equal ones are found.
        rounding and rounding.type == "uint8" and rounding.node.inputs[1:] == uses[0].node.inputs[1:]
        for rounding in roundings
    )


def _others(uses: list[Use]) -> str:
    names = sorted({use.node.op for use in uses if use.node.op != QUANTIZE})
    return ", ".join(names) or "a second QuantizeLinear"


def folds_into(graph: Graph, activation: Node, rounding: Quantization) -> bool:
    """Whether the integers' own limits cut off all that a Relu or Clip would."""
    scale, points = rounding.scale, rounding.zero_point
    if scale is None or points is None or rounding.type not in LOWEST:
        return False
    point, step = int(points.ravel()[0]), float(scale.ravel()[0])
    if activation.op == "Relu":
        return point == LOWEST[rounding.type]
    limits = clip_limits(graph, activation)
    if limits is None or not step > 0 or math.isinf(step):
        return False
    low, high = (round(limit / step) + point if math.isfinite(limit) else limit for limit in limits)
    return low <= LOWEST[rounding.type] and high >= HIGHEST[rounding.type]


def clip_limits(graph: Graph, clip: Node) -> tuple[float, float] | None:
    """The smallest and largest value that a Clip lets through; None where they are no constants."""
    limits = []
    for position, name, default in ((1, "min", -math.inf), (2, "max", math.inf)):
        if position < len(clip.inputs) and clip.inputs[position]:
            values = graph.values(clip.inputs[position])
            if values is None or values.size != 1:
                return None
            limits.append(float(values.ravel()[0]))
        else:
            limits.append(clip.number(name, default))
    return limits[0], limits[1]


def _quantized(graph: Graph, name: str) -> Quantization | None:
    return graph.dequantized(name, through=(*MOVES, *DROPPED))


def _added_bias(graph: Graph, node: Node) -> Use | None:
    """The Add that makes a matrix product with stored weights a Gemm."""
    uses = graph.uses.get(node.outputs[0], [])
    if len(uses) != 1 or node.outputs[0] in graph.outputs or uses[0].node.op != "Add" or len(uses[0].node.inputs) != 2:
        return None
    sides, bias = graph.shape(node.inputs[1]), graph.shape(uses[0].node.inputs[1 - uses[0].position])
    if sides is None or len(sides) != 2 or bias is None:
        return None
    return uses[0] if bias == (sides[1],) else None


def wrong_bias_scale(graph: Graph, target: str) -> Iterator[Found]:
    """Gemm nodes that run on integers but read their bias in another scale than it has."""
    for node in graph.weighted:
        if node.op == "Gemm" and len(node.inputs) > 2 and ort_reason(graph, node) == ("", ""):
            data, second = _quantized(graph, node.inputs[0]), weights(graph, node)
            if data is not None and not bias_scale_fits(graph, data, second, node.inputs[2]):
                yield Found(node.name, f"the bias '{node.inputs[2]}' has another scale than data times weights")


def quantized_on_loading(graph: Graph, target: str) -> Iterator[Found]:
    """Nodes whose float weights ONNX Runtime itself quantizes, because all around them is quantized."""
    for node in graph.weighted:
        stored = len(node.inputs) > 1 and graph.constant(node.inputs[1]) is not None
        if node.op in {"Conv", "Gemm"} and stored and ort_reason(graph, node) == ("", ""):
            yield Found(node.name, f"float weights '{node.inputs[1]}'")


def silent_axis(graph: Graph, target: str) -> Iterator[Found]:
    """Convolutions that run on integers although their scales lie along another axis than the output channels."""
    for node in graph.weighted:
        quantization = weights(graph, node)
        if node.op == "Conv" and quantization and not on_channel_axis(graph, node, quantization):
            sides = graph.shape(quantization.node.inputs[0])
            fits = quantization.scale is not None and sides and sides[0] == quantization.scale.size
            if fits and ort_reason(graph, node) == ("", ""):
                yield Found(node.name, f"weights with one scale per index of axis {quantization.axis}")
