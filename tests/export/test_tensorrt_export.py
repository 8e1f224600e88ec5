from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from midge.export.config import ExportConfig, VerifyConfig
from midge.export.export import export_run
from midge.export.half_precision import float16_graph
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.prepare import prepare
from midge.export.tensorrt_export import check_build, note_builds, save_tensorrt
from midge.export.verify import verify
from midge.runtime.artifact import Artifact, Variant, load_artifact
from midge.runtime.backend import open_backend, predict
from midge.runtime.cuda_device import why_no_gpu
from midge.runtime.errors import UserError
from midge.runtime.golden import load_golden
from midge.runtime.parity import compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.tensorrt_build import read_recipe
from midge.runtime.torch_model import ModelSpec, build_model

PX = 32
VIT_ARGS = {"img_size": PX, "patch_size": 8, "depth": 2, "embed_dim": 48}
VIT = ModelSpec("vit_tiny_patch16_224", VIT_ARGS, 10, 48, (), Preprocess(PX, PX), PX)
VARIANTS = ("tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """TensorRT's variants alone, built as a check. Not to be written to."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("tensorrt") / "tiny"
    config = ExportConfig(run=run, out=out, targets=("tensorrt",), precision=("fp32", "fp16", "int8"))
    assert export_run(dataclasses.replace(config, calibration_images=8, check_build=True)) == 0
    return load_artifact(out)


def test_each_variant_is_a_graph_and_a_recipe_that_a_builder_takes_without_a_word(exported: Artifact) -> None:
    assert tuple(exported.variants) == ("torch-fp32", *VARIANTS)
    for name in VARIANTS:
        model = exported.variants[name].model
        files = exported.manifest["variants"][name]["files"]
        assert set(files) == {f"{name}/model.onnx", f"{name}/recipe.json"}
        recipe = read_recipe(model.with_name("recipe.json"))
        assert (recipe.precision, recipe.input_name) == (name.split("-")[1], "image")
        assert recipe.input_shape == (1, 3, PX, PX)
        checked = json.loads(model.with_name("recipe.json").read_text())["checked"]
        assert (checked["builds"], checked["messages"]) == (True, [])
        assert checked["by"].startswith("tensorrt_rtx ")


def test_the_graphs_hold_their_precision(exported: Artifact) -> None:
    types = {}
    for name in VARIANTS:
        graph = onnx.load(exported.variants[name].model).graph
        weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
        types[name] = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in weights}
        assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    assert types == {"tensorrt-fp32": {"FLOAT"}, "tensorrt-fp16": {"FLOAT16"}, "tensorrt-int8": {"INT8"}}


def test_the_graphs_compute_the_same_as_the_reference(exported: Artifact) -> None:
    """Through ONNX Runtime: a TensorRT needs a GPU to run."""
    golden = load_golden(exported.golden, exported.input_shape, exported.output_shape)
    least = {"tensorrt-fp32": 0.99999, "tensorrt-fp16": 0.9995, "tensorrt-int8": 0.98}
    for name in VARIANTS:
        variant = exported.variants[name]
        with open_backend(Variant(name.replace("tensorrt", "onnx"), variant.model, 1, "0" * 64, "")) as backend:
            outputs = predict(backend, golden.inputs)
        assert compare_outputs(outputs, golden.outputs).cosine_mean >= least[name]


@pytest.mark.skipif(why_no_gpu() is None, reason="there is a GPU")
def test_verify_skips_what_needs_a_gpu(exported: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(exported.path, json=True)) == 0
    out, err = capsys.readouterr()
    assert set(json.loads(out)["skipped"]) == set(VARIANTS)
    assert f"Skipped tensorrt-fp32: {why_no_gpu()}." in " ".join(err.split())


def test_a_transformer_builds_in_every_precision(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path / "model.onnx"
    graph = export_onnx(build_model(VIT).eval(), PX, "logits")
    save_onnx(graph, path)
    images = np.random.default_rng(0).normal(size=(2, 3, PX, PX)).astype(np.float32)
    int8 = prepare(graph, images, "mse")[0].quantize("onnx-int8-s8")
    graphs = {"fp32": graph, "fp16": float16_graph(path), "int8": int8}
    for precision, converted in graphs.items():
        save_tensorrt(converted, tmp_path / precision / "model.onnx", precision)
        verdict = check_build(tmp_path / precision / "model.onnx")
        assert (verdict.ok, verdict.messages) == (True, ())
        assert (verdict.engine_bytes or 0) > 10_000


def test_a_graph_that_tensorrt_refuses_is_noted(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dialect for CPUs has zero points."""
    pytest.importorskip("tensorrt_rtx")
    model = tmp_path / "tensorrt-int8" / "model.onnx"
    save_tensorrt(onnx.load(artifact.variants["onnx-int8-u8"].model), model, "int8")
    assert not note_builds(tmp_path, ["onnx-int8-u8", "tensorrt-int8"])
    checked = json.loads(model.with_name("recipe.json").read_text())["checked"]
    assert not checked["builds"]
    assert checked["messages"]
    assert "tensorrt-int8 is refused by tensorrt_rtx" in capsys.readouterr().err


def test_the_check_names_its_package(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match=r"'tensorrt_rtx' is not installed .*pip install 'midge\[tensorrt\]'"):
        export_run(ExportConfig(run=run, out=tmp_path / "out", targets=("tensorrt",), check_build=True))
    assert not list(tmp_path.iterdir())
