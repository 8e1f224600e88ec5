"""What ``midge lint`` says of small graphs, held against what the runtimes themselves do with them.

ONNX Runtime's answer is the graph that it has optimized, node by node; OpenVINO's the graph that it executes;
TensorRT-RTX's whether it parses and builds, which needs no GPU, and what it logs.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from midge.export.lint import Report, lint_graph
from midge.export.lint_read import read_graph
from midge.export.lint_rule import ERROR, NOTE, WARNING
from midge.export.lint_rules import RULES
from midge.export.lint_rules_float import float_nodes
from midge.export.lint_targets import TARGETS
from midge.runtime import ort_backend
from midge.runtime.artifact import Artifact
from midge.runtime.errors import UserError
from midge.runtime.openvino_backend import OpenVinoBackend

U8, S8, S32, F32 = np.uint8, np.int8, np.int32, np.float32
SCALE, WEIGHT_SCALE = 0.02, 0.01


def channel_scales(channels: int) -> np.ndarray:
    return np.linspace(0.5, 1.5, channels, dtype=F32) * WEIGHT_SCALE


class Net:
    """A small network as it is written: one input ``image`` (1, 8, 8, 8), one output ``logits`` (1, K)."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: dict[str, np.ndarray] = {}
        self.rng = np.random.default_rng(0)

    def store(self, values: Any, dtype: Any = F32) -> str:
        name = f"c{len(self.stored)}"
        self.stored[name] = np.asarray(values, dtype)
        return name

    def op(self, op: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        made = [f"t{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, made, name=name or f"n{len(self.nodes)}", **attributes))
        return made[0] if outputs == 1 else made

    def q(self, x: str, dtype: Any = U8, zero: Any = 0, scale: Any = SCALE, **attributes: Any) -> str:
        points = () if zero is None else (self.store(zero, dtype),)
        return self.op("QuantizeLinear", x, self.store(scale), *points, **attributes)

    def dq(self, x: str, dtype: Any = U8, zero: Any = 0, scale: Any = SCALE, **attributes: Any) -> str:
        points = () if zero is None else (self.store(zero, dtype),)
        return self.op("DequantizeLinear", x, self.store(scale), *points, **attributes)

    def qdq(self, x: str, dtype: Any = U8, zero: Any = 0, scale: Any = SCALE, **attributes: Any) -> str:
        return self.dq(self.q(x, dtype, zero, scale, **attributes), dtype, zero, scale, **attributes)

    def weights(self, *shape: int, dtype: Any = S8, zero: Any = 0, axis: int | None = 0) -> str:
        low, high = (-100, 101) if dtype == S8 else (0, 256)
        values = self.store(self.rng.integers(low, high, shape), dtype)
        if axis is None:
            return self.dq(values, dtype, zero, WEIGHT_SCALE)
        channels = shape[axis]
        return self.dq(values, dtype, np.full(channels, zero), channel_scales(channels), axis=axis)

    def bias(self, scales: np.ndarray) -> str:
        values = self.store(self.rng.integers(-10_000, 10_000, len(scales)), S32)
        return self.dq(values, S32, np.zeros(len(scales)), scales, axis=0)

    def model(self, x: str, opset: int = 18, ir: int = 10, sides: Any = (1, 8, 8, 8), pool: bool = True) -> Any:
        if pool:
            x = self.op("Flatten", self.op("GlobalAveragePool", x))
        self.nodes.append(helper.make_node("Identity", [x], ["logits"], name="last"))
        domains = {node.domain for node in self.nodes} - {""}
        return helper.make_model(
            helper.make_graph(
                self.nodes,
                "net",
                [helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)],
                [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [sides[0], None])],
                [numpy_helper.from_array(values, name) for name, values in self.stored.items()],
            ),
            opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(name, 1) for name in domains)],
            ir_version=ir,
        )


@dataclass
class Style:
    """How a convolution is quantized."""

    dtype: Any = U8
    zero: Any = 0
    scale: Any = SCALE
    bias: str = "int32"
    weights: dict[str, Any] = field(default_factory=dict)
    after: str = ""
    between: str = ""
    output: bool = True
    input: bool = True
    groups: int = 1
    store_float: bool = False
    bias_factor: float = 1


