from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from midge.export.clip_weights import RATIOS, SAMPLES, clip_rows, clip_weights
from midge.export.graph_edit import weights
from midge.export.prepare import prepare
from midge.export.ranges import open_session
from midge.export.rounding import round_to_nearest

CHANNELS, CLASSES, PX = 8, 5, 6


def classifier(bias: bool = True) -> onnx.ModelProto:
    """A convolution whose channel 0 is nearly dead, pooled, and a linear layer that takes its scale from it."""
    rng = np.random.default_rng(0)
    stem, fc = rng.normal(size=(CHANNELS, 3, 1, 1)), rng.normal(size=(CLASSES, CHANNELS))
    stem[0] *= 1e-6
    fc[:3, 0] *= 1e4  # of the other two classes the weights are alike
    constants = {"stem": stem, "fc": fc} | ({"fc_bias": rng.normal(size=CLASSES)} if bias else {})
    nodes = [
        helper.make_node("Conv", ["image", "stem"], ["a"], name="stem_node"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc", *(["fc_bias"] if bias else [])], ["out"], name="fc_node", transB=1),
    ]
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, PX, PX])
    out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, CLASSES])
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], [out], tensors), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 8
    return model


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PX, PX)).astype(np.float32)


def outputs(graph: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    session = open_session(graph, ["out"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in inputs])


def outputs_on_the_grid(graph: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    """Outputs with the linear layer's weights rounded to the grid of INT8."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(graph)
    for tensor in rounded.graph.initializer:
        if tensor.name == "fc":
            values = round_to_nearest(numpy_helper.to_array(tensor).astype(np.float64)[None])[0]
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), "fc"))
    return outputs(rounded, inputs)


def error_on_the_grid(graph: onnx.ModelProto, expected: onnx.ModelProto) -> float:
    """Mean square that a linear layer rounded to the grid of INT8 changes at the outputs, but for its mean."""
    others = images(200, seed=2)
    return float((outputs_on_the_grid(graph, others) - outputs(expected, others)).var(axis=0).mean())


@pytest.mark.parametrize("bias", [True, False])
def test_a_weight_on_a_nearly_dead_feature_does_not_set_the_scale(bias: bool) -> None:
    graph = classifier(bias)
    clipped = clip_weights(graph, images(64, seed=1))
    before, after = weights(graph), weights(clipped)
    assert (np.abs(after["fc"][:3]).max(axis=1) < np.abs(before["fc"][:3]).max(axis=1) / 100).all()
    np.testing.assert_array_equal(after["fc"][3:], before["fc"][3:])
    np.testing.assert_array_equal(after["stem"], before["stem"])
    assert error_on_the_grid(clipped, graph) < error_on_the_grid(graph, graph) / 100


def test_layers_that_stay_float_keep_their_weights() -> None:
    graph = classifier()
    kept = clip_weights(graph, images(8, seed=1), float_nodes=["fc_node"])
    assert kept.SerializeToString() == graph.SerializeToString()


def test_the_bound_is_the_best_of_all_ratios() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 20, 6)) * np.exp(rng.normal(size=(2, 20, 6), scale=3))
    inputs = (rng.normal(size=(2, 100, 6)) * np.exp(rng.normal(size=(2, 1, 6), scale=3))).astype(np.float32)
    given, moved = clip_rows(rows, inputs), 0
    for group in range(len(rows)):
        for output, row in enumerate(rows[group]):
            errors = []
            for ratio in RATIOS:
                scale = ratio * np.abs(row).max() / 127
                change = np.clip(np.rint(row / scale), -127, 127) * scale - row
                errors.append(float(np.mean([(change @ x) ** 2 for x in inputs[group].astype(np.float64)])))
            best = int(np.argmin(errors))
            best = best if errors[best] < 0.9 * errors[0] else 0
            np.testing.assert_allclose(np.abs(given[group, output]).max(), RATIOS[best] * np.abs(row).max())
            moved += best > 0
    assert 5 < moved < 35


def test_weights_that_matter_alike_stay() -> None:
    rng = np.random.default_rng(0)
    rows, inputs = rng.normal(size=(1, 10, 400)), rng.normal(size=(1, SAMPLES, 400)).astype(np.float32)
    np.testing.assert_array_equal(clip_rows(rows, inputs), rows)


def test_dead_outputs_and_inputs_stay_finite() -> None:
    rows = np.zeros((1, 2, 3))
    rows[0, 0] = 1.0, -2.0, 0.5
    np.testing.assert_array_equal(clip_rows(rows, np.zeros((1, 4, 3), np.float32)), rows)


def nearly_constant() -> tuple[onnx.ModelProto, np.ndarray]:
    """The classifier, whose channel 0 sees the third colour alone; and images in which that hardly moves."""
    graph, inputs = classifier(), images(32, seed=3)
    for tensor in graph.graph.initializer:
        if tensor.name == "stem":
            values = numpy_helper.to_array(tensor).copy()
            values[0, :, 0, 0] = 0, 0, 1e-3
            tensor.CopyFrom(numpy_helper.from_array(values, "stem"))
    inputs[:, 2] = 1 + 1e-4 * inputs[:, 2]
    return graph, inputs


def test_the_biases_take_back_what_clipping_moves():
    graph, inputs = nearly_constant()
    clipped = clip_weights(graph, inputs)
    moved = np.abs(outputs(clipped, inputs).mean(axis=0) - outputs(graph, inputs).mean(axis=0)).max()
    int8 = prepare(graph, inputs, "minmax")[0].quantize("onnx-int8-u8")
    left = np.abs(outputs(int8, inputs).mean(axis=0) - outputs(graph, inputs).mean(axis=0)).max()
    assert left < 0.1 < 5 < moved


def test_a_constant_that_no_bias_correction_will_take_back_counts():
    graph, inputs = nearly_constant()
    errors = {}
    for correctable in (True, False):
        clipped = clip_weights(graph, inputs, correctable=correctable)
        errors[correctable] = np.square(outputs_on_the_grid(clipped, inputs) - outputs(graph, inputs)).mean()
    assert errors[False] < errors[True] / 3
    assert errors[False] <= np.square(outputs_on_the_grid(graph, inputs) - outputs(graph, inputs)).mean()
