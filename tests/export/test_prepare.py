from __future__ import annotations

import numpy as np
import onnx
import pytest

from midge.export.graph_edit import weights
from midge.export.prepare import RANGE_STEPS, Prepared, prepare
from midge.export.rounding import find_layers
from midge.runtime.artifact import Artifact


@pytest.fixture(scope="module")
def graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.variants["onnx-fp32"].model)


@pytest.fixture(scope="module")
def inputs(artifact: Artifact) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(24, *artifact.input_shape[1:])).astype(np.float32)


@pytest.fixture(scope="module")
def prepared(graph: onnx.ModelProto, inputs: np.ndarray) -> Prepared:
    floats = tuple(node.name for node in graph.graph.node if node.op_type == "Conv")[:1]
    return prepare(graph, inputs, "mse", floats)[0]


def test_weights_are_on_their_grids_but_for_what_stays_float(prepared: Prepared, graph: onnx.ModelProto) -> None:
    exact, found = weights(graph), weights(prepared.graph)
    layers = find_layers(prepared.graph, found)
    assert len(layers) == 22
    for layer in layers:
        rows = layer.grouped(found[layer.weight])
        if layer.node.name in prepared.float_nodes:
            np.testing.assert_array_equal(found[layer.weight], exact[layer.weight])
            continue
        steps = rows / (np.abs(rows).max(axis=-1, keepdims=True) / 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


def test_the_written_weights_are_those_that_rounding_chose(prepared: Prepared) -> None:
    """ONNX Runtime's quantizer takes its scales from the largest weights, and finds all others on the grid."""
    written, found = prepared.quantize("onnx-int8-u8"), weights(prepared.graph)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    compared = 0
    for layer in find_layers(prepared.graph, found):
        name = f"{layer.weight}_quantized"
        if name not in stored:
            continue
        values = layer.grouped(found[layer.weight])
        integers = layer.grouped(stored[name].astype(np.float64))
        scales = np.abs(values).max(axis=-1, keepdims=True) / 127
        np.testing.assert_allclose(integers * scales, values, atol=1e-3 * scales.max())
        compared += 1
    assert compared == 21  # all but the one that stays float


def test_the_original_is_the_graph_before_any_weight_was_changed(
    prepared: Prepared, graph: onnx.ModelProto, inputs: np.ndarray
) -> None:
    assert prepared.original is not None
    kept, exact = weights(prepared.original), weights(graph)
    assert kept.keys() == exact.keys()
    assert all(np.array_equal(kept[name], exact[name]) for name in exact)  # there is no attention to smooth
    plain, _ = prepare(graph, inputs, "mse", range_steps={})
    assert plain.original is None
    assert list(RANGE_STEPS) == ["weight clipping", "weight rounding", "bias correction"]
