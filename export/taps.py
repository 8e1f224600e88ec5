"""Intermediate tensors of a variant, by the names that they have in the FP32 graph.

ONNX files are run as they are written, without the runtime's fusing, i.e. in float between quantizing and dequantizing:
what shows is what the file does, not how a runtime rounds. OpenVINO compiles what it is given, and tensors that it
fuses away are brought back by asking for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.backend import cannot_load
from ..runtime.errors import require
from ..runtime.openvino_backend import compile_settings
from ..runtime.openvino_core import openvino_core

Run = Callable[[np.ndarray], list[np.ndarray]]
"""From an image (1, 3, H, W) float32 to the chosen tensors."""


ACTIVATIONS = {"Relu": ("Relu",), "Clip": ("Clamp", "Relu")}
"""Operators of ONNX that fold into the quantization after them -> OpenVINO's for them."""


@dataclass(frozen=True)
class Tap:
    """A model whose tensors can be looked at.

    Attributes:
        sources: tensor of the FP32 graph -> the model's own that stands for it.
        open: loads the model so that it gives some of its tensors.
    """

    sources: Mapping[str, str]
    open: Callable[[Sequence[str]], Run]


def tap_onnx(path: Path, ops: Mapping[str, str]) -> Tap:
    """An ONNX file. ``ops`` is what makes the tensors of the FP32 graph.

    Where an activation was folded into the quantization after it, its name has gone to the operator before it, and the
    dequantized values are what it stood for.
    """
    onnx = require("onnx", "export")
    import onnxruntime as ort

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's own, and it may come from elsewhere
        raise cannot_load("onnx", path, error) from None
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    quantized, dequantized = (
        {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == op}
        for op in ("QuantizeLinear", "DequantizeLinear")
    )
    sources = {
        name: name if made[name] == op else dequantized.get(quantized.get(name, ""), name)
        for name, op in ops.items()
        if name in made
    }

    def open_run(tensors: Sequence[str]) -> Run:
        present = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in tensors if name not in present
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base class
            raise cannot_load("ONNX Runtime", path, error) from None
        given = session.get_inputs()[0].name
        return lambda image: [np.asarray(value) for value in session.run(list(tensors), {given: image})]

    return Tap(sources, open_run)


def tap_openvino(path: Path, ops: Mapping[str, str]) -> Tap:
    """An OpenVINO model, whose tensors keep the names of the ONNX file that it was made from.

    That may be a quantized one, in which activations were folded as :func:`tap_onnx` says.
    """
    core = openvino_core()
    try:
        model = core.read_model(path)
    except Exception as error:  # RuntimeError mostly, but each frontend has its own
        raise cannot_load("OpenVINO", path, error) from None
    made = {
        name: op.get_type_name() for op in model.get_ordered_ops() for port in op.outputs() for name in port.get_names()
    }
    folded = {name for name, op in ops.items() if op in ACTIVATIONS and made.get(name) not in (None, *ACTIVATIONS[op])}
    dequantized = {name: found for name in folded if (found := f"{name}_DequantizeLinear_Output") in made}

    def open_run(tensors: Sequence[str]) -> Run:
        present = {name for port in model.outputs for name in port.get_names()}
        model.add_outputs([name for name in tensors if name not in present])
        compiled = core.compile_model(model, "CPU", compile_settings("CPU", threads=1, cache=None))
        request = compiled.create_infer_request()

        def run(image: np.ndarray) -> list[np.ndarray]:
            request.infer([image])
            return [request.get_tensor(name).data.copy() for name in tensors]

        return run

    return Tap({name: dequantized.get(name, name) for name in ops if name in made}, open_run)


# Runtime of a variant -> what shows its tensors. TensorRT's variants are ONNX files, and are run as such.
TAPS = {"onnxruntime": tap_onnx, "openvino": tap_openvino, "tensorrt": tap_onnx}
