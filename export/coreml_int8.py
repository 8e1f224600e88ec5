"""A Core ML package in INT8 (W8A8) from the same ranges as every other INT8 variant.

coremltools measures ranges by running the model, which only macOS can. But it writes Q/DQ by graph passes of its own,
which are given here the ranges that were measured on the ONNX graph. Both graphs are made from one torch network and
name their values after the same nodes, so a range is found by name, above operators that only move values where need
be; a value without a range is an error. That the names mean the same is checked by the weights: what multiplies them
must take the same tensor in both graphs.

As coremltools has it, what cannot be negative is unsigned from 0 on, everything else signed and symmetric; weights are
signed and symmetric per output channel. Of convolutional networks the inputs of convolutions, linear layers and
residual additions are quantized, of transformers those of convolutions and linear layers. The rest stays in 16-bit
floats.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UserError
from .coreml_export import INPUT, PREPROCESSING, import_coremltools, quiet
from .ranges import is_transformer
from .weights import weighted_nodes

if TYPE_CHECKING:
    from .prepare import Prepared

# Operators that only move numbers, in MIL and in ONNX.
MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "cast", "identity")
ONNX_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")

SMALLEST_SCALE = 2.0**-20  # 16-bit floats keep it to 6 %; a dead channel's would be 0

# What coremltools adds to the names of values in 16-bit floats.
FP16 = re.compile(r"_(cast|to)_fp16(?=_|$)")


def quantize_coreml(model: Any, prepared: Prepared) -> Any:
    """Quantize a converted network.

    Args:
        model: coremltools' MLModel in 16-bit floats, made by ``convert_coreml`` from the weights of the prepared graph.
        prepared: the graph, its ranges, and what stays float.

    Returns:
        The MLModel in INT8.

    Raises:
        UserError: a value to be quantized has no range, or the two graphs are not the same network.
    """
    ct = import_coremltools()
    with quiet():
        from coremltools.models.utils import _apply_graph_pass

        passes = _passes(Tensors(prepared), is_transformer(prepared.graph))
        return _apply_graph_pass(model, passes, spec_version=ct.target.iOS17)


class Tensors:
    """The tensors of an ONNX graph that values of an ML Program stand for.

    Args:
        prepared: the graph, its ranges, and what stays float.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._ranges, self._symmetric_ranges = prepared.ranges, prepared.symmetric_ranges
        self._producers = {name: node for node in prepared.graph.graph.node for name in node.output}
        self._inputs: dict[bytes, set[str]] = {}
        self._floats: set[bytes] = set()
        for weighted in weighted_nodes(prepared.graph):
            mark = _mark(weighted.weight)
            self._inputs.setdefault(mark, set()).add(self._origin(weighted.data))
            if weighted.node in prepared.float_nodes:
                self._floats.add(mark)

    def find(self, value: Any) -> str:
        """The tensor of a value (coremltools' Var) that holds the same numbers, moved or not."""
        name = _plain(value.name)
        if name in self._ranges:
            return name
        if value.op is not None and (value.op.op_type in MOVES or _pads_with_zeros(value.op)):
            return self.find(value.op.inputs["x"])
        raise UserError(f"Core ML's value {value.name!r} has no range by that name: the network cannot be quantized.")

    def check(self, value: Any, weight: np.ndarray) -> None:
        """Refuse a value that a weight multiplies here, where in the ONNX graph it multiplies another.

        Args:
            value: coremltools' Var.
            weight: (out, in…) float16.
        """
        found = self._origin(self.find(value))
        expected = self._inputs.get(_mark(weight), set())
        if found not in expected:
            raise UserError(
                f"Core ML's value {value.name!r} is taken for {found!r}, but the weight that it meets multiplies "
                f"{sorted(expected) or 'nothing'} in the ONNX graph: the network cannot be quantized."
            )

    def range(self, value: Any) -> tuple[float, float]:
        """Lowest and highest number that a value stands for, 0 among them."""
        name = self.find(value)
        low, high = self._ranges[name] if self._ranges[name][0] >= 0 else self._symmetric_ranges[name]
        return min(low, 0.0), max(high, 0.0)

    def stays_float(self, weight: np.ndarray) -> bool:
        """Whether a weight (out, in…) belongs to an operator that stays float."""
        return _mark(weight) in self._floats

    def _origin(self, name: str) -> str:
        """The tensor that a tensor only moves."""
        while (node := self._producers.get(name)) is not None and node.op_type in ONNX_MOVES:
            name = node.input[0]
        return name