def conv(net: Net, x: str, name: str, style: Style) -> str:
    points = style.zero
    x = net.qdq(x, style.dtype, points, style.scale) if style.input else net.op("Sigmoid", x)
    shape = (8, 8 // style.groups, 3, 3)
    weights = net.store(net.rng.normal(size=shape)) if style.store_float else net.weights(*shape, **style.weights)
    weight_scales = WEIGHT_SCALE * np.ones(8) if style.weights.get("axis", 0) is None else channel_scales(8)
    bias = {
        "": tuple,
        "int32": lambda: (net.bias(SCALE * style.bias_factor * weight_scales),),
        "float": lambda: (net.store(np.ones(8)),),
    }
    x = net.op("Conv", x, weights, *bias[style.bias](), name=name, pads=[1] * 4, group=style.groups)
    if style.between:
        x = net.op(style.between, x, kernel_shape=[2, 2])
    if style.after == "Clip":
        x = net.op("Clip", x, net.store(0), net.store(6))
    elif style.after:
        x = net.op(style.after, x)
    scale = 6 / 255 if style.after == "Clip" else style.scale
    return net.qdq(x, style.dtype, points, scale) if style.output else x


def convs(opset: int = 18, ir: int = 10, sides: Any = (1, 8, 8, 8), **changes: Any) -> Callable[[], Any]:
    """A convolution of the given style behind a plain UINT8 one, so that a difference shows at one node."""

    def build() -> Any:
        net = Net()
        first = {name: changes[name] for name in ("dtype", "zero") if name in changes}
        x = conv(net, "image", "plain", Style(**first, bias="float" if "dtype" in first else ""))
        return net.model(conv(net, x, "other", Style(**changes)), opset, ir, sides)

    return build


def product(op: str = "MatMul", dtype: Any = U8, axis: int = 1, bias: str = "", **changes: Any) -> Callable[[], Any]:
    """A matrix product of (8, 64) by (64, 16), of which the output is rounded unless ``output`` is False."""
    options: dict[str, Any] = {
        "add": False,
        "output": True,
        "after": "",
        "rank": 2,
        "attributes": {},
        "bias_factor": 1,
    }
    options |= changes

    def build() -> Any:
        net = Net()
        rows = [8, 64] if options["rank"] == 2 else [1, 8, 64]
        x = net.qdq(net.op("Reshape", "image", net.store(rows, np.int64)), dtype)
        weights = net.weights(64, 16, axis=axis)
        extra = {
            "": tuple,
            "int32": lambda: (net.bias(SCALE * options["bias_factor"] * channel_scales(16)),),
            "float": lambda: (net.store(np.ones(16)),),
        }
        x = net.op(op, x, weights, *extra[bias](), name="other", **options["attributes"])
        if options["add"]:
            x = net.op("Add", x, net.store(np.ones(16)))
        x = net.op(options["after"], x) if options["after"] else x
        x = net.qdq(x, dtype) if options["output"] else x
        x = net.op("ReduceMean", x, net.store([-2], np.int64), keepdims=int(options["rank"] == 2))
        return net.model(x, pool=False)

    return build


def built(body: Callable[[Net], str], **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        net = Net()
        return net.model(body(net), **options)

    return build


def plain(net: Net, x: str, name: str = "other", dtype: Any = S8) -> str:
    return net.op("Conv", x, net.weights(8, 8, 3, 3), name=name, pads=[1] * 4)


def read_by_channel(net: Net) -> str:
    """A convolution with float weights that reads one scale, written once for each channel."""
    x = net.dq(net.q(plain(net, net.qdq("image"), "first")), U8, np.zeros(8), np.full(8, SCALE), axis=1)
    return net.qdq(net.op("Conv", x, net.store(net.rng.normal(size=(8, 8, 3, 3))), name="other", pads=[1] * 4))


def branch(net: Net) -> str:
    x = plain(net, net.qdq("image", S8))
    return net.op("Add", net.qdq(x, S8), x)


def fan_out(net: Net, dtype: Any) -> str:
    """One tensor that two convolutions take, whose outputs are added."""
    x = net.qdq("image", dtype)
    return net.qdq(net.op("Add", *(net.qdq(plain(net, x, name), dtype) for name in ("plain", "other"))), dtype)


def residual(net: Net, dtype: Any) -> str:
    """A convolution's input added to its output."""
    x = net.qdq("image", dtype)
    return net.op("Add", net.qdq(plain(net, x), dtype), x)


def pooled_fan_out(net: Net) -> str:
    x = net.op("MaxPool", net.qdq("image", S8), kernel_shape=[3, 3], pads=[1] * 4)
    return net.op("Add", net.qdq(plain(net, x), S8), x)


def output_fan_out(net: Net) -> str:
    x = net.qdq(plain(net, net.qdq("image", S8), "plain"), S8)
    return net.op("Add", net.qdq(plain(net, x), S8), x)


def one_rounding_twice(net: Net, dtype: Any) -> str:
    x, scale, zero = plain(net, net.qdq("image", dtype)), net.store(SCALE), net.store(0, dtype)
    roundings = [net.op("QuantizeLinear", x, scale, zero) for _ in range(2)]
    return net.op("Add", *(net.op("DequantizeLinear", rounding, scale, zero) for rounding in roundings))


def two_roundings(net: Net, second: float) -> str:
    x = plain(net, net.qdq("image", S8))
    return net.op("Add", net.qdq(x, S8), net.qdq(x, S8, scale=second))


def shared_weights(net: Net) -> str:
    weights = net.weights(8, 8, 3, 3)
    x = net.qdq(net.op("Conv", net.qdq("image"), weights, name="plain", pads=[1] * 4))
    return net.qdq(net.op("Conv", x, weights, name="other", pads=[1] * 4))


def per_channel_data(net: Net) -> str:
    x = net.qdq("image", S8, np.zeros(8), np.full(8, SCALE), axis=1)
    return net.qdq(plain(net, x), S8)


def computed_scale(net: Net) -> str:
    scale, zero = net.op("ReduceMax", "image", keepdims=0), net.store(0, S8)
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", "image", scale, zero), scale, zero)
    return net.qdq(plain(net, x), S8)


def dynamic(net: Net) -> str:
    data, scale, zero = net.op("DynamicQuantizeLinear", net.op("Flatten", "image"), outputs=3)
    weights = net.store(net.rng.integers(-100, 100, (512, 8)), S8)
    x = net.op("Cast", net.op("MatMulInteger", data, weights, zero, name="other"), to=TensorProto.FLOAT)
    return net.op("Mul", net.op("Mul", x, scale), net.store(0.01))


def qlinear(net: Net) -> str:
    scale, zero = net.store(SCALE), net.store(0, U8)
    weights = net.store(net.rng.integers(-100, 100, (8, 8, 3, 3)), S8)
    rest = (net.store(0.01), net.store(0, S8), scale, zero)
    return net.dq(net.op("QLinearConv", net.q("image"), scale, zero, weights, *rest, name="other"))


def early_channels(net: Net) -> str:
    """Several scales, but no axis, which opset 12 knows nothing of."""
    values = net.store(net.rng.integers(-100, 101, (8, 8, 3, 3)), S8)
    weights = net.dq(values, S8, np.zeros(8), channel_scales(8))
    return net.qdq(net.op("Conv", net.qdq("image", S8), weights, name="other"), S8)


def transposed(net: Net) -> str:
    weights = net.weights(8, 8, 3, 3, axis=None)
    return net.qdq(net.op("ConvTranspose", net.qdq("image"), weights, name="other"))


def float_product(net: Net) -> str:
    x = net.qdq(net.op("Reshape", "image", net.store([8, 64], np.int64)))
    return net.op(
        "ReduceMean", net.qdq(net.op("MatMul", x, net.store(np.ones((64, 8))), name="other")), net.store([0], np.int64)
    )


def of_activations(net: Net, dtype: Any) -> str:
    sides = [net.store(sides, np.int64) for sides in ([8, 64], [64, 8])]
    a, b = (net.qdq(net.op("Reshape", "image", side), dtype) for side in sides)
    return net.op("ReduceMean", net.qdq(net.op("MatMul", a, b, name="other"), dtype), net.store([0], np.int64))


def float_conv(net: Net) -> str:
    x = net.qdq(plain(net, net.qdq("image", S8), "plain"), S8)
    return net.op("Conv", net.op("Sigmoid", x), net.store(np.ones((8, 8, 3, 3))), name="other")


S8_FLOAT_BIAS = {"dtype": S8, "bias": "float"}

CASES: dict[str, Callable[[], Any]] = {
    "u8": convs(),
    "u8 zero point": convs(zero=128),
    "u8 without zero point": convs(zero=None, bias="float"),
    "u8 float bias": convs(bias="float"),
    "u8 no bias": convs(bias=""),
    "u8 relu": convs(after="Relu"),
    "u8 relu above the lowest": convs(zero=10, after="Relu"),
    "u8 relu6": convs(after="Clip"),
    "u8 leaky relu": convs(after="LeakyRelu"),
    "u8 sigmoid": convs(after="Sigmoid"),
    "u8 hardswish": convs(after="HardSwish"),
    "u8 depthwise": convs(groups=8),
    "u8 output not rounded": convs(output=False),
    "u8 input not rounded": convs(input=False, output=False),
    "u8 relu behind pooling": convs(between="MaxPool", after="Relu"),
    "u8 pooling": convs(between="MaxPool"),
    "u8 weights": convs(weights={"dtype": U8, "zero": 128}, bias=""),
    "u8 weights float bias": convs(weights={"dtype": U8, "zero": 128}, bias="float"),
    "s8 weights with zero point": convs(weights={"zero": 3}, bias=""),
    "per tensor": convs(weights={"axis": None}),
    "weights along the input channels": convs(weights={"axis": 1}, bias=""),
    "weights along the input channels, float bias": convs(weights={"axis": 1}, bias="float"),
    "float weights": convs(store_float=True, bias=""),
    "float weights, data read by channel": built(read_by_channel),
    "weights only": convs(input=False, output=False, bias="float", dtype=S8),
    "bias in another scale": convs(bias_factor=2),
    "bias nearly in scale": convs(bias_factor=1.009),
    "s8": convs(**S8_FLOAT_BIAS),
    "s8 int32 bias": convs(dtype=S8),
    "s8 zero point": convs(**S8_FLOAT_BIAS, zero=5),
    "s8 relu": convs(**S8_FLOAT_BIAS, after="Relu"),
    "s8 relu6": convs(**S8_FLOAT_BIAS, after="Clip"),
    "s8 relu at the lowest": convs(dtype=S8, zero=-128, after="Relu"),
    "s8 depthwise relu6 not rounded": convs(**S8_FLOAT_BIAS, after="Clip", output=False, groups=8),
    "16 bits": convs(dtype=np.uint16, bias="", opset=21),
    "16 bits too early": convs(dtype=np.uint16, bias="", opset=18),
    "opset 12": convs(**S8_FLOAT_BIAS, weights={"axis": None}, opset=12),
    "opset 12 per channel": convs(**S8_FLOAT_BIAS, opset=12),
    "opset 12 without an axis": built(early_channels, opset=12),
    "opset 26": convs(**S8_FLOAT_BIAS, opset=26),
    "opset that nobody knows": convs(**S8_FLOAT_BIAS, opset=28, ir=14),
    "IR 14": convs(**S8_FLOAT_BIAS, ir=14),
    "IR 15": convs(**S8_FLOAT_BIAS, ir=15),
    "zero scale": convs(**S8_FLOAT_BIAS, scale=0),
    "negative scale": convs(**S8_FLOAT_BIAS, scale=-SCALE),
    "scale not a number": convs(**S8_FLOAT_BIAS, scale=np.nan),
    "infinite scale": convs(**S8_FLOAT_BIAS, scale=np.inf),
    "float": convs(input=False, output=False, bias="float", store_float=True, dtype=S8),
    "dynamic batch": convs(**S8_FLOAT_BIAS, sides=("N", 8, 8, 8)),
    "matmul u8": product(),
    "matmul s8 output not rounded": product(dtype=S8, output=False),
    "matmul s8 relu": product(dtype=S8, after="Relu"),
    "matmul relu, not rounded": product(after="Relu", output=False),
    "matmul tanh, not rounded": product(after="Tanh", output=False),
    "matmul along the rows": product(axis=0),
    "matmul add": product(add=True),
    "matmul add, not rounded": product(add=True, output=False),
    "matmul add of three axes": product(add=True, rank=3),
    "matmul add of three axes, not rounded": product(add=True, rank=3, output=False, dtype=S8),
    "gemm": product("Gemm", bias="int32"),
    "gemm not rounded": product("Gemm", bias="int32", output=False),
    "gemm float bias": product("Gemm", bias="float"),
    "gemm float bias, not rounded": product("Gemm", bias="float", output=False, dtype=S8),
    "gemm no bias, not rounded": product("Gemm", output=False, dtype=S8),
    "gemm beta": product("Gemm", bias="int32", attributes={"beta": 2.0}),
    "gemm bias in another scale": product("Gemm", bias="int32", bias_factor=2),
    "matmul of activations u8": built(functools.partial(of_activations, dtype=U8), pool=False),
    "matmul of activations s8": built(functools.partial(of_activations, dtype=S8), pool=False),
    "fan-out u8": built(functools.partial(fan_out, dtype=U8)),
    "fan-out s8": built(functools.partial(fan_out, dtype=S8)),
    "residual u8": built(functools.partial(residual, dtype=U8)),
    "residual s8": built(functools.partial(residual, dtype=S8)),
    "residual behind pooling s8": built(pooled_fan_out),
    "residual of a convolution s8": built(output_fan_out),
    "transposed convolution": built(transposed),
    "matmul with float weights": built(float_product, pool=False),
    "branch": built(branch),
    "rounded twice by one scale, u8": built(functools.partial(one_rounding_twice, dtype=U8)),
    "rounded twice by one scale, s8": built(functools.partial(one_rounding_twice, dtype=S8)),
    "rounded twice alike": built(lambda net: two_roundings(net, SCALE)),
    "rounded twice differently": built(lambda net: two_roundings(net, 0.03)),
    "rounded again": built(lambda net: net.qdq(plain(net, net.qdq(net.qdq("image", S8), S8, scale=0.03)), S8)),
    "another scale back": built(lambda net: net.qdq(plain(net, net.dq(net.q("image", S8), S8, scale=0.04)), S8)),
    "shared weights": built(shared_weights),
    "per-channel data": built(per_channel_data),
    "scales of a wrong number": built(
        lambda net: net.qdq(plain(net, net.qdq("image", S8, np.zeros(5), np.full(5, SCALE), axis=1)), S8)
    ),
    "zero points of another number": built(
        lambda net: net.qdq(plain(net, net.qdq("image", S8, np.zeros(8), SCALE, axis=1)), S8)
    ),
    "computed scale": built(computed_scale),
    "transpose between": built(
        lambda net: net.qdq(plain(net, net.op("Transpose", net.qdq("image", S8), perm=[0, 1, 3, 2])), S8)
    ),
    "dynamic quantization": built(dynamic, pool=False),
    "integer operator": built(qlinear),
    "one of two float": built(float_conv),
    "dangling": built(lambda net: (net.qdq("image", S8), net.qdq(plain(net, net.qdq("image", S8)), S8))[1]),
    "constant in a node": built(
        lambda net: net.qdq(plain(net, net.qdq(net.op("Add", "image", net.op("Constant", value_float=0.5)), S8)), S8)
    ),
    "operator of ONNX Runtime": built(lambda net: net.op("QuickGelu", "image", domain="com.microsoft")),
    "operator of both by its name": built(lambda net: net.op("Gelu", "image", domain="com.microsoft")),
    "operator of nobody": built(lambda net: net.op("Foo", "image", domain="my.own")),
    "operator that ONNX lacks": built(lambda net: net.op("Foo", "image")),
}


@functools.cache
def _model(case: str) -> bytes:
    return CASES[case]().SerializeToString()


@pytest.fixture
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(_model(request.param))
    return tmp_path / "model.onnx"


each_case = pytest.mark.parametrize("path", CASES, indirect=True, ids=lambda case: case.replace(" ", "-"))


def report_of(path: Path, target: str) -> Report:
    return lint_graph(path, read_graph(path), [target])


def rules_of(report: Report, *severities: str) -> set[str]:
    return {finding.rule for finding in report.findings if finding.severity in severities}


INTEGER = {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"}
FLOAT = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits", "ConvTranspose"}


def executed_by_ort(path: Path, folder: Path) -> dict[str, bool] | None:
    """Node -> whether it runs on integers, in ONNX Runtime's own optimized graph; None where it refuses or fails."""
    options = ort_backend._options(1)
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {"image": np.zeros((1, *session.get_inputs()[0].shape[1:]), np.float32)})
    except Exception:  # its exceptions share no base class
        return None
    nodes = onnx.load(folder / "optimized.onnx").graph.node
    products = {node.name.partition("/MatMulAddFusion")[0]: node.op_type for node in nodes}
    return {name: op in INTEGER for name, op in products.items() if op in INTEGER | FLOAT}


X86 = platform.machine().lower() in {"x86_64", "amd64"}


def has_vnni() -> bool:
    return Path("/proc/cpuinfo").exists() and "vnni" in Path("/proc/cpuinfo").read_text()


def has_amx() -> bool:
    return Path("/proc/cpuinfo").exists() and "amx_int8" in Path("/proc/cpuinfo").read_text()


def check_onnxruntime(path: Path, folder: Path) -> None:
    report, executed = report_of(path, "onnxruntime"), executed_by_ort(path, folder)
    if "load-without-vnni" in rules_of(report, WARNING):
        assert (executed is not None) == (has_vnni() or not X86)
        return
    if "signed-fanout" in rules_of(report, WARNING) and not X86:
        return  # elsewhere INT8 data has kernels too, as the consequence says
    assert report.taken("onnxruntime") == (executed is not None)
    if executed is not None:
        floats = report.float_names("onnxruntime") or []
        assert executed == {node.name: node.name not in floats for node in report.graph.weighted}


@each_case
def test_onnxruntime_does_as_lint_says(path: Path, tmp_path: Path) -> None:
    check_onnxruntime(path, tmp_path)


def executed_by_openvino(path: Path) -> tuple[bool, float | None]:
    """Whether OpenVINO takes a file, and the share of the multiply-accumulates that it does in 8-bit integers."""
    try:
        with OpenVinoBackend(path, 1) as backend:
            backend.run(np.zeros(backend.input_shape, np.float32))
            return True, backend.placement().share
    except UserError as error:
        assert "cannot load" in str(error)
        return False, None


def check_openvino(path: Path) -> None:
    report = report_of(path, "openvino")
    if "dynamic-shape" in rules_of(report, NOTE):
        return  # the backend takes static shapes only, as the note says
    taken, share = executed_by_openvino(path)
    if rules_of(report, WARNING) & {"scale", "scale-infinite"}:
        return  # which of both it does depends on what it fuses
    assert report.taken("openvino") == taken
    if share is not None:
        reasons = [why for why, _ in float_nodes(report.graph, "openvino").values()]
        floats = [why for why in reasons if why != "signed-zero-point" or has_amx()]  # which holds with AMX alone
        assert (share == 1) == (not floats)
        assert (share == 0) == (len(floats) == len(report.graph.weighted))


@pytest.mark.usefixtures("openvino_integers")
@each_case
def test_openvino_does_as_lint_says(path: Path) -> None:
    check_openvino(path)


class Logger:
    """One logger per process is what TensorRT allows."""

    @staticmethod
    @functools.cache
    def shared() -> Any:
        trt = pytest.importorskip("tensorrt_rtx")

        class Kept(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: list[str] = []

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.WARNING and "CUDA driver" not in message:
                    self.lines.append(message)

        return Kept()


def built_by_tensorrt(path: Path) -> tuple[bool, list[str]]:
    """Whether TensorRT-RTX parses and builds a file, and its warnings and errors."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = Logger.shared()
    logger.lines.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return False, list(logger.lines)
    return builder.build_serialized_network(network, builder.create_builder_config()) is not None, list(logger.lines)


def check_tensorrt(path: Path) -> None:
    report = report_of(path, "tensorrt-rtx")
    if "scale-computed" in rules_of(report, ERROR):
        return  # building it ends the process, in version 1.7
    done, lines = built_by_tensorrt(path)
    if "dynamic-shape" in rules_of(report, WARNING):
        assert not done and any("optimization profile" in line for line in lines)
        return
    assert report.taken("tensorrt-rtx") == done, lines
    tried = {finding.rule for finding in report.findings if finding.verified and finding.severity != NOTE}
    if done:
        assert any("UINT8" in line for line in lines) == ("uint8" in tried and "no zero point" not in str(report))
    assert tried or not lines


@each_case
def test_tensorrt_does_as_lint_says(path: Path) -> None:
    check_tensorrt(path)


class Images:
    """Calibration images as ONNX Runtime and NNCF ask for them."""

    def __init__(self) -> None:
        images = np.random.default_rng(0).normal(size=(4, 1, 3, 32, 32)).astype(F32)
        self.feeds = [{"image": image} for image in images]
        self.left = iter(self.feeds)

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self.left, {})


@pytest.fixture(scope="module")
def networks(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One ResNet18 as midge exports it, and as ONNX Runtime's and NNCF's defaults quantize it."""
    os.environ.setdefault("NNCF_CI", "1")  # else it reports its use to its makers
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns of compilers without a GPU
    import nncf
    from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static

    folder, plain_path = tmp_path_factory.mktemp("networks"), artifact.variants["onnx-fp32"].model
    paths = {name: variant.model for name, variant in artifact.variants.items() if name.startswith("onnx-")}
    for name, style in (("ort-static", QuantFormat.QDQ), ("ort-operators", QuantFormat.QOperator)):
        paths[name] = folder / f"{name}.onnx"
        quantize_static(plain_path, paths[name], Images(), quant_format=style)  # type: ignore[arg-type]
    paths["ort-dynamic"] = folder / "ort-dynamic.onnx"
    quantize_dynamic(plain_path, paths["ort-dynamic"])
    paths["nncf"] = folder / "nncf.onnx"
    onnx.save(nncf.quantize(onnx.load(plain_path), nncf.Dataset(Images().feeds), subset_size=4), paths["nncf"])
    return paths


NETWORKS = ("onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "ort-static", "ort-operators", "nncf")


@pytest.mark.usefixtures("openvino_integers")
@pytest.mark.parametrize("network", [*NETWORKS, "ort-dynamic"])
def test_lint_is_right_about_whole_networks(network: str, networks: dict[str, Path], tmp_path: Path) -> None:
    if network != "ort-dynamic":  # whose products are fused under other names
        check_onnxruntime(networks[network], tmp_path)
    check_openvino(networks[network])
    check_tensorrt(networks[network])


@pytest.mark.parametrize(
    ("network", "target", "rules"),
    [
        ("onnx-int8-u8", "onnxruntime", set()),
        ("onnx-int8-u8", "openvino", set()),
        ("onnx-int8-u8", "tensorrt-rtx", {"zero-point", "uint8", "int32-bias"}),
        (
            "onnx-int8-s8",
            "onnxruntime",
            {"unfolded-activation", "float-output", "float-bias-output", "signed-fanout"},
        ),
        ("onnx-int8-s8", "openvino", set()),
        ("onnx-int8-s8", "tensorrt-rtx", set()),
        ("onnx-int8-s8", "tensorrt10", set()),
        ("onnx-int8-s8", "tensorrt11", set()),
        ("ort-static", "onnxruntime", {"signed-fanout"}),
        ("ort-static", "tensorrt-rtx", {"zero-point", "int32-bias"}),
        ("ort-dynamic", "openvino", {"float-operator"}),
        ("ort-dynamic", "tensorrt-rtx", {"operator"}),
        ("nncf", "tensorrt-rtx", {"uint8"}),
    ],
)
def test_what_lint_says_of_them(network: str, target: str, rules: set[str], networks: dict[str, Path]) -> None:
    assert rules_of(report_of(networks[network], target), ERROR, WARNING) == rules


def test_every_rule_about_what_was_tried_has_a_case(tmp_path: Path) -> None:
    """Of errors and warnings: so that no rule stands that a runtime has not confirmed."""
    expected = {
        (name, target)
        for name, rule in RULES.items()
        for target, says in rule.on.items()
        if says.severity != NOTE and (TARGETS[target].tried if says.tried is None else says.tried)
    }
    found = set()
    for case in CASES:
        (tmp_path / "model.onnx").write_bytes(_model(case))
        report = lint_graph(tmp_path / "model.onnx", read_graph(tmp_path / "model.onnx"), TARGETS)
        found |= {(finding.rule, finding.target) for finding in report.findings}
    assert expected - found == set()


WRONG_NUMBERS = {"weight-axis", "bias-scale-gemm"}


@each_case
def test_onnxruntime_gives_wrong_numbers_where_lint_says(path: Path) -> None:
    """Its optimized graph against its own operators one by one, on an image that is not zero."""
    report = report_of(path, "onnxruntime")
    rules = rules_of(report, ERROR, WARNING)
    if ERROR in {finding.severity for finding in report.findings} or rules & {"scale", "scale-infinite"}:
        return
    if "load-without-vnni" in rules:
        return
    image = np.random.default_rng(1).normal(size=(1, 8, 8, 8)).astype(F32)
    outputs = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        options = ort_backend._options(1)
        options.graph_optimization_level = level
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs.append(np.asarray(session.run(None, {"image": image})[0], F32).ravel())
    norms = np.prod([np.linalg.norm(output) for output in outputs])
    cosine = float(outputs[0] @ outputs[1] / norms) if norms else 1.0
    assert cosine < 0.98 if rules & WRONG_NUMBERS else cosine > 0.99
