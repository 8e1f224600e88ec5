"""Layers that stay float in an INT8 graph: what they read, so that they do stay float.

What a float layer makes is rounded for the INT8 layers that take it, and for those alone.

A single float layer between INT8 layers needs more. ONNX Runtime quantizes on loading what was left out: a Conv or Gemm
that reads a DequantizeLinear with one scale and goes into a QuantizeLinear gets INT8 weights with one scale for all
channels (``weight_bias_quantization.cc``, tried with 1.32; of EfficientNet-Lite0 with two such layers the error was
three times that of none). So such a layer has a DequantizeLinear of its own with one, equal, scale for each channel:
the same numbers, and not part of an INT8 layer. For TensorRT, which has no such weakness, it is left out.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.errors import UserError, require
from .graph_edit import attribute, consumers
from .ranges import WEIGHTED

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

FUSED = ("Relu", "Clip")
"""Activations that become part of the layer before: they are rounded with it, or stay float with it."""

QUANTIZED_ON_LOADING = ("Conv", "ConvTranspose", "Gemm")


def check_float_layers(graph: ModelProto, names: Collection[str]) -> None:
    """Refuse names that are none of a graph's nodes.

    Raises:
        UserError: names the first.
    """
    known = {node.name: node.op_type for node in graph.graph.node}
    unknown = [name for name in names if name not in known]
    if unknown:
        example = next((name for name, op in known.items() if op in WEIGHTED), "none")
        raise UserError(
            f"The network has no layer {unknown[0][:100]!r} to leave in float: give names as midge quantize "
            f"--sensitivity prints them, like {example!r}."
        )


def detach_float_layers(quantized: ModelProto, float_nodes: Collection[str], apart: bool) -> None:
    """Let the layers that stay float read what is not rounded, in place.

    Args:
        quantized: a graph with Q/DQ.
        float_nodes: names of the nodes that were left without.
        apart: give a single layer between INT8 layers a DequantizeLinear of its own, by channel.
    """
    producers = {name: node for node in quantized.graph.node for name in node.output}
    uses = consumers(quantized)
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    added: list[NodeProto] = []
    for node in quantized.graph.node:
        if node.name not in float_nodes:
            continue
        for place, name in enumerate(node.input):
            dequantize = producers.get(name)
            rounding = producers.get(dequantize.input[0]) if dequantize is not None else None
            if dequantize is None or dequantize.op_type != "DequantizeLinear" or rounding is None:
                continue  # float already, or weights
            if _is_float(producers.get(rounding.input[0]), producers, float_nodes):
                node.input[place] = rounding.input[0]
            elif apart and node.op_type in QUANTIZED_ON_LOADING and node.input[1] in stored and _is_rounded(node, uses):
                added.append(_own_dequantize(quantized, stored, node, dequantize))
    quantized.graph.node.extend(added)
    _drop_unread(quantized)


def _is_float(source: NodeProto | None, producers: dict[str, NodeProto], float_nodes: Collection[str]) -> bool:
    """Whether a node computes in float, so that nothing but a rounding of what it makes is lost; None is the input."""
    while source is not None and source.op_type in FUSED:
        source = producers.get(source.input[0])
    if source is None or source.name in float_nodes:
        return True
    makers = (producers.get(name) for name in source.input)
    return not any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _is_rounded(node: NodeProto, uses: dict[str, list[NodeProto]]) -> bool:
    """Whether what a node makes goes into a QuantizeLinear, past an activation perhaps."""
    after = uses.get(node.output[0], [])
    return any(use.op_type == "QuantizeLinear" or (use.op_type in FUSED and _is_rounded(use, uses)) for use in after)


def _own_dequantize(
    quantized: ModelProto, stored: dict[str, TensorProto], node: NodeProto, shared: NodeProto
) -> NodeProto:
    """A DequantizeLinear for one node, with the shared one's scale for each channel; the node reads it already."""
    onnx = require("onnx", "export")
    sides = stored[node.input[1]].dims
    if node.op_type == "Gemm":
        channels = sides[1 if attribute(node, "transB", 0) else 0]
    else:
        channels = sides[0] if node.op_type == "ConvTranspose" else sides[1] * attribute(node, "group", 1)
    names = [shared.input[0]]
    for name, suffix in zip(shared.input[1:3], ("scales", "zero_points"), strict=True):
        values = np.full(channels, onnx.numpy_helper.to_array(stored[name]))
        quantized.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{node.name}_input_{suffix}"))
        names.append(f"{node.name}_input_{suffix}")
    node.input[0] = f"{node.name}_input"
    return onnx.helper.make_node("DequantizeLinear", names, [node.input[0]], name=f"{node.name}_input_DQ", axis=1)


def _drop_unread(quantized: ModelProto) -> None:
    """Drop the Q/DQ that nothing reads any more, and its constants, in place."""
    nodes = list(quantized.graph.node)
    while True:
        read = {name for node in nodes for name in node.input} | {output.name for output in quantized.graph.output}
        used = [node for node in nodes if read.intersection(node.output)]
        if len(used) == len(nodes):
            break
        nodes = used
    tensors = [tensor for tensor in quantized.graph.initializer if tensor.name in read]
    for field, kept in (("node", nodes), ("initializer", tensors)):
        quantized.graph.ClearField(field)
        getattr(quantized.graph, field).extend(kept)
