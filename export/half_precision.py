"""FP16 in the graph: weights and arithmetic of an ONNX graph in half precision, its input and outputs in float32.

TensorRT 11 has no flag for precision left: what is to run in FP16 must say so in the graph. The converter is the one
that ONNX Runtime maintains; its defaults keep float32 where an operator knows no half precision, and clip to the
largest half, 65504. LayerNormalization computes in float32 in any case (ONNX: ``stash_type``).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..runtime.errors import require
from .onnx_export import without_notes

if TYPE_CHECKING:
    from onnx import ModelProto


def float16_graph(onnx_path: Path) -> ModelProto:
    """The float32 graph of a file in half precision, checked."""
    onnx = require("onnx", "export")
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below the smallest half, which become that or 0
        model = convert_float_to_float16(onnx.load(onnx_path), keep_io_types=True)
    ONNXModel(model).topological_sort()  # the casts of the input come last
    without_notes(model)
    onnx.checker.check_model(model, full_check=True)
    return model
