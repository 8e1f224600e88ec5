"""From the FP32 graph to what every INT8 variant is written from: one graph, one table of ranges, one list of floats.

FP32 graph -> steps that change its weights -> ranges, measured once -> steps that need the ranges -> :class:`Prepared`.
A step is a pure function; nodes, activations and weights keep their names, so that weights find their way back into
torch by the names of its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bias_correction import correct_biases
from .quantize import DIALECTS, quantize_onnx, refuse_quantized
from .ranges import Ranges, RangeTable, graph_sha256, measure_ranges

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the INT8 variants of a network are written from.

    Attributes:
        graph: float32 ONNX graph; its weights and biases may be others than the exported network's.
        ranges: of its activations, for those that have a zero point.
        symmetric_ranges: the same for those that have none.
        float_nodes: names of the weighted operators that stay float.
    """

    graph: ModelProto
    ranges: Ranges
    symmetric_ranges: Ranges
    float_nodes: tuple[str, ...] = ()

    def quantize(self, variant: str) -> ModelProto:
        """The INT8 graph in the dialect of a variant."""
        dialect = DIALECTS[variant]
        ranges = self.symmetric_ranges if dialect.symmetric else self.ranges
        return quantize_onnx(self.graph, ranges, dialect, self.float_nodes)


def _correct_biases(prepared: Prepared, images: np.ndarray) -> Prepared:
    """Bias correction, for the dialect that quantizes most; the weights, the main cause, are the same in all."""
    return dataclasses.replace(
        prepared, graph=correct_biases(prepared.graph, prepared.quantize("onnx-int8-u8"), images)
    )


RangeStep = Callable[[Prepared, np.ndarray], Prepared]

# Name -> step, in the order in which they are taken; images are (N, 3, H, W) float32.
GRAPH_STEPS: dict[str, Callable[[ModelProto, np.ndarray], ModelProto]] = {}
RANGE_STEPS: dict[str, RangeStep] = {"bias correction": _correct_biases}


def prepare(
    graph: ModelProto,
    images: np.ndarray,
    method: str,
    float_nodes: tuple[str, ...] = (),
    stored: RangeTable | None = None,
    range_steps: Mapping[str, RangeStep] = RANGE_STEPS,
) -> tuple[Prepared, RangeTable]:
    """Prepare a network for INT8.

    Args:
        graph: the FP32 graph, of batch 1.
        images: (N, 3, H, W) float32, preprocessed calibration images.
        method: a name in ``METHODS``.
        float_nodes: names of the weighted operators that stay float.
        stored: ranges that were measured before; they are taken where they belong to the same graph.
        range_steps: the steps that follow the ranges.

    Returns:
        What the variants are written from, and the ranges by every method.

    Raises:
        UserError: the graph is quantized already.
    """
    refuse_quantized(graph)
    for change in GRAPH_STEPS.values():
        graph = change(graph, images)
    table = stored if stored and stored.graph_sha256 == graph_sha256(graph) else measure_ranges(graph, images)
    prepared = Prepared(graph, table.choose(method), table.choose_symmetric(method), float_nodes)
    for step in range_steps.values():
        prepared = step(prepared, images)
    return prepared, table
