"""ONNX graphs as OpenVINO files, in float32, in float16 or with Q/DQ; and NNCF's quantization.

OpenVINO reads the exported ONNX file instead of tracing the torch network once more: every target then starts from one
graph, with the same names, already folded. Weights are stored in float32, unlike OpenVINO's default, unless FP16 is
asked for: with half the bits it would be another network than the one that is called FP32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError, require
from ..runtime.files import atomic_folder
from ..runtime.openvino_core import openvino_core
from ..runtime.progress import Bar
from .delivery import Delivery

NNCF_IMAGES = 300  # at most: NNCF's own default


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


def quantize_openvino(
    onnx_path: Path, path: Path, images: np.ndarray, transformer: bool, delivery: Delivery | None = None
) -> None:
    """Quantize an ONNX file with NNCF: symmetric weights per channel, asymmetric activations, biases corrected.

    Args:
        onnx_path: the FP32 graph.
        path: the ``.xml`` to write; its folder must be new.
        images: (N, 3, H, W) float32, preprocessed, all of which are calibrated on.
        transformer: the network has attention, whose shape NNCF should know.
        delivery: what is added to the quantized graph, if anything.
    """
    core = openvino_core()
    nncf = import_nncf()
    nncf.set_log_level(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # where it draws progress of its own
        model = nncf.quantize(
            core.read_model(onnx_path),
            nncf.Dataset(_Passes(images)),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=min(len(images), NNCF_IMAGES),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )
    _save(model, path, delivery)


def import_nncf() -> Any:
    """NNCF, which reports its use to its makers unless it is told that it runs in a CI.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("NNCF_CI", "1")
    # It makes torch look for a compiler of GPU code, which warns where it finds one but no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return require("nncf", "openvino")


class _Passes:
    """Images as NNCF reads them, over and over; each pass shows its progress.

    Args:
        images: (N, 3, H, W) float32.
    """

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __iter__(self) -> Iterator[np.ndarray]:
        with Bar("Calibrating OpenVINO", len(self.images)) as bar:
            for image in self.images:
                bar.advance()  # first: NNCF does not come back after the last
                yield image[None]


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
