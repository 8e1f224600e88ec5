"""Real networks converted by the real coremltools, run by the reference interpreter."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional

from midge.__main__ import main
from midge.export.calibration import read_images
from midge.export.config import ExportConfig
from midge.export.coreml_export import convert_coreml
from midge.export.coreml_int8 import _mark, quantize_coreml
from midge.export.delivery import Delivery
from midge.export.fold import fold_batch_norm
from midge.export.onnx_export import export_onnx
from midge.export.prepare import prepare
from midge.export.weights import load_weights, weighted_nodes
from midge.export.writers import WRITERS, Source, prepared
from midge.runtime import coreml_backend
from midge.runtime.artifact import Artifact, Variant, load_artifact
from midge.runtime.backend import open_backend, predict
from midge.runtime.coreml_program import Program, read_program
from midge.runtime.errors import UserError
from midge.runtime.images import list_images
from midge.runtime.parity import Parity, compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, load_model

PX = 32
PREPROCESS = Preprocess(PX, PX)
VIT_ARGS = {"img_size": PX, "patch_size": 8, "depth": 1, "embed_dim": 48}
VIT = ModelSpec("vit_tiny_patch16_224", VIT_ARGS, 10, 48, tuple("abcdefghij"), PREPROCESS, PX)
INVERTED = ModelSpec("mobilenetv2_100", {}, 0, 16, (), PREPROCESS, PX)
NAMES = ("coreml-fp16", "coreml-int8")


@dataclass(frozen=True, eq=False)
class Made:
    """A network as both variants, its source, and how they agree with torch on real images."""

    source: Source
    programs: dict[str, Program]
    parity: dict[str, Parity]


class Inverted(torch.nn.Module):
    """A stem and two blocks as MobileNetV2 has them, one with its shortcut: features (N, 16)."""

    def __init__(self, pad_type: str = "") -> None:
        super().__init__()
        self.stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(8))
        self.first, self.second = self.block(8, 8, 1, pad_type), self.block(8, 16, 2, pad_type)

    @staticmethod
    def block(inputs: int, outputs: int, stride: int, pad_type: str) -> torch.nn.Module:
        from timm.models._efficientnet_blocks import InvertedResidual

        return InvertedResidual(
            inputs, outputs, stride=stride, exp_ratio=4, act_layer=torch.nn.ReLU6, pad_type=pad_type
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(functional.relu6(self.stem(images)))).mean(dim=(2, 3))


def randomize(model: Any) -> Any:
    """Statistics and weights that do something, a dead channel in each normalization, no two parameters alike."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)
            module.weight.data[0] = 0
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(spec: ModelSpec, model: Any, images: Path, folder: Path) -> Made:
    listed = list_images(images / "train")
    inputs = np.stack([image.input for image in read_images(listed, range(40), spec.preprocess, 1)])
    folded = fold_batch_norm(model, PX)
    output = "logits" if spec.num_classes else "features"
    graph = export_onnx(folded, PX, output)
    onnx.save(graph, folder / "model.onnx")
    int8, _ = prepare(graph, inputs, ExportConfig.calibration)
    source = Source(model, folded, spec, graph, folder / "model.onnx", inputs, int8, Delivery(spec.preprocess, {}))
    with torch.inference_mode():
        reference = model(torch.from_numpy(inputs)).numpy()
    programs, parity = {}, {}
    for name in NAMES:
        path = folder / name / WRITERS[name].model
        WRITERS[name].write(source, path)
        programs[name] = read_program(path)
        with open_backend(Variant(name, path, 1, "0" * 64, "")) as backend:
            parity[name] = compare_outputs(predict(backend, list(inputs)), reference)
    return Made(source, programs, parity)