def _plain(name: str) -> str:
    """Name of a value as the network's node has it; the normalized image is the input of the ONNX graph."""
    name = FP16.sub("", name)
    return INPUT if name == PREPROCESSING[-1] else name


def _pads_with_zeros(op: Any) -> bool:
    """Whether an operator puts zeros around a value, which ONNX's convolution does itself."""
    return op.op_type == "pad" and op.inputs["mode"].val == "constant" and op.inputs["constant_val"].val == 0


def _mark(weight: np.ndarray) -> bytes:
    """What is equal for equal weights in 16-bit floats, -0 and 0 among them: a converter stores one for the other."""
    return repr(weight.shape).encode() + (np.ascontiguousarray(weight, np.float16) + np.float16(0)).tobytes()


def _passes(tensors: Tensors, transformer: bool) -> list[Any]:
    """The graph passes that quantize, in order: coremltools' own, given our ranges and scales."""
    # Its types are made while it runs, so they are none that could be checked.
    mil: Any = importlib.import_module("coremltools.converters.mil.mil")
    graph_passes: Any = importlib.import_module("coremltools.converters.mil.mil.passes.graph_pass")
    pass_helper: Any = importlib.import_module("coremltools.converters.mil.mil.passes.helper")
    quantization: Any = importlib.import_module("coremltools.optimize.coreml._quantization_passes")
    optimize: Any = importlib.import_module("coremltools.optimize.coreml")
    mb = mil.Builder

    class Relu6(graph_passes.AbstractGraphPass):
        """Let clip to 0..6 be relu6, which is known to fuse into the convolution before it."""

        def apply(self, prog: Any) -> None:
            self.replace(prog.functions["main"])

        @pass_helper.block_context_manager
        def replace(self, block: Any) -> None:
            for op in list(block.operations):
                if op.op_type == "clip" and (op.alpha.val, op.beta.val) == (0, 6):
                    new = mb.relu6(x=op.x, name=op.name, before_op=op)
                    new.name = op.outputs[0].name
                    block.replace_uses_of_var_after_op(anchor_op=op, old_var=op.outputs[0], new_var=new)
                    block.remove_ops([op])

    class QuantizeInputs(quantization.insert_prefix_quantize_dequantize_pair):
        """Q/DQ before an operator's inputs, by the given ranges."""

        def is_valid_op(self, op: Any) -> bool:
            return op.op_type in quantized

        def transform_op(self, op: Any) -> None:
            if op.op_type != "add":
                if tensors.stays_float(op.inputs["weight"].val):
                    return
                tensors.check(op.inputs["x"], op.inputs["weight"].val)
            super().transform_op(op)

        def _construct_quant_dequant_op(self, input_var: Any, dtype: Any, mode: Any) -> Any:
            low, high = tensors.range(input_var)
            unsigned = low == 0
            scale = np.float16(max(high / 255 if unsigned else max(-low, high) / 127, SMALLEST_SCALE))
            zero_point = np.uint8(0) if unsigned else None
            arguments = {"scale": scale, "zero_point": zero_point}
            levels = mb.quantize(input=input_var, output_dtype="uint8" if unsigned else "int8", **arguments)
            return mb.dequantize(input=levels, **arguments)

    class QuantizeWeights(quantization.linear_quantize_weights):
        """Weights of convolutions and linear layers to 8 bits, signed and symmetric per output channel."""

        def is_valid_op(self, op: Any) -> bool:
            users = op.outputs[0].child_ops if op.op_type == "const" else ()
            weights = [user.op_type in ("conv", "linear") and user.weight is op.outputs[0] for user in users]
            return bool(weights) and all(weights) and not tensors.stays_float(op.outputs[0].val)

        @classmethod
        def blockwise_compress_by_dtype(cls, original_data: Any, dtype: Any, mode: Any, block_sizes: Any) -> Any:
            weight = original_data.astype(np.float32)
            largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True)
            scale = np.maximum(largest / 127, SMALLEST_SCALE).astype(np.float16)
            levels = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
            return quantization.optimize_utils.QuantParams(data=levels, scale=scale, offset=None, nbits=np.uint8(8))

    quantized = ("conv", "linear") if transformer else ("conv", "linear", "add")
    symmetric = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", weight_threshold=0)
    config = optimize.OptimizationConfig(symmetric)
    return [Relu6(), QuantizeInputs(config), QuantizeWeights(config)]
