from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from midge.__main__ import main
from midge.export.bias_correction import correct_biases
from midge.export.config import QuantizeConfig
from midge.export.prepare import Prepared
from midge.export.quantize import DIALECTS, quantize_onnx
from midge.export.requantize import quantize
from midge.export.sensitivity import LayerCost, by_cost, layer_costs, run_graph, sqnr_db
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file


@pytest.fixture(scope="module")
def costs(prepared: Prepared, inputs: np.ndarray) -> list[LayerCost]:
    return layer_costs(prepared.graph, prepared, inputs)


def test_costs_are_those_of_one_layer_alone(prepared: Prepared, inputs: np.ndarray, costs: list[LayerCost]) -> None:
    names = [node.name for node in prepared.graph.graph.node if node.op_type in {"Conv", "Gemm"}]
    assert [cost.node for cost in costs] == names
    (output,) = next(node.output for node in prepared.graph.graph.node if node.name == names[1])
    assert [node.op_type for node in prepared.graph.graph.node if output in node.input] == ["Relu"]
    relu = next(node.name for node in prepared.graph.graph.node if output in node.input)
    only = [names[1], relu]  # it is rounded after its ReLU
    second = quantize_onnx(prepared.graph, prepared.ranges, DIALECTS["onnx-int8-u8"], only=only)
    corrected = correct_biases(prepared.graph, second, inputs, only=[names[1]])
    second = quantize_onnx(corrected, prepared.ranges, DIALECTS["onnx-int8-u8"], only=only)
    quantized = {node.name for node in second.graph.node if node.op_type in {"Conv", "Gemm"} and "Deq" in node.input[1]}
    floats = {node.name for node in second.graph.node if node.op_type in {"Conv", "Gemm"}} - quantized
    assert quantized == {names[1]} and floats == {*names} - quantized
    outputs, reference = run_graph(second, inputs), run_graph(prepared.graph, inputs)
    noise = sum((a - b) ** 2 for a, b in zip(outputs.ravel().tolist(), reference.ravel().tolist(), strict=True))
    signal = sum(b**2 for b in reference.ravel().tolist())
    assert costs[1].sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    whole = sqnr_db(run_graph(prepared.quantize("onnx-int8-u8"), inputs), reference)
    assert whole is not None
    assert all(cost.sqnr_db is None or cost.sqnr_db > whole for cost in costs)  # one costs less than all
    assert [cost.sqnr_db for cost in by_cost(costs)] == sorted(cost.sqnr_db or math.inf for cost in costs)


def test_a_layer_that_is_made_costly_comes_first(
    prepared: Prepared, inputs: np.ndarray, costs: list[LayerCost]
) -> None:
    name = costs[5].node
    tensor = next(node.input[0] for node in prepared.graph.graph.node if node.name == name)
    low, high = prepared.ranges[tensor]
    worse = dataclasses.replace(prepared, ranges={**prepared.ranges, tensor: (low / 50, high / 50)})
    ordered = by_cost(layer_costs(worse.graph, worse, inputs))
    makers = {node.output[0]: node for node in prepared.graph.graph.node}
    relu = makers[tensor]
    touched = {node.name for node in prepared.graph.graph.node if tensor in node.input} | {makers[relu.input[0]].name}
    assert relu.op_type == "Relu"
    assert {name, ordered[0].node} <= touched