@pytest.fixture(scope="module")
def classifier(run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The trained ResNet of the fixtures, on the images it knows."""
    model, spec = load_model(run, "classifier")
    return make(spec, model, images, tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def vit(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(VIT, randomize(build_model(VIT)), images, tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def inverted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(INVERTED, randomize(Inverted()), images, tmp_path_factory.mktemp("inverted"))


def kinds(program: Program) -> Counter[str]:
    return Counter(operation.kind for operation in program.operations)


def check(made: Made, mean: float) -> None:
    fp16, int8 = (made.parity[name] for name in NAMES)
    assert fp16.cosine_min >= 0.9995
    assert int8.cosine_mean >= mean
    for program in made.programs.values():
        for operation in program.operations:
            for value in operation.constants.values():
                assert isinstance(value, str | list) or np.isfinite(value.astype(np.float64)).all()
            if operation.kind.startswith("reduce"):  # pooling alone: statistics of a batch are over axis 0 too
                axes = next(o for o in program.operations if o.outputs[0][0] == operation.inputs["axes"][0])
                assert {int(axis) % 4 for axis in axes.constants["val"]} == {2, 3}
        assert "batch_norm" not in kinds(program)
        assert program.image_inputs == ("image",)
        assert json.loads(program.metadata[coreml_backend.LABELS]) == list(made.source.spec.labels)
        assert Preprocess.from_json(json.loads(program.metadata[coreml_backend.PREPROCESS])) == PREPROCESS


def test_a_trained_classifier(classifier: Made) -> None:
    check(classifier, 0.995)
    fp16, int8 = (kinds(classifier.programs[name]) for name in NAMES)
    assert (fp16["conv"], fp16["linear"], fp16["quantize"]) == (20 + 1, 1, 0)
    assert int8["constexpr_affine_dequantize"] == fp16["conv"] + fp16["linear"]
    assert int8["quantize"] == int8["dequantize"] == 30


def test_a_transformer(vit: Made) -> None:
    check(vit, 0.99)
    int8 = kinds(vit.programs["coreml-int8"])
    assert int8["constexpr_affine_dequantize"] == int8["conv"] + int8["linear"] == int8["quantize"] == 6


def test_inverted_residuals(inverted: Made) -> None:
    check(inverted, 0.99)
    int8 = kinds(inverted.programs["coreml-int8"])
    assert (int8["relu6"], int8["clip"], int8["add"]) == (5, 0, 1)  # relu6 is known to fuse
    assert int8["constexpr_affine_dequantize"] == int8["conv"] == 7
    assert int8["quantize"] == 7 + 1  # of the addition one input is a convolution's too


def test_scales_are_the_tables(classifier: Made) -> None:
    """Each Q/DQ has the scale of its tensor's range, unsigned where that is not negative; none has another."""
    values = {o.outputs[0][0]: o.constants.get("val") for o in classifier.programs["coreml-int8"].operations}
    expected = {}
    int8 = prepared(classifier.source)
    for name, (low, high) in int8.ranges.items():
        unsigned = low >= 0
        low, high = (low, high) if unsigned else int8.symmetric_ranges[name]
        expected[name] = (
            "uint8" if unsigned else "int8",
            np.float16(high / 255 if unsigned else max(-low, high) / 127),
        )
    found = Counter()
    for operation in classifier.programs["coreml-int8"].operations:
        if operation.kind == "quantize":
            scale, dtype = (values[str(operation.inputs[name][0])] for name in ("scale", "output_dtype"))
            tensor = str(operation.inputs["input"][0]).split("_cast_fp16")[0].replace("_inversed_div", "image")
            assert (dtype, scale) == expected[tensor.removesuffix("_to_fp16")]
            found[dtype] += 1
    assert found["int8"] >= 10
    assert found["uint8"] >= 10


def test_equal_networks_give_equal_bytes(classifier: Made, tmp_path: Path) -> None:
    written = classifier.source.onnx_path.parent / "coreml-fp16/model.mlpackage"
    WRITERS["coreml-fp16"].write(classifier.source, tmp_path / "model.mlpackage")
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 3
    assert all((tmp_path / "model.mlpackage" / path).read_bytes() == (written / path).read_bytes() for path in files)


@pytest.mark.parametrize("name", ["vit", "inverted"])
def test_weights_find_their_way_back(name: str, request: pytest.FixtureRequest) -> None:
    source: Source = request.getfixturevalue(name).source
    before = source.folded.state_dict()
    same = load_weights(source.folded, source.graph, PX).state_dict()
    assert all(torch.equal(value, before[key]) for key, value in same.items())
    changed = copy.deepcopy(source.graph)
    for tensor in changed.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size > 1:
            tensor.CopyFrom(numpy_helper.from_array(1.01 * values + np.float32(0.01), tensor.name))
    network = load_weights(source.folded, changed, PX)
    owned = [key for key, _ in network.named_parameters() if key not in ("pos_embed", "cls_token")]
    assert len(list(weighted_nodes(changed))) == len({key.rpartition(".")[0] for key in owned})
    for key in owned:
        torch.testing.assert_close(network.state_dict()[key], 1.01 * before[key] + 0.01)


def test_a_graph_without_an_operator_is_refused(classifier: Made) -> None:
    graph = copy.deepcopy(classifier.source.graph)
    node = next(node for node in graph.graph.node if node.output[0] == "conv2d_3")
    graph.graph.node.remove(node)
    with pytest.raises(UserError, match="no weights for the operator 'conv2d_3'"):
        load_weights(classifier.source.folded, graph, PX)


def test_a_convolution_that_pads_as_tensorflow_does(images: Path, tmp_path: Path) -> None:
    """Core ML has an operator of its own for that, between the activation and the convolution."""
    made = make(INVERTED, randomize(Inverted(pad_type="same")), images, tmp_path)
    for program in made.programs.values():
        assert kinds(program)["pad"] == 1
    assert made.parity["coreml-fp16"].cosine_min >= 0.9995
    assert made.parity["coreml-int8"].cosine_mean >= 0.995
    assert kinds(made.programs["coreml-int8"])["constexpr_affine_dequantize"] == 7  # all convolutions


def test_zeros_of_both_signs_are_equal_weights() -> None:
    weight = np.array([[0.0, 1.0], [2.0, 0.0]], np.float32)
    assert _mark(weight) == _mark(weight * np.array([[-1.0, 1.0], [1.0, -1.0]], np.float32)) != _mark(weight.T)


def test_what_stays_float(classifier: Made, tmp_path: Path) -> None:
    source = classifier.source
    left = next(node.name for node in source.graph.graph.node if node.output[0] == "conv2d_5")
    int8 = dataclasses.replace(prepared(source), float_nodes=(left,))
    WRITERS["coreml-int8"].write(dataclasses.replace(source, int8=int8), tmp_path / "model.mlpackage")
    before, after = kinds(classifier.programs["coreml-int8"]), kinds(read_program(tmp_path / "model.mlpackage"))
    assert after["constexpr_affine_dequantize"] == before["constexpr_affine_dequantize"] - 1
    assert after["quantize"] == before["quantize"] - 1


def test_no_range_and_other_weights_are_refused(classifier: Made) -> None:
    source = classifier.source
    int8 = prepared(source)
    model = convert_coreml(load_weights(source.folded, int8.graph, PX), source.spec, "logits")
    ranges = {name: value for name, value in int8.ranges.items() if name != "relu_5"}
    with pytest.raises(UserError, match="'relu_5_cast_fp16' has no range"):
        quantize_coreml(model, dataclasses.replace(int8, ranges=ranges))
    graph = copy.deepcopy(int8.graph)
    node = next(node for node in graph.graph.node if node.output[0] == "conv2d_3")
    node.input[0] = "relu_1"
    with pytest.raises(
        UserError, match=r"taken for 'max_pool2d', but the weight that it meets multiplies \['relu_1'\]"
    ):
        quantize_coreml(model, dataclasses.replace(int8, graph=graph))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "artifact"
    arguments = ["export", str(run), "--out", str(out), "--targets", "coreml", "--precision", "fp16"]
    assert main(arguments) == 0
    return out


def test_the_commands(exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    artifact: Artifact = load_artifact(exported)
    assert artifact.variants["coreml-fp16"].model.name == "model.mlpackage"
    assert artifact.manifest["tools"]["coremltools"]
    monkeypatch.setattr(coreml_backend, "NATIVE", False)
    assert main(["verify", str(exported), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["variants"]["coreml-fp16"]
    assert verified["golden"]["cosine_min"] >= 0.9995
    assert verified["int8_mac_share"] is None
    assert main(["profile", str(exported), "--variants", "coreml-fp16", "--out", str(exported.parent / "records")]) == 2
    assert "Core ML runs on macOS only" in capsys.readouterr().err
    assert not (exported.parent / "records").exists()


def test_a_package_with_a_file_too_many_is_refused(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "artifact")
    (tmp_path / "artifact/coreml-fp16/model.mlpackage/Data/extra.bin").write_bytes(b"1")
    with pytest.raises(UserError, match="which its manifest does not name"):
        load_artifact(tmp_path / "artifact")
