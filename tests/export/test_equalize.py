from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper
from torch import nn

from midge.export.equalize import equalize, find_pairs, pair_scales
from midge.export.fold import fold_batch_norm
from midge.export.graph_edit import observe, weights, with_weights
from midge.export.onnx_export import export_onnx
from midge.export.ranges import open_session

PX = 32


def run(graph: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = open_session(graph, ["logits"])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def draw(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PX, PX)).astype(np.float32)


def disturb(model: nn.Module) -> nn.Module:
    """Weights whose channels differ in range by powers of ten, and normalizations that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.running_mean = 0.1 * torch.randn(shape, generator=generator)
            module.running_var = 10 ** (torch.rand(shape, generator=generator) - 0.5)
            module.weight.data = 10 ** (torch.rand(shape, generator=generator) - 0.7)
            module.bias.data = 0.2 * torch.randn(shape, generator=generator)
    return model.eval()


def export(name: str, **arguments: Any) -> onnx.ModelProto:
    model = disturb(timm.create_model(name, num_classes=7, **arguments))
    return export_onnx(fold_batch_norm(model, PX), PX, "logits")


@pytest.fixture(scope="module")
def mobilenet() -> onnx.ModelProto:
    return export("mobilenetv2_035")


@pytest.fixture(scope="module")
def relu_mobilenet(mobilenet: onnx.ModelProto) -> onnx.ModelProto:
    """The same with ReLU for ReLU6."""
    graph = with_weights(mobilenet, {})
    for node in graph.graph.node:
        if node.op_type == "Clip":
            node.op_type = "Relu"
            del node.input[1:]
    return graph


@pytest.fixture(scope="module")
def resnet() -> onnx.ModelProto:
    return export("resnet18", channels=(8, 16, 24, 32))


def ranges(values: dict[str, np.ndarray], first: str, second: str, depthwise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ranges of the channels between two convolutions, by a loop over them."""
    out_range = [max(abs(number) for number in channel.flat) for channel in values[first]]
    taken = values[second] if depthwise else values[second].swapaxes(0, 1)
    return np.array(out_range), np.array([max(abs(number) for number in channel.flat) for channel in taken])


def test_scales_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 3, 3, 3)), rng.normal(size=(5, 4, 1, 1))
    first[2] *= 100
    values = {"a": first, "b": second}
    r1, r2 = ranges(values, "a", "b", False)
    expected = [(one * two) ** 0.5 / two for one, two in zip(r1, r2, strict=True)]
    scales = pair_scales(first, second, depthwise=False)
    np.testing.assert_allclose(scales, expected, rtol=1e-12)
    first[1], second[:, 3] = 0, 0  # dead on one side: left alone
    np.testing.assert_array_equal(pair_scales(first, second, depthwise=False)[[1, 3]], 1)


@pytest.mark.parametrize("network", ["mobilenet", "relu_mobilenet", "resnet"])
def test_the_network_computes_the_same_under_the_same_names(network: str, request: pytest.FixtureRequest) -> None:
    graph = request.getfixturevalue(network)
    before = graph.SerializeToString()
    images, others = draw(4), draw(4, seed=1)
    equalized = equalize(graph, images)
    onnx.checker.check_model(equalized, full_check=True)
    for batch in (images, others):
        expected, given = run(graph, batch), run(equalized, batch)
        assert np.abs(expected - given).max() <= 1e-4 * np.abs(expected).max()
    assert graph.SerializeToString() == before
    assert list(equalized.graph.node) == list(graph.graph.node)
    assert [(t.name, t.dims) for t in equalized.graph.initializer] == [
        (t.name, t.dims) for t in graph.graph.initializer
    ]
    changed = [name for name, value in weights(equalized).items() if not np.array_equal(value, weights(graph)[name])]
    assert changed


