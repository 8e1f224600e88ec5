"""Where an error starts: a variant's intermediate tensors beside those of the FP32 graph, layer by layer, by name.

Every variant that is made from the ONNX graph keeps the names of its tensors, so both are run on the golden images with
these exposed as outputs (:mod:`.taps`).

The drift of a layer is its signal-to-quantization-noise ratio, over all images, in dB. A layer's own part is how far
that falls below the worst of its inputs'; above ``CLEAN_DB`` it counts as clean, so that the first rounding of a
faultless input is no drop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.artifact import Artifact, variant_runtime
from ..runtime.backend import cannot_load
from ..runtime.errors import UserError, require, unknown_name
from ..runtime.progress import track
from .taps import TAPS, tap_onnx

if TYPE_CHECKING:
    from onnx import GraphProto

REFERENCE_GRAPH = "onnx-fp32"
CLEAN_DB = 40.0
NUM_DROPS = 5

# Operators that only move values: their drift is that of their input.
MOVES = frozenset(
    (
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"),
        *("Slice", "Split", "Gather", "Concat", "Identity", "Cast"),
    )
)


@dataclass(frozen=True)
class Layer:
    """A tensor that the FP32 graph computes.

    Attributes:
        tensor: its name.
        op: the operator that makes it; with those before it whose results the variant does not have.
        module: name of the module in torch whose weights or bias it takes; "" where it takes none.
        inputs: tensors that the operator takes, of those computed or given.
    """

    tensor: str
    op: str
    module: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Drift:
    """How far a layer's values are from the FP32 graph's.

    Attributes:
        tensor: name of its output.
        op: the operator.
        module: name in torch of the module that it belongs to; "" where it takes no weights and no bias.
        cosine_mean: mean cosine of the images' tensors, -1..1.
        cosine_min: smallest of them.
        sqnr_db: signal-to-quantization-noise ratio over all images, dB; None where there is no difference at all.
        drop_db: what the layer itself loses, dB; see the module's head.
    """

    tensor: str
    op: str
    module: str
    cosine_mean: float
    cosine_min: float
    sqnr_db: float | None
    drop_db: float

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def measure_drift(artifact: Artifact, variant: str, images: np.ndarray) -> list[Drift]:
    """The drift of each layer that both graphs have, in the order of computation.

    Args:
        artifact: which holds the FP32 graph.
        variant: one made from that graph.
        images: (N, 3, H, W) float32, preprocessed.

    Raises:
        UserError: there is no such variant or no FP32 graph, none of its tensors has a name in common with the graph,
            or a tensor has another shape or numbers that are not finite.
    """
    onnx = require("onnx", "export")
    reference = find_model(artifact, REFERENCE_GRAPH)
    model = find_model(artifact, variant)
    runtime = variant_runtime(variant)
    if runtime not in TAPS:
        raise UserError(f"The drift of {variant} cannot be measured: give a variant of {', '.join(sorted(TAPS))}.")
    try:
        whole = read_layers(onnx.load(reference).graph)
    except Exception as error:  # protobuf's own, and it may come from elsewhere
        raise cannot_load("onnx", reference, error) from None
    ops = {layer.tensor: layer.op for layer in whole}
    tap = TAPS[runtime](model, ops)
    layers = merge_layers(whole, tap.sources)
    if not layers:
        raise UserError(f"No tensor of {variant} has a name of {REFERENCE_GRAPH}'s: export the artifact again.")
    expected = tap_onnx(reference, ops).open([layer.tensor for layer in layers])
    given = tap.open([tap.sources[layer.tensor] for layer in layers])
    sums = [Sums() for _ in layers]
    for image in track(images, "Layer by layer"):
        try:
            tensors = given(image[None]), expected(image[None])
        except Exception as error:  # each runtime has its own kinds; the model may be hostile
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"The variant {variant} cannot run ({reason}): export the artifact again.") from None
        for values, right, layer, total in zip(*tensors, layers, sums, strict=True):
            if values.shape != right.shape or not (np.isfinite(values).all() and np.isfinite(right).all()):
                raise UserError(
                    f"The tensor '{layer.tensor}' of {variant} is {values.shape}, in {REFERENCE_GRAPH} {right.shape}, "
                    "and all its numbers must be finite: export the artifact again."
                )
            total.add(values, right)
    return attribute(layers, sums)


def find_model(artifact: Artifact, variant: str) -> Path:
    """The file of a variant.

    Raises:
        UserError: the artifact does not have it.
    """
    if variant not in artifact.variants:
        raise unknown_name("variant", variant, artifact.variants)
    return artifact.variants[variant].model


def read_layers(graph: GraphProto) -> list[Layer]:
    """What a graph computes, in order."""
    constants = {tensor.name for tensor in graph.initializer}
    layers = []
    for node in graph.node:
        parameters = [name for name in node.input if name in constants and name.endswith((".weight", ".bias"))]
        module = parameters[0].rpartition(".")[0] if parameters else ""
        inputs = tuple(name for name in node.input if name and name not in constants)
        layers += [Layer(name, node.op_type, module, inputs) for name in node.output if name]
    return layers


def merge_layers(layers: Iterable[Layer], present: Container[str]) -> list[Layer]:
    """The layers whose tensors a variant has, each with those before it that it was fused with."""
    kept: list[Layer] = []
    absent: dict[str, Layer] = {}
    for layer in layers:
        before = [absent[name] for name in layer.inputs if name in absent]
        merged = Layer(
            tensor=layer.tensor,
            op="+".join([*dict.fromkeys(other.op for other in before), layer.op]),
            module=next((name for name in (layer.module, *(other.module for other in before)) if name), ""),
            inputs=tuple(
                source for name in layer.inputs for source in (absent[name].inputs if name in absent else (name,))
            ),
        )
        if layer.tensor in present:
            kept.append(merged)
        else:
            absent[layer.tensor] = merged
    return kept


class Sums:
    """What the drift of one tensor is worked out from, image by image."""

    def __init__(self) -> None:
        self.cosines: list[float] = []
        self.signal = self.noise = 0.0

    def add(self, values: np.ndarray, right: np.ndarray) -> None:
        """Take in an image's tensor and what it should be."""
        given, expected = (array.astype(np.float64).ravel() for array in (values, right))
        signal, power = float(expected @ expected), float(given @ given)
        length = math.sqrt(signal * power)
        self.cosines.append(float(given @ expected) / length if length else float(signal == power))
        self.signal += signal
        self.noise += float(np.square(given - expected).sum())

    @property
    def sqnr_db(self) -> float:
        """The ratio over all images; infinite where there is no noise."""
        if not self.noise:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf


