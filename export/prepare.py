"""From the FP32 graph to what every INT8 variant is written from: one graph, one table of ranges, one list of floats.

FP32 graph -> steps that change its weights -> ranges, measured once -> steps that need the ranges, a training being the
last -> :class:`Prepared`. A step is a pure function; nodes, activations and weights keep their names, so that weights
find their way back into torch by the names of its parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .bias_correction import correct_biases
from .calibration import Sample
from .clip_weights import clip_weights
from .float_layers import check_float_layers
from .quantize import DIALECTS, quantize_onnx, refuse_quantized
from .ranges import Ranges, RangeTable, graph_sha256, is_transformer, measure_ranges
from .rounding import round_weights
from .smooth import smooth

if TYPE_CHECKING:
    from onnx import ModelProto

COARSEST = 1.5  # times as coarse a step may be without a zero point


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the INT8 variants of a network are written from.

    Attributes:
        graph: float32 ONNX graph; its weights and biases may be others than the exported network's.
        ranges: of its activations, for those that have a zero point.
        symmetric_ranges: the same for those that have none.
        float_nodes: names of the nodes that stay float.
        trained: what calibration.json says of the training for INT8; empty where there was none.
        original: the graph before its weights were clipped, whose means the biases must keep; None for ``graph``.
    """

    graph: ModelProto
    ranges: Ranges
    symmetric_ranges: Ranges
    float_nodes: tuple[str, ...] = ()
    trained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    original: ModelProto | None = None

    @property
    def learned(self) -> bool:
        """Whether the weights and ranges come from a training: one that did not help is not kept."""
        return bool(self.trained.get("kept"))

    def choose_ranges(self, variant: str) -> Ranges:
        """The ranges for the dialect of a variant."""
        return self.symmetric_ranges if DIALECTS[variant].symmetric else self.ranges

    def quantize(self, variant: str) -> ModelProto:
        """The INT8 graph in the dialect of a variant."""
        return quantize_onnx(self.graph, self.choose_ranges(variant), DIALECTS[variant], self.float_nodes)

    def quantize_for_openvino(self) -> ModelProto:
        """The INT8 graph that OpenVINO computes fastest, where a zero point costs: in matrix products, and additions.

        Of a transformer the ``s8`` graph. Of others ``u8``, in which activations of both signs, as residual additions
        take them, are INT8 without a zero point, unless their steps became much coarser by it. Times as fast as FP32 on
        one thread at 224 px, with AMX / AVX512-VNNI / AVX2-VNNI: a ViT-Ti in ``s8`` 2.85 / 2.09 / 1.74, in ``u8`` 1.80
        / 1.72 / 1.45; a ResNet18 in ``s8`` 9.8 / 3.2 / 2.6, in ``u8`` 10.2 / 3.8 / 3.4. Without the zero points it is
        1.05 to 1.16 times as fast as in ``u8`` with AMX, a MobileNetV2 1.02 to 1.13 times; without AMX 1.0 times.
        """
        if is_transformer(self.graph):
            return self.quantize("onnx-int8-s8")
        signed = {}
        for name, (low, high) in self.ranges.items():
            most = max(-low, high)
            if low < 0 and 2 * most <= COARSEST * (high - low):
                signed[name] = (-most, most)  # of these ranges, which the weights were corrected or trained for
        return quantize_onnx(self.graph, self.ranges, DIALECTS["onnx-int8-u8"], self.float_nodes, signed=signed)


def _clip_weights(prepared: Prepared, images: np.ndarray) -> Prepared:
    """Weights within the scales that serve INT8 best; the scales are the same in all dialects."""
    clipped = clip_weights(prepared.graph, images, prepared.float_nodes)
    return dataclasses.replace(prepared, graph=clipped, original=prepared.graph)


def _round_weights(prepared: Prepared, images: np.ndarray) -> Prepared:
    """Weights on their grids, so that a layer's output changes least; the grids are the same in all dialects."""
    return dataclasses.replace(prepared, graph=round_weights(prepared.graph, images, prepared.float_nodes))


def _correct_biases(prepared: Prepared, images: np.ndarray) -> Prepared:
    """Bias correction, for the dialect that quantizes most; the weights, the main cause, are the same in all."""
    quantized = prepared.quantize("onnx-int8-u8")
    return dataclasses.replace(
        prepared, graph=correct_biases(prepared.graph, quantized, images, reference=prepared.original)
    )


RangeStep = Callable[[Prepared, np.ndarray], Prepared]

# Name -> step, in the order in which they are taken; images are (N, 3, H, W) float32. After those of the graph it
# computes the same.
GRAPH_STEPS: dict[str, Callable[[ModelProto, np.ndarray], ModelProto]] = {"smoothing": smooth}
RANGE_STEPS: dict[str, RangeStep] = {
    "weight clipping": _clip_weights,
    "weight rounding": _round_weights,
    "bias correction": _correct_biases,
}


def training(teacher: ModelProto, sample: Sample, epochs: int, lr: float, seed: int) -> RangeStep:
    """A last step that trains the network for INT8 in both dialects, see :mod:`.qat`.

    Args:
        teacher: the FP32 graph as it was exported.
        sample: images to train on; the calibration images that a step is given are too few.
        epochs: passes over them.
        lr: learning rate, in steps of the weights' grids.
        seed: of the order, flips and crops.
    """
    from .qat import QatConfig, Written, train_quantized  # imports torch

    config = QatConfig(epochs=epochs, lr=lr, seed=seed)

    def train(prepared: Prepared, images: np.ndarray) -> Prepared:
        written = {name: Written(prepared.quantize(name), prepared.choose_ranges(name)) for name in DIALECTS}
        found = train_quantized(prepared.graph, written, sample.inputs, config, teacher)
        facts = {
            "settings": dataclasses.asdict(config),
            "kept": found.helped,
            "loss_before": found.loss_before,
            "loss_after": found.loss_after,
            "images": sample.to_json(),
            "ranges": {name: {key: list(ends) for key, ends in of.items()} for name, of in found.ranges.items()},
        }
        ranges, symmetric = found.ranges["onnx-int8-u8"], found.ranges["onnx-int8-s8"]
        return dataclasses.replace(
            prepared, graph=found.graph, ranges=ranges, symmetric_ranges=symmetric, trained=facts
        )

    return train


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
        float_nodes: names of the nodes that stay float.
        stored: ranges that were measured before; they are taken where they belong to the same graph.
        range_steps: the steps that follow the ranges.

    Returns:
        What the variants are written from, and the ranges by every method.

    Raises:
        UserError: the graph is quantized already, or has no such node.
    """
    refuse_quantized(graph)
    check_float_layers(graph, float_nodes)
    for change in GRAPH_STEPS.values():
        graph = change(graph, images)
    table = stored if stored and stored.graph_sha256 == graph_sha256(graph) else measure_ranges(graph, images)
    prepared = Prepared(graph, table.choose(method), table.choose_symmetric(method), float_nodes)
    for step in range_steps.values():
        prepared = step(prepared, images)
    return prepared, table
