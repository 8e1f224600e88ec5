from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from midge.runtime.backend import Placement
from midge.runtime.openvino_backend import OpenVinoBackend
from midge.runtime.ort_backend import OrtBackend

RNG = np.random.default_rng(0)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    return helper.make_node(op, inputs.split(","), outputs.split(","), **attributes)


def write(path: Path, nodes: list[Any], outputs: int, **weights: tuple[int, ...]) -> Path:
    """A graph from ``image`` (1, 3, 8, 8) to ``logits`` (1, outputs) with random weights of the given shapes."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, outputs])],
        [numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name) for name, shape in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def placements(path: Path) -> list[Placement]:
    """By ONNX Runtime and by OpenVINO."""
    result = []
    for kind in (OrtBackend, OpenVinoBackend):
        with kind(path, 1) as backend:
            result.append(backend.placement())
    return result


POOL = node("ReduceMean", "maps", "logits", axes=[2, 3], keepdims=0)


def test_grouped_convolutions(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "image,w0", "a", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", "a", "b"),
        node("Conv", "b,w1", "c", group=6, pads=[1, 1, 1, 1]),
        node("Conv", "c,w2", "maps", group=2),
        POOL,
    ]
    path = write(tmp_path / "m.onnx", nodes, 10, w0=(6, 3, 3, 3), w1=(6, 1, 3, 3), w2=(10, 3, 1, 1))
    macs = 16 * (6 * 27 + 6 * 9 + 10 * 3)
    for placement in placements(path):
        assert (placement.int8_macs, placement.total_macs, placement.uncounted) == (0, macs, {})


def test_attention_and_transposed_products(tmp_path: Path) -> None:
    nodes = [
        node("Reshape", "image,to_rows", "rows"),
        node("MatMul", "rows,wq", "q"),
        node("MatMul", "rows,wk", "k"),
        node("MatMul", "rows,wv", "v"),
        node("Transpose", "k", "kt", perm=[0, 2, 1]),
        node("MatMul", "q,kt", "scores"),
        node("Softmax", "scores", "attention", axis=-1),
        node("MatMul", "attention,v", "mixed"),
        node("Reshape", "mixed,to_row", "row"),
        node("Gemm", "row,wo", "logits", transB=1),
    ]
    shapes = {"wq": (24, 16), "wk": (24, 16), "wv": (24, 16), "wo": (10, 128)}
    path = write(tmp_path / "m.onnx", nodes, 10, **shapes)
    import onnx

    model = onnx.load(path)
    for name, shape in (("to_rows", [1, 8, 24]), ("to_row", [1, 128])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    onnx.save(model, path)
    macs = 3 * 8 * 24 * 16 + 2 * 8 * 8 * 16 + 128 * 10
    for placement in placements(path):
        assert (placement.int8_macs, placement.total_macs, placement.uncounted) == (0, macs, {})
        assert placement.share == 0.0


def test_dynamically_quantized_products_are_integers(tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [
        node("Conv", "image,w0", "maps"),
        node("Flatten", "maps", "row"),
        node("MatMul", "row,w1", "logits"),
    ]
    path = write(tmp_path / "m.onnx", nodes, 10, w0=(4, 3, 1, 1), w1=(256, 10))
    quantized = tmp_path / "dynamic.onnx"
    quantize_dynamic(str(path), str(quantized), weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    with OrtBackend(quantized, 1) as backend:
        placement = backend.placement()
    assert placement.int8_macs == 2560
    assert placement.total_macs == 2560 + 64 * 12
    assert placement.share == pytest.approx(2560 / 3328)
    assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"} & set(placement.ops)


def test_operators_of_unknown_macs_make_the_share_unknown(tmp_path: Path) -> None:
    nodes = [node("ConvTranspose", "image,w0", "maps"), POOL]
    path = write(tmp_path / "m.onnx", nodes, 4, w0=(3, 4, 2, 2))
    by_ort, by_openvino = placements(path)
    assert by_ort.uncounted == {"ConvTranspose": 1}
    assert by_openvino.uncounted == {"ConvolutionBackpropData": 1}
    assert by_ort.share is by_openvino.share is None


def test_a_network_without_products_has_no_share(tmp_path: Path) -> None:
    nodes = [node("Add", "image,w0", "maps"), POOL]
    for placement in placements(write(tmp_path / "m.onnx", nodes, 3, w0=(1, 3, 8, 8))):
        assert (placement.total_macs, placement.uncounted, placement.share) == (0, {}, None)
