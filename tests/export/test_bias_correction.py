from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from midge.export.bias_correction import correct_biases, find_biases
from midge.export.prepare import Prepared, prepare
from midge.export.ranges import measure_ranges, open_session
from midge.runtime.artifact import Artifact
from midge.runtime.errors import UserError

PX = 32


@pytest.fixture(scope="module")
def graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.variants["onnx-fp32"].model)


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 3, PX, PX)).astype(np.float32)


@pytest.fixture(scope="module")
def uncorrected(graph: onnx.ModelProto, inputs: np.ndarray) -> Prepared:
    table = measure_ranges(graph, inputs)
    return Prepared(graph, table.choose("percentile-99.9"), table.choose_symmetric("percentile-99.9"))


def constants(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def means(graph: onnx.ModelProto, names: list[str], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Mean of each channel of the outputs of some nodes, over all images."""
    nodes = [node for node in graph.graph.node if node.name in names]
    session = open_session(graph, [node.output[0] for node in nodes])
    outputs = zip(*(session.run(None, {"image": image[None]}) for image in inputs), strict=True)
    return {
        node.name: np.concatenate(values).mean(axis=tuple(axis for axis in range(values[0].ndim) if axis != 1))
        for node, values in zip(nodes, outputs, strict=True)
    }


def test_means_are_the_float_network_s_again(graph: onnx.ModelProto, inputs: np.ndarray, uncorrected: Prepared) -> None:
    """The whole quantized network, run again with the new biases, has the float one's means before each activation."""
    corrected = correct_biases(graph, uncorrected.quantize("onnx-int8-u8"), inputs)
    after = Prepared(corrected, uncorrected.ranges, uncorrected.symmetric_ranges).quantize("onnx-int8-u8")
    names = list(find_biases(graph))
    assert len(names) == 22
    expected = means(graph, names, inputs)
    before, now = means(uncorrected.quantize("onnx-int8-u8"), names, inputs), means(after, names, inputs)
    errors = {name: [np.abs(m[name] - expected[name]).mean() for m in (before, now)] for name in names}
    assert sum(new for _, new in errors.values()) < 0.15 * sum(old for old, _ in errors.values())


def test_the_first_shift_is_what_the_means_differ_by(
    graph: onnx.ModelProto, inputs: np.ndarray, uncorrected: Prepared
) -> None:
    corrected = correct_biases(graph, uncorrected.quantize("onnx-int8-u8"), inputs)
    first, bias = next(iter(find_biases(graph).items()))
    shift = constants(corrected)[bias] - constants(graph)[bias]
    difference = (
        means(graph, [first], inputs)[first] - means(uncorrected.quantize("onnx-int8-u8"), [first], inputs)[first]
    )
    np.testing.assert_allclose(shift, difference, atol=1e-6)
    assert np.abs(shift).max() > 0


def test_only_biases_change(graph: onnx.ModelProto, inputs: np.ndarray, uncorrected: Prepared) -> None:
    corrected = correct_biases(graph, uncorrected.quantize("onnx-int8-u8"), inputs)
    before, after = constants(graph), constants(corrected)
    assert list(before) == list(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(find_biases(graph).values())
    assert list(corrected.graph.node) == list(graph.graph.node)


def test_biases_of_a_transformer_are_found_where_they_are_nobody_else_s(vit: onnx.ModelProto) -> None:
    found = find_biases(vit)
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    biases = {f"blocks.{block}.{part}.bias" for block in (0, 1) for part in parts}
    assert set(found.values()) == {"patch_embed.proj.bias", "head.bias", *biases}
    shared = onnx.ModelProto()
    shared.CopyFrom(vit)
    node = next(node for node in shared.graph.node if "blocks.0.mlp.fc2.bias" in node.input)
    node.input[list(node.input).index("blocks.0.mlp.fc2.bias")] = "blocks.0.attn.proj.bias"
    assert "blocks.0.attn.proj.bias" not in find_biases(shared).values()


def test_a_quantized_graph_is_refused(artifact: Artifact, inputs: np.ndarray) -> None:
    says = r"The graph is quantized already: it has \w+Linear '.*'. Give an FP32 graph"
    for variant in ("onnx-int8-u8", "onnx-int8-s8"):
        with pytest.raises(UserError, match=says):
            prepare(onnx.load(artifact.variants[variant].model), inputs, "mse")