def test_quantize_writes_a_new_artifact(
    artifact: Artifact, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    options = ["--sensitivity", "--limit", "4", "--budget", "50", "--held-out", "24", "--calibration", "entropy"]
    command = ["quantize", str(artifact.path), "--data", str(images / "train"), "--out", str(out), *options]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "node_conv2d_8 " in printed and "… and 2 layers that cost less." in printed
    assert "⣿" in printed or "⡇" in printed or "⢸" in printed  # the plot
    assert "(budget 50).\nLayers in float: none." in printed
    again, stored = load_artifact(out), json.loads((out / "calibration.json").read_text())
    assert (stored["method"], stored["float_nodes"]) == ("entropy", [])
    for name, variant in artifact.variants.items():
        changed = again.variants[name].sha256 != variant.sha256
        assert changed == ("int8" in name)  # OpenVINO's is made from the u8 graph


def test_a_budget_that_is_kept_and_its_layers_are_kept_in_float(
    artifact: Artifact, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed, again = tmp_path / "mixed", tmp_path / "again"
    command = ["quantize", str(artifact.path), "--data", str(images / "train"), "--limit", "8", "--held-out", "48"]
    assert main([*command, "--out", str(mixed), "--budget", "0", "--calibration", "minmax", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    floats = json.loads((mixed / "calibration.json").read_text())["float_nodes"]
    assert result["lost_points"] == 0
    assert result["float_nodes"] == floats
    graph = onnx.load(load_artifact(mixed).variants["onnx-int8-u8"].model)
    stored = {tensor.name for tensor in graph.graph.initializer}
    weighted = {node.name: node.input[1] in stored for node in graph.graph.node if node.op_type in {"Conv", "Gemm"}}
    assert {name for name, is_float in weighted.items() if is_float} == {*floats} & {*weighted}
    config = QuantizeConfig(artifact=mixed, data=images / "train", out=again)  # as the artifact is, layers too
    assert quantize(config) == 0
    assert load_artifact(again).variants["onnx-int8-u8"].sha256 == load_artifact(mixed).variants["onnx-int8-u8"].sha256


def test_the_same_method_gives_the_same_files(artifact: Artifact, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert quantize(QuantizeConfig(artifact=artifact.path, data=images / "train", out=out)) == 0
    again = load_artifact(out)
    assert {name: variant.sha256 for name, variant in again.variants.items()} == {
        name: variant.sha256 for name, variant in artifact.variants.items()
    }
    assert again.manifest["origin"]["quantized_from"] == sha256_file(artifact.path / "manifest.json")
    before, after = (json.loads((folder / "calibration.json").read_text()) for folder in (artifact.path, out))
    assert before == after


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "Nothing to do: give --sensitivity, or --out"),
        ({"sensitivity": True, "data": "test"}, "holds 0 of the 40 images that the artifact was calibrated on"),
        ({"sensitivity": True, "calibration": "max"}, "Unknown calibration method 'max'"),
        ({"sensitivity": True, "budget": -1.0}, "--budget is -1"),
        ({"out": "taken"}, "exists already"),
    ],
)
def test_mistakes(artifact: Artifact, images: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    (tmp_path / "taken").write_text("x")
    changes = {**changes, "data": images / changes.get("data", "train")}
    if "out" in changes:
        changes["out"] = tmp_path / changes["out"]
    with pytest.raises(UserError, match=says):
        quantize(QuantizeConfig(artifact=artifact.path, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def rewrite(folder: Path, relative: str, content: bytes) -> None:
    """Replace a file and what the manifest says of it."""
    import hashlib

    (folder / relative).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["calibration"] if relative == "calibration.json" else None
    entry = entry or manifest["variants"][relative.split("/")[0]]["files"][relative]
    entry.update(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_quantized_graph_is_refused(changed_artifact: Path, images: Path, tmp_path: Path) -> None:
    content = (changed_artifact / "onnx-int8-u8" / "model.onnx").read_bytes()
    rewrite(changed_artifact, "onnx-fp32/model.onnx", content)
    with pytest.raises(UserError, match="The graph is quantized already"):
        quantize(QuantizeConfig(artifact=changed_artifact, data=images / "train", out=tmp_path / "out"))
    rewrite(changed_artifact, "onnx-fp32/model.onnx", b"no graph")
    with pytest.raises(UserError, match="is no ONNX file"):
        quantize(QuantizeConfig(artifact=changed_artifact, data=images / "train", out=tmp_path / "out"))
    with pytest.raises(UserError, match="it is a file"):
        quantize(
            QuantizeConfig(artifact=changed_artifact / "onnx-int8-u8" / "model.onnx", data=images, sensitivity=True)
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 3}, "has schema 3, this midge reads up to 2"),
        ({"schema": 1}, "is of an earlier schema: export the artifact again"),
        ({"images": 3}, "has 'images': 3, which must be a list"),
        ({"method": "max"}, "has 'method': 'max', which must be one of"),
        ({"method": "max", "trained": {"kept": False}}, "has 'method': 'max', which must be one of"),
        ({"trained": {"kept": True}}, "says that the INT8 variants were trained, which quantizing .* would undo"),
        ({"trained": {}}, "says that the INT8 variants were trained"),
        ({"trained": 3}, "has 'trained': 3, which must be a JSON object"),
        ({"images": [{"path": "../../etc/passwd", "sha256": "0" * 64}]}, "holds 0 of the 1 images"),
        ({"ranges": {"graph_sha256": "0" * 64, "tensors": {"x": {}}}}, "has no field 'minmax'"),
    ],
)
def test_a_hostile_calibration(changed_artifact: Path, images: Path, changes: dict[str, Any], says: str) -> None:
    stored = {**json.loads((changed_artifact / "calibration.json").read_text()), **changes}
    rewrite(changed_artifact, "calibration.json", json.dumps(stored).encode())
    with pytest.raises(UserError, match=says):
        quantize(QuantizeConfig(artifact=changed_artifact, data=images / "train", sensitivity=True))


def test_what_clipping_a_layer_costs_counts(prepared: Prepared, inputs: np.ndarray, costs: list[LayerCost]) -> None:
    name = costs[2].node
    clipped = onnx.ModelProto()
    clipped.CopyFrom(prepared.graph)
    weight = next(node.input[1] for node in clipped.graph.node if node.name == name)
    for tensor in clipped.graph.initializer:
        if tensor.name == weight:
            values = onnx.numpy_helper.to_array(tensor)
            limit = 0.2 * np.abs(values).max()
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.clip(values, -limit, limit), weight))
    now = {
        cost.node: cost.sqnr_db
        for cost in layer_costs(prepared.graph, dataclasses.replace(prepared, graph=clipped), inputs)
    }
    before = {cost.node: cost.sqnr_db for cost in costs}
    assert (now[name] or 0) < (before[name] or 0) - 3
    assert {node: value for node, value in now.items() if node != name} == {
        node: value for node, value in before.items() if node != name
    }
