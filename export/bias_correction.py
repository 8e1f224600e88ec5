"""Bias correction: quantization moves the mean of a channel; its bias takes the mean error back.

Empirical, as in Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and
Bias Correction" (ICCV 2019), section 4.2 and appendix D: from the first layer to the last, the mean of each channel
before the activation is compared on calibration images, where all layers before are quantized and corrected already.
The quantized network is run once: each stretch of it starts from the tensors that the one before left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.errors import require
from .onnx_export import INPUT
from .ranges import WEIGHTED, open_session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MAX_IMAGES = 64
MAX_BYTES = 512 << 20  # of tensors that wait between two stretches


def correct_biases(
    graph: ModelProto,
    quantized: ModelProto,
    images: np.ndarray,
    reference: ModelProto | None = None,
    only: Collection[str] | None = None,
) -> ModelProto:
    """Correct the biases of an FP32 graph for what its quantized form does to the means.

    Args:
        graph: the FP32 graph, of batch 1.
        quantized: the same with Q/DQ; its weighted operators have the same names.
        images: (N, 3, H, W) float32, preprocessed; no more are used than ``MAX_IMAGES``.
        reference: the FP32 graph that has the right means, where ``graph`` has other weights than it began with.
        only: names of the operators whose biases are corrected; None for all.

    Returns:
        The graph with other biases. An operator without a bias of its own is left as it is.
    """
    biases = find_biases(graph)
    nodes = [node for node in graph.graph.node if node.name in biases and (only is None or node.name in only)]
    if not nodes:
        return graph
    images = images[: min(MAX_IMAGES, max(1, MAX_BYTES // _largest_cut(graph)))]
    session = open_session(reference or graph, [node.output[0] for node in nodes])
    expected = {node.name: np.zeros(1) for node in nodes}
    for image in images:
        outputs = session.run(None, {INPUT: image[None]})
        for node, output in zip(nodes, outputs, strict=True):
            expected[node.name] = expected[node.name] + _channel_means(output, node) / len(images)
    return _with_biases(graph, {biases[name]: shift for name, shift in _shifts(quantized, images, expected).items()})


def find_biases(graph: ModelProto) -> dict[str, str]:
    """Weighted operator -> the initializer that is its bias and nobody else's."""
    constants = {tensor.name: len(tensor.dims) for tensor in graph.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    found = {}
    for node in graph.graph.node:
        if node.op_type not in WEIGHTED or node.input[1] not in constants:
            continue
        if node.op_type == "MatMul":
            after = consumers.get(node.output[0], [])
            candidates = list(after[0].input) if len(after) == 1 and after[0].op_type == "Add" else []
        else:
            candidates = list(node.input[2:3])
        for name in candidates:
            if constants.get(name) == 1 and len(consumers[name]) == 1:
                found[node.name] = name
    return found


def _shifts(quantized: ModelProto, images: np.ndarray, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each bias lacks, (channels,), given the means of the FP32 graph."""
    onnx = require("onnx", "export")
    waiting = list(quantized.graph.node)
    held = {INPUT: [image[None] for image in images]}
    shifts = {}
    for target in [node for node in quantized.graph.node if node.name in expected]:
        stretch, waiting = _split(waiting, target, held)
        wanted = {name for node in waiting for name in node.input}
        outputs = [name for node in stretch for name in node.output if name in wanted or name == target.output[0]]
        inputs = sorted({name for node in stretch for name in node.input if name in held})
        part = onnx.ModelProto()
        part.CopyFrom(quantized)
        part.graph.ClearField("node")
        part.graph.node.extend(stretch)
        part.graph.ClearField("input")
        part.graph.input.extend(
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(held[name][0].dtype), held[name][0].shape
            )
            for name in inputs
        )
        _keep_used_constants(part)
        session = open_session(part, outputs)
        computed = [session.run(outputs, {name: held[name][index] for name in inputs}) for index in range(len(images))]
        held |= {name: [values[place] for values in computed] for place, name in enumerate(outputs)}
        means = [_channel_means(values, target) for values in held[target.output[0]]]
        shift = expected[target.name] - np.mean(means, axis=0)
        shifts[target.name] = shift
        shape = [-1, *[1] * (held[target.output[0]][0].ndim - 2)] if target.op_type == "Conv" else [-1]
        held[target.output[0]] = [
            (values + shift.reshape(shape)).astype(np.float32) for values in held[target.output[0]]
        ]
        held = {name: values for name, values in held.items() if name in wanted}
    return shifts


def _split(waiting: list[NodeProto], target: NodeProto, held: Iterable[str]) -> tuple[list[NodeProto], list[NodeProto]]:
    """The nodes that a target needs, itself among them, given the tensors that are held; and the others, in order."""
    needed = {*target.output}
    stretch = []
    for node in reversed(waiting):
        if needed.intersection(node.output):
            stretch.append(node)
            needed.update(set(node.input).difference(held))
    chosen = {id(node) for node in stretch}
    return stretch[::-1], [node for node in waiting if id(node) not in chosen]


def _keep_used_constants(part: ModelProto) -> None:
    """Drop the initializers that no node takes, and the shapes of tensors, in place."""
    used = {name for node in part.graph.node for name in node.input}
    kept = [tensor for tensor in part.graph.initializer if tensor.name in used]
    part.graph.ClearField("initializer")
    part.graph.initializer.extend(kept)
    part.graph.ClearField("value_info")


def _channel_means(output: np.ndarray, node: NodeProto) -> np.ndarray:
    """Means (channels,) float64 of one image's output."""
    channel = 1 if node.op_type == "Conv" else output.ndim - 1
    return output.mean(axis=tuple(axis for axis in range(output.ndim) if axis != channel), dtype=np.float64)


def _largest_cut(graph: ModelProto) -> int:
    """Bytes of an image's three largest activations, which is what waits between two stretches of usual networks."""
    onnx = require("onnx", "export")
    infos = onnx.shape_inference.infer_shapes(graph).graph.value_info
    sizes = [4 * math.prod(side.dim_value or 1 for side in info.type.tensor_type.shape.dim) for info in infos]
    return max(1, sum(sorted(sizes)[-3:]))


def _with_biases(graph: ModelProto, shifts: dict[str, np.ndarray]) -> ModelProto:
    """A copy of a graph of which some initializers are shifted."""
    onnx = require("onnx", "export")
    corrected = onnx.ModelProto()
    corrected.CopyFrom(graph)
    for tensor in corrected.graph.initializer:
        if tensor.name in shifts:
            shifted = onnx.numpy_helper.to_array(tensor) + shifts[tensor.name].astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(shifted.astype(np.float32), tensor.name))
    return corrected
