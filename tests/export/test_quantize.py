from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from midge.export import quantize
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.quantize import DIALECTS, PERCENTILE, is_transformer, measure_ranges, quantize_onnx
from midge.runtime.artifact import Artifact, Variant
from midge.runtime.backend import open_backend
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model

PX = 32
MOBILENET = ModelSpec("mobilenetv2_100", {}, 10, 1280, (), Preprocess(PX, PX), PX)
VIT_ARGS = {"img_size": PX, "patch_size": 8, "depth": 2, "embed_dim": 48}
VIT = ModelSpec("vit_tiny_patch16_224", VIT_ARGS, 10, 48, (), Preprocess(PX, PX), PX)


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
    ranges = json.loads((artifact_path / "calibration.json").read_text())["ranges"]
    unsigned, signed = list(u8.activation_scales()), list(s8.activation_scales())
    for tensor, scale, zero_point in unsigned:
        low, high = min(ranges[tensor][0], 0), max(ranges[tensor][1], 0)
        assert scale == pytest.approx((high - low) / 255, rel=1e-5)
        assert abs(int(zero_point) + low / scale) <= 0.51
    for tensor, scale, _ in signed:
        assert scale == pytest.approx(max(map(abs, ranges[tensor])) / 127, rel=1e-5)
    assert len({tensor for tensor, _, _ in signed} & {tensor for tensor, _, _ in unsigned}) >= 15


def test_ranges_leave_out_the_share_of_all_values_that_they_should(
    artifact: Artifact, artifact_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tensors, counted over all their values at once; measured in chunks, which must not show."""
    import onnxruntime

    model = onnx.load(artifact.variants["onnx-fp32"].model)
    images = np.random.default_rng(0).normal(size=(12, 3, PX, PX)).astype(np.float32)
    values_per_image = sum(
        int(np.prod([side.dim_value for side in info.type.tensor_type.shape.dim]))
        for info in [
            *onnx.shape_inference.infer_shapes(model).graph.value_info,
            *model.graph.input,
            *model.graph.output,
        ]
    )
    monkeypatch.setattr(quantize, "CHUNK_BYTES", 4 * 4 * values_per_image + 4)
    ranges = measure_ranges(artifact.variants["onnx-fp32"].model, images)
    names = [model.graph.node[index].output[0] for index in (0, 1, 20)]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [session.run(names, {"image": image[None]}) for image in images]
    cut = (100 - PERCENTILE) / 200
    for name, *values in zip(names, *outputs, strict=True):
        flat = np.concatenate([value.ravel() for value in values])
        (low, high), bin_width = ranges[name], 2 * np.abs(flat).max() / quantize.HISTOGRAM_BINS
        assert (flat < low - bin_width).sum() <= cut * flat.size <= (flat < low + 2 * bin_width).sum()
        assert (flat > high + 2 * bin_width).sum() <= cut * flat.size <= (flat > high - bin_width).sum()
    assert set(ranges) >= {"image", "logits", *names}


def test_measuring_prints_nothing(artifact: Artifact, capfd: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((2, 3, PX, PX), np.float32)
    ranges = measure_ranges(artifact.variants["onnx-fp32"].model, images)
    assert ranges["image"] == (0, 0)
    assert capfd.readouterr() == ("", "")
    for dialect in DIALECTS.values():  # dead tensors have a scale all the same
        graph = Graph(quantize_onnx(artifact.variants["onnx-fp32"].model, ranges, dialect))
        assert all(scale > 0 for _, scale, _ in graph.activation_scales())


def test_ranges_serve_twice(artifact: Artifact) -> None:
    images = np.random.default_rng(0).normal(size=(4, 3, PX, PX)).astype(np.float32)
    path = artifact.variants["onnx-fp32"].model
    ranges = measure_ranges(path, images)
    before = dict(ranges)
    first, _, again = (quantize_onnx(path, ranges, DIALECTS[f"onnx-int8-{name}"]) for name in ("u8", "s8", "u8"))
    assert first.SerializeToString() == again.SerializeToString()
    assert ranges == before


def share(model: onnx.ModelProto, path: Path) -> float | None:
    save_onnx(model, path)
    with open_backend(Variant("onnx-int8-u8", path, 1, "0" * 64, "")) as backend:
        return backend.placement().share


@pytest.mark.parametrize(("spec", "transformer"), [(MOBILENET, False), (VIT, True)])
def test_u8_of_other_networks_runs_on_integers(spec: ModelSpec, transformer: bool, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "model.onnx"
    model = build_model(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # equal ones would be stored, and quantized, as one
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    graph = export_onnx(model, PX, "logits")
    save_onnx(graph, path)
    assert is_transformer(graph) is transformer
    images = np.random.default_rng(0).normal(size=(4, 3, PX, PX)).astype(np.float32)
    quantized = quantize_onnx(path, measure_ranges(path, images), DIALECTS["onnx-int8-u8"])
    assert (share(quantized, tmp_path / "int8.onnx") or 0) >= 0.95
    found = Graph(quantized)
    fed = {node.op_type for name in found.of("DequantizeLinear") for node in found.consumers[name.output[0]]}
    assert ("LayerNormalization" in fed, "Add" in fed) == (False, not transformer)


def test_u8_runs_on_integers(artifact: Artifact) -> None:
    with open_backend(artifact.variants["onnx-int8-u8"]) as backend:
        assert (backend.placement().share or 0) >= 0.95
