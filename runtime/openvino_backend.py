"""OpenVINO: latency hint, one stream, the given number of threads, float arithmetic in float32.

It runs on the CPU unless another device is named, and keeps no compiled model unless a cache is. The precision is
stated because OpenVINO otherwise computes every float layer in bfloat16 where the CPU can, silently.

What executed is read from the compiled model's runtime graph, whose nodes carry the types and shapes that were chosen.
Attention is fused there into one node without its inner shapes, so its matrix products are looked up in the file's own
graph by the names that the fused node keeps. Where the sum of both is not the file's, the share is not known.

On an x86 without VNNI, OpenVINO's integer kernels add in 16 bits, which overflow: a ResNet18's smallest cosine to FP32
was 0.46, where the same file has 0.986 in exact arithmetic. There, Q/DQ is computed as it is written, in float: right,
no faster than FP32, and reported as what it is.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Placement, TensorSpec, cannot_load, check_batch
from .cpu_features import adds_in_16_bits
from .errors import UserError, require, unknown_name
from .macs import INTEGER_TYPES, convolution_macs, matmul_macs
from .openvino_core import openvino_core

# Node types of the runtime graph.
CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
MATRIX_PRODUCTS = frozenset({"FullyConnected", "MatMul"})
FUSED = "Subgraph"
TYPES = {"f32": "float32", "u8": "uint8"}
CONSTANTS = frozenset({"Const", "Input", "Output"})

# Operators of the file whose multiply-accumulates are not worked out here.
UNCOUNTED = """ConvolutionBackpropData GroupConvolutionBackpropData DeformableConvolution Einsum Loop If
ScaledDotProductAttention TensorIterator LSTMCell LSTMSequence GRUCell GRUSequence RNNCell RNNSequence"""


class OpenVinoBackend:
    """A network in OpenVINO.

    Args:
        model: the .xml file, its weights in the .bin file of the same name; one input, float32 or 8-bit, of static
            shape but for the batch, and float32 outputs.
        threads: threads of one inference, on a CPU.
        device: e.g. ``"GPU"``, ``"GPU.1"``, ``"NPU"``; None is the CPU.
        cache: folder of compiled models; None keeps none.
    """

    def __init__(self, model: Path, threads: int, device: str | None = None, cache: Path | None = None) -> None:
        openvino = require("openvino", "openvino")
        core = openvino_core()
        self._device = "CPU" if device is None else device
        if self._device not in core.available_devices:
            raise unknown_name("OpenVINO device", self._device, core.available_devices)
        self._settings = compile_settings(self._device, threads, cache)
        try:
            self._model = core.read_model(model)
            self._compiled = core.compile_model(self._model, self._device, self._settings)
        except Exception as error:  # RuntimeError mostly, but each frontend has its own
            raise cannot_load("OpenVINO", model, error) from None
        inputs, outputs = self._model.inputs, self._model.outputs
        shapes = [port.get_partial_shape() for port in (*inputs, *outputs)]
        ranks = {len(shape) for shape in shapes[1:] if shape.rank.is_static}
        types = [TYPES.get(port.get_element_type().get_type_name()) for port in inputs]
        batch, *sides = list(shapes[0]) if len(inputs) == 1 and len(shapes[0]) == 4 else [openvino.Dimension()]
        if not sides or any(side.is_dynamic for side in sides) or types[0] is None or ranks not in ({2}, {4}):
            given = [str(shape) for shape in shapes]
            raise UserError(
                f"The model '{model}' has {given}: it must have one float or uint8 input of 4 sides, fixed but for the "
                "batch, and (N, K) or (N, C, H, W) outputs."
            )
        self.dynamic_batch: bool = batch.is_dynamic
        number = 1 if self.dynamic_batch else batch.get_length()
        self.input_shape: tuple[int, ...] = (number, *(side.get_length() for side in sides))
        self.input_dtype = types[0]
        self.inputs, self.outputs = (
            tuple(
                TensorSpec(_name(port), _shape(port, number), port.get_element_type().to_dtype().name) for port in ports
            )
            for ports in (inputs, outputs)
        )
        self._request = self._compiled.create_infer_request()

    def __enter__(self) -> OpenVinoBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The first output, (N, …) float32, for a batch of ``input_shape``."""
        self._infer(batch)
        return self._request.get_output_tensor(0).data.copy()

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, (N, …) float32 each."""
        self._infer(batch)
        return tuple(tensor.data.copy() for tensor in self._request.output_tensors)

    def _infer(self, batch: np.ndarray) -> None:
        check_batch(batch, self.input_shape, self.input_dtype, self.dynamic_batch)
        self._request.infer([batch], share_inputs=True)

    def close(self) -> None:
        """Free the request, the compiled model and the file's graph."""
        del self._request, self._compiled, self._model

    def placement(self) -> Placement:
        """What one inference executes, from the runtime graph (see the module's head)."""
        model, compiled = self._model, self._compiled
        if self.dynamic_batch:  # the graphs show no shapes then: another network, of the artifact's batch, does
            openvino = require("openvino", "openvino")
            model = self._model.clone()
            model.reshape(list(self.input_shape))
            compiled = openvino.compile_model(model, self._device, self._settings)
        macs_by_name, uncounted = _macs_of_file(model)
        int8_macs = total_macs = 0
        ops: Counter[str] = Counter()
        for node in compiled.get_runtime_model().get_ordered_ops():
            kind = _info(node, "layerType")
            if kind in CONSTANTS:
                continue
            ops[kind] += 1
            macs = _macs_of_node(node, kind, macs_by_name)
            total_macs += macs
            int8_macs += macs if macs and _is_integer(node, kind) else 0
        if total_macs != sum(macs_by_name.values()):
            uncounted["(not found in the runtime graph)"] = 1
        return Placement(int8_macs, total_macs, dict(sorted(ops.items())), dict(uncounted))


