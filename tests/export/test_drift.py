from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from midge.__main__ import main
from midge.export.drift import (
    CLEAN_DB,
    Layer,
    Sums,
    attribute,
    biggest_drops,
    measure_drift,
    merge_layers,
    read_layers,
)
from midge.export.taps import tap_onnx
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.golden import load_golden

NUM_IMAGES = 6


def golden_images(artifact: Artifact) -> np.ndarray:
    return load_golden(artifact.golden, artifact.input_shape, artifact.output_shape).inputs[:NUM_IMAGES]


def damage(folder: Path, variant: str, change: Callable[[onnx.ModelProto], Any]) -> Artifact:
    """Change an ONNX file, and the manifest with it."""
    path = folder / variant / "model.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["variants"][variant]["files"][f"{variant}/model.onnx"]
    entry.update(size_bytes=path.stat().st_size, sha256=sha256_file(path))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return load_artifact(folder)


def scaled(name: str, factor: float) -> Callable[[onnx.ModelProto], None]:
    """Multiply a constant."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * factor).astype(np.float32), name))

    return change


@pytest.mark.parametrize("variant", ["onnx-int8-u8", "onnx-int8-s8", "openvino-int8"])
def test_a_sound_variant_drifts_little_and_everywhere(artifact: Artifact, variant: str) -> None:
    drifts = measure_drift(artifact, variant, golden_images(artifact))
    by_name = {drift.tensor: drift for drift in drifts}
    assert list(by_name)[-1] == "logits"
    assert len({drift.module for drift in drifts} - {""}) == 22  # all convolutions and the classifier
    assert all(drift.cosine_min > 0.9 for drift in drifts)
    assert all(drift.sqnr_db is not None and 5 < drift.sqnr_db < 80 for drift in drifts)
    assert all(drift.cosine_min <= drift.cosine_mean <= 1 + 1e-9 for drift in drifts)


def test_the_drift_of_the_output_is_that_of_the_outputs(artifact: Artifact) -> None:
    """Worked out plainly from two sessions."""
    import onnxruntime as ort

    images = golden_images(artifact)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outputs = []
    for variant in ("onnx-int8-s8", "onnx-fp32"):
        session = ort.InferenceSession(str(artifact.variants[variant].model), options)
        outputs.append(
            np.stack([np.asarray(session.run(["logits"], {"image": image[None]})[0])[0] for image in images])
        )
    given, expected = (np.asarray(output, np.float64) for output in outputs)
    last = measure_drift(artifact, "onnx-int8-s8", images)[-1]
    assert last.sqnr_db == pytest.approx(10 * np.log10((expected**2).sum() / ((given - expected) ** 2).sum()), abs=0.01)
    cosines = (given * expected).sum(1) / np.linalg.norm(given, axis=1) / np.linalg.norm(expected, axis=1)
    assert (last.cosine_mean, last.cosine_min) == pytest.approx((cosines.mean(), cosines.min()), abs=1e-6)


@pytest.mark.parametrize("variant", ["onnx-int8-u8", "onnx-int8-s8"])
@pytest.mark.parametrize("layer", ["conv1", "layer2.0.conv2", "layer4.1.conv1", "fc"])
def test_a_damaged_layer_is_named(changed_artifact: Path, variant: str, layer: str) -> None:
    artifact = damage(changed_artifact, variant, scaled(f"{layer}.weight_scale", 3))
    drifts = measure_drift(artifact, variant, golden_images(artifact))
    worst = biggest_drops(drifts)[0]
    assert worst.module == layer
    assert worst.drop_db > 15
    before = drifts[: drifts.index(worst)]
    assert all(drift.drop_db < worst.drop_db / 2 for drift in before)


def test_a_damaged_bias_is_named_where_all_else_is_equal(changed_artifact: Path) -> None:
    """The FP32 graph itself, of which one bias went wrong."""
    (changed_artifact / "onnx-int8-s8" / "model.onnx").write_bytes(
        (changed_artifact / "onnx-fp32" / "model.onnx").read_bytes()
    )
    artifact = damage(changed_artifact, "onnx-int8-s8", scaled("layer3.0.conv1.bias", -4))
    drifts = measure_drift(artifact, "onnx-int8-s8", golden_images(artifact))
    assert biggest_drops(drifts)[0].module == "layer3.0.conv1"
    first = [drift.tensor for drift in drifts].index(biggest_drops(drifts)[0].tensor)
    assert all(drift.sqnr_db is None and drift.drop_db == 0 for drift in drifts[:first])


def test_the_command(changed_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(changed_artifact, "onnx-int8-u8", scaled("layer3.0.conv1.weight_scale", 3))
    arguments = ["verify", str(changed_artifact), "--drift", "onnx-int8-u8"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("onnx-int8-u8 against onnx-fp32, layer by layer, 50 golden images")
    assert any(line.startswith("layer3.0.conv1 (Conv+Relu) loses ") for line in lines[-5:])
    assert max(map(len, lines)) <= 110
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    worst = next(entry for entry in found["layers"] if entry["tensor"] == found["drops"][0])
    assert worst["module"] == "layer3.0.conv1"
    assert (found["variant"], found["images"]) == ("onnx-int8-u8", 50)


def test_what_cannot_be_compared_is_told(artifact: Artifact, changed_artifact: Path) -> None:
    images = golden_images(artifact)
    with pytest.raises(UserError, match="Unknown variant 'onnx-int8': choose one of onnx-fp32"):
        measure_drift(artifact, "onnx-int8", images)
    with pytest.raises(UserError, match="The drift of torch-fp32 cannot be measured: give a variant of onnxruntime"):
        measure_drift(artifact, "torch-fp32", images)
    spoiled = damage(changed_artifact, "onnx-int8-s8", scaled("layer1.0.conv1.bias", math.nan))
    with pytest.raises(UserError, match=r"The tensor '.*' of onnx-int8-s8 is .*all its numbers must be finite"):
        measure_drift(spoiled, "onnx-int8-s8", images)

    def rename(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [name if name in {"image", ""} else f"x_{name}" for name in names]
        for tensor in (*model.graph.initializer, *model.graph.output):
            tensor.name = f"x_{tensor.name}"
        del model.graph.value_info[:]

    for variant in ("onnx-int8-s8", "onnx-fp32"):  # the hash is checked before, so a forger would have changed both
        broken = dataclasses.replace(artifact.variants[variant], model=changed_artifact / "garbage.onnx")
        broken.model.write_bytes(b"garbage")
        forged = dataclasses.replace(artifact, variants={**artifact.variants, variant: broken})
        with pytest.raises(UserError, match="onnx cannot load"):
            measure_drift(forged, "onnx-int8-s8", images)
    with pytest.raises(UserError, match="onnx-int8-s8 cannot run"):
        measure_drift(artifact, "onnx-int8-s8", images[:, :, :16])

    with pytest.raises(UserError, match="No tensor of onnx-int8-u8 has a name of onnx-fp32's"):
        measure_drift(damage(changed_artifact, "onnx-int8-u8", rename), "onnx-int8-u8", images)


def test_ratios_by_hand() -> None:
    total = Sums()
    total.add(np.array([[1.1, 2.0]]), np.array([[1.0, 2.0]]))
    total.add(np.array([[0.0, 0.0]]), np.array([[0.0, 0.0]]))
    assert total.sqnr_db == pytest.approx(10 * math.log10(5 / 0.01))
    assert total.cosines == pytest.approx([5.1 / math.sqrt(5.21 * 5), 1])
    assert Sums().sqnr_db == math.inf
    silent = Sums()
    silent.add(np.array([1.0]), np.array([0.0]))
    assert (silent.sqnr_db, silent.cosines) == (-math.inf, [0])


def test_a_layer_s_own_part_is_what_falls_below_its_inputs() -> None:
    layers = [
        Layer("a", "Conv", "a", ("image",)),
        Layer("b", "Conv", "b", ("a",)),
        Layer("c", "Add", "", ("a", "b")),
    ]
    sums = []
    for noise in (1e-6, 1e-2, 2e-2):  # 60, 20 and 17 dB
        total = Sums()
        total.signal, total.noise, total.cosines = 1.0, noise, [1.0]
        sums.append(total)
    drifts = attribute(layers, sums)
    assert [drift.drop_db for drift in drifts] == pytest.approx([0, CLEAN_DB - 20, 10 * math.log10(2)])
    assert [drift.tensor for drift in biggest_drops(drifts)] == ["b", "c"]
    moved = attribute([layers[0], Layer("b", "Gather", "", ("a",))], sums[:2])
    assert (moved[1].drop_db, biggest_drops(moved)) == (pytest.approx(CLEAN_DB - 20), [])


def test_a_layer_has_the_name_of_its_module_by_weight_or_bias() -> None:
    """Of a transformer's matrix products the exporter turns the weights, which then have no name."""
    nodes = [
        helper.make_node("Conv", ["image", "stem.weight", "stem.bias"], ["maps"]),
        helper.make_node("Gemm", ["maps", "val_12", "blocks.0.attn.qkv.bias"], ["qkv"]),
        helper.make_node("Split", ["qkv"], ["q", "k"]),
        helper.make_node("Add", ["q", "pos_embed"], ["out"]),
    ]
    constants = ("stem.weight", "stem.bias", "val_12", "blocks.0.attn.qkv.bias", "pos_embed")
    tensors = [numpy_helper.from_array(np.zeros(1, np.float32), name) for name in constants]
    assert read_layers(helper.make_graph(nodes, "g", [], [], tensors)) == [
        Layer("maps", "Conv", "stem", ("image",)),
        Layer("qkv", "Gemm", "blocks.0.attn.qkv", ("maps",)),
        Layer("q", "Split", "", ("qkv",)),
        Layer("k", "Split", "", ("qkv",)),
        Layer("out", "Add", "", ("q",)),
    ]


def test_layers_that_a_variant_lacks_are_merged_into_the_next() -> None:
    layers = [
        Layer("a", "Conv", "a", ("image",)),
        Layer("b", "Relu", "", ("a",)),
        Layer("c", "Add", "", ("b", "image")),
        Layer("d", "Relu", "", ("c",)),
    ]
    assert merge_layers(layers, {"a", "b", "c", "d"}) == layers
    assert merge_layers(layers, {"b", "d"}) == [
        Layer("b", "Conv+Relu", "a", ("image",)),
        Layer("d", "Add+Relu", "", ("b", "image")),
    ]


def test_folded_activations_are_read_behind_the_quantization(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Abs", ["image"], ["relu"]),
        helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Neg", ["dq"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2])],
        [
            numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
            numpy_helper.from_array(np.array(0, np.uint8), "zero"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    tap = tap_onnx(tmp_path / "model.onnx", {"relu": "Relu", "out": "Neg", "gone": "Conv"})
    assert tap.sources == {"relu": "dq", "out": "out"}
    values = tap.open(["dq", "out"])(np.array([[0.6, -1.0]], np.float32))
    np.testing.assert_array_equal(np.concatenate(values), [[0.5, 1.0], [-0.5, -1.0]])
