"""ONNX Runtime: all graph optimizations, the given threads inside an operator, one operator at a time.

It runs on the CPU unless another execution provider is named.

What executed is read from the runtime's own profile of one run. Two more sessions are profiled, with weights kept in
their plain layout so that their shapes show: one optimized like the real one, whose integer operators are counted; and
one without the layout optimizations, for the total, because the blocked layout (NCHWc) pads channels to a multiple of
8 or 16 and so shows more MACs than the network has.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from .backend import Placement, TensorSpec, cannot_load, cannot_run, check_batch
from .cpu_features import adds_in_16_bits
from .errors import UserError, unknown_name
from .macs import INTEGER_TYPES, convolution_macs, matmul_macs

LEVELS = ort.GraphOptimizationLevel
TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}

# Operator -> positions of data and weights among its inputs.
CONVOLUTIONS = {
    "Conv": (0, 1),
    "FusedConv": (0, 1),
    "NhwcFusedConv": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearConv": (0, 3),
}
MATRIX_PRODUCTS = {
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedGemm": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "DynamicQuantizeMatMul": (0, 1),
    "QLinearMatMul": (0, 3),
    "QGemm": (0, 3),
}
QUANTIZES_ITS_DATA = frozenset({"DynamicQuantizeMatMul"})  # takes floats, multiplies integers

# Operators of several matrix-like inputs that do no matrix product. Any other such operator is reported as uncounted.
WITHOUT_MACS = """Add Sub Mul Div Pow Mod Max Min Sum Mean Where Concat And Or Xor Equal Greater GreaterOrEqual Less
LessOrEqual PRelu Expand Reshape Gather GatherElements GatherND ScatterElements ScatterND Resize BiasGelu FastGelu
BiasSoftmax SkipLayerNormalization SkipSimplifiedLayerNormalization QLinearAdd QLinearMul QLinearConcat QLinearWhere
QuantizeLinear DequantizeLinear"""


CPU = "CPUExecutionProvider"
TENSOR_TYPES = {"tensor(float16)": "float16", **TYPES}


class Executed(NamedTuple):
    """One operator of a profile: its name, and per input and output the type and the shape."""

    op: str
    inputs: list[tuple[str, list[int]]]
    outputs: list[tuple[str, list[int]]]


class OrtBackend:
    """A network in ONNX Runtime.

    Args:
        model: the ONNX file; one input, float32 or 8-bit, of static shape but for the batch, and float32 outputs.
        threads: intra-op threads.
        device: an execution provider; None is the CPU's. What it cannot run runs on the CPU.
        cache: not used: nothing is kept.
    """

    def __init__(self, model: Path, threads: int, device: str | None = None, cache: Path | None = None) -> None:
        self.model = model
        self.threads = threads
        self._providers = choose_providers(device)
        self._session = self._open(_options(threads))
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        batch, *sides = inputs[0].shape if len(inputs) == 1 else [0]
        ranks = {len(output.shape) for output in outputs}
        known = inputs and inputs[0].type in TYPES
        if len(sides) != 3 or any(type(side) is not int for side in sides) or not known or ranks not in ({2}, {4}):
            given = [(tensor.name, tensor.shape, tensor.type) for tensor in (*inputs, *outputs)]
            raise UserError(
                f"The model '{model}' has {given}: it must have one float or uint8 input of 4 sides, fixed but for the "
                "batch, and (N, K) or (N, C, H, W) outputs."
            )
        self.dynamic_batch = type(batch) is not int
        self.input_shape: tuple[int, ...] = (1 if self.dynamic_batch else batch, *sides)
        self.input_dtype = TYPES[inputs[0].type]
        self.inputs, self.outputs = (
            tuple(_spec(tensor, self.input_shape[0]) for tensor in tensors) for tensors in (inputs, outputs)
        )
        self._input, self._outputs = inputs[0].name, [output.name for output in outputs]

    def __enter__(self) -> OrtBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The first output, (N, …) float32, for a batch of ``input_shape``."""
        return self._run(batch, self._outputs[:1])[0]

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, (N, …) float32 each."""
        return tuple(self._run(batch, self._outputs))

    def _run(self, batch: np.ndarray, outputs: list[str]) -> list[np.ndarray]:
        check_batch(batch, self.input_shape, self.input_dtype, self.dynamic_batch)
        try:
            return [np.asarray(output) for output in self._session.run(outputs, {self._input: batch})]
        except Exception as error:  # its exceptions share no base class
            raise cannot_run("ONNX Runtime", self.model, error) from None

    def close(self) -> None:
        """Free the session."""
        del self._session

    def placement(self) -> Placement:
        """What one run executes, from profiles of two more sessions (see the module's head)."""
        executed = self._profile(LEVELS.ORT_ENABLE_ALL)
        int8_macs, _, uncounted = _count(executed)
        _, total_macs, uncounted_plain = _count(self._profile(LEVELS.ORT_ENABLE_EXTENDED))
        ops = Counter(node.op for node in executed)
        return Placement(int8_macs, total_macs, dict(sorted(ops.items())), uncounted or uncounted_plain)

    def _open(self, options: ort.SessionOptions) -> ort.InferenceSession:
        try:
            session = ort.InferenceSession(str(self.model), options, providers=self._providers)
        except Exception as error:  # its exceptions share no base class
            raise cannot_load("ONNX Runtime", self.model, error) from None
        if self._providers[0] not in session.get_providers():  # it goes on without one that cannot start
            raise UserError(f"ONNX Runtime has {self._providers[0]}, but it does not start here: check its libraries.")
        return session

    def _profile(self, level: ort.GraphOptimizationLevel) -> list[Executed]:
        with tempfile.TemporaryDirectory() as folder:
            options = _options(self.threads)
            options.graph_optimization_level = level
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            options.add_session_config_entry("session.disable_prepacking", "1")
            session = self._open(options)
            session.run(self._outputs, {self._input: np.zeros(self.input_shape, self.input_dtype)})
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return [
            Executed(args["op_name"], _tensors(args["input_type_shape"]), _tensors(args["output_type_shape"]))
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
            for args in [event["args"]]
        ]


def choose_providers(device: str | None) -> list[str]:
    """The execution provider of that name, then the CPU's.

    Raises:
        UserError: this build of ONNX Runtime does not have it.
    """
    allowed = ort.get_available_providers()
    if device is not None and device not in allowed:
        raise unknown_name("execution provider", device, allowed)
    return [*dict.fromkeys((device or CPU, CPU))]


def _spec(tensor: Any, batch: int) -> TensorSpec:
    return TensorSpec(tensor.name, (batch, *tensor.shape[1:]), TENSOR_TYPES.get(tensor.type or "", "other"))


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL
    options.log_severity_level = 3
    keep_exact(options)
    return options


def keep_exact(options: ort.SessionOptions) -> None:
    """Have INT8 products added up without overflow, on the kernels that this CPU has for it.

    Without VNNI, x86 adds pairs of products of u8 and s8 in 16 bits: a cosine of 0.86 instead of 0.999 was seen. The
    entry makes the weights u8 too, whose kernels do not overflow. It must not be set elsewhere: ONNX Runtime 1.32 also
    heeds it where there is AMX, and then passes over the AMX kernels, which exist for signed weights alone. A ResNet18
    took 2.2 times as long, for the same bytes.
    """
    if adds_in_16_bits():
        options.add_session_config_entry("session.x64quantprecision", "1")


def _tensors(described: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    return [(kind, shape) for tensor in described for kind, shape in tensor.items()]


def _count(executed: list[Executed]) -> tuple[int, int, dict[str, int]]:
    """(8-bit integer MACs, all MACs, uncounted operators) of a profile."""
    int8_macs = total_macs = 0
    uncounted: Counter[str] = Counter()
    for node in executed:
        macs = _macs(node)
        if macs is None:
            uncounted[node.op] += 1
            continue
        total_macs += macs
        int8_macs += macs if _is_integer(node) else 0
    return int8_macs, total_macs, dict(uncounted)


def _operands(node: Executed) -> list[tuple[str, list[int]]]:
    """Data and weights of an operator that has MACs; [] of any other."""
    positions = CONVOLUTIONS.get(node.op) or MATRIX_PRODUCTS.get(node.op) or ()
    return [node.inputs[position] for position in positions if position < len(node.inputs)]


def _is_integer(node: Executed) -> bool:
    operands = _operands(node)[1:] if node.op in QUANTIZES_ITS_DATA else _operands(node)
    return bool(operands) and all(kind in INTEGER_TYPES for kind, _ in operands)


def _macs(node: Executed) -> int | None:
    """MACs of one operator; None where they are not known."""
    operands = [shape for _, shape in _operands(node)]
    if len(operands) == 2 and node.outputs:
        output = node.outputs[0][1]
        if node.op in MATRIX_PRODUCTS:
            return matmul_macs(operands[0], operands[1], output)
        return convolution_macs(output, operands[1], operands[1][0]) if len(operands[1]) > 2 else None
    if node.op in CONVOLUTIONS or node.op in MATRIX_PRODUCTS:
        return None
    matrices = sum(len(shape) > 1 for _, shape in node.inputs)
    return None if matrices > 1 and node.op not in WITHOUT_MACS.split() else 0