def attribute(layers: Sequence[Layer], sums: Sequence[Sums]) -> list[Drift]:
    """Each layer's drift, and its own part of it."""
    known: dict[str, float] = {}
    drifts = []
    for layer, total in zip(layers, sums, strict=True):
        ratio = max(total.sqnr_db, -CLEAN_DB)
        before = min([known.get(name, math.inf) for name in layer.inputs], default=math.inf)
        known[layer.tensor] = ratio
        drifts.append(
            Drift(
                tensor=layer.tensor,
                op=layer.op,
                module=layer.module,
                cosine_mean=float(np.mean(total.cosines)),
                cosine_min=min(total.cosines),
                sqnr_db=None if math.isinf(ratio) else ratio,
                drop_db=max(0.0, min(before, CLEAN_DB) - min(ratio, CLEAN_DB)),
            )
        )
    return drifts


def biggest_drops(drifts: Iterable[Drift]) -> list[Drift]:
    """The layers that lose most by what they compute, the worst first; none that loses nothing."""
    worst = sorted(filter(computes, drifts), key=lambda drift: -drift.drop_db)[:NUM_DROPS]
    return [drift for drift in worst if drift.drop_db > 0]


def computes(drift: Drift) -> bool:
    """Whether a layer does more than move values."""
    return not MOVES.issuperset(drift.op.split("+"))


def drift_json(artifact: Artifact, variant: str, drifts: Sequence[Drift], images: int) -> dict[str, Any]:
    """The JSON document of ``--drift --json``."""
    return {
        "schema": 1,
        "artifact": artifact.name,
        "variant": variant,
        "reference": REFERENCE_GRAPH,
        "images": images,
        "layers": [drift.to_json() for drift in drifts],
        "drops": [drift.tensor for drift in biggest_drops(drifts)],
    }


def print_drift(artifact: Artifact, variant: str, drifts: Sequence[Drift], images: int) -> None:
    """Print a table of the layers that compute, and the biggest drops, to stdout."""
    shown = list(filter(computes, drifts))
    width = max(len("layer"), *(len(_name(drift)) for drift in shown)) if shown else len("layer")
    print(f"{artifact.name}: {variant} against {REFERENCE_GRAPH}, layer by layer, {images} golden images")
    print(f"{'layer':<{width}}  {'operator':<18}  cos mean    cos min  SQNR dB  own drop dB")
    for drift in shown:
        ratio = "equal" if drift.sqnr_db is None else f"{drift.sqnr_db:.1f}"
        cosines = f"{drift.cosine_mean:.6f}  {drift.cosine_min:9.6f}"
        print(f"{_name(drift):<{width}}  {drift.op[:18]:<18}  {cosines}  {ratio:>7}  {drift.drop_db:>11.1f}")
    for drift in biggest_drops(drifts):
        print(f"{_name(drift)} ({drift.op}) loses {drift.drop_db:.1f} dB, to {drift.sqnr_db or 0:.1f} dB.")


def _name(drift: Drift) -> str:
    """The module's name where there is one, else the tensor's; printable, whatever the file says."""
    name = drift.module or drift.tensor
    return name if name.isprintable() and len(name) <= 60 else repr(name[:60])
