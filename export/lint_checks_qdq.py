"""What ``midge lint`` looks for in the Q/DQ nodes themselves: types, zero points, scales, pairs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .lint_checks_file import Found
from .lint_graph import DEQUANTIZE, INTEGER_OPERATORS, QUANTIZE, Graph, Node, Quantization

EIGHT_BITS = ("int8", "uint8")
CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv")


def nonzero_zero_point(graph: Graph, target: str) -> Iterator[Found]:
    """Q/DQ nodes with a zero point that is not 0."""
    for node, quantization in graph.quantizations.items():
        points = quantization.zero_point
        if points is not None and points.any():
            yield Found(node.name, f"zero point {_shown(points)}")


def unsigned_activations(graph: Graph, target: str) -> Iterator[Found]:
    """Activations that are rounded to UINT8."""
    for quantization in graph.of(QUANTIZE):
        if quantization.type == "uint8":
            why = "" if len(quantization.node.inputs) > 2 and quantization.node.inputs[2] else " (no zero point given)"
            yield Found(quantization.node.name, f"to UINT8{why}")


def unsigned_weights(graph: Graph, target: str) -> Iterator[Found]:
    """Constants stored as UINT8."""
    for quantization in graph.of(DEQUANTIZE):
        if quantization.is_constant and quantization.type == "uint8":
            yield Found(quantization.node.name, f"UINT8 weights '{quantization.node.inputs[0]}'")


def integer_bias(graph: Graph, target: str) -> Iterator[Found]:
    """Constants stored as INT32, which biases are."""
    for quantization in graph.of(DEQUANTIZE):
        if quantization.type == "int32":
            yield Found(quantization.node.name, f"INT32 bias '{quantization.node.inputs[0]}'")


def other_integers(graph: Graph, target: str) -> Iterator[Found]:
    """Q/DQ of neither 8 nor, in a bias, 32 bits."""
    for node, quantization in graph.quantizations.items():
        kind = quantization.type
        if kind and kind not in EIGHT_BITS and not (kind == "int32" and node.op == DEQUANTIZE):
            yield Found(node.name, f"Q/DQ in {kind.upper()}")


def early_type(graph: Graph, target: str) -> Iterator[Found]:
    """Q/DQ of other than 8 bits in an opset that has none."""
    for found in other_integers(graph, target):
        if graph.opsets.get("", 0) < 21:
            yield Found(found.node, f"{found.detail}, opset {graph.opsets.get('', 0)}")


def early_axis(graph: Graph, target: str) -> Iterator[Found]:
    """An axis in a Q/DQ node of an opset that has none."""
    for node in graph.quantizations:
        if not node.domain and graph.opsets.get("", 0) < 13 and "axis" in node.attributes:
            yield Found(node.name, f"an axis, opset {graph.opsets.get('', 0)}")


def early_channels(graph: Graph, target: str) -> Iterator[Found]:
    """Several scales in a Q/DQ node of an opset that knows but one."""
    for node, quantization in graph.quantizations.items():
        several = quantization.scale is not None and quantization.scale.size > 1
        if not node.domain and graph.opsets.get("", 0) < 13 and several and "axis" not in node.attributes:
            yield Found(node.name, f"{_size(quantization)} scales, opset {graph.opsets.get('', 0)}")


def bad_scale(graph: Graph, target: str) -> Iterator[Found]:
    """Scales that are 0, below 0 or not a number."""
    for node, quantization in graph.quantizations.items():
        scale = quantization.scale
        if scale is not None and scale.dtype.kind == "f" and not bool((scale > 0).all()):
            yield Found(node.name, f"scale {scale.ravel()[~(scale.ravel() > 0)][0]:g}")


def infinite_scale(graph: Graph, target: str) -> Iterator[Found]:
    """Scales that are infinite."""
    for node, quantization in graph.quantizations.items():
        scale = quantization.scale
        if scale is not None and scale.dtype.kind == "f" and np.isposinf(scale).any():
            yield Found(node.name, "an infinite scale")


def misshapen_scale(graph: Graph, target: str) -> Iterator[Found]:
    """As many scales as fit neither the whole tensor nor its axis."""
    for node, quantization in graph.quantizations.items():
        scale = quantization.scale
        if scale is None or node.number("block_size", 0):
            continue
        if scale.size == 0 or scale.ndim > 1:
            yield Found(node.name, f"scales of shape {list(scale.shape)}")
        elif scale.size > 1 and (sides := graph.sides(node.inputs[0])) is not None:
            axis = quantization.axis + (len(sides) if quantization.axis < 0 else 0)
            if not 0 <= axis < len(sides) or sides[axis] not in {0, scale.size}:
                yield Found(node.name, f"{scale.size} scales along axis {quantization.axis} of {list(sides)}")


def misshapen_zero_point(graph: Graph, target: str) -> Iterator[Found]:
    """Another number of zero points than of scales."""
    for node, quantization in graph.quantizations.items():
        scale, points = quantization.scale, quantization.zero_point
        given = len(node.inputs) > 2 and node.inputs[2]
        if given and scale is not None and points is not None and points.size != scale.size:
            yield Found(node.name, f"{scale.size} scales and {points.size} zero points")


def computed_scale(graph: Graph, target: str) -> Iterator[Found]:
    """Scales that are worked out at run time."""
    for node, quantization in graph.quantizations.items():
        if quantization.scale is None and graph.constant(node.inputs[1]) is None:
            yield Found(node.name, f"the scale '{node.inputs[1]}' is no constant")


def weights(graph: Graph, node: Node) -> Quantization | None:
    """The DequantizeLinear of a node's constant weights."""
    quantization = graph.dequantized(node.inputs[1]) if len(node.inputs) > 1 else None
    return quantization if quantization is not None and quantization.is_constant else None


