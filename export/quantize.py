"""INT8 in ONNX: activation ranges measured once, from which Q/DQ is written in two dialects.

No single INT8 ONNX file is good everywhere, so there are two, with equal ranges:

* ``u8`` for ONNX Runtime and OpenVINO on CPUs: unsigned activations with a zero point, every operator that has an
  integer kernel, biases as 32-bit integers, ReLU folded into the rounding.
* ``s8`` for TensorRT, whose parser takes no zero point but 0 and no bias through DequantizeLinear: signed symmetric
  activations, biases left float, Q/DQ before the weighted operators only, so that convolution, bias, residual addition
  and ReLU still fuse; of a residual addition one input is quantized (NVIDIA, "Working with Quantized Types").

Weights are signed and symmetric per output channel in both. Attention, normalization and activations of transformers
stay float: only convolutions and matrix products are quantized there.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import require
from ..runtime.progress import Bar
from .onnx_export import INPUT, without_notes

if TYPE_CHECKING:
    from onnx import ModelProto

Ranges = Mapping[str, tuple[float, float]]
"""Tensor of the FP32 graph -> lowest and highest value that its 8-bit form stands for."""

# Chosen by measurement among min-max, the mean of the images' extremes, percentiles 99.9 to 99.999 and entropy, on
# 10,000 test images of 32 px. All keep the top-1 within 0.4 points. This one is among the best at keeping the float
# network's own predictions: 99.1 % of a ResNet18's, and 93.2 % of a weakly trained MobileNetV2's, where the mean keeps
# 91.2 % and min-max 92.1 %.
PERCENTILE = 99.99
METHOD = f"{PERCENTILE} % of the values by a histogram over all images"
HISTOGRAM_BINS = 2048
CHUNK_BYTES = 256 << 20

WEIGHTED = ("Conv", "Gemm", "MatMul")

# Operators of convolutional networks that ONNX Runtime runs on integers, or that only move what is quantized.
INTEGER_OPS = (
    *WEIGHTED,
    *("Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Resize"),
)


@dataclass(frozen=True)
class Dialect:
    """How Q/DQ is written.

    Attributes:
        activations: type of the activations, a name of ORT's QuantType.
        ops: operators of a convolutional network that are quantized; of a transformer only those of ``WEIGHTED``.
        float_outputs: operators whose outputs are not quantized on their own.
        options: of ORT's QDQQuantizer.
        note: what a reader of the manifest should know.
    """

    activations: str
    ops: tuple[str, ...]
    float_outputs: tuple[str, ...]
    options: dict[str, Any]
    note: str


DIALECTS = {
    "onnx-int8-u8": Dialect(
        activations="QUInt8",
        ops=INTEGER_OPS,
        float_outputs=("Gemm",),
        options={"ActivationSymmetric": False},
        note="Unsigned activations, for CPUs: ONNX Runtime, OpenVINO. An x86 CPU without VNNI may saturate.",
    ),
    "onnx-int8-s8": Dialect(
        activations="QInt8",
        ops=WEIGHTED,
        float_outputs=WEIGHTED,
        options={
            "ActivationSymmetric": True,
            "QuantizeBias": False,
            "QDQDisableWeightAdjustForInt32Bias": True,
        },
        note="Signed symmetric activations and float biases, for TensorRT: much of it runs in float elsewhere.",
    ),
}


def measure_ranges(onnx_path: Path, images: np.ndarray) -> Ranges:
    """Measure the range of every activation, once for all dialects.

    Args:
        onnx_path: the FP32 graph.
        images: (N, 3, H, W) float32, preprocessed.

    Returns:
        Of each tensor the range that ``PERCENTILE`` % of its values lie in, by a histogram over all images.
    """
    require("onnx", "export")
    from onnxruntime.quantization.calibrate import PercentileCalibrater

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),  # where it notes what it does
        Bar("Calibrating ONNX", len(images)) as bar,
    ):
        augmented = Path(folder) / "augmented.onnx"
        calibrator = PercentileCalibrater(
            onnx_path, augmented_model_path=str(augmented), num_bins=HISTOGRAM_BINS, percentile=PERCENTILE
        )
        calibrator.augment_graph()
        calibrator.create_inference_session()
        for chunk in np.array_split(images, _num_chunks(calibrator.infer_session, len(images))):
            # It keeps all activations of a chunk. The reader need not be of its class.
            calibrator.collect_data(_Reader(chunk, bar))  # type: ignore[arg-type]
        measured = calibrator.compute_data()
    low_high = {name: np.ravel(measured[name].range_value).tolist() for name in sorted(measured.keys())}
    return {name: (low, high) for name, (low, high) in low_high.items()}


def _num_chunks(session: Any, num_images: int) -> int:
    """Number of parts of the images, so that the activations of one part take at most ``CHUNK_BYTES``."""
    image_bytes = sum(4 * math.prod(output.shape) for output in session.get_outputs())
    return math.ceil(num_images / max(1, CHUNK_BYTES // image_bytes))


class _Reader:
    """Images as ORT's calibrators ask for them.

    Args:
        images: (N, 3, H, W) float32.
        bar: counts them.
    """

    def __init__(self, images: np.ndarray, bar: Bar) -> None:
        self._images = iter(images)
        self._bar = bar

    def get_next(self) -> dict[str, np.ndarray]:
        image = next(self._images, None)
        if image is None:
            return {}
        self._bar.advance()
        return {INPUT: image[None]}


def is_transformer(model: ModelProto) -> bool:
    """Whether a network has attention or the normalization that goes with it."""
    return any(node.op_type in {"LayerNormalization", "Softmax"} for node in model.graph.node)


def quantize_onnx(onnx_path: Path, ranges: Ranges, dialect: Dialect) -> ModelProto:
    """Write Q/DQ into a graph.

    Args:
        onnx_path: the FP32 graph.
        ranges: of its activations.
        dialect: one of ``DIALECTS``.

    Returns:
        The checked INT8 graph.
    """
    onnx = require("onnx", "export")
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantType

    model = onnx.shape_inference.infer_shapes(onnx.load(onnx_path))
    transformer = is_transformer(model)
    low_high: dict[str, Any] = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
    tensors_range = TensorsData(CalibrationMethod.MinMax, low_high)  # a new one: the quantizer rewrites it
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType[dialect.activations],
        tensors_range=tensors_range,
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=list(WEIGHTED if transformer else dialect.ops),
        extra_options={**dialect.options, "OpTypesToExcludeOutputQuantization": list(dialect.float_outputs)},
    )
    if not transformer and "Add" not in dialect.ops:
        for tensor in float_residuals(model):
            quantizer.quantize_activation_tensor(tensor)
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    without_notes(quantized)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def float_residuals(model: ModelProto) -> list[str]:
    """One input of each addition of two activations of which no weighted operator takes either, and so quantizes it.

    It is the second, which is the shortcut where ``x = x + shortcut`` was traced: the first stays float and fuses with
    the convolution that makes it.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    quantized = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input}
    additions = [node.input for node in model.graph.node if node.op_type == "Add"]
    return [inputs[1] for inputs in additions if not (constants | quantized).intersection(inputs)]
