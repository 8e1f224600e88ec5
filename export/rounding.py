"""Weights rounded to the grid of INT8 so that a layer's output changes least, instead of each weight to the nearest.

What a layer makes of the rounding errors d of its weights is d x, whose mean square d H d' depends on how its inputs x
vary together, H = E[x x']. So the weights are rounded one after another, and those still to come make up for the error
of those before: Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ" (ICLR 2023), section 3, after the Optimal Brain
Surgeon. It was made for 3 and 4 bits, but a depthwise convolution, whose 9 inputs are neighbours in the image and
almost equal, gains from it at 8: errors of its weights that do not cancel add up.

The mean of d x is taken out of the bias instead, so H is the covariance. The largest weight of an output channel stays
as it is: whoever writes INT8 takes the scale from it and finds every weight on the grid. One pass over a few images of
the FP32 network is all that is needed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .graph_edit import attribute, consumers, observe, weights, with_weights

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LEVELS = 127  # of a weight, either way
MAX_IMAGES = 64
POSITIONS = 49  # of an image that are looked at in each layer
DAMPING = 0.01  # of the mean variance, added to every variance
MAX_INPUTS = 1280  # of an output: with more, errors average out, and the time grows with the cube
BLOCK = 64  # weights after which the error is passed on to all others at once


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or matrix product with constant weights.

    Attributes:
        node: the operator.
        weight: name of its weights.
        bias: name of its bias, or "" where it has none of its own.
        groups: of a convolution, else 1.
        inputs: number of inputs of one output, K.
        transposed: the weights are (K, outputs) instead of (outputs, K).
    """

    node: NodeProto
    weight: str
    bias: str
    groups: int
    inputs: int
    transposed: bool

    def grouped(self, values: np.ndarray) -> np.ndarray:
        """Weights as (groups, outputs / groups, K)."""
        rows = values.T if self.transposed else values
        return rows.reshape(self.groups, len(rows) // self.groups, self.inputs)

    def ungrouped(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What :meth:`grouped` gave, as weights of the given shape."""
        return rows.reshape(-1, self.inputs).T if self.transposed else rows.reshape(shape)


@dataclass(eq=False)
class Moments:
    """Sums over the inputs that a layer was seen with.

    Attributes:
        count: number of inputs.
        first: sum of x, (groups, K).
        second: sum of x x', (groups, K, K); 0 where it is not needed.
    """

    count: int = 0
    first: np.ndarray = field(default_factory=lambda: np.zeros(1))
    second: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def add(self, inputs: np.ndarray, wide: bool) -> None:
        """Add inputs (groups, n, K); of a wide layer only their sum."""
        self.count += inputs.shape[1]
        self.first = self.first + inputs.sum(axis=1, dtype=np.float64)
        if not wide:
            self.second = self.second + inputs.transpose(0, 2, 1) @ inputs


def round_weights(graph: ModelProto, images: np.ndarray, float_nodes: Collection[str] = ()) -> ModelProto:
    """Round all weights to the grid of INT8, symmetric, one scale for each output channel.

    Args:
        graph: FP32, of batch 1.
        images: (N, 3, H, W) float32, preprocessed calibration images; no more are used than ``MAX_IMAGES``.
        float_nodes: names of operators that will not be quantized, whose weights stay as they are.

    Returns:
        A graph whose weights are multiples of their scales, with biases that take the mean error back.
    """
    values = weights(graph)
    layers = [layer for layer in find_layers(graph, values) if layer.node.name not in float_nodes]
    moments = measure_moments(graph, layers, values, images[:MAX_IMAGES])
    changed = {}
    for layer, seen in zip(layers, moments, strict=True):
        rows = layer.grouped(values[layer.weight])
        mean = seen.first / seen.count
        if layer.inputs > MAX_INPUTS:
            rounded = round_to_nearest(rows)
        else:
            second = seen.second / seen.count
            taken = mean[:, :, None] * mean[:, None, :] if layer.bias else 0.0
            rounded = round_with_feedback(rows, second - taken)
        changed[layer.weight] = layer.ungrouped(rounded, values[layer.weight].shape)
        if layer.bias:
            shift = np.einsum("grk,gk->gr", rounded - rows, mean).ravel()
            changed[layer.bias] = values[layer.bias] - shift
    return with_weights(graph, changed)


def find_layers(graph: ModelProto, values: dict[str, np.ndarray]) -> list[Layer]:
    """The layers whose weights serve them alone, in the graph's order."""
    uses = consumers(graph)
    own = {name for name in values if len(uses.get(name, ())) == 1}
    found = []
    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in own:
            continue
        shape = values[node.input[1]].shape
        bias = node.input[2] if len(node.input) > 2 and node.input[2] in own else ""
        if node.op_type == "Conv" and len(shape) == 4 and set(attribute(node, "dilations", [1])) == {1}:
            groups, inputs, transposed = attribute(node, "group", 1), int(np.prod(shape[1:])), False
        elif node.op_type != "Conv" and len(shape) == 2 and not attribute(node, "transA", 0):
            transposed = not attribute(node, "transB", 0)
            groups, inputs = 1, shape[0] if transposed else shape[1]
        else:
            continue
        found.append(Layer(node, node.input[1], bias, groups, inputs, transposed))
    return found


def measure_moments(
    graph: ModelProto, layers: list[Layer], values: dict[str, np.ndarray], images: np.ndarray
) -> list[Moments]:
    """Mean and second moments of the inputs of each layer, at some positions of each image, drawn by a fixed seed."""
    rng = np.random.default_rng(0)
    moments = [Moments() for _ in layers]
    for seen in observe(graph, [layer.node.input[0] for layer in layers], images):
        for layer, sums in zip(layers, moments, strict=True):
            shape = values[layer.weight].shape
            sums.add(inputs_of(layer, shape, seen[layer.node.input[0]], rng), layer.inputs > MAX_INPUTS)
    return moments


def inputs_of(
    layer: Layer,
    shape: tuple[int, ...],
    activation: np.ndarray,
    rng: np.random.Generator,
    positions: int = POSITIONS,
) -> np.ndarray:
    """What a layer multiplies by its weights at some positions, drawn at random.

    Args:
        layer: of which this is the input.
        shape: of its weights.
        activation: (1, C, H, W) for a convolution, else (..., K); float32.
        rng: draws the positions.
        positions: how many at most.

    Returns:
        (groups, n, K), n at most ``positions``.
    """
    if layer.node.op_type != "Conv":
        rows = activation.reshape(-1, layer.inputs)
        return rows[rng.permutation(len(rows))[:positions]][None]
    top, left, bottom, right = attribute(layer.node, "pads", [0, 0, 0, 0])
    padded = np.pad(activation[0], ((0, 0), (top, bottom), (left, right)))
    steps = attribute(layer.node, "strides", [1, 1])
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape[2:], axis=(1, 2))  # (C, H, W, h, w)
    windows = windows[:, :: steps[0], :: steps[1]]
    rows, columns = np.divmod(rng.permutation(windows.shape[1] * windows.shape[2])[:positions], windows.shape[2])
    picked = windows[:, rows, columns].reshape(layer.groups, shape[1], len(rows), -1)
    return picked.transpose(0, 2, 1, 3).reshape(layer.groups, len(rows), layer.inputs)


def scales_of(rows: np.ndarray) -> np.ndarray:
    """The scale of each output, its largest weight / 127; 1 where all are 0. (..., K) -> (..., 1)."""
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    return np.where(largest > 0, largest / LEVELS, 1.0)


def round_to_nearest(rows: np.ndarray) -> np.ndarray:
    """Weights (groups, outputs, K) on the grid, each by itself."""
    scales = scales_of(rows)
    return np.rint(rows / scales) * scales


def round_with_feedback(rows: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Weights on the grid, so that d H d' of their errors d is small.

    Args:
        rows: (groups, outputs, K) float64.
        moments: H, (groups, K, K), symmetric and not negative.

    Returns:
        Multiples of :func:`scales_of`, of the same shape; the largest weight of each output is the same.
    """
    num_inputs = rows.shape[2]
    scales, largest = scales_of(rows)[..., 0], np.abs(rows).argmax(axis=2)
    mean_variance = np.maximum(np.einsum("gkk->gk", moments).mean(axis=1), np.finfo(np.float32).tiny)
    damped = moments + DAMPING * mean_variance[:, None, None] * np.eye(num_inputs)
    # The upper Cholesky factor of the inverse: its row k tells how the weights after k make up for an error in k.
    upper = np.linalg.cholesky(np.linalg.inv(damped)).transpose(0, 2, 1)
    left, rounded = rows.copy(), np.empty_like(rows)
    for start in range(0, num_inputs, BLOCK):
        stop = min(start + BLOCK, num_inputs)
        errors = np.empty((*rows.shape[:2], stop - start))
        for k in range(start, stop):
            levels = np.clip(np.rint(left[:, :, k] / scales), -LEVELS, LEVELS)
            levels = np.where(largest == k, np.sign(rows[:, :, k]) * LEVELS, levels)
            rounded[:, :, k] = levels * scales
            error = (left[:, :, k] - rounded[:, :, k]) / upper[:, k, k, None]
            left[:, :, k + 1 : stop] -= error[:, :, None] * upper[:, None, k, k + 1 : stop]
            errors[:, :, k - start] = error
        left[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    return rounded
