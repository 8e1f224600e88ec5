"""How each variant is made: one table, variant -> the function that writes it.

All variants start from one network (batch normalization folded), one ONNX graph of it and one table of ranges.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtime.artifact import REFERENCE
from ..runtime.errors import require
from ..runtime.progress import say
from ..runtime.torch_model import ModelSpec, save_model
from .clip_weights import clip_weights
from .coreml_export import convert_coreml, import_coremltools, save_coreml
from .coreml_int8 import quantize_coreml
from .delivery import Delivery
from .half_precision import float16_graph
from .onnx_export import save_onnx
from .openvino_export import save_openvino
from .prepare import Prepared
from .quantize import DIALECTS, DYNAMIC, DYNAMIC_OPS, quantize_dynamic
from .tensorrt_export import save_tensorrt
from .weights import load_weights

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn


DYNAMIC_IMAGES = 128  # that weights are clipped by for the dynamic form: a second pass, for what is hardly clipped


@dataclass(frozen=True, eq=False)
class Source:
    """What the variants of an artifact are made from.

    Attributes:
        model: the network as it was trained, in eval mode on the CPU.
        folded: the same with batch normalization folded into the convolutions.
        spec: how to rebuild it, its preprocessing and labels.
        graph: its FP32 ONNX graph, made from ``folded``.
        onnx_path: a file that holds the graph.
        images: (N, 3, H, W) float32, preprocessed calibration images; none where nothing is quantized.
        int8: what the INT8 variants are written from; None where there are none.
        delivery: what is added to a graph when it is written.
    """

    model: nn.Module
    folded: nn.Module
    spec: ModelSpec
    graph: ModelProto
    onnx_path: Path
    images: np.ndarray
    int8: Prepared | None
    delivery: Delivery

    def save(self, graph: ModelProto, path: Path) -> None:
        """Write an ONNX variant."""
        save_onnx(self.delivery.of_onnx(graph), path)

    @property
    def output_name(self) -> str:
        """Name of the network's output, the same in every format."""
        return self.graph.graph.output[0].name


@dataclass(frozen=True)
class Writer:
    """How one variant is made.

    Attributes:
        model: name of the file or folder that the runtime loads, inside the variant's folder.
        write: writes it, given the source and that path, whose folder is new and not yet there.
        note: what a reader of the manifest should know.
        needs_ranges: whether it is written from the prepared graph and its ranges.
        transformers_only: whether it is of no use to a network without attention.
        packages: what it imports, by the extra that brings it.
    """

    model: str
    write: Callable[[Source, Path], None]
    note: str = ""
    needs_ranges: bool = False
    transformers_only: bool = False
    packages: tuple[tuple[str, str], ...] = ()


def write_reference(source: Source, path: Path) -> None:
    """``torch-fp32``: the weights, and how timm rebuilds the network."""
    save_model(path.parent, path.stem, source.model, source.spec)


def write_onnx(source: Source, path: Path) -> None:
    """``onnx-fp32``: the graph that the other variants are made from."""
    source.save(source.graph, path)


def write_onnx_fp16(source: Source, path: Path) -> None:
    """``onnx-fp16``: the graph in half precision."""
    source.save(float16_graph(source.onnx_path), path)


def onnx_dialect(variant: str) -> Writer:
    """A variant of ``DIALECTS``."""
    dialect = DIALECTS[variant]

    def write(source: Source, path: Path) -> None:
        source.save(prepared(source).quantize(variant), path)

    return Writer("model.onnx", write, dialect.note, needs_ranges=True)


def prepared(source: Source) -> Prepared:
    """What the INT8 variants are written from, where it is known to be there."""
    assert source.int8 is not None
    return source.int8


def write_dynamic(source: Source, path: Path) -> None:
    """``onnx-int8-dynamic``: the ranges of activations are found anew for each image.

    From the smoothed graph: corrected biases, or a training, are for static ranges, and its convolutions stay float.
    """
    int8 = prepared(source)
    graph = int8.original or source.graph
    unquantized = [node.name for node in graph.graph.node if node.op_type not in DYNAMIC_OPS]
    images = source.images[:DYNAMIC_IMAGES]
    clipped = clip_weights(graph, images, (*int8.float_nodes, *unquantized), correctable=False)
    source.save(quantize_dynamic(clipped, int8.float_nodes), path)


def write_openvino(source: Source, path: Path) -> None:
    """``openvino-fp32``: the graph as OpenVINO's files."""
    save_openvino(source.onnx_path, path, source.delivery)


def write_openvino_fp16(source: Source, path: Path) -> None:
    """``openvino-fp16``: the same with weights in half precision."""
    save_openvino(source.onnx_path, path, source.delivery, fp16=True)