def test_ranges_are_equal_after_convergence(relu_mobilenet: onnx.ModelProto) -> None:
    pairs = find_pairs(relu_mobilenet)
    # The stem and a block without expansion, 16 blocks of two pairs, and two linear ends that one convolution takes.
    assert len(pairs) == 2 + 2 * 16 + 2
    before, after = weights(relu_mobilenet), weights(equalize(relu_mobilenet, draw(1)))
    worst_before = worst_after = 1.0
    for pair in pairs:
        r1, r2 = ranges(before, pair.first, pair.second, pair.depthwise)
        worst_before = max(worst_before, (r1 / r2).max(), (r2 / r1).max())
        r1, r2 = ranges(after, pair.first, pair.second, pair.depthwise)
        worst_after = max(worst_after, (r1 / r2).max(), (r2 / r1).max())
    assert worst_before > 10
    assert worst_after < 1.01


def test_residual_branches_are_untouched(resnet: onnx.ModelProto) -> None:
    pairs = find_pairs(resnet)
    assert {(pair.first, pair.second) for pair in pairs} == {
        (f"layer{stage}.{block}.conv1.weight", f"layer{stage}.{block}.conv2.weight")
        for stage in range(1, 5)
        for block in range(2)
    }
    before, after = weights(resnet), weights(equalize(resnet, draw(1)))
    paired = {name for pair in pairs for name in (pair.first, pair.bias, pair.second)}
    for name, value in before.items():
        assert (name in paired) is not np.array_equal(value, after[name])
    additions = [node.output[0] for node in resnet.graph.node if node.op_type == "Add"]
    images = draw(1, seed=2)
    (first,), (second,) = (list(observe(graph, additions, images)) for graph in (resnet, equalize(resnet, images)))
    for name in additions:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-3, atol=1e-4 * np.abs(first[name]).max())


def test_relu6_keeps_its_bound(mobilenet: onnx.ModelProto) -> None:
    """Channels that reach 6 keep their scale, others stay below it with headroom; on these images nothing changes."""
    images, headroom = draw(4), 2.0
    equalized = equalize(mobilenet, images, headroom)
    expected = run(mobilenet, images)
    assert np.abs(expected - run(equalized, images)).max() <= 1e-4 * np.abs(expected).max()
    tensors = [pair.tensor for pair in find_pairs(mobilenet) if pair.bound == 6]
    assert len(tensors) >= 30

    def peaks(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
        seen = list(observe(graph, tensors, images))
        return {name: np.max([image[name].max(axis=(0, 2, 3)) for image in seen], axis=0) for name in tensors}

    before, after = peaks(mobilenet), peaks(equalized)
    kept = grown = 0
    for name in tensors:
        near = before[name] * headroom >= 6
        np.testing.assert_allclose(after[name][near], before[name][near], rtol=1e-3)
        assert (after[name][~near] * headroom <= 6 * 1.001).all()
        kept, grown = kept + near.sum(), grown + (after[name][~near] > 1.05 * before[name][~near]).sum()
    assert kept > 10 and grown > 10


def graph_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], outputs: list[str]) -> onnx.ModelProto:
    image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, PX, PX])
    infos = [helper.make_empty_tensor_value_info(name) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()]
    return helper.make_model(helper.make_graph(nodes, "g", [image], infos, tensors))


def test_what_does_not_scale_is_no_pair() -> None:
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(4, 3, 1, 1)), "v": rng.normal(size=(4, 4, 1, 1)), "low": -1.0, "high": 6.0}
    first = helper.make_node("Conv", ["image", "w"], ["a"])
    second = helper.make_node("Conv", ["b", "v"], ["c"])
    relu = helper.make_node("Relu", ["a"], ["b"])
    assert len(find_pairs(graph_of([first, relu, second], constants, ["c"]))) == 1
    for middle, outputs in (
        ([helper.make_node("Sigmoid", ["a"], ["b"])], ["c"]),
        ([helper.make_node("Clip", ["a", "low", "high"], ["b"])], ["c"]),  # cuts below 0 too
        ([relu], ["b", "c"]),  # what is between is an output
        ([relu, helper.make_node("Neg", ["b"], ["d"])], ["c", "d"]),  # and goes elsewhere
    ):
        graph = graph_of([first, *middle, second], constants, outputs)
        assert find_pairs(graph) == []
        assert equalize(graph, draw(0)).SerializeToString() == graph.SerializeToString()
    shared = helper.make_node("Conv", ["b", "v"], ["e"])  # the weight serves two
    assert find_pairs(graph_of([first, relu, second, shared], constants, ["c", "e"])) == []
