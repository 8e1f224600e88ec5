from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.export.histogram import ESTIMATES, Histogram
from midge.export.ranges import (
    METHODS,
    WEIGHTED,
    RangeTable,
    activations,
    check_method,
    find_origins,
    graph_sha256,
    measure_ranges,
    open_session,
)
from midge.runtime.artifact import Artifact
from midge.runtime.errors import UserError
from midge.runtime.fields import Fields

PX = 32


@pytest.fixture(scope="module")
def graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.variants["onnx-fp32"].model)


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 3, PX, PX)).astype(np.float32)


@pytest.fixture(scope="module")
def table(graph: onnx.ModelProto, inputs: np.ndarray) -> RangeTable:
    return measure_ranges(graph, inputs)


def test_every_activation_is_measured_over_all_images(
    graph: onnx.ModelProto, inputs: np.ndarray, table: RangeTable
) -> None:
    import onnxruntime

    names = activations(graph)
    assert set(table.estimates) == {"image", *names}
    assert len(names) == len(graph.graph.node)
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = onnxruntime.InferenceSession(probed.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [session.run(names, {"image": image[None]}) for image in inputs]
    for name, *values in zip(names, *outputs, strict=True):
        flat = np.concatenate([value.ravel() for value in values])
        assert table.estimates[name]["minmax"] == (flat.min(), flat.max())
        low, high = table.estimates[name]["percentile-99.9"]
        assert (flat < low).sum() + (flat > high).sum() <= 0.001 * flat.size
        for low, high in table.estimates[name].values():
            assert low <= high


def test_what_is_only_rearranged_has_the_ranges_of_what_it_was(vit: onnx.ModelProto) -> None:
    images = np.random.default_rng(0).normal(size=(3, 3, 32, 32)).astype(np.float32)
    names = activations(vit)
    table, origins = measure_ranges(vit, images), find_origins(vit, names)
    assert len(origins) > 0.3 * len(names)
    measured = [name for name in names if name in table.estimates]
    assert sum(name in origins for name in measured) > 0.2 * len(measured)
    session = open_session(vit, measured)
    histograms = {name: Histogram() for name in measured}
    for image in images:
        for name, values in zip(measured, session.run(measured, {"image": image[None]}), strict=True):
            histograms[name].add(values)
    for name in measured:
        assert table.estimates[name] == {method: estimate(histograms[name]) for method, estimate in ESTIMATES.items()}


def test_of_a_transformer_what_stays_float_in_all_forms_is_not_measured(vit: onnx.ModelProto) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    measured = set(measure_ranges(vit, images).estimates)
    made = {node.output[0]: node.op_type for node in vit.graph.node}
    assert {"Erf", "Div"} & set(made.values())
    assert not [name for name in measured - {"image"} if made[name] in {"Erf", "Div"}]
    for node in vit.graph.node:
        if node.op_type in WEIGHTED:
            assert {name for name in (*node.input, *node.output) if name in made} <= measured


def test_methods_choose_from_the_estimates(table: RangeTable) -> None:
    for method, (asymmetric, symmetric) in METHODS.items():
        ranges, bounds = table.choose(method), table.choose_symmetric(method)
        assert ranges == {tensor: of[asymmetric] for tensor, of in table.estimates.items()}
        assert bounds == {tensor: of[symmetric] for tensor, of in table.estimates.items()}
    assert table.choose("mse") != table.choose("minmax") != table.choose("entropy")


def test_what_is_stored_is_read_back(graph: onnx.ModelProto, table: RangeTable) -> None:
    read = RangeTable.from_json(Fields(json.loads(json.dumps(table.to_json())), "ranges"))
    assert read.estimates == table.estimates
    assert read.graph_sha256 == graph_sha256(graph)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mse": [1, 0]}, "the lower number first"),
        ({"mse": [0]}, "a list of 2 finite numbers"),
        ({"mse": [0, float("nan")]}, "a list of 2 finite numbers"),
        ({"mse": None}, "a list of 2 finite numbers"),
    ],
)
def test_damaged_ranges_are_refused(table: RangeTable, change: dict[str, object], says: str) -> None:
    stored = table.to_json()
    stored["tensors"]["image"] = {**stored["tensors"]["image"], **change}
    with pytest.raises(UserError, match=says):
        RangeTable.from_json(Fields(stored, "ranges"))


def test_an_unknown_method_lists_the_methods() -> None:
    with pytest.raises(UserError, match=r"Unknown calibration method 'max': choose one of entropy, minmax, mse, perc"):
        check_method("max")


def write(folder: Path, images: list[np.ndarray]) -> Path:
    from PIL import Image

    folder.mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def test_images_of_one_colour_have_no_range(run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "grey", [np.full((28, 28, 3), 40 * index, np.uint8) for index in range(6)])
    with pytest.raises(UserError, match=r"calibration images is of one colour, so the activations have no range: name"):
        export_run(ExportConfig(run=run, out=tmp_path / "out", data=data, targets=("onnx",)))
    assert not (tmp_path / "out").exists()


def test_three_images_are_said_to_be_few(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    data = write(tmp_path / "few", [rng.integers(0, 255, (28, 28, 3), np.uint8) for _ in range(3)])
    config = ExportConfig(run=run, out=tmp_path / "out", data=data, targets=("onnx",), calibration="entropy")
    assert export_run(config) == 0
    assert "Calibrating on 2 images only: INT8 may suffer" in capsys.readouterr().err
    stored = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (stored["method"], len(stored["images"])) == ("entropy", 2)