def write_openvino_int8(source: Source, path: Path) -> None:
    """``openvino-int8``: the graph that OpenVINO computes fastest (:meth:`.prepare.Prepared.quantize_for_openvino`)."""
    with tempfile.TemporaryDirectory() as work:
        onnx_path = Path(work) / "model.onnx"
        save_onnx(prepared(source).quantize_for_openvino(), onnx_path)
        save_openvino(onnx_path, path, source.delivery)


def write_tensorrt(source: Source, path: Path) -> None:
    """``tensorrt-fp32``: the graph, and the recipe of an engine."""
    save_tensorrt(source.delivery.of_onnx(source.graph), path, "fp32")


def write_tensorrt_fp16(source: Source, path: Path) -> None:
    """``tensorrt-fp16``: the graph in half precision, and the recipe."""
    save_tensorrt(source.delivery.of_onnx(float16_graph(source.onnx_path)), path, "fp16")


def write_tensorrt_int8(source: Source, path: Path) -> None:
    """``tensorrt-int8``: the graph in the ``s8`` dialect, and the recipe."""
    save_tensorrt(source.delivery.of_onnx(prepared(source).quantize("onnx-int8-s8")), path, "int8")


def write_coreml(source: Source, path: Path) -> None:
    """``coreml-fp16``: the folded network as an ML Program."""
    save_coreml(convert_coreml(source.folded, source.spec, source.output_name), source.spec, path)


def write_coreml_int8(source: Source, path: Path) -> None:
    """``coreml-int8``: an ML Program with the prepared graph's weights, quantized by its ranges."""
    int8 = prepared(source)
    network = load_weights(source.folded, int8.graph, source.spec.input_px)
    model = convert_coreml(network, source.spec, source.output_name)
    save_coreml(quantize_coreml(model, int8), source.spec, path)


OPENVINO = (("openvino", "openvino"),)
COREML = (("coremltools", "coreml"),)
ENGINE_NOTE = "The engine is built on the device, by recipe.json."

WRITERS: dict[str, Writer] = {
    REFERENCE: Writer("model.safetensors", write_reference, "The reference that every variant is compared with."),
    "onnx-fp32": Writer("model.onnx", write_onnx),
    "onnx-fp16": Writer(
        "model.onnx",
        write_onnx_fp16,
        "Half precision in the graph, for GPUs and TensorRT: a CPU mostly casts it to float32, and is no faster by it.",
    ),
    "onnx-int8-u8": onnx_dialect("onnx-int8-u8"),
    "onnx-int8-s8": onnx_dialect("onnx-int8-s8"),
    DYNAMIC: Writer(
        "model.onnx",
        write_dynamic,
        "Matrix products on integers, with ranges found for each image: for transformers in ONNX Runtime on CPUs.",
        needs_ranges=True,
        transformers_only=True,
    ),
    "openvino-fp32": Writer("model.xml", write_openvino, packages=OPENVINO),
    "openvino-fp16": Writer(
        "model.xml",
        write_openvino_fp16,
        "Weights stored in half precision: half the size; a CPU computes in float32.",
        packages=OPENVINO,
    ),
    "openvino-int8": Writer(
        "model.xml",
        write_openvino_int8,
        "The u8 graph, activations of both signs without a zero point; of transformers the s8 graph.",
        needs_ranges=True,
        packages=OPENVINO,
    ),
    "tensorrt-fp32": Writer("model.onnx", write_tensorrt, ENGINE_NOTE),
    "tensorrt-fp16": Writer("model.onnx", write_tensorrt_fp16, ENGINE_NOTE),
    "tensorrt-int8": Writer("model.onnx", write_tensorrt_int8, ENGINE_NOTE, needs_ranges=True),
    "coreml-fp16": Writer(
        "model.mlpackage", write_coreml, "ML Program for iOS 17 in 16-bit floats, images in.", packages=COREML
    ),
    "coreml-int8": Writer(
        "model.mlpackage",
        write_coreml_int8,
        "ML Program for iOS 17, W8A8: pays off on the Neural Engine from A17 Pro and M4 on.",
        needs_ranges=True,
        packages=COREML,
    ),
}


def suited(variants: Sequence[str], transformer: bool) -> tuple[str, ...]:
    """The variants that are of use to a network; what is left out is said."""
    left_out = [variant for variant in variants if WRITERS[variant].transformers_only and not transformer]
    for variant in left_out:
        say(f"Left out {variant}: it is for networks with attention, and this one has none.")
    return tuple(variant for variant in variants if variant not in left_out)


def check_packages(variants: Sequence[str]) -> None:
    """Import what the variants need, so that a missing package is said before any work.

    Raises:
        UserError: one is not installed.
    """
    for module in ("torch", "timm", "safetensors"):
        require(module, "train")
    for module in ("onnx", "onnxscript", "onnxslim"):
        require(module, "export")
    for module, extra in dict.fromkeys(package for variant in variants for package in WRITERS[variant].packages):
        if module == "coremltools":
            import_coremltools()
        else:
            require(module, extra)
