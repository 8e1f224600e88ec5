from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from midge.export.mixed_precision import (
    CROSSING,
    STEP,
    Rounding,
    float_price,
    freed_noise,
    keep_budget,
    macs_of,
    measure_roundings,
    order_float_layers,
)
from midge.export.prepare import Prepared
from midge.export.sensitivity import damage, run_graph
from midge.runtime.errors import UserError


@pytest.fixture(scope="module")
def roundings(prepared: Prepared, inputs: np.ndarray) -> list[Rounding]:
    return measure_roundings(prepared, inputs)


def chain() -> Prepared:
    """image (1, 2, 4, 4) -> 1 x 1 convolution a, ReLU -> b -> logits of c, all of two channels."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(size=(2, 2, 1, 1)).astype(np.float32), name) for name in "ABC"]
    nodes = [
        helper.make_node("Conv", ["image", "A"], ["before"], name="a"),
        helper.make_node("Relu", ["before"], ["x"], name="relu"),
        helper.make_node("Conv", ["x", "B"], ["y"], name="b"),
        helper.make_node("Conv", ["y", "C"], ["z"], name="c"),
        helper.make_node("GlobalAveragePool", ["z"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], name="flatten"),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 2, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    ranges = dict.fromkeys(("image", "y", "z"), (-4.0, 4.0)) | {"x": (0.0, 4.0), "before": (-4.0, 4.0)}
    ranges |= dict.fromkeys(("pooled", "logits"), (-4.0, 4.0))
    return Prepared(model, ranges, ranges)


def test_each_rounding_is_measured_alone() -> None:
    """Against the network written out in NumPy."""
    network = chain()
    images = np.random.default_rng(1).normal(size=(5, 2, 4, 4)).astype(np.float32)
    a, b, c = (numpy_helper.to_array(tensor)[:, :, 0, 0] for tensor in network.graph.graph.initializer)

    def run(rounded: str) -> np.ndarray:
        def after(name: str, values: np.ndarray) -> np.ndarray:
            if name != rounded:
                return values
            low, high = network.ranges[name]
            scale = np.float32((high - low) / 255)
            zero = np.rint(-low / scale)
            return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale

        x = after("x", np.maximum(np.einsum("oi,nihw->nohw", a, after("image", images)), 0))
        y = after("y", np.einsum("oi,nihw->nohw", b, x))
        pooled = after("z", np.einsum("oi,nihw->nohw", c, y)).mean(axis=(2, 3))
        return after("logits", after("pooled", pooled))

    reference = run("")
    found = {rounding.tensors[0]: rounding for rounding in measure_roundings(network, images)}
    layers = {"image": {"a"}, "x": {"a", "b"}, "y": {"b", "c"}, "z": {"c", "pool"}}
    layers["pooled"] = {"pool", "flatten"}
    for name, expected in layers.items():
        noise = np.square(run(name) - reference, dtype=np.float64).sum() / np.square(reference, dtype=np.float64).sum()
        assert found[name].noise == pytest.approx(noise, rel=1e-3)
        assert expected <= found[name].layers
        assert (found[name].values, found[name].outside) == (2 if name == "pooled" else 32, name == "image")
    assert found["x"].layers == {"a", "b"}


def test_noises_add_up(prepared: Prepared, inputs: np.ndarray, roundings: list[Rounding]) -> None:
    """To about what the whole network's activations cost, as the order of the layers takes for granted."""
    reference = run_graph(prepared.graph, inputs)
    outputs = run_graph(prepared.quantize("onnx-int8-u8"), inputs)
    whole = float(np.square(outputs - reference).sum() / np.square(reference).sum())
    assert sum(rounding.noise for rounding in roundings) == pytest.approx(whole, rel=0.6)
    assert len({name for rounding in roundings for name in rounding.tensors}) >= 30


def rounding(name: str, layers: str, noise: float, values: int = 0, outside: bool = False) -> Rounding:
    return Rounding((name,), frozenset(layers), noise, values, outside)


def test_prices() -> None:
    roundings = [rounding("i", "a", 1, 10, True), rounding("x", "ab", 2, 20), rounding("y", "bc", 4, 40)]
    macs = {"a": 1000, "b": 2000, "c": 7000}
    assert float_price(roundings, macs, frozenset()) == CROSSING * 10 / 10_000  # the image becomes integers
    assert float_price(roundings, macs, frozenset("a")) == (1000 + CROSSING * 20) / 10_000
    assert float_price(roundings, macs, frozenset("b")) == (2000 + CROSSING * (10 + 20 + 40)) / 10_000
    assert float_price(roundings, macs, frozenset("abc")) == 1
    assert [freed_noise(roundings, frozenset(chosen)) for chosen in ("", "b", "ab", "abc")] == [0, 0, 3, 7]


