from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from midge.runtime.artifact import Artifact, load_artifact, write_manifest
from midge.runtime.errors import UserError
from midge.runtime.golden import load_golden, write_golden
from midge.runtime.preprocess import Preprocess

Change = Callable[[Path, str, Any], None]


def write_artifact(folder: Path) -> None:
    for variant in ("onnx-fp32", "torch-fp32"):
        (folder / variant).mkdir(parents=True)
    (folder / "onnx-fp32/model.onnx").write_bytes(b"graph")
    (folder / "torch-fp32/model.safetensors").write_bytes(b"weights")
    (folder / "torch-fp32/model.json").write_bytes(b"{}")
    (folder / "calibration.json").write_text("{}")
    rng = np.random.default_rng(0)
    write_golden(folder / "golden.npz", rng.normal(size=(5, 3, 8, 8)), rng.normal(size=(5, 2)))
    write_manifest(
        folder,
        name="tiny",
        kind="classifier",
        input_shape=(1, 3, 8, 8),
        outputs={"logits": (1, 2)},
        preprocess=Preprocess(8, 8),
        labels=["a", "b"],
        models={"onnx-fp32": "onnx-fp32/model.onnx", "torch-fp32": "torch-fp32/model.safetensors"},
        notes={"onnx-fp32": "as exported"},
        origin={"run": "r"},
        tools={"torch": "2"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_artifact(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_what_was_written_is_read(folder: Path) -> None:
    artifact = load_artifact(folder)
    assert artifact.input_shape == (1, 3, 8, 8)
    assert artifact.output_shape == (1, 2)
    assert artifact.labels == ("a", "b")
    assert artifact.preprocess == Preprocess(8, 8)
    assert sorted(artifact.variants) == ["onnx-fp32", "torch-fp32"]
    variant = artifact.variants["torch-fp32"]
    assert variant.model == folder / "torch-fp32/model.safetensors"
    assert variant.size_bytes == len(b"weights") + len(b"{}")
    assert artifact.variants["onnx-fp32"].note == "as exported"
    golden = load_golden(artifact.golden, artifact.input_shape, artifact.output_shape)
    assert golden.inputs.shape == (5, 3, 8, 8)
    assert golden.outputs.dtype == np.float32


def test_equal_folders_give_equal_manifests(folder: Path, tmp_path: Path) -> None:
    write_artifact(tmp_path / "again")
    assert (tmp_path / "again/manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_variant_hash_covers_each_file(folder: Path, tmp_path: Path, change: Change) -> None:
    before = load_artifact(folder).variants["torch-fp32"].sha256
    shutil.rmtree(folder / "onnx-fp32")
    assert len(before) == 64
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["variants"]["onnx-fp32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_artifact(folder).variants["torch-fp32"].sha256 == before
    (folder / "torch-fp32/model.json").write_bytes(b"[]")
    import hashlib

    change(folder, "variants|torch-fp32|files|torch-fp32/model.json|sha256", hashlib.sha256(b"[]").hexdigest())
    assert load_artifact(folder).variants["torch-fp32"].sha256 != before


FILES = [
    "onnx-fp32/model.onnx",
    "torch-fp32/model.safetensors",
    "torch-fp32/model.json",
    "calibration.json",
    "golden.npz",
]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_names_the_file(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=f"'{folder / name}' was changed"):
        load_artifact(folder)


@pytest.mark.parametrize("name", FILES)
def test_size_is_checked_and_missing_files_named(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=f"'{folder / name}' has .* bytes, its manifest says"):
        load_artifact(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"'{folder / name}' is missing"):
        load_artifact(folder)


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "/etc/hostname",
        "torch-fp32/../../outside",
        "",
        ".",
        "a//b",
        "C:\\x",
        "a\\b",
        "a\0b",
        "a\nb",
        "\ud800",
        "x" * 501,
    ],
)
def test_paths_that_leave_the_folder(folder: Path, path: str, change: Change) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    change(folder, "golden|path", path)
    with pytest.raises(UserError, match="must be a plain one inside the folder"):
        load_artifact(folder)
    entry = {"sha256": "0" * 64, "size_bytes": 1}
    change(folder, "variants|onnx-fp32", {"model": path, "files": {path: entry}, "note": ""})
    with pytest.raises(UserError, match="must be a plain one inside the folder") as caught:
        load_artifact(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("linked", ["onnx-fp32/model.onnx", "onnx-fp32"])
def test_links_are_refused(folder: Path, linked: str) -> None:
    moved = folder.parent / "moved"
    (folder / linked).rename(moved)
    (folder / linked).symlink_to(moved)
    with pytest.raises(UserError, match="is reached through a link"):
        load_artifact(folder)


def test_artifact_reached_through_a_link_is_fine(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert load_artifact(link).name == "tiny"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 3, "has schema 3, this midge reads up to 2: install a newer midge"),
        ("name", "../up", "has 'name': '../up', which must be letters"),
        ("kind", "detector", "one of classifier, embedding, features"),
        ("input|shape", [1, 3, 8, 9], "'input'"),
        ("input|shape", [1, 3, 9, 9], r"\[batch, 3, 8, 8\]"),
        ("input|shape", [1, 3, 8], "4 integers"),
        ("input|dtype", "float64", "one of float32"),
        ("input|layout", "NHWC", "one of NCHW"),
        ("preprocess|embedded", 1, "'embedded': 1, which must be true or false"),
        ("preprocess|embedded", True, r"\[batch, 8, 8, 3\]"),
        ("outputs|0|shape", [2, 2], "batch is 1"),
        ("outputs|0|shape", [1, 2, 1, 1], "a list of 2 integers"),
        ("outputs|0|name", "a\x1b[2Jb", "printable text"),
        ("outputs|0|shape", [1, 3], "one name for each of the 3 outputs"),
        ("outputs", [], "a list of 1 to 16 JSON objects"),
        ("outputs", [{"name": "a", "shape": [1, 2]}] * 2, "one output, as the kind is classifier"),
        ("outputs", [5], "outputs 0 must be a JSON object"),
        ("kind", "features", "a list of 4 integers"),
        ("variants|onnx-fp32|dynamic_batch", "yes", "'dynamic_batch': 'yes', which must be true or false"),
        ("labels", ["a"], "one name for each of the 2 outputs"),
        ("variants", {}, "holds 0 variants"),
        ("variants|onnx", {}, "has the name 'onnx'"),
        ("variants|onnx-fp32|model", "torch-fp32/model.json", "one of its files"),
        ("variants|onnx-fp32|files|onnx-fp32/model.onnx|size_bytes", -1, "an integer in 0"),
        ("golden|sha256", "A" * 64, "64 lower-case hexadecimal digits"),
        ("calibration", 5, "'calibration': 5"),
        ("origin", None, "'origin': None"),
    ],
)
def test_each_field_is_checked(folder: Path, path: str, value: Any, message: str, change: Change) -> None:
    change(folder, path, value)
    with pytest.raises(UserError, match=message) as caught:
        load_artifact(folder)
    assert "\n" not in str(caught.value)


def test_schema_1_had_one_output(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["schema"] = 1
    (manifest["output"],) = manifest.pop("outputs")
    del manifest["input"]["layout"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert load_artifact(folder).outputs == {"logits": (1, 2)}


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from nodes(item, (*path, key))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["../x", "golden.npz", "onnx-fp32/model.onnx", "0" * 64, "bicubic"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_manifests_load_or_raise_a_user_error(folder: Path, data: st.DataObject) -> None:
    original = (folder / "manifest.json").read_text()
    manifest = json.loads(original)
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        *parents, last = data.draw(st.sampled_from(list(nodes(manifest))), label="node")
        node = manifest
        for key in parents:
            node = node[key]
        action = data.draw(st.sampled_from(["delete", "replace", "rename"]), label="action")
        value = copy.deepcopy(node[last])
        if action == "replace":
            node[last] = data.draw(anything, label="value")
            continue
        del node[last]
        if action == "rename" and isinstance(node, dict):
            node[data.draw(st.text(max_size=20), label="key")] = value
        if not manifest:
            break
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        assert isinstance(load_artifact(folder), Artifact)
    except UserError as error:
        assert "\n" not in str(error).replace(str(folder), "")
    finally:
        (folder / "manifest.json").write_text(original)
