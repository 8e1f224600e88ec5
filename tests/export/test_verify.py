from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from midge.__main__ import main
from midge.export.config import VerifyConfig
from midge.export.verify import verify
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file

VARIANTS = ("torch-fp32", "onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "openvino-fp32", "openvino-int8")


def rewrite(folder: Path, relative: str, change: Callable[[onnx.ModelProto], Any]) -> None:
    """Change an ONNX file and say so in the manifest, as a forger would."""
    model = onnx.load(folder / relative)
    change(model)
    (folder / relative).write_bytes(model.SerializeToString())
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["variants"][relative.split("/")[0]]["files"][relative]
    entry.update(size_bytes=(folder / relative).stat().st_size, sha256=sha256_file(folder / relative))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("openvino_integers")
def test_every_variant_passes(artifact_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(artifact_path, data=images / "test", json=True)) == 0
    found = result(capsys)
    assert (found["ok"], found["skipped"], tuple(found["variants"])) == (True, {}, VARIANTS)
    for name, entry in found["variants"].items():
        assert entry["missed"] == []
        assert entry["golden"]["n"] == 50
        assert ("data" in entry) == (name != "torch-fp32")
        assert entry.get("data", {"n": 30})["n"] == 30
    assert found["variants"]["torch-fp32"]["golden"]["max_abs_error"] == 0
    assert 0 < found["variants"]["onnx-fp32"]["data"]["max_abs_error"] < 1e-4
    shares = {name: entry["int8_mac_share"] for name, entry in found["variants"].items()}
    assert shares["onnx-int8-u8"] >= 0.95
    assert shares["openvino-int8"] >= 0.95
    assert [shares[name] for name in VARIANTS if name.endswith("fp32")] == [0, 0, 0]


def test_the_table_names_every_variant(artifact_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifact_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny (classifier) against torch-fp32"
    assert [line.split()[0] for line in lines[2:]] == list(VARIANTS)
    assert all(line.split()[-1] == "yes" for line in lines[2:])
    assert max(map(len, lines)) <= 110


def test_some_variants(artifact_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference runs for --data although it was not asked for."""
    config = VerifyConfig(artifact_path, data=images / "test", limit=4, variants=("onnx-fp32",), json=True)
    assert verify(config) == 0
    found = result(capsys)["variants"]
    assert set(found) == {"onnx-fp32"}
    assert found["onnx-fp32"]["data"]["n"] == 4
    with pytest.raises(UserError, match="Unknown variant 'onnx-fp16': choose one of onnx-fp32"):
        verify(VerifyConfig(artifact_path, variants=("onnx-fp16",)))


def shift_the_first_logit(model: onnx.ModelProto) -> None:
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
    bias.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.array([50, 0, 0], np.float32), "fc.bias")
    )


def test_a_changed_network_misses_the_thresholds(changed_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(changed_artifact, "onnx-fp32/model.onnx", shift_the_first_logit)
    assert verify(VerifyConfig(changed_artifact)) == 1
    printed = capsys.readouterr().out
    assert "onnx-fp32, golden: smallest cosine" in printed
    assert "onnx-fp32, golden: top-1 agreement" in printed
    assert [line.split()[-1] for line in printed.splitlines()[2:8]] == ["yes", "no", "yes", "yes", "yes", "yes"]
    assert verify(VerifyConfig(changed_artifact, min_cosine=-1, min_agreement=0)) == 0


def test_outputs_that_are_not_finite(changed_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "fc.bias")
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), "fc.bias"))

    rewrite(changed_artifact, "onnx-fp32/model.onnx", spoil)
    assert verify(VerifyConfig(changed_artifact, variants=("onnx-fp32",), json=True)) == 1
    golden = result(capsys)["variants"]["onnx-fp32"]["golden"]
    assert (golden["cosine_min"], golden["max_abs_error"], golden["top1_agreement"]) == (-1, None, 0)


def test_a_device_and_a_cache_reach_the_runtimes(artifact_path: Path, tmp_path: Path) -> None:
    assert main(["verify", str(artifact_path), "--variants", "openvino-fp32", "--cache", str(tmp_path / "cache")]) == 0
    assert list((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match=r"Unknown OpenVINO device 'NPU\.9': choose one of CPU"):
        verify(VerifyConfig(artifact_path, variants=("openvino-fp32",), device="NPU.9"))


def test_a_changed_file_is_found(changed_artifact: Path) -> None:
    path = changed_artifact / "openvino-fp32" / "model.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"openvino-fp32/model\.bin' was changed"):
        verify(VerifyConfig(changed_artifact))


def test_a_network_of_another_shape_is_refused(changed_artifact: Path) -> None:
    def cut(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name in {"fc.weight", "fc.bias"}:
                tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)[:2], tensor.name))
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2

    def shrink(model: onnx.ModelProto) -> None:
        for side in (2, 3):
            model.graph.input[0].type.tensor_type.shape.dim[side].dim_value = 16
        del model.graph.value_info[:]

    shutil.copytree(changed_artifact, changed_artifact.with_name("second"))
    rewrite(changed_artifact, "onnx-fp32/model.onnx", cut)
    with pytest.raises(UserError, match=r"onnx-fp32 gives \(1, 2\) float32, the manifest says \(1, 3\) float32"):
        verify(VerifyConfig(changed_artifact))
    second = changed_artifact.with_name("second")
    rewrite(second, "onnx-fp32/model.onnx", shrink)
    with pytest.raises(UserError, match=r"onnx-fp32 takes \(1, 3, 16, 16\), the manifest says \(1, 3, 32, 32\)"):
        verify(VerifyConfig(second))


def test_runtimes_that_are_not_installed_are_skipped(
    artifact_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert verify(VerifyConfig(artifact_path, data=images / "test", json=True)) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert set(found["variants"]) == {"onnx-fp32", "onnx-int8-u8", "onnx-int8-s8"}
    assert found["skipped"]["torch-fp32"] == "timm is not installed"
    assert "Skipped openvino-int8: openvino is not installed." in err
    assert "The images of --data are not looked at: timm is not installed" in err
    assert all("data" not in entry for entry in found["variants"].values())


def test_no_variant_can_run(artifact_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"No variant of .* can run here: openvino is not installed"):
        verify(VerifyConfig(artifact_path, variants=("openvino-fp32", "openvino-int8")))


def test_a_variant_of_an_unknown_target_is_skipped(changed_artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((changed_artifact / "manifest.json").read_text())
    manifest["variants"]["tflite-int8"] = manifest["variants"]["onnx-fp32"]
    (changed_artifact / "manifest.json").write_text(json.dumps(manifest))
    assert verify(VerifyConfig(changed_artifact, json=True)) == 0
    assert result(capsys)["skipped"] == {"tflite-int8": "this midge knows no runtime for it"}


def test_the_base_install_is_enough(artifact_path: Path) -> None:
    blocked = ("torch", "timm", "safetensors", "onnx", "onnxscript", "onnxslim", "openvino", "nncf", "torchvision")
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from pathlib import Path\nfrom midge.export.config import VerifyConfig\n"
        f"from midge.export.verify import verify\nsys.exit(verify(VerifyConfig(Path({str(artifact_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert names == ["onnx-fp32", "onnx-int8-u8", "onnx-int8-s8"]
