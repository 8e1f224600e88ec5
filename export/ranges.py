"""The ranges of a graph's activations, measured once, by every method: what all INT8 variants are written from.

One pass over the calibration images fills a histogram of each activation, from which :mod:`.histogram` estimates the
ranges. All of them are stored in ``calibration.json``, with the hash of the graph that they belong to, so that another
method, or another dialect, needs no further look at the images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UserError, require, unknown_name
from ..runtime.fields import Fields
from ..runtime.files import write_json
from ..runtime.progress import say, track
from .calibration import Samples
from .histogram import ESTIMATES, Histogram, Range
from .onnx_export import INPUT

if TYPE_CHECKING:
    from onnx import ModelProto

Ranges = Mapping[str, tuple[float, float]]
"""Tensor of the FP32 graph -> lowest and highest value that its 8-bit form stands for."""

WEIGHTED = ("Conv", "Gemm", "MatMul")
REARRANGE = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # operators that change no value

# Choice of --calibration -> the estimates for asymmetric and for symmetric activations.
METHODS: dict[str, tuple[str, str]] = {
    "minmax": ("minmax", "minmax"),
    "percentile": ("percentile-99.99", "percentile-99.99"),
    "percentile-99.9": ("percentile-99.9", "percentile-99.9"),
    "percentile-99.999": ("percentile-99.999", "percentile-99.999"),
    "mse": ("mse", "mse-symmetric"),
    "entropy": ("entropy", "entropy"),
}

FILE = "calibration.json"
SCHEMA = 2  # of that file; 1 held the ranges of one method
FEW_IMAGES = 32
MAX_TENSORS = 100_000


@dataclass(frozen=True, eq=False)
class RangeTable:
    """The ranges of all activations of one graph, by every method.

    Attributes:
        graph_sha256: of the graph that they were measured on.
        estimates: tensor -> name in ``ESTIMATES`` -> range.
    """

    graph_sha256: str
    estimates: Mapping[str, Mapping[str, Range]]

    def choose(self, method: str) -> Ranges:
        """The ranges for activations with a zero point, by a name in ``METHODS``."""
        return {tensor: of[METHODS[method][0]] for tensor, of in self.estimates.items()}

    def choose_symmetric(self, method: str) -> Ranges:
        """The ranges for activations without a zero point: of the two bounds, the one further from 0 counts."""
        return {tensor: of[METHODS[method][1]] for tensor, of in self.estimates.items()}

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        tensors = {
            tensor: {name: list(low_high) for name, low_high in of.items()} for tensor, of in self.estimates.items()
        }
        return {"graph_sha256": self.graph_sha256, "tensors": tensors}

    @classmethod
    def from_json(cls, fields: Fields) -> RangeTable:
        """Read what :meth:`to_json` gave.

        Raises:
            UserError: a field is missing or wrong.
        """
        tensors = fields.fields("tensors")
        if len(tensors.value) > MAX_TENSORS:
            raise fields.wrong("tensors", len(tensors.value), f"at most {MAX_TENSORS} tensors")
        estimates = {tensor: _read_estimates(tensors.fields(tensor)) for tensor in tensors.value}
        return cls(fields.sha256("graph_sha256"), estimates)


def _read_estimates(fields: Fields) -> dict[str, Range]:
    estimates = {}
    for name in ESTIMATES:
        low, high = fields.numbers(name, 2)
        if low > high:
            raise fields.wrong(name, [low, high], "the lower number first")
        estimates[name] = (low, high)
    return estimates


def check_method(method: str) -> None:
    """Refuse a name that is not in ``METHODS``.

    Raises:
        UserError: lists the names.
    """
    if method not in METHODS:
        raise unknown_name("calibration method", method, METHODS)


def check_calibration_images(images: np.ndarray) -> None:
    """Refuse images that no range can be measured on, and say where they are few.

    Args:
        images: (N, 3, H, W) float32, preprocessed.

    Raises:
        UserError: each of them is of one colour.
    """
    if not np.ptp(images, axis=(2, 3)).any():
        raise UserError(
            f"Each of the {len(images)} calibration images is of one colour, so the activations have no range: "
            "name photos with --data."
        )
    if len(images) < FEW_IMAGES:
        say(f"Calibrating on {len(images)} images only: INT8 may suffer. Some hundreds are usual.")


def graph_sha256(graph: ModelProto) -> str:
    """SHA-256 of a graph's bytes, equal for equal graphs."""
    return hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()


