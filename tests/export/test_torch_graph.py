from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from midge.export.fold import fold_batch_norm
from midge.export.onnx_export import OPSET, export_onnx
from midge.export.prepare import prepare
from midge.export.quantize import DIALECTS
from midge.export.torch_graph import TorchGraph
from midge.runtime.artifact import Artifact
from midge.runtime.errors import UserError

PX = 32
VIT_ARGS = {"img_size": PX, "patch_size": 8, "depth": 2, "embed_dim": 48}
NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": VIT_ARGS,
}


def images(number: int) -> torch.Tensor:
    return torch.randn(number, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def in_onnx_runtime(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Each input by itself, with no operator fused, so that Q/DQ is computed as the file says it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = [session.run(None, {model.graph.input[0].name: given})[0] for given in inputs]
    return np.concatenate(outputs)


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_as_in_onnx_runtime_on_a_batch(name: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10, **NETWORKS[name]).eval()
    with torch.no_grad():  # as timm starts it, a ConvNeXt's blocks give next to nothing
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    graph, batch = export_onnx(fold_batch_norm(model, PX), PX, "logits"), images(3)
    expected = in_onnx_runtime(graph, np.split(batch.numpy(), 3))
    found = TorchGraph(graph)(batch)["logits"]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    prepared, _ = prepare(graph, batch.numpy(), "minmax", range_steps={})
    for variant in DIALECTS:
        quantized = prepared.quantize(variant)
        expected = in_onnx_runtime(quantized, np.split(batch.numpy(), 3))
        assert cosines(TorchGraph(quantized)(batch)["logits"].numpy(), expected).min() > 0.99


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-int8-u8", "onnx-int8-s8"])
def test_variants_of_a_trained_network(artifact: Artifact, variant: str) -> None:
    model = onnx.load(artifact.variants[variant].model)
    expected = in_onnx_runtime(model, [image[None].numpy() for image in images(8)])
    found = TorchGraph(model)(images(8))["logits"].numpy()
    assert cosines(found, expected).mean() > 0.9999


def test_images_of_a_batch_do_not_meet(artifact: Artifact) -> None:
    graph = TorchGraph(onnx.load(artifact.variants["onnx-fp32"].model))
    together = graph(images(4))["logits"]
    for image, logits in zip(images(4).split(1), together, strict=True):
        torch.testing.assert_close(graph(image)["logits"][0], logits)


def one_node(op: str, given: Mapping[str, Any], inputs: Sequence[Any], outputs: int) -> onnx.ModelProto:
    """A graph of one operator, whose first input is the graph's and whose others are constants."""
    names = ["x", *("" if value is None else f"c{index}" for index, value in enumerate(inputs[1:]))]
    assert inputs[0] is not None
    node = helper.make_node(op, names, [f"y{index}" for index in range(outputs)], **given)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs[0].shape)],
        [helper.make_empty_tensor_value_info("y0")],
        [
            numpy_helper.from_array(value, name)
            for name, value in zip(names[1:], inputs[1:], strict=True)
            if value is not None
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def f32(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


SCALES = np.array([0.5, 0.25, 0.125], np.float32)
HALVES = (np.arange(-24, 24, dtype=np.float32) / 8).reshape(1, 3, 4, 4)  # many lie in the middle between two steps
CASES: list[tuple[str, dict[str, Any], list[Any]]] = [
    ("Conv", {"pads": [0, 1, 2, 1], "strides": [2, 1]}, [f32(1, 3, 9, 8), f32(4, 3, 3, 3), f32(4)]),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2], "group": 4}, [f32(1, 4, 9, 8), f32(4, 1, 3, 3)]),
    ("Conv", {"dilations": [2, 1]}, [f32(1, 4, 9, 9), f32(4, 4, 2, 2)]),
    ("Conv", {"auto_pad": "SAME_LOWER", "group": 2}, [f32(1, 4, 9, 9), f32(4, 2, 2, 2)]),
    ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}, [f32(1, 3, 9, 8)]),
    ("MaxPool", {"kernel_shape": [2, 2], "ceil_mode": 1, "strides": [2, 2]}, [f32(1, 3, 9, 9)]),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [0, 1, 1, 1], "strides": [2, 2]}, [f32(1, 3, 8, 9)]),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}, [f32(1, 3, 8, 9)]),
    ("GlobalAveragePool", {}, [f32(1, 3, 5, 4)]),
    ("ReduceMean", {"keepdims": 0}, [f32(1, 3, 5, 4), i64(2, 3)]),
    ("ReduceMean", {}, [f32(1, 3, 5, 4)]),
    ("Gemm", {"transB": 1}, [f32(2, 5), f32(3, 5), f32(3)]),
    ("Gemm", {"alpha": 0.5, "beta": 2.0}, [f32(2, 5), f32(5, 3), f32(3)]),
    ("LayerNormalization", {"axis": -1, "epsilon": 1e-3}, [f32(1, 5, 4), f32(4), f32(4)]),
    ("BatchNormalization", {}, [f32(1, 3, 4, 4), f32(3), f32(3), f32(3), f32(3) ** 2]),
    ("Softmax", {"axis": 1}, [f32(1, 5, 4)]),
    ("Clip", {}, [f32(1, 9), np.float32(-0.5), np.float32(0.5)]),
    ("Clip", {}, [f32(1, 9), None, np.float32(0.5)]),
    ("LeakyRelu", {"alpha": 0.3}, [f32(1, 9)]),
    ("PRelu", {}, [f32(1, 3, 4, 4), f32(3, 1, 1)]),
    ("HardSigmoid", {"alpha": 1 / 6}, [4 * f32(1, 9)]),
    ("HardSwish", {}, [4 * f32(1, 9)]),
    ("Erf", {}, [f32(1, 9)]),
    ("Flatten", {"axis": 2}, [f32(1, 3, 4, 5)]),
    ("Reshape", {}, [f32(1, 3, 4, 5), i64(0, -1, 5)]),
    ("Transpose", {"perm": [0, 2, 1]}, [f32(1, 3, 4)]),
    ("Split", {"axis": 1, "num_outputs": 2}, [f32(1, 5, 4)]),
    ("Split", {"axis": 1}, [f32(1, 5, 4), i64(1, 4)]),
    ("Slice", {}, [f32(1, 9, 4), i64(-8, 0), i64(2**62, 2), i64(1, 2), i64(2, 1)]),
    ("Squeeze", {}, [f32(1, 1, 4), i64(1)]),
    ("Unsqueeze", {}, [f32(1, 4), i64(0, -1)]),
    ("Expand", {}, [f32(1, 1, 4), i64(1, 3, 1)]),
    ("Gather", {"axis": 1}, [f32(1, 5, 4), np.array(-1)]),
    ("Gather", {"axis": 1}, [f32(1, 5, 4), np.array([[0, 2], [-1, 1]])]),
    ("Pad", {}, [f32(1, 3, 4, 4), i64(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5)]),
    ("Pad", {"mode": "reflect"}, [f32(1, 3, 4, 4), i64(0, 0, 1, 2, 0, 0, 0, 1)]),
    ("QuantizeLinear", {}, [HALVES, np.float32(0.25), np.uint8(3)]),
    ("QuantizeLinear", {}, [HALVES, np.float32(0.01), np.int8(0)]),
    ("QuantizeLinear", {"axis": 1}, [HALVES, SCALES, np.zeros(3, np.int8)]),
]


@pytest.mark.parametrize(("op", "given", "inputs"), CASES)
def test_each_operator_as_in_onnx_runtime(op: str, given: dict[str, Any], inputs: list[Any]) -> None:
    model = one_node(op, given, inputs, outputs=2 if op == "Split" else 1)
    expected = in_onnx_runtime(model, [inputs[0]])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"  # and so not through vmap
    found = TorchGraph(model)(torch.from_numpy(inputs[0]))["y0"].numpy()
    assert found.dtype == expected.dtype
    if op == "QuantizeLinear":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_unknown_operator_is_named() -> None:
    model = one_node("Hardmax", {}, [f32(1, 4)], outputs=1)
    with pytest.raises(UserError, match="'Hardmax'"):
        TorchGraph(model)
