"""Feature maps of several strides, against timm's own ``features_only``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from midge.export.config import ExportConfig, VerifyConfig
from midge.export.export import export_run
from midge.export.subject import check_subject, load_subject
from midge.export.verify import verify
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.backend import open_backend, predict_all
from midge.runtime.errors import UserError
from midge.runtime.feature_maps import take_feature_maps
from midge.runtime.parity import compare_outputs

CHANNELS = (8, 16, 24, 32)
OUTPUTS = {"stride8": (1, 16, 4, 4), "stride16": (1, 24, 2, 2), "stride32": (1, 32, 1, 1)}


@pytest.fixture(scope="module")
def maps(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The maps of the run's backbone, in FP32 and INT8. Not to be written to."""
    out = tmp_path_factory.mktemp("artifacts") / "maps"
    assert export_run(ExportConfig(run, out=out, kind="features", calibration_images=40)) == 0
    return load_artifact(out)


def sorted_like(own: dict[str, Any], state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the names of a ``features_only`` network, which writes an underscore for some dots."""
    plain = {name.replace(".", "_"): tensor for name, tensor in state.items()}
    return {name: plain[name.removeprefix("model.").replace(".", "_")] for name in own}


@pytest.mark.parametrize(
    ("name", "strides"),
    [("test_resnet", (2, 8, 32)), ("test_efficientnet", (4, 16)), ("test_convnext", (8, 16, 32)), ("test_vit", (16,))],
)
def test_maps_are_those_of_features_only(name: str, strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval()
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    info: Any = network.feature_info
    reductions = info.reduction() if hasattr(info, "reduction") else [entry["reduction"] for entry in info]
    places = [len(reductions) - 1 - reductions[::-1].index(stride) for stride in strides]
    oracle: Any = timm.create_model(name, features_only=True, out_indices=places).eval()
    oracle.load_state_dict(sorted_like(oracle.state_dict(), state))
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        given, expected = take_feature_maps(network, strides)(images), oracle(images)
    assert [tuple(output.shape[2:]) for output in given] == [(160 // stride,) * 2 for stride in strides]
    for output, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(output, wanted)


def test_the_manifest_has_every_map(maps: Artifact) -> None:
    assert (maps.kind, maps.outputs, maps.labels) == ("features", OUTPUTS, ())
    assert "fc.weight" not in load_file(maps.variants["torch-fp32"].model)


@pytest.mark.parametrize("variant", ["torch-fp32", "onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "openvino-int8"])
def test_every_variant_gives_the_maps_of_timm(maps: Artifact, run: Path, variant: str) -> None:
    network: Any = timm.create_model("resnet18", features_only=True, out_indices=(2, 3, 4), channels=CHANNELS).eval()
    network.load_state_dict(sorted_like(network.state_dict(), load_file(run / "backbone.safetensors")))
    inputs = maps.read_golden().inputs
    with torch.inference_mode():
        expected = [output.numpy() for output in network(torch.from_numpy(inputs))]
    with open_backend(maps.variants[variant]) as backend:
        outputs = predict_all(backend, inputs)
        np.testing.assert_array_equal(backend.run(inputs[:1]), outputs[0][:1])
    for given, wanted, shape in zip(outputs, expected, OUTPUTS.values(), strict=True):
        assert given.shape[1:] == shape[1:]
        parity = compare_outputs(given.reshape(len(given), -1), wanted.reshape(len(wanted), -1))
        assert parity.cosine_min > 0.99999 if "fp32" in variant else parity.cosine_mean > 0.98


def test_verify_compares_every_map(maps: Artifact, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(maps.path, data=images / "test", limit=4, int8_min_cosine=0.98)) == 0
    printed = capsys.readouterr().out
    assert all(f"onnx-int8-u8 {output}" in printed for output in OUTPUTS)
    assert verify(VerifyConfig(maps.path, variants=("onnx-int8-u8",), int8_min_cosine=1, json=True)) == 1
    entry = json.loads(capsys.readouterr().out)["variants"]["onnx-int8-u8"]
    assert set(entry["golden"]) == set(OUTPUTS)
    assert entry["missed"][0].startswith("golden, stride8: mean cosine")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strides": (8, 64)}, "has no feature map of stride 64: choose of --strides 2 4 8 16 32"),
        ({"kind": None, "strides": (8,)}, "--strides goes with --kind features"),
        ({"kind": "embedding", "strides": (8,)}, "--strides goes with --kind features"),
    ],
)
def test_mistakes_are_one_line(run: Path, changes: dict[str, Any], says: str) -> None:
    config = ExportConfig(run, out=Path("out"), **{"kind": "features", **changes})
    with pytest.raises(UserError, match=says):
        check_subject(config)
        load_subject(config)


def test_weights_of_elsewhere_give_maps_without_their_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_efficientnet", num_classes=5).eval()
    save_file(dict(network.state_dict()), tmp_path / "w.safetensors")
    given: Any = {"weights": tmp_path / "w.safetensors", "backbone": "test_efficientnet", "data": Path("data")}
    config = ExportConfig(out=Path("out"), kind="features", strides=(16,), image_px=64, **given)
    check_subject(config)
    subject = load_subject(config)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        (expected,) = network.forward_intermediates(images, indices=[3], intermediates_only=True)  # type: ignore[operator]
        torch.testing.assert_close(subject.model(images)[0], expected)
    assert (subject.kind, subject.outputs) == ("features", ("stride16",))
