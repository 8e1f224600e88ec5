"""Cross-layer equalization: the channels between two convolutions get the same range in the weights of both.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction"
(ICCV 2019), section 4.1. Where a convolution's output goes through ReLU into one other convolution alone, channel i can
be divided by s_i in the first and multiplied by it in the second; s_i = sqrt(r1_i r2_i) / r2_i makes both ranges equal,
and is repeated over all pairs until nothing moves. A block of MobileNetV2 is two such pairs: expansion and depthwise
convolution, depthwise convolution and projection.

ReLU6 does not scale: its bound of 6 would have to become 6 / s_i, another one for each channel, for which no runtime
has an integer kernel. So pairs with ReLU6 between are left alone, and the network computes the same on every image.
With a ``headroom`` they take part as far as the bound allows: a channel that reaches 6 / headroom on calibration
images keeps its scale, and of the others the range, times the headroom, stays below 6. That is exact on images whose
channels stay within the headroom, and not all do: of EfficientNet-Lite0's float32 predictions on other photos than
the 64 calibrated on it changed 3 of 150 with a headroom of 2.

High biases are not absorbed (section 4.1.3): with zero padding before a depthwise convolution that is not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .graph_edit import attribute, consumers, observe, weights, with_weights

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

TOLERANCE = 1e-3  # of a scale: converged
MAX_ROUNDS = 50
MAX_SCALE = 1e4  # of one channel in all, either way: beyond, biases and float32 suffer


@dataclass(frozen=True)
class Pair:
    """Two convolutions with nothing but an activation between.

    Attributes:
        first: name of the weight whose output channels are scaled, (K, C / groups, h, w).
        bias: name of its bias (K,), or "" where there is none.
        second: name of the weight whose input channels are scaled back.
        depthwise: whether the second is (K, 1, h, w), so that its input channels are its output channels.
        tensor: the activation between.
        bound: what the activation is cut at; infinite for ReLU and for none.
    """

    first: str
    bias: str
    second: str
    depthwise: bool
    tensor: str
    bound: float


def equalize(graph: ModelProto, images: np.ndarray, headroom: float | None = None) -> ModelProto:
    """Equalize the ranges of the weights on both sides of each channel.

    Args:
        graph: FP32, batch normalization folded, of batch 1.
        images: (N, 3, H, W) float32, preprocessed calibration images; looked at with a headroom alone, then at least 1.
        headroom: how many times its largest calibration value a channel before ReLU6 may reach; None to leave it alone.

    Returns:
        A graph with other weights and biases that computes the same. Without any pair it is an equal graph.
    """
    pairs = [pair for pair in find_pairs(graph) if headroom is not None or np.isinf(pair.bound)]
    values = weights(graph)
    limits = _limits(graph, pairs, images, headroom or 1.0)
    total = {pair.tensor: np.ones(len(values[pair.first])) for pair in pairs}
    for _ in range(MAX_ROUNDS):
        moved = 0.0
        for pair in pairs:
            wanted = total[pair.tensor] / pair_scales(values[pair.first], values[pair.second], pair.depthwise)
            low, high = limits[pair.tensor]
            gain = np.clip(wanted, low, high) / total[pair.tensor]  # (K,): 1 / s of the paper
            _scale(values, pair, gain)
            total[pair.tensor] *= gain
            moved = max(moved, float(np.abs(np.log(gain)).max()))
        if moved < TOLERANCE:
            break
    touched = {name for pair in pairs for name in (pair.first, pair.bias, pair.second) if name}
    return with_weights(graph, {name: values[name] for name in touched})


def find_pairs(graph: ModelProto) -> list[Pair]:
    """The pairs of convolutions of a graph, in its order; where a tensor goes to two places, there is none."""
    uses = consumers(graph)
    values = weights(graph)
    outputs = {output.name for output in graph.graph.output}
    found = []
    for node in graph.graph.node:
        if not _is_convolution(node, values, uses):
            continue
        tensor, bound = node.output[0], float("inf")
        after = _only(uses, tensor, outputs)
        if after is not None and after.op_type in ("Relu", "Clip"):
            tensor, bound = after.output[0], _upper_bound(after, values)
            after = _only(uses, tensor, outputs)
        if after is None or not bound > 0 or not _is_convolution(after, values, uses):
            continue
        groups, second = attribute(after, "group", 1), values[after.input[1]]
        depthwise = groups > 1 and groups == len(second) and second.shape[1] == 1
        if after.input[0] != tensor or (groups > 1 and not depthwise):
            continue
        bias = node.input[2] if len(node.input) > 2 else ""
        found.append(Pair(node.input[1], bias, after.input[1], depthwise, tensor, bound))
    return found


def pair_scales(first: np.ndarray, second: np.ndarray, depthwise: bool) -> np.ndarray:
    """Scales (K,): s = sqrt(r1 r2) / r2, equation 11 of the paper; 1 for a channel that one side does not use.

    Args:
        first: (K, C, h, w), whose output channels are meant.
        second: (L, K, h, w), whose input channels are meant, or (K, 1, h, w) where it is depthwise.
        depthwise: whether it is.
    """
    first_range = np.abs(first).max(axis=(1, 2, 3))
    second_range = np.abs(second).max(axis=(1, 2, 3) if depthwise else (0, 2, 3))
    used = (first_range > 0) & (second_range > 0)
    product = np.sqrt(first_range) * np.sqrt(second_range)
    return np.divide(product, second_range, out=np.ones_like(product), where=used)


def _scale(values: dict[str, np.ndarray], pair: Pair, gain: np.ndarray) -> None:
    """Multiply the channels of a pair by ``gain`` (K,) in the first convolution, divide them in the second."""
    values[pair.first] = values[pair.first] * gain[:, None, None, None]
    if pair.bias:
        values[pair.bias] = values[pair.bias] * gain
    places = (slice(None), None, None, None) if pair.depthwise else (None, slice(None), None, None)
    values[pair.second] = values[pair.second] / gain[places]


def _limits(
    graph: ModelProto, pairs: list[Pair], images: np.ndarray, headroom: float
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each pair's tensor the smallest and the largest gain (K,) that leaves the outputs as they are."""
    bounded = {pair.tensor: pair.bound for pair in pairs if np.isfinite(pair.bound)}
    peaks = {tensor: np.zeros(1) for tensor in bounded}
    for seen in observe(graph, list(bounded), images) if bounded else ():
        for tensor, activation in seen.items():
            peaks[tensor] = np.maximum(peaks[tensor], activation.max(axis=(0, 2, 3)))
    limits = {pair.tensor: (np.full(1, 1 / MAX_SCALE), np.full(1, MAX_SCALE)) for pair in pairs}
    for tensor, bound in bounded.items():
        room = bound / np.maximum(headroom * peaks[tensor], bound / MAX_SCALE)
        free = room > 1
        limits[tensor] = np.where(free, 1 / MAX_SCALE, 1.0), np.where(free, room, 1.0)
    return limits


def _is_convolution(node: NodeProto, values: dict[str, np.ndarray], uses: dict[str, list[NodeProto]]) -> bool:
    """Whether it is a 2-d convolution whose weight and bias are constants of its own."""
    return (
        node.op_type == "Conv"
        and all(name in values and len(uses[name]) == 1 for name in node.input[1:])
        and values[node.input[1]].ndim == 4
    )


def _only(uses: dict[str, list[NodeProto]], tensor: str, outputs: set[str]) -> NodeProto | None:
    """The one node that takes a tensor, or None where it is an output or more than one does."""
    after = uses.get(tensor, [])
    return after[0] if len(after) == 1 and tensor not in outputs else None


def _upper_bound(activation: NodeProto, values: dict[str, np.ndarray]) -> float:
    """What a ReLU or a clip at 0 from below lets pass at most; 0 where it does not scale."""
    if activation.op_type == "Relu":
        return float("inf")
    low, high = (float(values[name]) if name in values else np.nan for name in [*activation.input[1:3], "", ""][:2])
    return high if low == 0 and high > 0 else 0.0
