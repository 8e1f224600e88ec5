"""Which layers of an INT8 network stay float, so that it keeps a stated budget and loses little speed.

What INT8 costs is mostly the rounding of activations, and a tensor is spared it only where all that make and take it
stay float. So the tensors are judged, each rounded alone in an otherwise float network. Errors of different tensors are
taken to add up, as independent ones do in their squares.

What a float layer costs is its multiply-accumulates; and where float and integers meet, values change their form. In
ONNX Runtime that is dear: scattered layers with a tenth of EfficientNet-Lite0's multiply-accumulates in float took 49 %
more time than none, the same share at the network's beginning 10 %, and its first two layers, which make half of all
error, no time at all. So layers are left in float in the order of the error that this takes away for its price, one
tensor's layers at a time, or all from the beginning on to some layer, or from some layer on to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.errors import UserError, require
from ..runtime.macs import convolution_macs, matmul_macs
from ..runtime.progress import say, track
from .float_layers import FUSED
from .graph_edit import consumers
from .onnx_export import INPUT
from .prepare import Prepared
from .quantize import INTEGER_OPS
from .ranges import WEIGHTED, is_transformer
from .sensitivity import DIALECT, run_graph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

CROSSING = 64  # multiply-accumulates that INT8 must save to pay for one value that changes between integers and float
OUTPUT_SUFFIX = "_QuantizeLinear_Input"  # that ORT's quantizer gives a network's output before it is rounded
LEAST_PRICE = 1e-3  # of all multiply-accumulates
STEP = 0.1  # of all multiply-accumulates: the most that a set is dearer than the one before, where there is such a set


@dataclass(frozen=True)
class Rounding:
    """One rounding of activations.

    Attributes:
        tensors: that share a scale, as what goes into a pooling and what comes out.
        layers: names of the nodes that make and take them, and run on integers.
        noise: power of the error that it makes in the outputs, over their power, when it is the only one.
        values: number of values of the largest tensor.
        outside: whether it is the network's input, which comes in float.
    """

    tensors: tuple[str, ...]
    layers: frozenset[str]
    noise: float
    values: int
    outside: bool


def measure_roundings(prepared: Prepared, images: np.ndarray) -> list[Rounding]:
    """What the rounding of each activation costs, in the graph's order.

    Args:
        prepared: what INT8 is written from, with no layer in float and the weights as they were.
        images: (N, 3, H, W) float32, preprocessed.
    """
    onnx = require("onnx", "export")
    graph, quantized = prepared.graph, prepared.quantize(DIALECT)
    reference = run_graph(graph, images)
    power = float(np.square(reference, dtype=np.float64).sum()) or 1.0
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    scales: dict[str, list[NodeProto]] = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            scales.setdefault(node.input[1], []).append(node)
    shapes = shapes_of(graph)
    found = []
    for nodes in track(list(scales.values()), "Rounding one activation at a time"):
        tensors = tuple(node.input[0].removesuffix(OUTPUT_SUFFIX) for node in nodes)
        rounded = onnx.ModelProto()
        rounded.CopyFrom(graph)
        rounded.graph.initializer.extend(stored[name] for name in nodes[0].input[1:3])
        _round(rounded, dict(zip(tensors, nodes, strict=True)))
        noise = float(np.square(run_graph(rounded, images) - reference, dtype=np.float64).sum()) / power
        values = max(math.prod(shapes.get(name, [1])) for name in tensors)
        found.append(Rounding(tensors, integer_layers(graph, tensors), noise, values, INPUT in tensors))
    return found


def _round(graph: ModelProto, roundings: Mapping[str, NodeProto]) -> None:
    """Let all that take some tensors take them rounded, in place; who reads an output of the network too."""
    onnx = require("onnx", "export")
    nodes = list(graph.graph.node)
    for name, rounding in roundings.items():
        place = next((place for place, node in enumerate(nodes) if name in node.output), -1)
        plain, rounded = name, f"{name}_rounded"
        if name in {output.name for output in graph.graph.output}:
            plain, rounded = f"{name}_plain", name
            made = list(nodes[place].output)
            nodes[place].output[made.index(name)] = plain
        for node in nodes:
            taken = [rounded if each == name else each for each in node.input]
            node.input[:] = taken
        scale = rounding.input[1:3]
        nodes[place + 1 : place + 1] = [
            onnx.helper.make_node("QuantizeLinear", [plain, *scale], [f"{name}_integers"]),
            onnx.helper.make_node("DequantizeLinear", [f"{name}_integers", *scale], [rounded]),
        ]
    graph.graph.ClearField("node")
    graph.graph.node.extend(nodes)


def integer_layers(graph: ModelProto, tensors: Sequence[str]) -> frozenset[str]:
    """Names of the nodes that make or take some tensors and that ``u8`` quantizes.

    Activations that are part of a layer are not among them: they are float where it is.
    """
    ops = WEIGHTED if is_transformer(graph) else INTEGER_OPS
    producers = {name: node for node in graph.graph.node for name in node.output}
    uses = consumers(graph)
    layers = set()
    for tensor in tensors:
        maker = producers.get(tensor)
        while maker is not None and maker.op_type in FUSED:
            maker = producers.get(maker.input[0])
        takers = [node for node in uses.get(tensor, ()) if node.op_type not in FUSED]
        layers |= {node.name for node in (maker, *takers) if node is not None and node.op_type in ops}
    return frozenset(layers)


def order_float_layers(graph: ModelProto, roundings: Sequence[Rounding]) -> list[tuple[str, ...]]:
    """Ever larger sets of layers to leave in float, from none to all that some rounding concerns.

    Args:
        graph: the FP32 graph.
        roundings: of its activations.

    Returns:
        Sets of names, each with all of the one before, in the graph's order.
    """
    layers = frozenset[str]().union(*(rounding.layers for rounding in roundings))
    in_order = [node.name for node in graph.graph.node if node.name in layers]
    ends = (
        *(in_order[:place] for place in range(len(in_order))),
        *(in_order[place:] for place in range(len(in_order))),
    )
    candidates = {*(rounding.layers for rounding in roundings), *map(frozenset, ends)}
    macs = macs_of(graph)
    chosen, sets = frozenset[str](), [tuple[str, ...]()]
    while chosen < layers:
        paid, freed = float_price(roundings, macs, chosen), freed_noise(roundings, chosen)
        dearer = {
            grown: max(float_price(roundings, macs, grown) - paid, LEAST_PRICE)
            for grown in {chosen | candidate for candidate in candidates} - {chosen}
        }
        gains = {grown: (freed_noise(roundings, grown) - freed) / price for grown, price in dearer.items()}
        near = [grown for grown, price in dearer.items() if price <= STEP and gains[grown] > 0]
        chosen = max(near or gains, key=lambda grown: (gains[grown], -len(grown), sorted(grown)))
        sets.append(tuple(name for name in in_order if name in chosen))
    return sets


def freed_noise(roundings: Sequence[Rounding], chosen: frozenset[str]) -> float:
    """The noise of the roundings that are not made, where the chosen layers are float."""
    return sum(rounding.noise for rounding in roundings if rounding.layers <= chosen)


def float_price(roundings: Sequence[Rounding], macs: Mapping[str, int], chosen: frozenset[str]) -> float:
    """What it costs that the chosen layers are float, in shares of the network's multiply-accumulates."""
    crossing = sum(
        rounding.values
        for rounding in roundings
        if not rounding.layers <= chosen and (rounding.outside or rounding.layers & chosen)
    )
    return (sum(macs[name] for name in chosen) + CROSSING * crossing) / max(1, sum(macs.values()))