def compile_settings(device: str, threads: int, cache: Path | None) -> dict[str, str]:
    """What a device is told; each takes only what it knows."""
    settings = {"PERFORMANCE_HINT": "LATENCY", "CACHE_DIR": "" if cache is None else str(cache)}
    if device == "CPU":
        settings |= {"NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": str(threads)}
        if adds_in_16_bits():
            settings["LP_TRANSFORMS_MODE"] = "NO"
    if not device.startswith("NPU"):
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    return settings


def _name(port: Any) -> str:
    return min(port.get_names(), default=port.get_node().get_friendly_name())


def _shape(port: Any, batch: int) -> tuple[int, ...]:
    """The shape of an input or output, for a batch where the model takes any; the rest of it is fixed."""
    first, *sides = port.get_partial_shape()
    return (batch if first.is_dynamic else first.get_length(), *(side.get_length() for side in sides))


def _info(node: Any, key: str) -> str:
    return node.get_rt_info()[key].astype(str)


def _shapes(node: Any) -> tuple[list[list[int]], list[int]]:
    """Shapes of the inputs, [] where not static, and of the first output."""
    ports = [port.get_partial_shape() for port in (*node.inputs(), node.outputs()[0])]
    shapes = [list(shape.to_shape()) if shape.is_static else [] for shape in ports]
    return shapes[:-1], shapes[-1]


def _macs_of_file(model: Any) -> tuple[dict[str, int], Counter[str]]:
    """MACs of each operator of the file that has some, by its name, and the operators that are not counted."""
    macs: dict[str, int] = {}
    uncounted: Counter[str] = Counter()
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in CONVOLUTIONS:
            inputs, output = _shapes(node)
            macs[node.get_friendly_name()] = convolution_macs(output, inputs[1], output[1])
        elif kind == "MatMul":
            inputs, output = _shapes(node)
            macs[node.get_friendly_name()] = matmul_macs(inputs[0], inputs[1], output) or 0
        elif kind in UNCOUNTED.split():
            uncounted[kind] += 1
    return macs, uncounted


def _macs_of_node(node: Any, kind: str, macs_by_name: dict[str, int]) -> int:
    """MACs of a node of the runtime graph; 0 where it has none or does not show them."""
    if kind == FUSED:
        return sum(macs_by_name.get(name, 0) for name in _info(node, "originalLayersNames").split(","))
    if kind not in CONVOLUTIONS and kind not in MATRIX_PRODUCTS:
        return 0
    inputs, output = _shapes(node)
    if len(inputs) < 2 or not inputs[1] or not output:
        return 0
    if kind in CONVOLUTIONS:
        return convolution_macs(output, inputs[1], output[1])
    return matmul_macs(inputs[0], inputs[1], output) or 0


def _is_integer(node: Any, kind: str) -> bool:
    """Whether data and weights are 8-bit integers; of fused attention, whether all its inputs are."""
    operands = node.inputs() if kind == FUSED else node.inputs()[:2]
    return all(port.get_element_type().get_type_name() in INTEGER_TYPES for port in operands)
