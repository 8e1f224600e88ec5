from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from midge.export.graph_edit import weights, with_weights
from midge.export.ranges import open_session
from midge.export.rounding import (
    find_layers,
    inputs_of,
    round_to_nearest,
    round_weights,
    round_with_feedback,
    scales_of,
)

PX = 12


def photos(count: int) -> np.ndarray:
    """Noise that varies slowly over an image, as photos do: (N, 3, PX, PX) float32."""
    noise = np.random.default_rng(1).normal(size=(count, 3, PX + 8, PX + 8))
    windows = np.lib.stride_tricks.sliding_window_view(noise, (9, 9), axis=(2, 3))
    return (1 + windows.mean(axis=(4, 5)) * 5).astype(np.float32)


def network() -> onnx.ModelProto:
    """A convolution of stride 2 with padding, a depthwise one, a 1 x 1, and both kinds of matrix product."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "stem": rng.normal(size=(8, 3, 3, 3)),
        "stem_bias": rng.normal(size=8),
        "depthwise": rng.normal(size=(8, 1, 3, 3)),
        "depthwise_bias": rng.normal(size=8),
        "point": rng.normal(size=(6, 8, 1, 1)),
        "gemm": rng.normal(size=(5, 6)),
        "gemm_bias": rng.normal(size=5),
        "matmul": rng.normal(size=(5, 4)),
    }
    nodes = [
        helper.make_node("Conv", ["image", "stem", "stem_bias"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "depthwise", "depthwise_bias"], ["c"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "point"], ["d"], name="point_node"),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("Gemm", ["f", "gemm", "gemm_bias"], ["g"], transB=1),
        helper.make_node("MatMul", ["g", "matmul"], ["out"]),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, PX, PX])
    out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 4])
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [out], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    return model


def error(rows: np.ndarray, rounded: np.ndarray, moments: np.ndarray) -> float:
    """Mean square error of the outputs, by a loop over them."""
    return sum(
        float((after - before) @ moments[group] @ (after - before))
        for group in range(len(rows))
        for before, after in zip(rows[group], rounded[group], strict=True)
    )


def test_feedback_is_near_the_best_of_all_roundings() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 6))  # neighbours, almost equal
    moments = (x.T @ x / len(x))[None]
    rows = rng.normal(size=(1, 20, 6))
    scales = scales_of(rows)
    best = np.empty_like(rows)
    for index, row in enumerate(rows[0]):
        scale = scales[0, index, 0]
        choices = itertools.product(*({np.floor(v / scale), np.ceil(v / scale)} for v in row))
        candidates = [np.array(choice) * scale for choice in choices]
        best[0, index] = min(
            candidates, key=lambda candidate: float((candidate - row) @ moments[0] @ (candidate - row))
        )
    given = error(rows, round_with_feedback(rows, moments), moments)
    nearest = error(rows, round_to_nearest(rows), moments)
    assert given < 1.2 * error(rows, best, moments)
    assert given < nearest / 4


@pytest.mark.parametrize("num_inputs", [5, 64, 150])
def test_feedback_in_blocks_is_the_plain_one(num_inputs: int) -> None:
    """The Optimal Brain Surgeon's rule, with the inverse of what is left computed anew for each weight."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, num_inputs)) @ rng.normal(size=(num_inputs, num_inputs))
    moments = x.T @ x / len(x)
    rows = rng.normal(size=(2, num_inputs))
    damped = moments + 0.01 * np.trace(moments) / num_inputs * np.eye(num_inputs)
    expected, left = rows.copy(), rows.copy()
    for row in range(len(rows)):
        scale, largest = np.abs(rows[row]).max() / 127, int(np.abs(rows[row]).argmax())
        for k in range(num_inputs):
            level = np.clip(np.rint(left[row, k] / scale), -127, 127)
            expected[row, k] = scale * (127 * np.sign(rows[row, k]) if k == largest else level)
            inverse = np.linalg.inv(damped[k:, k:])
            left[row, k + 1 :] -= (left[row, k] - expected[row, k]) / inverse[0, 0] * inverse[0, 1:]
    given = round_with_feedback(rows[None], moments[None])[0]
    assert (np.abs(given - expected) > 1e-9).mean() <= 0.01  # ties of roundings


