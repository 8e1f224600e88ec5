"""Which layer costs how much of an INT8 network.

One weighted operator at a time is quantized, the others stay float, and the outputs are compared with the FP32 graph's
on calibration images; so no labels are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.parity import compare_outputs
from ..runtime.progress import track
from .bias_correction import correct_biases
from .float_layers import FUSED
from .graph_edit import consumers
from .onnx_export import INPUT
from .prepare import Prepared
from .quantize import DIALECTS, quantize_onnx
from .ranges import WEIGHTED, open_session

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

DIALECT = "onnx-int8-u8"
"""The variant on which costs are measured: it quantizes most."""


@dataclass(frozen=True)
class LayerCost:
    """What quantizing one layer alone does to the outputs.

    Attributes:
        node: its name.
        op: its operator.
        sqnr_db: power of the outputs over power of their error, in dB; None where there is no error.
        cosine_mean: mean cosine of the outputs to the FP32 graph's, -1..1.
        top1_agreement: share of the images with the same largest output, 0..1.
    """

    node: str
    op: str
    sqnr_db: float | None
    cosine_mean: float
    top1_agreement: float

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def layer_costs(graph: ModelProto, prepared: Prepared, images: np.ndarray) -> list[LayerCost]:
    """The cost of each weighted operator, in the graph's order.

    Args:
        graph: the FP32 graph.
        prepared: the same network with the weights that INT8 is written from, and its ranges; its biases not
            corrected, which is done here for each layer alone.
        images: (N, 3, H, W) float32, preprocessed.
    """
    reference = run_graph(graph, images)
    weights = {tensor.name: tensor for tensor in prepared.graph.graph.initializer}
    nodes = [node for node in graph.graph.node if node.op_type in WEIGHTED]
    uses = consumers(graph)
    costs = []
    for node in track(nodes, "Quantizing one layer at a time"):
        changed = with_tensors_of(node, graph, weights)
        # With its activation, as it is fused: what the layer gives before a ReLU6 can be ten times as wide as after.
        only = [node.name, *(after.name for after in uses.get(node.output[0], ()) if after.op_type in FUSED)]
        write = functools.partial(quantize_onnx, ranges=prepared.ranges, dialect=DIALECTS[DIALECT], only=only)
        quantized = write(correct_biases(changed, write(changed), images, reference=graph, only=[node.name]))
        outputs = run_graph(quantized, images)
        parity = compare_outputs(outputs, reference)
        costs.append(
            LayerCost(node.name, node.op_type, sqnr_db(outputs, reference), parity.cosine_mean, parity.top1_agreement)
        )
    return costs


def with_tensors_of(node: NodeProto, graph: ModelProto, weights: dict[str, TensorProto]) -> ModelProto:
    """The graph, in which one node's stored inputs are those of ``weights``, by name."""
    changed = type(graph)()
    changed.CopyFrom(graph)
    for tensor in changed.graph.initializer:
        if tensor.name in node.input and tensor.name in weights:
            tensor.CopyFrom(weights[tensor.name])
    return changed


def sqnr_db(outputs: np.ndarray, reference: np.ndarray) -> float | None:
    """Signal to quantization noise, in dB; None where there is no noise."""
    noise = float(np.sum((outputs.astype(np.float64) - reference) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return 10 * math.log10(signal / noise) if noise and signal else None


def by_cost(costs: Sequence[LayerCost]) -> list[LayerCost]:
    """The costliest first."""
    return sorted(costs, key=lambda cost: math.inf if cost.sqnr_db is None else cost.sqnr_db)


def damage(prepared: Prepared, reference: np.ndarray, images: np.ndarray, classifier: bool) -> float:
    """What INT8 does to an FP32 graph's outputs, in points.

    Args:
        prepared: what INT8 is written from.
        reference: (N, K) float32, the FP32 graph's outputs.
        images: (N, 3, H, W) float32, preprocessed.
        classifier: the outputs are logits.

    Returns:
        100 times the share of images with another top-1, or of features 100 (1 - mean cosine).
    """
    parity = compare_outputs(run_graph(prepared.quantize(DIALECT), images), reference)
    return 100 * (1 - (parity.top1_agreement if classifier else parity.cosine_mean))


def run_graph(graph: ModelProto, images: np.ndarray) -> np.ndarray:
    """Outputs (N, K) float32 of a graph of batch 1 for (N, 3, H, W) images."""
    session = open_session(graph, [graph.graph.output[0].name])
    return np.concatenate([session.run(None, {INPUT: image[None]})[0] for image in images])
