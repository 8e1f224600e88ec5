"""ONNX graphs as OpenVINO files: in float32, in float16 or with Q/DQ.

OpenVINO reads the exported ONNX file instead of tracing the torch network once more: every target then starts from one
graph, with the same names, already folded. Weights are stored in float32, unlike OpenVINO's default, unless FP16 is
asked for: with half the bits it would be another network than the one that is called FP32.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, require
from ..runtime.files import atomic_folder
from ..runtime.openvino_core import openvino_core
from .delivery import Delivery


def save_openvino(onnx_path: Path, path: Path, delivery: Delivery | None = None, fp16: bool = False) -> None:
    """Convert an ONNX file to OpenVINO's ``.xml`` and ``.bin``.

    Args:
        onnx_path: the FP32 graph.
        path: the ``.xml`` to write; its folder must be new.
        delivery: what is added to the graph, if anything.
        fp16: store the weights in half precision instead of float32.

    Raises:
        UserError: OpenVINO is not installed or cannot write.
    """
    _save(openvino_core().read_model(onnx_path), path, delivery, fp16)


def _save(model: Any, path: Path, delivery: Delivery | None, fp16: bool = False) -> None:
    """Write a model. What OpenVINO named by a counter of the process is named by its place, for equal bytes."""
    if delivery is not None:
        model = delivery.of_openvino(model)
    for place, operation in enumerate(model.get_ordered_ops()):
        if re.fullmatch(rf"{operation.get_type_name()}_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{place}")
    try:
        with atomic_folder(path.parent) as folder:
            require("openvino", "openvino").save_model(model, folder / path.name, compress_to_fp16=fp16)
    except RuntimeError as error:  # all it says of a full disk is "iostream error"
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"OpenVINO cannot write '{path.parent}' ({reason}): check the space on the disk.") from None
