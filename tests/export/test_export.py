from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from midge.__main__ import main
from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.backend import open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.golden import load_golden
from midge.runtime.images import content_hash, list_images, load_image
from midge.runtime.parity import compare_outputs
from midge.runtime.torch_model import load_model

VARIANTS = ("torch-fp32", "onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "openvino-fp32", "openvino-int8")
PX = 32


def files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(paths)}


def export(run: Path, out: Path, **changes: Any) -> Path:
    assert export_run(ExportConfig(run=run, out=out, **{"calibration_images": 8, **changes})) == 0
    return out


def test_the_artifact_describes_the_run(artifact: Artifact, run: Path, images: Path) -> None:
    assert tuple(artifact.variants) == VARIANTS
    assert (artifact.name, artifact.kind, artifact.labels) == ("tiny", "classifier", ("ant", "bee", "cat"))
    assert (artifact.input_name, artifact.input_shape) == ("image", (1, 3, PX, PX))
    assert (artifact.output_name, artifact.output_shape) == ("logits", (1, 3))
    origin = artifact.manifest["origin"]
    assert (origin["run"], origin["exported"], origin["data_fingerprint"]) == ("run", "classifier", "f" * 64)
    assert origin["config_sha256"] == sha256_file(run / "config.json")
    assert {"torch", "onnx", "onnxruntime", "openvino"} <= artifact.manifest["tools"].keys()
    assert str(images) not in json.dumps(artifact.manifest)
    assert "TensorRT" in artifact.variants["onnx-int8-s8"].note


def test_the_reference_is_the_run_s_classifier(artifact: Artifact, run: Path) -> None:
    model = artifact.variants["torch-fp32"].model
    assert sha256_file(model) == sha256_file(run / "classifier.safetensors")
    assert load_model(model.parent, "model")[1] == load_model(run, "classifier")[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees_with_torch_on_the_test_images(
    artifact: Artifact, images: Path, run: Path, variant: str
) -> None:
    import torch

    test = list_images(images / "test")
    inputs = np.stack([artifact.preprocess(load_image(test.path(index))) for index in range(len(test))])
    with torch.inference_mode():
        expected = load_model(run, "classifier")[0](torch.from_numpy(inputs)).numpy()
    with open_backend(artifact.variants[variant]) as backend:
        outputs = predict(backend, inputs)
    assert test.labels is not None
    assert (expected.argmax(axis=1) == test.labels).mean() > 0.9  # the network has learned something
    parity = compare_outputs(outputs, expected)
    if "int8" in variant:
        assert parity.cosine_mean > 0.99
        assert parity.top1_agreement >= 0.9
        assert (parity.max_abs_error or 0) > 1e-3  # it is really another arithmetic
    else:
        assert parity.cosine_min > 0.9999
        assert parity.top1_agreement >= 0.999


def test_golden_and_calibration_images_are_training_images(
    artifact: Artifact, artifact_path: Path, images: Path
) -> None:
    golden = load_golden(artifact.golden, artifact.input_shape, artifact.output_shape)
    calibration = json.loads((artifact_path / "calibration.json").read_text())
    test = {content_hash(path) for path in (images / "test").rglob("*.png")}
    listed = [*calibration["images"], *artifact.manifest["origin"]["golden_images"]]
    assert len(calibration["images"]) == 40
    assert len(golden.inputs) == len(listed) - 40 == 50  # of the 90
    assert len({image["sha256"] for image in listed}) == len(listed)
    for image in listed:
        assert content_hash(images / "train" / image["path"]) == image["sha256"]
        assert image["sha256"] not in test
    first = artifact.manifest["origin"]["golden_images"][0]
    np.testing.assert_array_equal(golden.inputs[0], artifact.preprocess(load_image(images / "train" / first["path"])))
    assert (calibration["evaluation_images"], calibration["seed"]) == (30, 0)
    assert calibration["tools"] == artifact.manifest["tools"]
    assert calibration["schema"] == 2


def test_golden_outputs_are_the_reference_s(artifact: Artifact) -> None:
    golden = load_golden(artifact.golden, artifact.input_shape, artifact.output_shape)
    with open_backend(artifact.variants["torch-fp32"]) as backend:
        np.testing.assert_array_equal(predict(backend, golden.inputs), golden.outputs)


def test_equal_runs_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    one, two = (export(run, tmp_path / name, name="same", calibration_images=4) for name in ("one", "two"))
    assert files(one) == files(two)
    assert len(files(one)) >= 11


def test_a_run_without_a_classifier_gives_features(run: Path, images: Path, tmp_path: Path) -> None:
    backbone_run = tmp_path / "backbone-run"
    shutil.copytree(run, backbone_run, ignore=shutil.ignore_patterns("classifier*"))
    out = export(backbone_run, tmp_path / "embedding", targets=("onnx",), precision=("fp32",), data=images / "train")
    artifact = load_artifact(out)
    assert (artifact.kind, artifact.output_name, artifact.output_shape) == ("embedding", "features", (1, 32))
    assert (artifact.labels, tuple(artifact.variants)) == ((), ("torch-fp32", "onnx-fp32"))
    assert artifact.manifest["calibration"] is None
    assert not (out / "calibration.json").exists()


def test_int8_of_one_target_alone(run: Path, tmp_path: Path) -> None:
    artifact = load_artifact(export(run, tmp_path / "x", targets=("openvino",), precision=("int8",)))
    assert tuple(artifact.variants) == ("torch-fp32", "openvino-int8")
    assert json.loads((artifact.path / "calibration.json").read_text())["ranges"]["tensors"]


def test_layers_are_left_in_float_where_asked(run: Path, tmp_path: Path) -> None:
    names = ("node_conv2d", "node_conv2d_1")
    out = export(run, tmp_path / "out", float_layers=names)
    assert json.loads((out / "calibration.json").read_text())["float_nodes"] == list(names)
    for variant in ("onnx-int8-u8", "onnx-int8-s8"):
        graph = onnx.load(load_artifact(out).variants[variant].model).graph
        stored = {tensor.name for tensor in graph.initializer}
        assert {node.name for node in graph.node if node.op_type == "Conv" and node.input[1] in stored} == {*names}


def test_what_is_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(run, tmp_path / "one", targets=("onnx",))
    printed = capsys.readouterr().out
    for variant in VARIANTS[:4]:
        assert f"{tmp_path}/one/{variant}/model." in printed
    assert "calibrated on 8 images, none of which is among the 30 evaluation images" in printed
    export(run, tmp_path / "two", targets=("onnx",), json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["kind"], result["calibration_images"]) == ("two", "classifier", 8)
    assert set(result["variants"]) == set(VARIANTS[:4])
    assert {"images", "onnx", "calibration", "golden", *VARIANTS[:4]} == set(result["seconds"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "../up"}, r"The name '\.\./up' cannot be an artifact's"),
        ({"name": "x" * 101}, "cannot be an artifact's"),
        ({"calibration_images": 0}, "--calibration-images is 0: give a value from 1"),
        ({"targets": ("ort8",)}, "Unknown target 'ort8'"),
        (
            {"float_layers": ("conv1",)},
            "The network has no layer 'conv1' to leave in float: give names as midge quantize",
        ),
        ({"data": Path("nowhere")}, "No folder at 'nowhere'"),
        ({"evaluation_data": Path("nowhere")}, "No folder at 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(run: Path, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        export(run, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither classifier"):
        export(tmp_path, tmp_path / "out")


def test_a_taken_folder_is_refused_at_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="exists already"):
        export(run / "nowhere", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("package", "extra"), [("openvino", "openvino"), ("onnxslim", "export"), ("timm", "train")])
