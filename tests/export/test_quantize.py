from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.prepare import Prepared
from midge.export.quantize import DIALECTS, quantize_dynamic, quantize_onnx, refuse_quantized
from midge.export.ranges import METHODS, is_transformer, measure_ranges
from midge.runtime.artifact import Artifact, Variant
from midge.runtime.backend import open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.parity import compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model

PX = 32
MOBILENET = ModelSpec("mobilenetv2_100", {}, 10, 1280, (), Preprocess(PX, PX), PX)


class Graph:
    """An ONNX graph with what the tests look up in it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def of(self, *ops: str) -> list[onnx.NodeProto]:
        return [node for node in self.nodes if node.op_type in ops]

    def op_before(self, name: str) -> str:
        return self.producer[name].op_type if name in self.producer else "constant or input"

    def activation_scales(self) -> Iterator[tuple[str, float, np.ndarray]]:
        """(tensor whose scale it is, scale, zero point) of each QuantizeLinear; pooled values keep the scale."""
        for node in self.of("QuantizeLinear"):
            yield (
                node.input[1].removesuffix("_scale"),
                float(self.constants[node.input[1]]),
                self.constants[node.input[2]],
            )


def load(artifact: Artifact, variant: str) -> Graph:
    return Graph(onnx.load(artifact.variants[variant].model))


@pytest.fixture(scope="module")
def u8(artifact: Artifact) -> Graph:
    return load(artifact, "onnx-int8-u8")


@pytest.fixture(scope="module")
def s8(artifact: Artifact) -> Graph:
    return load(artifact, "onnx-int8-s8")


@pytest.mark.parametrize("variant", sorted(DIALECTS))
def test_weights_are_signed_symmetric_and_per_output_channel(artifact: Artifact, variant: str) -> None:
    graph = load(artifact, variant)
    floats = {node.name: node for node in Graph(onnx.load(artifact.variants["onnx-fp32"].model)).of("Conv", "Gemm")}
    weighted = graph.of("Conv", "Gemm")
    assert len(weighted) == len(floats) == 22
    for node in weighted:
        weight = graph.producer[node.input[1]]
        assert weight.op_type == "DequantizeLinear"
        values, scales, zero_points = (graph.constants[name] for name in weight.input)
        assert values.dtype == zero_points.dtype == np.int8
        assert scales.shape == zero_points.shape == (values.shape[0],)
        assert not zero_points.any()
        assert {attribute.name: attribute.i for attribute in weight.attribute} == {"axis": 0}
        largest = np.abs(values.reshape(len(values), -1).astype(int)).max(axis=1)
        assert np.median(largest) == 127  # the range of each channel is its own


def test_u8_has_unsigned_activations_and_integer_biases(u8: Graph) -> None:
    scales = list(u8.activation_scales())
    assert len(scales) >= 30
    assert {zero_point.dtype for _, _, zero_point in scales} == {np.dtype(np.uint8)}
    assert any(int(zero_point) > 0 for _, _, zero_point in scales)
    for node in u8.of("Conv", "Gemm"):
        assert u8.op_before(node.input[0]) == "DequantizeLinear"
        assert u8.constants[u8.producer[node.input[2]].input[0]].dtype == np.int32
    for node in u8.of("Conv"):
        assert [consumer.op_type for consumer in u8.consumers[node.output[0]]] == ["QuantizeLinear"]
    for node in u8.of("Add"):
        assert {u8.op_before(name) for name in node.input} == {"DequantizeLinear"}
    assert not u8.of("Relu")  # folded: the zero point is the smallest value


def test_s8_is_what_tensorrt_parses(s8: Graph) -> None:
    for node in s8.of("QuantizeLinear", "DequantizeLinear"):
        zero_point = s8.constants[node.input[2]]
        assert zero_point.dtype == np.int8
        assert not zero_point.any()
    stored = [s8.constants[node.input[0]] for node in s8.of("DequantizeLinear") if node.input[0] in s8.constants]
    assert {values.dtype for values in stored} == {np.dtype(np.int8)}  # and no int32 bias
    for node in s8.of("Conv", "Gemm"):
        assert s8.op_before(node.input[0]) == s8.op_before(node.input[1]) == "DequantizeLinear"
        assert s8.constants[node.input[2]].dtype == np.float32


def test_s8_lets_residual_blocks_fuse(s8: Graph) -> None:
    additions = s8.of("Add")
    assert len(additions) == 8
    for node in additions:
        assert [s8.op_before(name) for name in node.input] == ["Conv", "DequantizeLinear"]
    shortcuts = [s8.producer[s8.producer[node.input[1]].input[0]].input[0] for node in additions]
    assert [s8.op_before(name) for name in shortcuts].count("Conv") == 4  # each stage changes the channels
    assert len(s8.of("Relu")) == 17


def test_both_dialects_come_from_the_stored_ranges(
    artifact: Artifact, artifact_path: Path, u8: Graph, s8: Graph
) -> None:
    stored = json.loads((artifact_path / "calibration.json").read_text())
    asymmetric, symmetric = METHODS[stored["method"]]
    ranges = stored["ranges"]["tensors"]
    unsigned, signed = list(u8.activation_scales()), list(s8.activation_scales())
    for tensor, scale, zero_point in unsigned:
        low, high = min(ranges[tensor][asymmetric][0], 0), max(ranges[tensor][asymmetric][1], 0)
        assert scale == pytest.approx((high - low) / 255, rel=1e-5)
        assert abs(int(zero_point) + low / scale) <= 0.51
    for tensor, scale, _ in signed:
        assert scale == pytest.approx(max(map(abs, ranges[tensor][symmetric])) / 127, rel=1e-5)
    assert len({tensor for tensor, _, _ in signed} & {tensor for tensor, _, _ in unsigned}) >= 15


def test_dead_tensors_have_a_scale_all_the_same(artifact: Artifact) -> None:
    model = onnx.load(artifact.variants["onnx-fp32"].model)
    table = measure_ranges(model, np.zeros((2, 3, PX, PX), np.float32))
    assert set(table.estimates["image"].values()) == {(0, 0)}
    prepared = Prepared(model, table.choose("mse"), table.choose_symmetric("mse"))
    for variant in DIALECTS:
        assert all(scale > 0 for _, scale, _ in Graph(prepared.quantize(variant)).activation_scales())


def test_ranges_serve_twice(artifact: Artifact) -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, PX, PX)).astype(np.float32)
    path = artifact.variants["onnx-fp32"].model
    ranges = measure_ranges(onnx.load(path), images).choose("mse")
    before = dict(ranges)
    first, _, again = (quantize_onnx(path, ranges, DIALECTS[f"onnx-int8-{name}"]) for name in ("u8", "s8", "u8"))
    assert first.SerializeToString() == again.SerializeToString()
    assert ranges == before


def share(model: onnx.ModelProto, path: Path) -> float | None:
    save_onnx(model, path)
    with open_backend(Variant("onnx-int8-u8", path, 1, "0" * 64, "")) as backend:
        return backend.placement().share


@pytest.fixture(scope="module")
def mobilenet() -> onnx.ModelProto:
    import torch

    model = build_model(MOBILENET)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # equal ones would be stored, and quantized, as one
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return export_onnx(model, PX, "logits")


@pytest.mark.parametrize(("name", "transformer"), [("mobilenet", False), ("vit", True)])
def test_u8_of_other_networks_runs_on_integers(
    name: str, transformer: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(name)
    assert is_transformer(graph) is transformer
    images = np.random.default_rng(0).normal(size=(4, 3, PX, PX)).astype(np.float32)
    quantized = quantize_onnx(graph, measure_ranges(graph, images).choose("mse"), DIALECTS["onnx-int8-u8"])
    assert (share(quantized, tmp_path / "int8.onnx") or 0) >= 0.95
    found = Graph(quantized)
    fed = {node.op_type for name in found.of("DequantizeLinear") for node in found.consumers[name.output[0]]}
    assert ("LayerNormalization" in fed, "Add" in fed) == (False, not transformer)


def test_dynamic_multiplies_integers_in_a_transformer(vit: onnx.ModelProto, tmp_path: Path) -> None:
    floats = Graph(vit)
    weighted = [node for node in floats.of("MatMul", "Gemm") if node.input[1] in floats.constants]
    quantized = quantize_dynamic(vit)
    graph = Graph(quantized)
    products = graph.of("MatMulInteger")
    assert len(products) == len(weighted) == 9  # 4 of each block, and the classifier
    for node in products:
        weights, zero_points = graph.constants[node.input[1]], graph.constants[node.input[3]]
        assert weights.dtype == zero_points.dtype == np.int8
        assert zero_points.shape == (weights.shape[1],)  # per output channel
        assert not zero_points.any()
    assert {node.op_type for node in floats.nodes} - {node.op_type for node in graph.nodes} <= {"Gemm"}
    assert "QuantizeLinear" not in {node.op_type for node in graph.nodes}
    products_macs = sum(int(np.prod(floats.constants[node.input[1]].shape)) for node in weighted[:-1]) * 17
    head_macs, patches_macs, attention_macs = 48 * 10, 3 * 8 * 8 * 48 * 16, 2 * 2 * 17 * 17 * 48
    integer = products_macs + head_macs
    total = integer + patches_macs + attention_macs
    assert share(quantized, tmp_path / "int8.onnx") == pytest.approx(integer / total)
    with pytest.raises(UserError, match="quantized already: it has DynamicQuantizeLinear"):
        refuse_quantized(quantized)


def test_dynamic_gives_nearly_the_float_network_s_outputs(vit: onnx.ModelProto, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(16, 3, PX, PX)).astype(np.float32)
    outputs = []
    for name, graph in (("float", vit), ("int8", quantize_dynamic(vit))):
        save_onnx(graph, tmp_path / f"{name}.onnx")
        with open_backend(Variant("onnx-x", tmp_path / f"{name}.onnx", 1, "0" * 64, "")) as backend:
            outputs.append(predict(backend, images))
    parity = compare_outputs(outputs[1], outputs[0])
    assert 0.999 < parity.cosine_min < 1 - 1e-9
    with_a_float = quantize_dynamic(vit, [node.name for node in vit.graph.node if node.op_type == "Gemm"])
    assert len(Graph(with_a_float).of("MatMulInteger")) < 9


def test_nodes_that_stay_float(artifact: Artifact) -> None:
    model = onnx.load(artifact.variants["onnx-fp32"].model)
    ranges = measure_ranges(model, np.random.default_rng(0).normal(size=(2, 3, PX, PX)).astype(np.float32))
    names = [node.name for node in model.graph.node if node.op_type == "Conv"][2:4]
    prepared = Prepared(model, ranges.choose("mse"), ranges.choose_symmetric("mse"), tuple(names))
    for variant in DIALECTS:
        graph = Graph(prepared.quantize(variant))
        plain = {node.name for node in graph.of("Conv", "Gemm") if node.input[1] in graph.constants}
        assert plain == set(names)


def test_u8_runs_on_integers(artifact: Artifact) -> None:
    with open_backend(artifact.variants["onnx-int8-u8"]) as backend:
        assert (backend.placement().share or 0) >= 0.95
