"""The last step before a graph is written: what it is, inside the file, and where it is wanted the normalization too.

Whatever a variant's arithmetic is, it is made from the float graph that takes a normalized image. Only here the graph
is given its 8-bit input, so that ranges, quantization and half precision know nothing of it: the normalized image is
the tensor that the first convolution's Q/DQ stands on, and that convolution still runs in integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..runtime.errors import require
from ..runtime.preprocess import Preprocess
from ..runtime.torch_model import ModelSpec

if TYPE_CHECKING:
    from onnx import ModelProto

PREFIX = "preprocess_"  # of the names that are added to a graph
SECTION = "midge"  # of OpenVINO's rt_info


@dataclass(frozen=True)
class Delivery:
    """How a graph is handed over.

    Attributes:
        preprocess: from an image to the input; where it is embedded, it goes into the graph.
        facts: key -> text, for the file's metadata; no path and no time.
    """

    preprocess: Preprocess
    facts: Mapping[str, str]

    def of_onnx(self, graph: ModelProto) -> ModelProto:
        """A copy of a graph as it is to be written, checked."""
        onnx = require("onnx", "export")
        delivered = onnx.ModelProto()
        delivered.CopyFrom(graph)
        if self.preprocess.embedded:
            embed_onnx(delivered, self.preprocess)
        onnx.helper.set_model_props(delivered, dict(self.facts))
        onnx.checker.check_model(delivered, full_check=True)
        return delivered

    def of_openvino(self, model: Any) -> Any:
        """An OpenVINO model as it is to be written; it may be the given one, changed."""
        openvino = require("openvino", "openvino")
        if self.preprocess.embedded:
            model = embed_openvino(openvino, model, self.preprocess)
        for key, text in self.facts.items():
            model.set_rt_info(text, [SECTION, key])
        return model


def describe_graph(kind: str, spec: ModelSpec) -> dict[str, str]:
    """What a reader of the file alone needs: kind, preprocessing, labels, and what it was made from and by."""
    return {
        "midge": __version__,
        "kind": kind,
        "backbone": spec.timm_name,
        "preprocess": json.dumps(spec.preprocess.to_json()),
        "labels": json.dumps(list(spec.labels), ensure_ascii=False),
    }


def embed_onnx(model: ModelProto, preprocess: Preprocess) -> None:
    """Let a graph take (N, H, W, 3) uint8 instead of a normalized (N, 3, H, W) float32 image, in place.

    The cast comes first: TensorRT takes 8-bit inputs only where nothing else touches them.
    """
    onnx = require("onnx", "export")
    graph = model.graph
    name = graph.input[0].name
    batch, channels, height, width = graph.input[0].type.tensor_type.shape.dim
    sides = [side.dim_param or side.dim_value for side in (batch, height, width, channels)]
    floats, planes, scaled, normalized = (f"{PREFIX}{part}" for part in ("floats", "planes", "scaled", "image"))
    for node in graph.node:
        for position, taken in enumerate(node.input):
            if taken == name:
                node.input[position] = normalized
    mean, std = (np.array(values, np.float64)[:, None, None] for values in (preprocess.mean, preprocess.std))
    constants = {f"{PREFIX}factor": 1 / (255 * std), f"{PREFIX}shift": -mean / std}
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(np.float32), key) for key, value in constants.items()
    )
    make_node = onnx.helper.make_node
    added = [
        make_node("Cast", [name], [floats], name=floats, to=onnx.TensorProto.FLOAT),
        make_node("Transpose", [floats], [planes], name=planes, perm=[0, 3, 1, 2]),
        make_node("Mul", [planes, f"{PREFIX}factor"], [scaled], name=scaled),
        make_node("Add", [scaled, f"{PREFIX}shift"], [normalized], name=normalized),
    ]
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, sides))


def embed_openvino(openvino: Any, model: Any, preprocess: Preprocess) -> Any:
    """The same for an OpenVINO model, by OpenVINO's own preprocessing."""
    steps = openvino.preprocess.PrePostProcessor(model)
    image = steps.input()
    image.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
    image.model().set_layout(openvino.Layout("NCHW"))
    scaled = image.preprocess().convert_element_type(openvino.Type.f32)
    scaled.mean([255 * value for value in preprocess.mean]).scale([255 * value for value in preprocess.std])
    return steps.build()
