"""The forms in which a graph is handed over: 8-bit input, any batch, half precision, facts in the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from midge.export.config import ExportConfig, VerifyConfig
from midge.export.export import check_forms, export_run
from midge.export.verify import verify
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.backend import open_backend, predict
from midge.runtime.cpu_features import adds_in_16_bits
from midge.runtime.errors import UserError
from midge.runtime.images import list_images, load_image
from midge.runtime.parity import compare_outputs
from midge.runtime.torch_model import load_model

VARIANTS = (
    *("torch-fp32", "onnx-fp32", "onnx-fp16", "onnx-int8-u8", "onnx-int8-s8"),
    *("openvino-fp32", "openvino-fp16", "openvino-int8"),
)
PX = 32


@pytest.fixture(scope="module")
def forms(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The run's classifier with everything asked for. Not to be written to."""
    out = tmp_path_factory.mktemp("artifacts") / "forms"
    forms = {"precision": ("fp32", "fp16", "int8"), "dynamic_batch": True, "embed_preprocess": True, "opset": 21}
    assert export_run(ExportConfig(run, out=out, calibration_images=40, **forms)) == 0  # type: ignore[arg-type]
    return load_artifact(out)


def test_the_manifest_says_what_goes_in(forms: Artifact) -> None:
    assert tuple(forms.variants) == VARIANTS
    described = {"name": "image", "shape": [1, PX, PX, 3], "dtype": "uint8", "layout": "NHWC"}
    assert forms.manifest["input"] == described
    assert forms.preprocess.embedded
    assert [variant.dynamic_batch for variant in forms.variants.values()] == [False] + [True] * 7
    assert "cast" in forms.variants["onnx-fp16"].note
    assert forms.read_golden().inputs.dtype == np.uint8


@pytest.mark.parametrize("variant", VARIANTS)
def test_8_bit_images_give_what_normalized_ones_give(
    forms: Artifact, artifact: Artifact, images: Path, run: Path, variant: str
) -> None:
    import torch

    test = list_images(images / "test")
    decoded = [load_image(test.path(index)) for index in range(len(test))]
    with torch.inference_mode():
        floats = torch.from_numpy(np.stack([artifact.preprocess(image) for image in decoded]))
        expected = load_model(run, "classifier")[0](floats).numpy()
    crops = np.stack([forms.preprocess(image) for image in decoded])
    with open_backend(forms.variants[variant]) as backend:
        assert (backend.input_shape, backend.input_dtype) == ((1, PX, PX, 3), "uint8")
        outputs = predict(backend, crops)
        if backend.dynamic_batch:
            np.testing.assert_allclose(backend.run(crops), outputs, rtol=0.05, atol=0.05)
        share = backend.placement().share
    parity = compare_outputs(outputs, expected)
    if "int8" in variant:
        assert parity.cosine_mean > 0.99
        floats = variant == "onnx-int8-s8" or (variant == "openvino-int8" and adds_in_16_bits())
        assert share is not None and (share > 0.95 or floats)  # the first convolution too
    else:
        assert parity.cosine_min > (0.9995 if "fp16" in variant else 0.99999)
        assert (parity.max_abs_error or 0) > 1e-5 or "fp32" in variant  # it is really another arithmetic


def test_the_normalized_image_is_what_is_quantized(forms: Artifact) -> None:
    model = onnx.load(forms.variants["onnx-int8-u8"].model)
    assert [node.op_type for node in model.graph.node if node.name.startswith("preprocess_")] == [
        *("Cast", "Transpose", "Mul", "Add")
    ]
    (taker,) = (node for node in model.graph.node if "preprocess_image" in node.input)
    assert taker.op_type == "QuantizeLinear"


def test_half_precision_is_in_the_graph(forms: Artifact) -> None:
    model = onnx.load(forms.variants["onnx-fp16"].model)
    weights = [tensor for tensor in model.graph.initializer if not tensor.name.startswith("preprocess_")]
    floats = {tensor.data_type for tensor in weights} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    import openvino

    network = openvino.Core().read_model(forms.variants["openvino-fp16"].model)
    kinds = {node.get_element_type().get_type_name() for node in network.get_ops() if len(node.outputs()) == 1}
    assert "f16" in kinds
    for target, suffix in (("onnx", ".onnx"), ("openvino", ".bin")):
        paths = [forms.variants[f"{target}-{precision}"].model.with_suffix(suffix) for precision in ("fp16", "fp32")]
        half, single = (path.stat().st_size for path in paths)
        assert half < 0.55 * single


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_file_says_what_it_is(forms: Artifact, variant: str) -> None:
    path = forms.variants[variant].model
    if variant.startswith("onnx"):
        model = onnx.load(path)
        facts = {entry.key: entry.value for entry in model.metadata_props}
        assert [entry.version for entry in model.opset_import if not entry.domain] == [21]
        assert model.ir_version == 10
    else:
        import openvino

        known = openvino.Core().read_model(path).get_rt_info()["midge"]
        facts = {key: known[key].value for key in ("kind", "labels", "preprocess", "backbone", "midge")}
    assert facts["kind"] == "classifier"
    assert json.loads(facts["labels"]) == ["ant", "bee", "cat"]
    assert json.loads(facts["preprocess"]) == forms.manifest["preprocess"]
    assert (facts["backbone"], facts["midge"]) == ("resnet18", forms.manifest["origin"]["midge"])
    assert "/tmp" not in json.dumps(facts)


def test_verify_runs_batches_too(forms: Artifact, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(VerifyConfig(forms.path, data=images / "test", json=True)) == 0
    found = json.loads(capsys.readouterr().out)["variants"]
    assert all(("batch" in entry) == (name != "torch-fp32") for name, entry in found.items())
    assert {entry["batch"]["n"] for name, entry in found.items() if name != "torch-fp32"} == {3}
    assert found["onnx-fp32"]["data"]["cosine_min"] > 0.99999


def test_a_variant_that_takes_single_images_only(changed_artifact: Path) -> None:
    manifest = json.loads((changed_artifact / "manifest.json").read_text())
    manifest["variants"]["onnx-fp32"]["dynamic_batch"] = True
    (changed_artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="onnx-fp32 takes one image at a time, the manifest says any"):
        verify(VerifyConfig(changed_artifact))


def test_a_manifest_that_claims_8_bit_images(changed_artifact: Path) -> None:
    manifest: dict[str, Any] = json.loads((changed_artifact / "manifest.json").read_text())
    manifest["preprocess"]["embedded"] = True
    manifest["input"].update(shape=[1, PX, PX, 3], dtype="uint8", layout="NHWC")
    (changed_artifact / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"inputs.npy is float32 .*, not uint8"):
        verify(VerifyConfig(changed_artifact))


@pytest.mark.parametrize(
    ("changes", "flag"), [({"embed_preprocess": True}, "--embed-preprocess"), ({"kind": "features"}, "--kind features")]
)
def test_other_targets_have_no_such_form(changes: dict[str, Any], flag: str) -> None:
    config = ExportConfig(Path("run"), out=Path("out"), **changes)
    check_forms(config, ["onnx-fp32", "openvino-int8"])
    with pytest.raises(UserError, match=f"{flag} is for onnx and openvino, not coreml-fp16"):
        check_forms(config, ["onnx-fp32", "coreml-fp16"])