def channel_axis(graph: Graph, node: Node) -> int:
    """The axis of a node's weights that its output channels lie along; -1 is the last."""
    if node.op in CONVOLUTIONS:
        return 0
    if node.op == "ConvTranspose":
        return 1
    return 0 if node.op == "Gemm" and node.number("transB", 0) else -1


def on_channel_axis(graph: Graph, node: Node, quantization: Quantization) -> bool:
    """Whether weights have one scale, or one per output channel."""
    sides = graph.shape(quantization.node.inputs[0])
    if quantization.scale is None or quantization.scale.size == 1 or sides is None:
        return True
    return (quantization.axis - channel_axis(graph, node)) % len(sides) == 0


def other_axis(graph: Graph, target: str) -> Iterator[Found]:
    """Weights of a convolution with scales along another axis than the output channels."""
    for node in graph.weighted:
        quantization = weights(graph, node)
        if node.op in CONVOLUTIONS and quantization and not on_channel_axis(graph, node, quantization):
            yield Found(node.name, f"weights with one scale per index of axis {quantization.axis}")


def unlike_pair(graph: Graph, target: str) -> Iterator[Found]:
    """A DequantizeLinear that gives integers another meaning than the QuantizeLinear before it."""
    for quantization in graph.of(DEQUANTIZE):
        source = graph.producer.get(quantization.node.inputs[0])
        before = graph.quantizations.get(source) if source is not None and source.op == QUANTIZE else None
        if before is not None and not before.same_steps(quantization):
            yield Found(quantization.node.name, f"other steps than '{before.node.name}', which it undoes")


def double_rounding(graph: Graph, target: str) -> Iterator[Found]:
    """A QuantizeLinear straight after a DequantizeLinear with other steps."""
    for quantization in graph.of(QUANTIZE):
        before = graph.dequantized(quantization.node.inputs[0])
        if before is not None and not before.same_steps(quantization):
            yield Found(quantization.node.name, f"rounds what '{before.node.name}' has just read, to other steps")


def dangling(graph: Graph, target: str) -> Iterator[Found]:
    """Q/DQ nodes whose result nothing takes, and QuantizeLinear nodes whose integers feed no operator for them."""
    readers = INTEGER_OPERATORS | {DEQUANTIZE}
    for node in graph.quantizations:
        name = node.outputs[0]
        users = [use.node for use in graph.uses.get(name, [])]
        if name in graph.used_inside:
            continue
        if not users and name not in graph.outputs:
            yield Found(node.name, f"nothing takes its result '{name}'")
        elif node.op == QUANTIZE and name in graph.outputs:
            yield Found(node.name, f"its integers '{name}' are an output of the network")
        elif node.op == QUANTIZE:
            others = sorted({user.op for user in users if user.op not in readers and not user.op.startswith("QLinear")})
            if others:
                yield Found(node.name, f"its integers feed {', '.join(others)}, without a DequantizeLinear")


def fails_without_vnni(graph: Graph, target: str) -> Iterator[Found]:
    """What ONNX Runtime cannot turn from INT8 to UINT8, as session.x64quantprecision has it do on x86 without VNNI."""
    readers: dict[str, int] = {}
    for quantization in graph.of(DEQUANTIZE):
        if quantization.is_constant and quantization.type == "int8":
            stored = quantization.node.inputs[0]
            readers[stored] = readers.get(stored, 0) + len(graph.uses.get(quantization.node.outputs[0], []))
    for name, number in readers.items():
        if number > 1 and exceeds_7_bits(graph, name):
            yield Found(graph.uses[name][0].node.name, f"one INT8 tensor '{name}' for {number} nodes")
    for node in graph.weighted:
        if node.op == "QLinearConv" and len(node.inputs) > 3 and exceeds_7_bits(graph, node.inputs[3]):
            zero_point = graph.values(node.inputs[2])
            if zero_point is not None and zero_point.dtype == np.int8:
                yield Found(node.name, "QLinearConv of INT8 data")


def exceeds_7_bits(graph: Graph, name: str) -> bool:
    """Whether stored INT8 values go beyond -64 to 64, or are not known."""
    values = graph.values(name)
    return values is None or (
        values.dtype == np.int8 and values.size > 0 and not -64 <= values.min() <= values.max() <= 64
    )


def saturating_products(graph: Graph, target: str) -> Iterator[Found]:
    """Signed weights of more than 7 bits, in the file as a whole."""
    wide = [
        quantization
        for quantization in graph.of(DEQUANTIZE)
        if quantization.is_constant
        and quantization.type == "int8"
        and exceeds_7_bits(graph, quantization.node.inputs[0])
    ]
    if wide:
        yield Found("", f"INT8 weights beyond -64 to 64 in {len(wide)} tensors")


def _shown(values: np.ndarray) -> str:
    different = np.unique(values)
    return str(different[0]) if different.size == 1 else f"{different[0]} to {different[-1]}"


def _size(quantization: Quantization) -> int:
    return 0 if quantization.scale is None else quantization.scale.size
