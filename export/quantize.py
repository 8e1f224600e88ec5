"""INT8 in ONNX: from activation ranges that were measured once, Q/DQ is written in two dialects; and a third without.

No single INT8 ONNX file is good everywhere, so there are three:

* ``u8`` for ONNX Runtime and OpenVINO on CPUs: unsigned activations with a zero point, every operator that has an
  integer kernel, biases as 32-bit integers, ReLU folded into the rounding.
* ``s8`` for TensorRT, whose parser takes no zero point but 0 and no bias through DequantizeLinear: signed symmetric
  activations, biases left float, Q/DQ before the weighted operators only, so that convolution, bias, residual addition
  and ReLU still fuse; of a residual addition one input is quantized (NVIDIA, "Working with Quantized Types"). OpenVINO
  too computes a transformer fastest by it.
* ``dynamic`` for transformers in ONNX Runtime on CPUs, where Q/DQ wins them nothing: matrix products on integers, whose
  ranges are found for each image.

Weights are signed and symmetric per output channel in all. Attention, normalization and activations of transformers
stay float: only convolutions and matrix products are quantized there.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UserError, require
from .float_layers import detach_float_layers
from .onnx_export import without_notes
from .ranges import WEIGHTED, Ranges, is_transformer

if TYPE_CHECKING:
    from onnx import ModelProto

# Operators of convolutional networks that ONNX Runtime runs on integers, or that only move what is quantized.
INTEGER_OPS = (
    *WEIGHTED,
    *("Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "Sigmoid"),
    *("MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Resize"),
)

DYNAMIC = "onnx-int8-dynamic"
"""The variant without static ranges, for transformers: see :func:`quantize_dynamic`."""

# Operators that no float network has.
INTEGER_ONLY = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul"}
    | {"ConvInteger", "MatMulInteger"}
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

    @property
    def symmetric(self) -> bool:
        """Whether the zero point of every activation is 0."""
        return bool(self.options["ActivationSymmetric"])


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
        note="Signed symmetric activations, float biases: for TensorRT. ONNX Runtime computes much of it in float.",
    ),
}


def refuse_quantized(graph: ModelProto) -> None:
    """Refuse a graph that is quantized already.

    Raises:
        UserError: names one of its operators.
    """
    integer = next((node for node in graph.graph.node if node.op_type in INTEGER_ONLY), None)
    if integer is not None:
        raise UserError(
            f"The graph is quantized already: it has {integer.op_type} '{integer.name[:100]}'. Give an FP32 graph."
        )


def quantize_onnx(
    graph: ModelProto | Path,
    ranges: Ranges,
    dialect: Dialect,
    float_nodes: Collection[str] = (),
    only: Collection[str] = (),
    signed: Ranges | None = None,
) -> ModelProto:
    """Write Q/DQ into a graph.

    Args:
        graph: the FP32 graph, or the file that holds it.
        ranges: of its activations.
        dialect: one of ``DIALECTS``.
        float_nodes: names of nodes that stay float.
        only: names of the nodes that are quantized; all where empty.
        signed: ranges of the activations that are signed and symmetric, whatever the dialect says of the others.

    Returns:
        The checked INT8 graph.
    """
    onnx = require("onnx", "export")
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantType

    model = onnx.shape_inference.infer_shapes(onnx.load(graph) if isinstance(graph, Path) else graph)
    transformer = is_transformer(model)
    chosen = {**ranges, **(signed or {})}
    low_high: dict[str, Any] = {name: (np.float32(low), np.float32(high)) for name, (low, high) in chosen.items()}
    tensors_range = TensorsData(CalibrationMethod.MinMax, low_high)  # a new one: the quantizer rewrites it
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType[dialect.activations],
        tensors_range=tensors_range,
        nodes_to_quantize=list(only),
        nodes_to_exclude=list(float_nodes),
        op_types_to_quantize=list(WEIGHTED if transformer else dialect.ops),
        extra_options={
            **dialect.options,
            "OpTypesToExcludeOutputQuantization": list(dialect.float_outputs),
            "TensorQuantOverrides": {
                name: [{"quant_type": QuantType.QInt8, "symmetric": True}] for name in signed or {}
            },
        },
    )
    if not transformer and "Add" not in dialect.ops and not only:
        for tensor in float_residuals(model, float_nodes):
            quantizer.quantize_activation_tensor(tensor)
    quantizer.quantize_model()
    if float_nodes:
        detach_float_layers(quantizer.model.model, float_nodes, apart=not dialect.symmetric)
    return _written_by(quantizer)


DYNAMIC_OPS = ("MatMul", "Gemm")


def quantize_dynamic(graph: ModelProto, float_nodes: Collection[str] = ()) -> ModelProto:
    """Quantize the matrix products with weights, the ranges of whose data are found for each image.

    Weights are signed and symmetric per output channel, as in the static dialects; whatever is no matrix product with
    weights stays float, a convolution that embeds patches too.

    Args:
        graph: the FP32 graph.
        float_nodes: names of nodes that stay float.

    Returns:
        The checked INT8 graph.
    """
    onnx = require("onnx", "export")
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType

    quantizer = ONNXQuantizer(
        onnx.shape_inference.infer_shapes(graph),
        per_channel=True,
        reduce_range=False,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=[],
        nodes_to_exclude=[*float_nodes, *(f"{name}_MatMul" for name in float_nodes)],  # a Gemm becomes a MatMul first
        op_types_to_quantize=list(DYNAMIC_OPS),
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    return _written_by(quantizer)


def _written_by(quantizer: Any) -> ModelProto:
    """What one of ORT's quantizers made, in order, without notes, and checked."""
    onnx = require("onnx", "export")
    quantizer.model.topological_sort()
    quantized = quantizer.model.model
    without_notes(quantized)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def float_residuals(model: ModelProto, float_nodes: Collection[str] = ()) -> list[str]:
    """One input of each addition of two activations of which no weighted operator takes either, and so quantizes it.

    It is the second, which is the shortcut where ``x = x + shortcut`` was traced: the first stays float and fuses with
    the convolution that makes it.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.name not in float_nodes]
    quantized = {name for node in nodes if node.op_type in WEIGHTED for name in node.input}
    additions = [node.input for node in nodes if node.op_type == "Add"]
    return [inputs[1] for inputs in additions if not (constants | quantized).intersection(inputs)]
