"""The rules of ``midge lint``: what each looks for, what it means for which runtime, and what to do about it.

``error``: the runtime refuses the file. ``warning``: it takes the file but computes in float what the file quantizes,
or computes something else than the file says. ``note``: worth knowing, no defect.

What is said of ONNX Runtime, OpenVINO and TensorRT-RTX was tried, unless it says otherwise; what is said of TensorRT
8, 10 and 11 and of Core ML is from the documents named, and unverified.
"""

from __future__ import annotations

from . import lint_checks_file as file
from . import lint_checks_qdq as qdq
from . import lint_placement_ort as ort
from .lint_rule import (
    DEQUANTIZE_ROW,
    ERROR,
    NOTE,
    ONNX_SPEC,
    OPENVINO_LPT,
    ORT_OPTIMIZER,
    QUANTIZED_TYPES,
    WARNING,
    Rule,
    Says,
    on,
    on_tensorrt,
)
from .lint_rules_float import FLOAT_RULES, PLACEMENTS
from .lint_targets import TARGETS, TENSORRT

BROKEN_SCALE = {
    "onnxruntime": Says(WARNING, "taken, and the numbers that come out mean nothing", ORT_OPTIMIZER),
    "openvino": Says(WARNING, "refused or taken, and then the numbers mean nothing", OPENVINO_LPT),
}
RULES: dict[str, Rule] = {
    # The file as a whole.
    "version": Rule(
        file.later_version,
        "Export at an earlier opset; write an earlier ir_version, which keeps the meaning.",
        on(["onnxruntime"], ERROR, "the file is refused"),
    ),
    "operator": Rule(
        file.unknown_operator,
        "Export without it: as Q/DQ instead of integer operators, at another opset, or by standard operators.",
        on(["onnxruntime", "openvino", *TENSORRT], ERROR, "the file is refused: there is no such operator"),
    ),
    "opset": Rule(
        file.later_opset,
        "Export at an earlier opset.",
        on(["tensorrt8", "tensorrt10", "tensorrt11"], WARNING, "may be refused, or read as it was defined before"),
    ),
    "later-release": Rule(
        file.later_release,
        "Use that release, or export by simpler operators.",
        on(["tensorrt8"], WARNING, "earlier releases refuse the file"),
    ),
    "int8-flag": Rule(
        file.needs_int8_flag,
        "Build with trtexec --int8, or BuilderFlag.INT8.",
        {
            "tensorrt8": Says(
                NOTE, "the build fails without the INT8 flag", "NVIDIA TensorRT 8.5 Developer Guide, Working with INT8"
            )
        },
    ),
    "dynamic-shape": Rule(
        file.dynamic_shape,
        "Export with a static shape, or give TensorRT an optimization profile (trtexec --minShapes, …).",
        on_tensorrt(
            WARNING, "the build fails without an optimization profile", "TensorRT documentation, Dynamic Shapes"
        )
        | on(["onnxruntime", "openvino"], NOTE, "runs, but midge's backends take no other open side than the batch"),
    ),
    "not-onnx": Rule(
        file.is_onnx,
        "Export for Core ML from the torch network; its quantization is made there anew.",
        {"coreml": Says(NOTE, "Core ML takes no ONNX: only its operators are looked at", TARGETS["coreml"].source)},
    ),
    "coreml-operator": Rule(
        file.unconverted_operator,
        "Try the conversion of the torch network before relying on it.",
        {"coreml": Says(NOTE, "no conversion of its torch counterpart is known", TARGETS["coreml"].source)},
    ),
    "float-file": Rule(
        file.float_file,
        "Quantize it first, if it should run in integers.",
        on(PLACEMENTS, NOTE, "runs in float, as the file says"),
    ),
    # Q/DQ nodes.
    "zero-point": Rule(
        qdq.nonzero_zero_point,
        "Quantize symmetrically to INT8 with zero point 0, as midge's onnx-int8-s8 does.",
        on_tensorrt(ERROR, "the parser refuses the node", DEQUANTIZE_ROW),
    ),
    "uint8": Rule(
        qdq.unsigned_activations,
        "Quantize activations symmetrically to INT8, as midge's onnx-int8-s8 does.",
        on_tensorrt(WARNING, "read as INT8: all above 127 steps is cut off, half of the range", QUANTIZED_TYPES),
    ),
    "uint8-weights": Rule(
        qdq.unsigned_weights,
        "Store weights as INT8 with zero point 0.",
        on_tensorrt(ERROR, "the parser refuses the node", QUANTIZED_TYPES),
    ),
    "int32-bias": Rule(
        qdq.integer_bias,
        "Leave biases in float (QuantizeBias=False of ONNX Runtime's quantizer), as midge's onnx-int8-s8 does.",
        on_tensorrt(ERROR, "the parser refuses the node: it dequantizes no INT32", QUANTIZED_TYPES),
    ),
    "integer-type": Rule(
        qdq.other_integers,
        "Quantize to INT8.",
        on_tensorrt(ERROR, "the parser refuses the node", QUANTIZED_TYPES),
    ),
    "integer-type-opset": Rule(
        qdq.early_type,
        "Quantize to 8 bits, or export at opset 21 or later.",
        {"onnxruntime": Says(ERROR, "the file is refused: Q/DQ has other integers from opset 21 on", ONNX_SPEC)},
    ),
    "per-channel-opset": Rule(
        qdq.early_axis,
        "Export at opset 13 or later, or with one scale per tensor.",
        {
            "onnxruntime": Says(ERROR, "the file is refused: Q/DQ has an axis from opset 13 on", ONNX_SPEC),
            "openvino": Says(ERROR, "the file is refused", ONNX_SPEC),
        }
        | on_tensorrt(NOTE, "outside of the ONNX specification; TensorRT-RTX 1.7 reads it all the same", ONNX_SPEC),
    ),
    "per-channel-undefined": Rule(
        qdq.early_channels,
        "Export at opset 13 or later, or with one scale per tensor.",
        {
            "onnxruntime": Says(WARNING, "not defined before opset 13: read along an axis of its choice", ONNX_SPEC),
            "openvino": Says(ERROR, "the file is refused", ONNX_SPEC),
        }
        | on_tensorrt(NOTE, "outside of the ONNX specification; TensorRT-RTX 1.7 reads it all the same", ONNX_SPEC),
    ),
    "scale": Rule(
        qdq.bad_scale,
        "Calibrate again: a scale must be above 0.",
        on_tensorrt(ERROR, "the parser refuses the node", "ONNX-TensorRT, onnxOpImporters.cpp: scales must be positive")
        | BROKEN_SCALE,
    ),
    "scale-infinite": Rule(
        qdq.infinite_scale,
        "Calibrate again: a scale must be finite.",
        on(TENSORRT, WARNING, "taken, and the numbers that come out mean nothing") | BROKEN_SCALE,
    ),
    "scale-shape": Rule(
        qdq.misshapen_scale,
        "Give one scale, or one per index of the axis.",
        on_tensorrt(ERROR, "the parser refuses the node", "ONNX-TensorRT, onnxOpImporters.cpp")
        | {
            "onnxruntime": Says(ERROR, "loaded, and fails when it runs", ONNX_SPEC),
            "openvino": Says(ERROR, "the file is refused", ONNX_SPEC),
        },
    ),
    "zero-point-shape": Rule(
        qdq.misshapen_zero_point,
        "Give as many zero points as scales.",
        on_tensorrt(ERROR, "the parser refuses the node", "ONNX-TensorRT, onnxOpImporters.cpp")
        | {
            "onnxruntime": Says(ERROR, "loaded, and fails when it runs", ONNX_SPEC),
            "openvino": Says(NOTE, "taken, stretched to fit", ONNX_SPEC),
        },
    ),
    "scale-computed": Rule(
        qdq.computed_scale,
        "Calibrate once, and store the scales.",
        on_tensorrt(ERROR, "scales must be known when the engine is built", QUANTIZED_TYPES, tried=False),
    ),
    "weight-axis": Rule(
        ort.silent_axis,
        "Quantize weights per output channel: axis 0 of a convolution's.",
        {"onnxruntime": Says(WARNING, "computed with the scales of the output channels: wrong numbers", ORT_OPTIMIZER)},
    ),
    "weight-axis-tensorrt": Rule(
        qdq.other_axis,
        "Quantize weights per output channel: axis 0 of a convolution's.",
        on_tensorrt(
            WARNING, "per-channel scales are for output channels: wrong numbers or float", QUANTIZED_TYPES, False
        ),
    ),
    "bias-scale-gemm": Rule(
        ort.wrong_bias_scale,
        "Store the bias in the scale of data times weights.",
        {"onnxruntime": Says(WARNING, "the bias is read in that scale all the same: wrong numbers", ORT_OPTIMIZER)},
    ),
    "pair": Rule(
        qdq.unlike_pair,
        "Give both nodes the same scale, zero point and type.",
        on(PLACEMENTS, WARNING, "the tensor changes its scale there, which no quantizer means"),
    ),
    "double-rounding": Rule(
        qdq.double_rounding,
        "Round once: drop one of both pairs.",
        on(PLACEMENTS, NOTE, "rounded twice, which loses accuracy and time"),
    ),
    "dangling": Rule(
        qdq.dangling,
        "Remove the node, or follow it by a DequantizeLinear.",
        on(PLACEMENTS, NOTE, "work for nothing, or integers where numbers were meant"),
    ),
    "load-without-vnni": Rule(
        qdq.fails_without_vnni,
        "Store weights once per node, and quantize activations to UINT8 or use Q/DQ instead of QLinearConv.",
        {
            "onnxruntime": Says(
                WARNING,
                "on x86 without VNNI it fails to load once session.x64quantprecision is set, as midge sets it",
                ORT_OPTIMIZER,
            )
        },
    ),
    "saturation": Rule(
        qdq.saturating_products,
        "Set session.x64quantprecision, as midge does, or quantize weights to 7 bits (reduce_range).",
        {
            "onnxruntime": Says(
                NOTE,
                "on x86 without VNNI sums of two products overflow 16 bits unless session.x64quantprecision is set",
                "ONNX Runtime documentation, Quantize ONNX models: data type selection",
            )
        },
    ),
    "float-weights-quantized": Rule(
        ort.quantized_on_loading,
        "Store quantized weights, per channel; or read the data with a scale for each channel, which keeps it float.",
        {"onnxruntime": Says(WARNING, "quantized on loading, with one scale for all channels", ORT_OPTIMIZER)},
    ),
    **FLOAT_RULES,
    # Said only where nothing above says why a runtime refuses the file.
    "invalid": Rule(
        file.invalid,
        "Export the model again.",
        on(PLACEMENTS, NOTE, "no valid ONNX: it may be refused, or read in its own way"),
    ),
}