def test_macs_are_those_of_the_network(prepared: Prepared) -> None:
    macs = macs_of(prepared.graph)
    shapes = {info.name: info for info in onnx.shape_inference.infer_shapes(prepared.graph).graph.value_info}
    weights = {tensor.name: tensor.dims for tensor in prepared.graph.graph.initializer}
    for node in prepared.graph.graph.node:
        if node.op_type == "Conv":
            sides = [side.dim_value for side in shapes[node.output[0]].type.tensor_type.shape.dim]
            assert macs[node.name] == int(np.prod(sides)) * int(np.prod(weights[node.input[1]][1:]))
        elif node.op_type == "Gemm":
            assert macs[node.name] == int(np.prod(weights[node.input[1]]))
        else:
            assert macs[node.name] == 0


def test_sets_grow_by_what_is_freed_for_its_price(prepared: Prepared, roundings: list[Rounding]) -> None:
    sets = order_float_layers(prepared.graph, roundings)
    assert sets[0] == ()
    assert {*sets[-1]} == frozenset[str]().union(*(each.layers for each in roundings))
    assert all({*before} < {*after} for before, after in itertools.pairwise(sets))
    macs, names = macs_of(prepared.graph), [node.name for node in prepared.graph.graph.node]
    for names_of_set in sets:
        assert list(names_of_set) == [name for name in names if name in names_of_set]
    # The first step, found by trying all of one tensor's layers and all beginnings and ends that are not too dear.
    places = [[name for name in names if name in sets[-1]][slice(*ends)] for ends in _ends(len(sets[-1]))]
    base = float_price(roundings, macs, frozenset())
    ratios = {
        candidate: freed_noise(roundings, candidate) / max(float_price(roundings, macs, candidate) - base, 1e-3)
        for candidate in {*(each.layers for each in roundings), *map(frozenset, places)} - {frozenset()}
        if float_price(roundings, macs, candidate) - base <= STEP
    }
    assert ratios[frozenset(sets[1])] == max(ratios.values())


def _ends(count: int) -> list[tuple[int, int]]:
    return [*((0, place) for place in range(1, count)), *((place, count) for place in range(count))]


def test_a_tensor_that_is_rounded_badly_is_spared_first(prepared: Prepared, inputs: np.ndarray) -> None:
    makers = {node.output[0]: node for node in prepared.graph.graph.node}
    relus = [node for node in prepared.graph.graph.node if node.op_type == "Relu"]
    tensor = relus[5].output[0]
    worse = dataclasses.replace(prepared, ranges={**prepared.ranges, tensor: (0.0, prepared.ranges[tensor][1] / 50)})
    sets = order_float_layers(worse.graph, measure_roundings(worse, inputs))
    takers = {node.name for node in prepared.graph.graph.node if tensor in node.input}
    assert {makers[relus[5].input[0]].name, *takers} <= {*sets[1]}
    before = damage(worse, run_graph(worse.graph, inputs), inputs, classifier=False)
    mixed, lost = keep_budget(*with_floats(worse, inputs, sets), before / 4)
    assert lost <= before / 4
    assert mixed.float_nodes == sets[1]
    assert damage(mixed, run_graph(prepared.graph, inputs), inputs, classifier=False) == lost


def with_floats(prepared: Prepared, inputs: np.ndarray, sets: list[tuple[str, ...]]) -> tuple[Any, Any, Any]:
    """The first arguments of keep_budget for features."""
    reference = run_graph(prepared.graph, inputs)
    return (
        lambda names: dataclasses.replace(prepared, float_nodes=names),
        sets,
        lambda int8: damage(int8, reference, inputs, classifier=False),
    )


def test_budgets_that_always_and_never_hold(
    prepared: Prepared, inputs: np.ndarray, roundings: list[Rounding], capsys: pytest.CaptureFixture[str]
) -> None:
    sets = order_float_layers(prepared.graph, roundings)
    assert keep_budget(*with_floats(prepared, inputs, sets), 100)[0].float_nodes == ()
    assert "With 0 of 22 layers in float" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"With all but the last layers in float, 0\.\d\d points are lost still"):
        keep_budget(
            lambda names: dataclasses.replace(prepared, float_nodes=()), *with_floats(prepared, inputs, sets)[1:], 0
        )


def test_a_transformers_layers(vit: onnx.ModelProto) -> None:
    from midge.export.ranges import measure_ranges

    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    table = measure_ranges(vit, images)
    prepared = Prepared(vit, table.choose("mse"), table.choose_symmetric("mse"))
    roundings = measure_roundings(prepared, images)
    weighted = {node.name for node in vit.graph.node if node.op_type in {"Conv", "MatMul", "Gemm"}}
    assert frozenset[str]().union(*(each.layers for each in roundings)) == weighted
    assert {*order_float_layers(vit, roundings)[-1]} == weighted
