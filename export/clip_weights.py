"""The scale of INT8 weights by what it costs at the output, instead of by the largest weight.

A channel's scale is its largest weight / 127, and a weight may be large because what it multiplies hardly ever moves:
the linear probe of a backbone with a nearly dead feature had one of 80 among others of 0.1, all of which rounded to 0.
So the weights of each output channel are clipped where the mean square of d x is smallest: d is what clipping and
rounding change in them, x the channel's inputs on calibration images. That is what Lin et al., "AWQ" (MLSys 2024),
minimize when they search for a clipping range; here each channel has its own.

The mean of d x does not count where the channel has a bias: :mod:`.bias_correction` takes it back.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from .bias_correction import find_biases
from .graph_edit import observe, weights, with_weights
from .rounding import Layer, find_layers, inputs_of, round_to_nearest

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_IMAGES = 256  # each is one input of the classifier
SAMPLES = 1024  # inputs of a layer that are looked at, spread over the images
RATIOS = 0.8 ** np.arange(31)  # of the largest weight, down to a thousandth
GAIN = 0.9  # a clip must leave at most so much of the error: what hardly matters stays as it was


def clip_weights(
    graph: ModelProto, images: np.ndarray, float_nodes: Collection[str] = (), *, correctable: bool = True
) -> ModelProto:
    """Clip the weights of the output channels that INT8 keeps better so.

    Args:
        graph: FP32, of batch 1.
        images: (N, 3, H, W) float32, preprocessed calibration images; no more are used than ``MAX_IMAGES``.
        float_nodes: names of operators that will not be quantized, whose weights stay as they are.
        correctable: biases will be corrected afterwards.

    Returns:
        A graph with smaller weights where that serves, else an equal one.
    """
    values = weights(graph)
    layers = [layer for layer in find_layers(graph, values) if layer.node.name not in float_nodes]
    corrected = find_biases(graph) if correctable else {}
    changed = {}
    for layer, inputs in zip(layers, _sample_inputs(graph, layers, values, images[:MAX_IMAGES]), strict=True):
        rows = layer.grouped(values[layer.weight])
        if layer.node.name in corrected:
            inputs -= inputs.mean(axis=1, keepdims=True)
        clipped = clip_rows(rows, inputs)
        if not np.array_equal(clipped, rows):
            changed[layer.weight] = layer.ungrouped(clipped, values[layer.weight].shape)
    return with_weights(graph, changed)


def clip_rows(rows: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Clip each output's weights where that makes the error after rounding smallest.

    Args:
        rows: (groups, outputs, K) float64 weights.
        inputs: (groups, n, K) float32, what they are multiplied by.

    Returns:
        The weights, of the same shape.
    """
    largest = np.abs(rows).max(axis=2, keepdims=True)
    best, bounds = GAIN * _errors(round_to_nearest(rows), rows, inputs), largest[..., 0]
    for ratio in RATIOS[1:]:
        clipped = np.clip(rows, -ratio * largest, ratio * largest)
        errors = _errors(round_to_nearest(clipped), rows, inputs)
        better = errors < best
        if not better.any() and (_errors(clipped, rows, inputs) >= best).all():
            break  # what a bound cuts off costs too much even without the rounding, and a smaller one cuts more
        best, bounds = np.where(better, errors, best), np.where(better, ratio * largest[..., 0], bounds)
    return np.clip(rows, -bounds[..., None], bounds[..., None])


def _errors(changed: np.ndarray, rows: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Mean square of what changed weights do to each output, (groups, outputs)."""
    changes = (changed - rows).astype(np.float32)
    return np.square(inputs @ changes.transpose(0, 2, 1)).mean(axis=1, dtype=np.float64)


def _sample_inputs(
    graph: ModelProto, layers: list[Layer], values: dict[str, np.ndarray], images: np.ndarray
) -> list[np.ndarray]:
    """Inputs (groups, n, K) of each layer, at some positions of each image, drawn by a fixed seed."""
    rng = np.random.default_rng(0)
    positions = -(-SAMPLES // len(images))
    found: list[list[np.ndarray]] = [[] for _ in layers]
    for seen in observe(graph, [layer.node.input[0] for layer in layers], images):
        for layer, parts in zip(layers, found, strict=True):
            shape = values[layer.weight].shape
            parts.append(inputs_of(layer, shape, seen[layer.node.input[0]], rng, positions))
    return [np.concatenate(parts, axis=1) for parts in found]
