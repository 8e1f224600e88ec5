from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midge.runtime.artifact import load_artifact, variant_runtime, write_manifest
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.golden import write_golden
from midge.runtime.preprocess import Preprocess


def write_features(folder: Path, **changes: Any) -> None:
    """An artifact that takes 8-bit images and gives two maps."""
    (folder / "onnx-fp32").mkdir(parents=True)
    (folder / "onnx-fp32/model.onnx").write_bytes(b"graph")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    write_golden(folder / "golden.npz", images, rng.normal(size=(5, 4, 2, 2)), rng.normal(size=(5, 6, 1, 1)))
    fields: dict[str, Any] = {
        "name": "maps",
        "kind": "features",
        "input_shape": (1, 8, 8, 3),
        "outputs": {"stride4": (1, 4, 2, 2), "stride8": (1, 6, 1, 1)},
        "preprocess": Preprocess(8, 8, embedded=True),
        "labels": [],
        "models": {"onnx-fp32": "onnx-fp32/model.onnx"},
        "notes": {},
        "origin": {},
        "tools": {},
        "dynamic_batch": ["onnx-fp32"],
    }
    write_manifest(folder, **{**fields, **changes})


def test_several_outputs_and_8_bit_images(tmp_path: Path) -> None:
    write_features(tmp_path)
    artifact = load_artifact(tmp_path)
    assert (artifact.input_shape, artifact.input_dtype) == ((1, 8, 8, 3), "uint8")
    assert list(artifact.outputs.items()) == [("stride4", (1, 4, 2, 2)), ("stride8", (1, 6, 1, 1))]
    assert (artifact.output_name, artifact.output_shape) == ("stride4", (1, 4, 2, 2))
    assert artifact.variants["onnx-fp32"].dynamic_batch
    golden = artifact.read_golden()
    assert (golden.inputs.dtype, golden.outputs.shape) == (np.uint8, (5, 4, 2, 2))
    assert [output.shape for output in golden.more] == [(5, 6, 1, 1)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": ["a"] * 4}, "one name for each of the 0 outputs, or empty"),
        ({"outputs": {"stride4": (1, 4, 2, 2)}}, "holds .*outputs_1.npy.*, not the arrays inputs and outputs"),
        ({"outputs": {"a": (1, 4, 2, 2), "b": (1, 6, 1, 2)}}, r"gives \(N, 4, 2, 2\) and \(N, 6, 1, 2\)"),
        ({"outputs": {"a": (1, 4, 2, 2), "b": (2, 6, 1, 1)}}, r"outputs 1 has 'shape': \[2, 6, 1, 1\]"),
        ({"preprocess": Preprocess(8, 8)}, r"'input': \[1, 8, 8, 3\]"),
        ({"kind": "embedding"}, "one output, as the kind is embedding"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        write_features(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_an_output_name_that_comes_twice(tmp_path: Path, change: Callable[[Path, str, Any], None]) -> None:
    write_features(tmp_path)
    change(tmp_path, "outputs|1|name", "stride4")
    with pytest.raises(UserError, match="of different names"):
        load_artifact(tmp_path)


def test_a_golden_pack_of_other_numbers_than_the_input(tmp_path: Path) -> None:
    write_features(tmp_path)
    arrays = [np.zeros((5, 8, 8, 3), np.float32), np.zeros((5, 4, 2, 2)), np.zeros((5, 6, 1, 1))]
    write_golden(tmp_path / "golden.npz", *arrays)
    with pytest.raises(UserError, match=r"inputs.npy is float32 .*, not uint8 in C order"):
        write_manifest_again(tmp_path)


def write_manifest_again(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    golden = folder / "golden.npz"
    manifest["golden"] = {"path": "golden.npz", "sha256": sha256_file(golden), "size_bytes": golden.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_artifact(folder)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it does not exist\. Give the folder that 'midge export' wrote"):
        load_artifact(tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="it is a file"):
        load_artifact(tmp_path / "file")
    with pytest.raises(UserError, match="No manifest at"):
        load_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("1" * 5000)
    with pytest.raises(UserError, match="is not valid JSON"):
        load_artifact(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not valid JSON"):
        load_artifact(tmp_path)


def test_variant_runtime() -> None:
    assert [variant_runtime(name) for name in ("torch-fp32", "onnx-int8-u8", "openvino-int8")] == [
        "torch",
        "onnxruntime",
        "openvino",
    ]
    with pytest.raises(
        UserError, match="Unknown target 'tflite': choose one of coreml, onnx, openvino, tensorrt, torch"
    ):
        variant_runtime("tflite-fp16")
