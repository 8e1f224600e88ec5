"""SmoothQuant: outliers of a layer normalization's channels move into the weights that take them.

Xiao, Lin, Seznec, Wu, Demouth and Han, "SmoothQuant" (ICML 2023), equations 3 and 4: channel j of the activations is
divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), row j of the weights multiplied by it. After a layer
normalization the division folds into its scale and bias, so nothing is added to the graph and it computes the same.
That serves the two matrix products of a transformer's block whose inputs have outliers: the one that makes query, key
and value, and the first of the MLP. The other two follow no layer normalization: attention and GELU lie between.

``alpha`` is chosen for each normalization by the error that 8 bits then make in its products on calibration images,
among no smoothing at all and ``ALPHAS``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.errors import require
from .graph_edit import attribute, consumers, observe, weights, with_weights
from .rounding import round_to_nearest

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MAX_IMAGES = 64
TOKENS = 32  # of an image that the error is measured on
MAX_SCALE = 1e4


@dataclass(frozen=True)
class Smoothable:
    """A layer normalization all of whose outputs go into matrix products with constant weights.

    Attributes:
        scale: name of its weight (C,).
        bias: name of its bias (C,), or "" where it has none.
        tensor: its output, (..., C).
        products: names of the weights, and whether they are (K, C) instead of (C, K).
    """

    scale: str
    bias: str
    tensor: str
    products: tuple[tuple[str, bool], ...]


def smooth(graph: ModelProto, images: np.ndarray, alpha: float | None = None) -> ModelProto:
    """Even out the channels behind layer normalizations.

    Args:
        graph: FP32, of batch 1.
        images: (N, 3, H, W) float32, preprocessed calibration images; no more are used than ``MAX_IMAGES``.
        alpha: how much of the range moves into the weights, 0..1; None to choose it.

    Returns:
        A graph with other weights that computes the same. Without layer normalization it is an equal graph.
    """
    found = find_smoothable(graph)
    values = weights(graph)
    if not found:
        return with_weights(graph, {})
    peaks, tokens = _look_at(graph, [norm.tensor for norm in found], images[:MAX_IMAGES])
    changed = {}
    for norm in found:
        rows = np.concatenate([_rows(values[name], transposed) for name, transposed in norm.products])  # (K, C)
        x = tokens[norm.tensor]
        scales = (
            choose_scales(x, peaks[norm.tensor], rows)
            if alpha is None
            else smoothing_scales(peaks[norm.tensor], rows, alpha)
        )
        for name in filter(None, (norm.scale, norm.bias)):
            changed[name] = values[name] / scales
        for name, transposed in norm.products:
            changed[name] = values[name] * (scales if transposed else scales[:, None])
    return with_weights(graph, changed)


def smoothing_scales(peaks: np.ndarray, rows: np.ndarray, alpha: float) -> np.ndarray:
    """Scales s (C,), equation 4 of the paper; 1 for a channel that is 0 or is not used.

    Args:
        peaks: max|X_j| (C,).
        rows: all weights that take the channels, (K, C).
        alpha: 0..1.
    """
    largest = np.abs(rows).max(axis=0)
    used = (peaks > 0) & (largest > 0)
    scales = np.ones(len(peaks))
    scales[used] = peaks[used] ** alpha / largest[used] ** (1 - alpha)
    return np.clip(scales, 1 / MAX_SCALE, MAX_SCALE)


def choose_scales(tokens: np.ndarray, peaks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The scales (C,) with which 8 bits change the products least: those of one of ``ALPHAS``, or ones.

    Args:
        tokens: X, (n, C).
        peaks: max|X_j| (C,), over more tokens than these.
        rows: all weights that take the channels, (K, C).
    """
    candidates = [np.ones(len(peaks)), *(smoothing_scales(peaks, rows, alpha) for alpha in ALPHAS)]
    exact = tokens @ rows.T
    errors = [np.square(_int8_product(tokens / scales, rows * scales) - exact).sum() for scales in candidates]
    return candidates[int(np.argmin(errors))]


def _int8_product(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """X W' (n, K) with both rounded to 8 bits: X by one range with a zero point, W symmetric by output."""
    low, high = min(tokens.min(), 0.0), max(tokens.max(), 0.0)
    step = (high - low) / 255 or 1.0
    return (np.rint(tokens / step) * step) @ round_to_nearest(rows[None])[0].T


def _look_at(
    graph: ModelProto, tensors: list[str], images: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of each tensor (..., C) the largest magnitudes by channel (C,), and some tokens (n, C) drawn by a fixed seed."""
    rng = np.random.default_rng(0)
    peaks: dict[str, np.ndarray] = {}
    tokens: dict[str, list[np.ndarray]] = {tensor: [] for tensor in tensors}
    for seen in observe(graph, tensors, images):
        for tensor, activation in seen.items():
            rows = activation.reshape(-1, activation.shape[-1]).astype(np.float64)
            peaks[tensor] = np.maximum(peaks.get(tensor, 0.0), np.abs(rows).max(axis=0))
            tokens[tensor].append(rows[rng.permutation(len(rows))[:TOKENS]])
    return peaks, {tensor: np.concatenate(parts) for tensor, parts in tokens.items()}


def find_smoothable(graph: ModelProto) -> list[Smoothable]:
    """The layer normalizations of a graph that can be smoothed, in its order."""
    onnx = require("onnx", "export")
    uses = consumers(graph)
    own = {name: value for name, value in weights(graph).items() if len(uses.get(name, ())) == 1}
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    shapes = {
        info.name: [side.dim_value for side in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.output)
    }
    outputs = {output.name for output in graph.graph.output}
    found = []
    for node in graph.graph.node:
        if node.op_type != "LayerNormalization" or any(name not in own for name in node.input[1:] if name):
            continue
        tensor = node.output[0]
        channels = own[node.input[1]].size
        if shapes.get(tensor, [0])[-1] != channels or attribute(node, "axis", -1) not in (-1, len(shapes[tensor]) - 1):
            continue
        products = [] if tensor in outputs else _products(uses, shapes, own, outputs, tensor, channels)
        if products:
            bias = node.input[2] if len(node.input) > 2 else ""
            found.append(Smoothable(node.input[1], bias, tensor, tuple(products)))
    return found


def _products(
    uses: dict[str, list[NodeProto]],
    shapes: dict[str, list[int]],
    own: dict[str, np.ndarray],
    outputs: set[str],
    tensor: str,
    channels: int,
) -> list[tuple[str, bool]]:
    """The weights of the products that a tensor goes into, past reshapes; [] where it goes anywhere else too."""
    products: list[tuple[str, bool]] = []
    for node in uses.get(tensor, []):
        output = node.output[0]
        if node.op_type == "Reshape" and shapes.get(output, [0])[-1] == channels and output not in outputs:
            further = _products(uses, shapes, own, outputs, output, channels)
        else:
            further = _product(node, tensor, own)
        if not further:
            return []
        products += further
    return products


def _product(node: NodeProto, tensor: str, own: dict[str, np.ndarray]) -> list[tuple[str, bool]]:
    """The weights by which a node multiplies a tensor (..., C), and whether they are (K, C); [] where it does not."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] != tensor or attribute(node, "transA", 0):
        return []
    weight = node.input[1]
    return [(weight, bool(attribute(node, "transB", 0)))] if weight in own and own[weight].ndim == 2 else []


def _rows(values: np.ndarray, transposed: bool) -> np.ndarray:
    """Weights as (K, C)."""
    return values if transposed else values.T
