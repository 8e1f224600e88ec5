from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from midge.export.onnx_export import OPSET, export_onnx, save_onnx
from midge.runtime.artifact import Variant
from midge.runtime.backend import open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.parity import compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model

PX = 32
SPECS = {
    "resnet18": ModelSpec("resnet18", {"channels": (8, 16, 24, 32)}, 10, 32, (), Preprocess(PX, PX), PX),
    "mobilenetv2_035": ModelSpec("mobilenetv2_035", {}, 10, 1280, (), Preprocess(PX, PX), PX),
    "vit": ModelSpec(
        "vit_tiny_patch16_224",
        {"img_size": PX, "patch_size": 8, "depth": 2, "embed_dim": 48},
        10,
        48,
        (),
        Preprocess(PX, PX),
        PX,
    ),
}


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_graph_computes_what_torch_computes(name: str, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    model = build_model(SPECS[name])
    for module in model.modules():  # statistics as after a training: those of a new network are 0 and 1
        if (
            isinstance(module, torch.nn.BatchNorm2d)
            and module.running_mean is not None
            and module.running_var is not None
        ):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    graph = export_onnx(model, PX, "logits")
    save_onnx(graph, tmp_path / "model.onnx")
    images = np.random.default_rng(0).normal(size=(8, 3, PX, PX)).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images)).numpy()
    with open_backend(Variant("onnx-fp32", tmp_path / "model.onnx", 1, "0" * 64, "")) as backend:
        assert backend.input_shape == (1, 3, PX, PX)
        parity = compare_outputs(predict(backend, images), expected)
    assert parity.cosine_min > 0.99999
    assert parity.top1_agreement == 1
    ops = {node.op_type for node in graph.graph.node}
    assert not ops & {"BatchNormalization", "Identity", "Dropout", "Constant"}


def test_names_opset_and_no_notes() -> None:
    model = build_model(SPECS["resnet18"])
    graph = export_onnx(model, PX, "features")
    assert [tensor.name for tensor in graph.graph.input] == ["image"]
    assert [tensor.name for tensor in graph.graph.output] == ["features"]
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET)]
    assert graph.ir_version == 8
    assert not graph.metadata_props and not graph.graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert str(Path(__file__).parents[2]).encode() not in graph.SerializeToString()


def test_equal_weights_give_equal_bytes(tmp_path: Path) -> None:
    import torch

    for name in ("a", "b"):
        torch.manual_seed(0)
        save_onnx(export_onnx(build_model(SPECS["resnet18"]), PX, "logits"), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    onnx.checker.check_model(onnx.load(tmp_path / "a"))


def test_a_network_that_cannot_be_exported_is_one_line() -> None:
    import torch

    class Branching(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean((2, 3)) if image.sum().item() > 0 else image.amax((2, 3))

    with pytest.raises(UserError, match="torch cannot export this network to ONNX") as caught:
        export_onnx(Branching().eval(), PX, "logits")
    assert "\n" not in str(caught.value)