def test_a_missing_package_is_named_before_any_work(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"'{package}' is not installed .*pip install 'midge\[{extra}\]'"):
        export(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_onnx_needs_no_openvino(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "onnx-fp32" in load_artifact(export(run, tmp_path / "x", targets=("onnx",), precision=("fp32",))).variants


def test_a_full_disk_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # the networks fit, the golden pack does not
    try:
        arguments = ["--targets", "onnx", "--precision", "fp32", "--out", str(tmp_path / "out")]
        assert main(["export", str(run), *arguments]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("midge: error: ") and "File too large" in error
    assert not list(tmp_path.iterdir())


def test_a_network_of_numbers_that_are_not_finite(run: Path, images: Path, tmp_path: Path) -> None:
    from midge.runtime.torch_model import save_model

    model, spec = load_model(run, "classifier")
    model.get_parameter("fc.bias").data[0] = float("nan")
    save_model(tmp_path / "run", "classifier", model, dataclasses.replace(spec))
    with pytest.raises(UserError, match="gives numbers that are not finite"):
        export(tmp_path / "run", tmp_path / "out", data=images / "train", targets=("onnx",), precision=("fp32",))
    assert not (tmp_path / "out").exists()


def test_the_command_line_is_quiet_on_stderr(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "midge", "export", run, "--out", tmp_path / "out", "--calibration-images", "4"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    expected = (
        "Passed over",
        "Calibrating",
        "Reading",
        "Left out onnx-int8-dynamic: it is for networks with attention",
    )
    assert [line for line in done.stderr.splitlines() if not line.startswith(expected)] == []
    assert done.stdout.startswith("variant")
