from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from midge.export.float_layers import check_float_layers
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.prepare import Prepared
from midge.export.ranges import is_transformer, measure_ranges
from midge.export.sensitivity import run_graph
from midge.runtime.errors import UserError
from midge.runtime.openvino_backend import OpenVinoBackend
from midge.runtime.ort_backend import OrtBackend, keep_exact
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model

PX = 32
LEVELS = ort.GraphOptimizationLevel


def images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, PX, PX)).astype(np.float32)


def prepare_network(name: str, **arguments: int) -> Prepared:
    """With weights of its own in each channel, so that one scale for all of them loses much."""
    import torch

    from midge.export.fold import fold_batch_norm

    torch.manual_seed(0)
    model = build_model(ModelSpec(name, dict(arguments), 10, 1280, (), Preprocess(PX, PX), PX)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.exp(0.5 * torch.randn(module.weight.shape, generator=generator))
            module.running_mean = 0.1 * torch.randn(module.weight.shape, generator=generator)
    graph = export_onnx(fold_batch_norm(model, PX), PX, "logits")
    table = measure_ranges(graph, images())
    return Prepared(graph, table.choose("mse"), table.choose_symmetric("mse"))


@pytest.fixture(scope="module")
def mobilenet() -> Prepared:
    return prepare_network("mobilenetv2_100")


def with_floats(prepared: Prepared, *names: str) -> Prepared:
    return Prepared(prepared.graph, prepared.ranges, prepared.symmetric_ranges, names)


def convolutions(prepared: Prepared) -> list[onnx.NodeProto]:
    return [node for node in prepared.graph.graph.node if node.op_type == "Conv"]


def run(graph: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    keep_exact(options)
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"image": image[None]})[0]) for image in images()])


def relative_error(outputs: np.ndarray, reference: np.ndarray) -> float:
    return float(np.square(outputs - reference).sum() / np.square(reference).sum())


@pytest.mark.parametrize("place", [3, 4, 10])  # an expansion, a depthwise convolution, an expansion after an addition
def test_a_single_float_layer_is_not_quantized_on_loading(mobilenet: Prepared, place: int) -> None:
    node = convolutions(mobilenet)[place]
    mixed = with_floats(mobilenet, node.name).quantize("onnx-int8-u8")
    plain, optimized = run(mixed, LEVELS.ORT_DISABLE_ALL), run(mixed, LEVELS.ORT_ENABLE_ALL)
    # As it was before: one scale for the layer's data, and ONNX Runtime makes its weights INT8 by one scale as well.
    shared = onnx.ModelProto()
    shared.CopyFrom(mixed)
    detached = next(each for each in shared.graph.node if each.name == node.name)
    own = next(each for each in shared.graph.node if detached.input[0] in each.output)
    others = [each for each in shared.graph.node if own.input[0] in each.input and each.name != own.name]
    rounding = next(each for each in shared.graph.node if own.input[0] in each.output)
    del own.attribute[:]
    own.input[1:] = rounding.input[1:]
    assert not others  # one reader: nothing else was taken apart
    np.testing.assert_array_equal(run(shared, LEVELS.ORT_DISABLE_ALL), plain)
    noise = relative_error(run(shared, LEVELS.ORT_ENABLE_ALL), plain)
    assert relative_error(optimized, plain) < noise / 10


def test_runtimes_compute_it_in_float(mobilenet: Prepared, tmp_path: Path) -> None:
    node = convolutions(mobilenet)[10]
    path = tmp_path / "model.onnx"
    shares = []
    for prepared in (mobilenet, with_floats(mobilenet, node.name)):
        save_onnx(prepared.quantize("onnx-int8-u8"), path)
        with OrtBackend(path, 1) as backend:
            shares.append(backend.placement().share)
            outputs = backend.run(images()[:1])
    reference = run_graph(mobilenet.graph, images()[:1])
    with OpenVinoBackend(path, 1) as other:
        assert relative_error(other.run(images()[:1]), reference) < 2 * relative_error(outputs, reference)
    assert shares[0] == 1
    assert shares[1] is not None and 0.9 < shares[1] < 1


