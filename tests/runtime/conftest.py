"""A network of two operators, and what damages a manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def small_onnx(tmp_path: Path) -> Path:
    """A convolution and a mean: ``image`` (1, 3, 8, 8) -> ``logits`` (1, 4)."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (tmp_path / "small.onnx").write_bytes(model.SerializeToString())
    return tmp_path / "small.onnx"


def change_field(folder: Path, path: str, value: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    node = manifest
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("|"))
    for key in parents:
        node = node[key]
    node[last] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def change() -> Callable[[Path, str, Any], None]:
    """:func:`change_field`: set one field of a folder's manifest, ``change(folder, "outputs|0|shape", [1, 3])``."""
    return change_field