def test_weights_are_on_the_grid_that_a_writer_finds() -> None:
    graph = network()
    before, after = weights(graph), weights(round_weights(graph, photos(8)))
    for name, axes in (("stem", (1, 2, 3)), ("depthwise", (1, 2, 3)), ("point", (1, 2, 3)), ("gemm", 1), ("matmul", 0)):
        scale = np.abs(after[name]).max(axis=axes, keepdims=True) / 127
        np.testing.assert_allclose(scale, np.abs(before[name]).max(axis=axes, keepdims=True) / 127, rtol=1e-6)
        levels = after[name] / scale
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-4)
        assert np.abs(after[name] - before[name]).max() > 0
    kept = weights(round_weights(graph, photos(8), float_nodes=["point_node"]))
    assert [name for name in before if np.array_equal(kept[name], before[name])] == ["point"]


def test_inputs_are_what_the_weights_are_multiplied_by() -> None:
    graph = network()
    values = weights(graph)
    for layer in find_layers(graph, values):
        source, target = layer.node.input[0], layer.node.output[0]
        probed = onnx.ModelProto()
        probed.CopyFrom(graph)
        del probed.graph.output[:]
        probed.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in (source, target))
        image = photos(1)
        names = [source, target] if source != "image" else [target]
        computed = ReferenceEvaluator(probed).run(names, {"image": image})
        found: dict[str, np.ndarray] = dict(zip(names, map(np.asarray, computed), strict=True))
        rows = layer.grouped(values[layer.weight])
        assert layer.ungrouped(rows, values[layer.weight].shape) == pytest.approx(values[layer.weight])
        x = inputs_of(layer, values[layer.weight].shape, found.get(source, image), np.random.default_rng(0))
        products = np.einsum("grk,gnk->ngr", rows, x).reshape(x.shape[1], -1)
        if layer.bias:
            products += values[layer.bias]
        outputs = found[target].reshape(products.shape[1], -1).T if layer.node.op_type == "Conv" else found[target]
        for product in products:
            assert np.abs(outputs - product).max(axis=1).min() < 1e-4


def test_outputs_are_closer_than_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, images, others = network(), photos(16), photos(24)[16:]

    def outputs(model: onnx.ModelProto) -> np.ndarray:
        session = open_session(model, ["out"])
        return np.concatenate([session.run(None, {"image": image[None]})[0] for image in others])

    expected = outputs(graph)
    given = np.square(outputs(round_weights(graph, images)) - expected).mean()
    values = weights(graph)
    nearest = {
        layer.weight: layer.ungrouped(round_to_nearest(layer.grouped(values[layer.weight])), values[layer.weight].shape)
        for layer in find_layers(graph, values)
    }
    assert given < np.square(outputs(with_weights(graph, nearest)) - expected).mean() / 2
    monkeypatch.setattr(
        "midge.export.rounding.MAX_INPUTS", 0
    )  # all count as wide: the nearest, with the means corrected
    wide = round_weights(graph, images)
    np.testing.assert_allclose(weights(wide)["point"], nearest["point"], rtol=1e-6)
    assert not np.array_equal(weights(wide)["stem_bias"], values["stem_bias"])


def test_dead_channels_and_inputs_stay_finite() -> None:
    rows = np.zeros((1, 2, 3))
    rows[0, 0] = 1.0, -2.0, 0.5
    given = round_with_feedback(rows, np.zeros((1, 3, 3)))
    np.testing.assert_allclose(given, round_to_nearest(rows))
    assert not given[0, 1].any()