def measure_ranges(graph: ModelProto, images: np.ndarray) -> RangeTable:
    """Measure the ranges of all activations that a form of INT8 may round, the input and the output among them.

    Args:
        graph: the FP32 graph, of batch 1.
        images: (N, 3, H, W) float32, preprocessed.

    Raises:
        UserError: the network gives numbers that are not finite.
    """
    names = activations(graph)
    origins = find_origins(graph, names)
    rounded = {origins.get(name, name) for name in roundable(graph, names)}
    counted = [name for name in names if name in rounded]
    histograms = {name: Histogram() for name in (INPUT, *counted)}
    session = open_session(graph, counted)
    for image in track(images, "Calibrating", len(images)):
        histograms[INPUT].add(image)
        for name, values in zip(counted, session.run(counted, {INPUT: image[None]}), strict=True):
            histograms[name].add(values)
    estimates = {
        tensor: {name: estimate(histogram) for name, estimate in ESTIMATES.items()}
        for tensor, histogram in histograms.items()
    }
    estimates |= {name: estimates[origin] for name, origin in origins.items() if origin in estimates}
    return RangeTable(graph_sha256(graph), dict(sorted(estimates.items())))


def find_origins(graph: ModelProto, names: Collection[str]) -> dict[str, str]:
    """Activation -> the tensor all of whose values it has, in another order or shape: two in five of a ViT's."""
    origins: dict[str, str] = {}
    for node in graph.graph.node:
        known = node.output[0] in names and (node.input[0] in names or node.input[0] == INPUT)
        if node.op_type in REARRANGE and known:
            origins[node.output[0]] = origins.get(node.input[0], node.input[0])
    return origins


def is_transformer(graph: ModelProto) -> bool:
    """Whether a network has attention or the normalization that goes with it."""
    return any(node.op_type in {"LayerNormalization", "Softmax"} for node in graph.graph.node)


def roundable(graph: ModelProto, names: Collection[str]) -> list[str]:
    """Those of some activations that a form of INT8 may round: of a transformer what products take and give.

    The other half of a ViT's values lie within its attention, normalizations and activations, which stay float in all
    forms; without them ONNX Runtime also runs those fused.
    """
    if not is_transformer(graph):
        return list(names)
    weighted = [node for node in graph.graph.node if node.op_type in WEIGHTED]
    kept = {name for node in weighted for name in (*node.input, *node.output)}
    kept |= {output.name for output in graph.graph.output}
    return [name for name in names if name in kept]


def activations(graph: ModelProto) -> list[str]:
    """Names of the float32 tensors that the nodes of a graph compute, in their order."""
    onnx = require("onnx", "export")
    inferred = onnx.shape_inference.infer_shapes(graph).graph
    infos = (*inferred.value_info, *inferred.output)
    floats = {info.name for info in infos if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return [name for node in inferred.node for name in node.output if name in floats]


def open_session(graph: ModelProto, outputs: list[str]) -> Any:
    """An ONNX Runtime session of a graph whose outputs are the given tensors."""
    onnx = require("onnx", "export")
    import onnxruntime

    from ..runtime.ort_backend import keep_exact

    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    keep_exact(options)
    return onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])


def write_calibration(
    folder: Path,
    samples: Samples,
    table: RangeTable | None,
    method: str,
    seed: int,
    tools: dict[str, str],
    float_nodes: Sequence[str] = (),
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write ``calibration.json``: the images, how they were drawn, and what was found with them.

    Args:
        folder: the artifact's.
        samples: the images.
        table: all ranges; None where no variant needed them.
        method: a name in ``METHODS``, by which the ranges were chosen.
        seed: of the draw.
        tools: package -> version.
        float_nodes: names of the nodes that stay float.
        trained: settings, images and result of a training for INT8; None or empty where there was none.
    """
    calibration = {
        "schema": SCHEMA,
        "method": method,
        "seed": seed,
        "evaluation_images": samples.evaluation_images,
        "excluded": samples.excluded,
        "images": samples.calibration.to_json(),
        "float_nodes": list(float_nodes),
        **({} if table is None else {"ranges": table.to_json()}),
        **({"trained": trained} if trained else {}),
        "tools": tools,
    }
    write_json(folder / FILE, calibration)
