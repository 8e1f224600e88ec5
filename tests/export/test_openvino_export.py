from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from midge.export.delivery import Delivery
from midge.export.onnx_export import save_onnx
from midge.export.openvino_export import save_openvino
from midge.export.prepare import Prepared
from midge.export.ranges import measure_ranges
from midge.export.writers import WRITERS, Source
from midge.runtime.artifact import Artifact
from midge.runtime.backend import predict
from midge.runtime.errors import UserError
from midge.runtime.openvino_backend import OpenVinoBackend
from midge.runtime.torch_model import load_model


def weights(path: Path) -> list[str]:
    """Element types of the constants of rank 2 or more."""
    import openvino

    model = openvino.Core().read_model(path)
    constants = [node for node in model.get_ordered_ops() if node.get_type_name() == "Constant"]
    return [node.get_element_type().get_type_name() for node in constants if len(node.get_output_shape(0)) > 1]


def test_weights_stay_float32(artifact: Artifact) -> None:
    types = weights(artifact.variants["openvino-fp32"].model)
    assert len(types) > 20
    assert set(types) == {"f32"}


def test_int8_weights_are_stored_as_bytes(artifact: Artifact) -> None:
    types = weights(artifact.variants["openvino-int8"].model)
    assert types.count("i8") == 22  # 21 convolutions and the classifier
    sizes = [
        artifact.variants[name].model.with_suffix(".bin").stat().st_size for name in ("openvino-fp32", "openvino-int8")
    ]
    assert sizes[1] < 0.3 * sizes[0]


def test_layers_that_stay_float_take_the_u8_graph(artifact: Artifact, tmp_path: Path) -> None:
    graph = onnx.load(artifact.variants["onnx-fp32"].model)
    images = np.random.default_rng(0).normal(size=(2, *artifact.input_shape[1:])).astype(np.float32)
    table = measure_ranges(graph, images)
    floats = tuple(node.name for node in graph.graph.node if node.op_type == "Conv")[:2]
    int8 = Prepared(graph, table.choose("mse"), table.choose_symmetric("mse"), floats)
    reference = artifact.variants["torch-fp32"].model
    model, spec = load_model(reference.parent, reference.stem)
    delivery = Delivery(spec.preprocess, {})
    source = Source(model, model, spec, graph, artifact.variants["onnx-fp32"].model, images, int8, delivery)
    WRITERS["openvino-int8"].write(source, tmp_path / "int8" / "model.xml")
    types = weights(tmp_path / "int8" / "model.xml")
    assert (types.count("i8"), types.count("f32")) == (20, 2)


def test_a_transformer_is_written_from_the_s8_graph(artifact: Artifact, vit: onnx.ModelProto, tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(2, *artifact.input_shape[1:])).astype(np.float32)
    table = measure_ranges(vit, images)
    int8 = Prepared(vit, table.choose("mse"), table.choose_symmetric("mse"))
    reference = artifact.variants["torch-fp32"].model
    model, spec = load_model(reference.parent, reference.stem)
    source = Source(model, model, spec, vit, tmp_path / "none.onnx", images, int8, Delivery(spec.preprocess, {}))
    WRITERS["openvino-int8"].write(source, tmp_path / "int8" / "model.xml")
    save_onnx(int8.quantize("onnx-int8-s8"), tmp_path / "s8.onnx")
    with (
        OpenVinoBackend(tmp_path / "int8" / "model.xml", threads=1) as written,
        OpenVinoBackend(tmp_path / "s8.onnx", threads=1) as s8,
    ):
        np.testing.assert_array_equal(predict(written, images), predict(s8, images))


def test_activations_of_both_signs_have_no_zero_point(artifact: Artifact) -> None:
    graph = onnx.load(artifact.variants["onnx-fp32"].model)
    images = np.random.default_rng(0).normal(size=(2, *artifact.input_shape[1:])).astype(np.float32)
    table = measure_ranges(graph, images)
    lopsided = next(name for name, (low, _) in table.choose("mse").items() if low < 0 and name != "image")
    # 1.7 times as coarse with as many steps below 0 as above:
    ranges = {**table.choose("mse"), lopsided: (-0.2, 1.0)}
    graph = Prepared(graph, ranges, table.choose_symmetric("mse")).quantize_for_openvino().graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    signed, unsigned = 0, 0
    for node in graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        name, scale, point = node.input[1].removesuffix("_scale"), *(stored[each] for each in node.input[1:])
        if point.dtype == np.int8:
            assert ranges[name][0] < 0 and name != lopsided
            assert not point.any()
            assert float(scale) == pytest.approx(max(map(abs, ranges[name])) / 127, rel=1e-5)
            signed += 1
        else:
            assert ranges[name][0] >= 0 or name == lopsided
            unsigned += 1
    assert signed > 5 and unsigned > 15


def test_a_full_disk_is_one_line_and_leaves_nothing(artifact: Artifact, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"OpenVINO cannot write '.*' .*: check the space on the disk"):
            save_openvino(artifact.variants["onnx-fp32"].model, tmp_path / "out" / "model.xml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_missing_openvino_names_the_extra(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"'openvino' is not installed .*midge\[openvino\]"):
        save_openvino(artifact.variants["onnx-fp32"].model, tmp_path / "model.xml")
