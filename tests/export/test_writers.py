from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from midge.export.delivery import Delivery
from midge.export.prepare import prepare
from midge.export.smooth import smooth
from midge.export.writers import WRITERS, Source
from midge.runtime.preprocess import Preprocess

PX = 32


def test_the_dynamic_form_takes_smoothing_alone_from_the_static_ones(vit: onnx.ModelProto, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(16, 3, PX, PX)).astype(np.float32)
    int8, _ = prepare(vit, images, "mse")
    absent: Any = None
    source = Source(absent, absent, absent, vit, tmp_path / "x", images, int8, Delivery(Preprocess(PX, PX), {}))
    WRITERS["onnx-int8-dynamic"].write(source, tmp_path / "model.onnx")
    written, floats, static = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
        for graph in (onnx.load(tmp_path / "model.onnx"), smooth(vit, images), int8.graph)
    )
    patches = next(node for node in vit.graph.node if node.op_type == "Conv")
    kept = [name for name in floats if name in written and written[name].dtype == np.float32]
    assert patches.input[1] in kept
    assert all(np.array_equal(written[name], floats[name]) for name in kept)
    assert not all(np.array_equal(static[name], floats[name]) for name in kept)