def test_float_layers_in_a_row_pass_on_what_is_not_rounded(mobilenet: Prepared) -> None:
    nodes = convolutions(mobilenet)
    mixed = with_floats(mobilenet, *(node.name for node in nodes[:4])).quantize("onnx-int8-u8")
    producers = {name: node for node in mixed.graph.node for name in node.output}
    kept = {node.name: node for node in mixed.graph.node}
    for node in nodes[:4]:
        source = producers.get(kept[node.name].input[0])
        assert source is None or source.op_type in {"Conv", "Clip"}
    assert "image_QuantizeLinear" not in kept
    after = producers[kept[nodes[4].name].input[0]]
    assert after.op_type == "DequantizeLinear"
    assert len(after.attribute) == 0  # one scale: it feeds an INT8 layer


def test_an_addition_in_float_takes_what_float_layers_give(mobilenet: Prepared) -> None:
    graph = mobilenet.graph.graph
    addition = next(node for node in graph.node if node.op_type == "Add")
    makers = {name: node for node in graph.node for name in node.output}
    first, second = (makers[name] for name in addition.input)
    assert {first.op_type, second.op_type} == {"Conv"}
    mixed = with_floats(mobilenet, addition.name, second.name).quantize("onnx-int8-u8")
    producers = {name: node for node in mixed.graph.node for name in node.output}
    written = next(node for node in mixed.graph.node if node.name == addition.name)
    assert [producers[name].op_type for name in written.input] == ["DequantizeLinear", "Conv"]
    symmetric = with_floats(mobilenet, addition.name, first.name, second.name).quantize("onnx-int8-s8")
    producers = {name: node for node in symmetric.graph.node for name in node.output}
    written = next(node for node in symmetric.graph.node if node.name == addition.name)
    assert [producers[name].op_type for name in written.input] == ["Conv", "Conv"]


def test_s8_has_one_scale_for_a_tensor(mobilenet: Prepared) -> None:
    mixed = with_floats(mobilenet, convolutions(mobilenet)[10].name).quantize("onnx-int8-s8")
    weights = {tensor.name: tensor for tensor in mixed.graph.initializer}
    for node in mixed.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] not in weights:
            assert not weights[node.input[1]].dims  # TensorRT takes no scales by channel of data


@pytest.mark.parametrize("dialect", ["onnx-int8-u8", "onnx-int8-s8"])
def test_all_layers_in_float_is_the_float_graph(mobilenet: Prepared, dialect: str) -> None:
    names = [node.name for node in mobilenet.graph.graph.node]
    graph = with_floats(mobilenet, *names).quantize(dialect)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.graph.node}
    np.testing.assert_allclose(run_graph(graph, images()), run_graph(mobilenet.graph, images()), rtol=1e-4, atol=1e-4)


def test_a_transformers_layers(vit: onnx.ModelProto) -> None:
    assert is_transformer(vit)
    table = measure_ranges(vit, images())
    prepared = Prepared(vit, table.choose("mse"), table.choose_symmetric("mse"))
    reference = run_graph(vit, images())
    whole = relative_error(run_graph(prepared.quantize("onnx-int8-u8"), images()), reference)
    weighted = [node.name for node in vit.graph.node if node.op_type in {"Conv", "MatMul", "Gemm"}]
    half = with_floats(prepared, *weighted[: len(weighted) // 2]).quantize("onnx-int8-u8")
    assert 0 < relative_error(run_graph(half, images()), reference) < whole
    none = with_floats(prepared, *weighted).quantize("onnx-int8-u8")
    assert relative_error(run_graph(none, images()), reference) < 1e-9


def test_an_unknown_layer(mobilenet: Prepared) -> None:
    check_float_layers(mobilenet.graph, ["node_add"])
    with pytest.raises(UserError, match=r"no layer 'blocks' to leave in float: .* like 'node_"):
        check_float_layers(mobilenet.graph, ["node_add", "blocks"])
