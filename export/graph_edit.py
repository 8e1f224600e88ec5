"""Reading a folded FP32 graph and changing its weights: what the steps before quantization have in common.

A step takes a graph and gives a copy whose nodes, activations and weights have the same names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import require
from .onnx_export import INPUT
from .ranges import open_session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto


def weights(graph: ModelProto) -> dict[str, np.ndarray]:
    """The float32 initializers of a graph by name, as float64, in which they can be scaled back and forth."""
    onnx = require("onnx", "export")
    floats = (tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    return {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in floats}


def with_weights(graph: ModelProto, changed: Mapping[str, np.ndarray]) -> ModelProto:
    """A copy of a graph in which some initializers have other values, stored as float32."""
    onnx = require("onnx", "export")
    copied = onnx.ModelProto()
    copied.CopyFrom(graph)
    for tensor in copied.graph.initializer:
        if tensor.name in changed:
            values = np.ascontiguousarray(changed[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return copied


def consumers(graph: ModelProto) -> dict[str, list[NodeProto]]:
    """Tensor -> the nodes that take it, in their order, once for each place in which they do."""
    found: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute, or the default where it has none."""
    onnx = require("onnx", "export")
    values = (onnx.helper.get_attribute_value(item) for item in node.attribute if item.name == name)
    return next(values, default)


def observe(graph: ModelProto, tensors: Sequence[str], images: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Run a graph on one image after another.

    Args:
        graph: of batch 1.
        tensors: names of its activations, or of its input.
        images: (N, 3, H, W) float32, preprocessed.

    Yields:
        Of each image the values of the tensors, by name.
    """
    computed = [name for name in dict.fromkeys(tensors) if name != INPUT]
    session = open_session(graph, computed) if computed else None
    for image in images:
        values = dict(zip(computed, session.run(computed, {INPUT: image[None]}), strict=True)) if session else {}
        yield {name: values.get(name, image[None]) for name in tensors}