def shapes_of(graph: ModelProto) -> dict[str, list[int]]:
    """The sides of all tensors that are known; 1 for one that is open."""
    onnx = require("onnx", "export")
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in inferred.initializer}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        shapes[info.name] = [side.dim_value or 1 for side in info.type.tensor_type.shape.dim]
    return shapes


def macs_of(graph: ModelProto) -> dict[str, int]:
    """Multiply-accumulates of each node."""
    shapes = shapes_of(graph)
    macs = {}
    for node in graph.graph.node:
        macs[node.name] = 0
        sides = [shapes.get(name, []) for name in (*node.input[:2], node.output[0])]
        if node.op_type == "Conv" and all(sides):
            macs[node.name] = convolution_macs(sides[2], sides[1], sides[1][0])
        elif node.op_type in ("MatMul", "Gemm") and all(sides):
            macs[node.name] = matmul_macs(*sides) or 0
    return macs


def keep_budget(
    prepare: Callable[[tuple[str, ...]], Prepared],
    sets: Sequence[tuple[str, ...]],
    lost_by: Callable[[Prepared], float],
    budget: float,
) -> tuple[Prepared, float]:
    """Leave as few layers in float as keep a budget.

    The set is found by halving, as if more float layers never did harm; the one that is returned was measured to keep
    the budget.

    Args:
        prepare: makes the network for INT8, given the layers that stay float: biases are corrected for them.
        sets: of layers to leave in float, from none to all.
        lost_by: measures the points that it loses.
        budget: the most points.

    Returns:
        The network with the layers that stay float, and the points that are lost.

    Raises:
        UserError: not even the last set but one, which leaves something in INT8, keeps the budget.
    """

    def tried(place: int) -> tuple[Prepared, float]:
        prepared = prepare(sets[place])
        weighted = [node.name for node in prepared.graph.graph.node if node.op_type in WEIGHTED]
        number, lost = len({*weighted} & {*sets[place]}), lost_by(prepared)
        say(f"With {number} of {len(weighted)} layers in float {lost:.2f} points are lost (budget {budget:g}).")
        return prepared, lost

    best = tried(0)
    if best[1] <= budget:
        return best
    low, high, lost = 0, len(sets) - 1, best[1]  # places: too few layers, and enough
    while high - low > 1:
        middle = (low + high) // 2
        found = tried(middle)
        if found[1] <= budget:
            high, best = middle, found
        else:
            low, lost = middle, found[1]
    if high == len(sets) - 1:
        raise UserError(
            f"With all but the last layers in float, {lost:.2f} points are lost still: give --budget above that, or "
            "more images."
        )
    return best
