from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from midge.export.calibration import Sample
from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.export.fake_quantize import FakeQuantize, LearnedRanges, grid_ends, round_to, weight_step
from midge.export.onnx_export import save_onnx
from midge.export.prepare import RANGE_STEPS, Prepared, prepare, training
from midge.export.qat import (
    QatConfig,
    Student,
    Trained,
    Written,
    head_inputs,
    relative_error,
    train_quantized,
    weights_and_biases,
)
from midge.export.quantize import DIALECTS
from midge.export.ranges import Ranges, RangeTable, graph_sha256
from midge.runtime.artifact import Artifact, Variant, load_artifact
from midge.runtime.backend import open_backend, predict
from midge.runtime.errors import UserError
from midge.runtime.fields import Fields
from midge.runtime.images import list_images

U8, S8 = "onnx-int8-u8", "onnx-int8-s8"
CONFIG = QatConfig(epochs=6, lr=0.3, batch_size=16)


@pytest.fixture(scope="module")
def inputs(artifact: Artifact, images: Path) -> np.ndarray:
    """(64, 3, 32, 32) float32, of all classes in no order."""
    listed = list_images(images / "train")
    order = np.random.default_rng(0).permutation(len(listed))[:64].tolist()
    return np.stack([artifact.preprocess(listed.load(index)) for index in order])


@pytest.fixture(scope="module")
def graph(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(artifact.variants["onnx-fp32"].model)


@pytest.fixture(scope="module")
def bad_ranges(artifact_path: Path) -> Ranges:
    """A third of what was measured: most large values are clipped."""
    stored = json.loads((artifact_path / "calibration.json").read_text())["ranges"]
    measured = RangeTable.from_json(Fields(stored, "ranges")).choose("percentile")
    return {name: (low / 3, high / 3) for name, (low, high) in measured.items()}


def write(graph: onnx.ModelProto, ranges: dict[str, Ranges]) -> dict[str, Written]:
    prepared = Prepared(graph, ranges[U8], ranges[S8])
    return {name: Written(prepared.quantize(name), ranges[name]) for name in DIALECTS}


def infer(model: onnx.ModelProto, images: np.ndarray, path: Path) -> np.ndarray:
    save_onnx(model, path)
    with open_backend(Variant("onnx-fp32", path, 1, "0" * 64, "")) as backend:
        return predict(backend, images)


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    return (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


@pytest.fixture(scope="module")
def written(graph: onnx.ModelProto, bad_ranges: Ranges) -> dict[str, Written]:
    return write(graph, dict.fromkeys(DIALECTS, bad_ranges))


@pytest.fixture(scope="module")
def trained(graph: onnx.ModelProto, written: dict[str, Written], inputs: np.ndarray) -> Trained:
    return train_quantized(graph, written, inputs, CONFIG)


@pytest.mark.parametrize(("limits", "ends"), [((0, 255), (-0.7, 1.9)), ((0, 255), (0.0, 2.1)), ((-128, 127), (-1, 1))])
def test_fake_quantizer_against_plain_arithmetic(limits: tuple[int, int], ends: tuple[float, float]) -> None:
    """Value by value: the rounding, and the gradients of LSQ's equation 3 with both ends of the range."""
    qmin, qmax = limits
    values = np.random.default_rng(0).normal(size=200)
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    low, high = (torch.tensor(end, dtype=torch.float64, requires_grad=True) for end in ends)
    weights = np.random.default_rng(1).normal(size=200)
    y = FakeQuantize.apply(x, low, high, qmin, qmax)
    assert isinstance(y, torch.Tensor)
    (y * torch.tensor(weights)).sum().backward()
    scale = (ends[1] - ends[0]) / (qmax - qmin)
    zero_point = round(qmin - ends[0] / scale)
    low_gradient = high_gradient = 0.0
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        integer = min(max(round(value / scale) + zero_point, qmin), qmax)
        assert y[index].item() == pytest.approx((integer - zero_point) * scale)
        outside = 1 if value / scale + zero_point > qmax else -1 if value / scale + zero_point < qmin else 0
        assert x.grad is not None
        assert x.grad[index].item() == pytest.approx(0 if outside else weight)
        if outside > 0:
            high_gradient += weight
        elif outside < 0:
            low_gradient += weight
        else:
            by_scale = round(value / scale) - value / scale
            high_gradient += weight * by_scale / (qmax - qmin)
            low_gradient -= weight * by_scale / (qmax - qmin)
    assert low.grad is not None
    assert high.grad is not None
    assert (low.grad.item(), high.grad.item()) == pytest.approx((low_gradient, high_gradient))


def test_fake_quantizer_is_the_same_under_vmap() -> None:
    gradients = []
    for function in (FakeQuantize.apply, lambda x, *ends: torch.vmap(lambda row: FakeQuantize.apply(row, *ends))(x)):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        low, high = torch.tensor(-0.5, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        y = function(x, low, high, 0, 255)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad, low.grad, high.grad))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_signed_grids_are_symmetric_and_weights_round_per_channel() -> None:
    low, high = grid_ends(torch.tensor([-0.5, 1.27]), -128, 127)
    assert (low.item(), high.item()) == pytest.approx((-1.28, 1.27))
    weight = torch.tensor([[1.0, -127.0], [0.5, 0.25], [0.0, 0.0]], requires_grad=True)
    assert weight_step(weight, 0).flatten().tolist() == pytest.approx([1.0, 0.5 / 127, 0.0])
    rounded = round_to(weight, weight_step(weight, 0))
    assert rounded[0].tolist() == [1.0, -127.0]
    assert rounded[1].tolist() == pytest.approx([0.5, 64 * 0.5 / 127])
    assert rounded[2].tolist() == [0, 0]
    rounded.sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[1, 1], [1, 1], [1, 1]]


def test_an_end_stays_within_a_clip_and_at_zero() -> None:
    clip = onnx.helper.make_node("Clip", ["x", "zero", "six"], ["y"])
    constants = [
        onnx.numpy_helper.from_array(np.array(value, np.float32), name) for name, value in {"zero": 0, "six": 6}.items()
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph([clip], "clip", [], [], constants))
    learned = LearnedRanges(model, {"y": (0.0, 5.9), "x": (-1.0, 2.0)}, 1 / 255)
    with torch.no_grad():
        for parameter in learned.parameters.values():
            parameter.fill_(40)
    learned.keep_in_bounds()
    assert learned.ends("y").tolist() == pytest.approx([0, 6])
    assert learned.ends("x").tolist() == pytest.approx([-np.exp(40 / 255), 2 * np.exp(40 / 255)])


def test_the_relative_error_is_each_image_s_and_none_outweighs_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    values, wanted = torch.randn(2, 5, 3, 2, 2, generator=generator)
    values[0] *= 1e4  # has left the range of all others
    wanted[1] = 0
    expected = []
    for given, target in zip(values.numpy(), wanted.numpy(), strict=True):
        longer = max((given**2).sum(), (target**2).sum())
        expected.append(((given - target) ** 2).sum() / longer)
    assert relative_error(values, wanted).item() == pytest.approx(np.mean(expected), rel=1e-5)
    assert max(expected) <= 4
    values.requires_grad_()
    relative_error(values, wanted).backward()
    assert values.grad is not None
    lengths = values.grad.flatten(1).norm(dim=1)
    assert lengths[0] < lengths[2:].min()
    assert relative_error(torch.zeros(2, 3), torch.zeros(2, 3)).item() == 0


def test_training_repairs_bad_ranges(
    graph: onnx.ModelProto,
    written: dict[str, Written],
    trained: Trained,
    inputs: np.ndarray,
    tmp_path: Path,
) -> None:
    assert trained.loss_after < 0.6 * trained.loss_before
    expected = infer(graph, inputs, tmp_path / "fp32.onnx")
    learned = write(trained.graph, trained.ranges)
    for dialect in DIALECTS:
        before, after = (infer(made[dialect].graph, inputs, tmp_path / "int8.onnx") for made in (written, learned))
        assert cosines(after, expected).mean() > cosines(before, expected).mean() + 0.1
        agreement = [(logits.argmax(1) == expected.argmax(1)).mean() for logits in (before, after)]
        assert agreement[1] > max(agreement[0], 0.9)


def test_the_files_give_what_was_simulated(trained: Trained, inputs: np.ndarray, tmp_path: Path) -> None:
    """After training, in ONNX Runtime on integers: the writers need no more than the weights and the ranges."""
    written = write(trained.graph, trained.ranges)
    student = Student(trained.graph, written)
    for dialect, made in written.items():
        with torch.no_grad():
            simulated = student(torch.from_numpy(inputs), dialect)["logits"].numpy()
        assert cosines(infer(made.graph, inputs, tmp_path / "int8.onnx"), simulated).mean() > 0.9999


def test_names_shapes_and_seeds(
    graph: onnx.ModelProto,
    written: dict[str, Written],
    trained: Trained,
    bad_ranges: Ranges,
    inputs: np.ndarray,
) -> None:
    assert [node.SerializeToString() for node in trained.graph.graph.node] == [
        node.SerializeToString() for node in graph.graph.node
    ]
    changed = {
        one.name
        for one, two in zip(graph.graph.initializer, trained.graph.graph.initializer, strict=True)
        if one.raw_data != two.raw_data
    }
    assert changed == set(weights_and_biases(graph))
    assert len(head_inputs(graph)) == 1
    for ranges in trained.ranges.values():
        assert set(ranges) == set(bad_ranges)
        assert all((low <= 0 or low == bad_ranges[name][0]) and high >= low for name, (low, high) in ranges.items())
    assert trained.ranges[U8]["relu"][0] == 0
    short = dataclasses.replace(CONFIG, epochs=1)
    one, two = (train_quantized(graph, written, inputs[:32], short) for _ in range(2))
    assert one.graph.SerializeToString() == two.graph.SerializeToString()
    assert one.ranges == two.ranges


def test_what_does_not_help_is_left_out(
    graph: onnx.ModelProto, written: dict[str, Written], inputs: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = train_quantized(graph, {U8: written[U8]}, inputs[:32], QatConfig(epochs=1, lr=0))
    assert kept.loss_after == kept.loss_before
    assert kept.graph is graph
    assert kept.ranges == {U8: written[U8].ranges}
    assert "did not help" in capsys.readouterr().err


def test_too_few_images_are_refused(graph: onnx.ModelProto, written: dict[str, Written], inputs: np.ndarray) -> None:
    with pytest.raises(UserError, match="at least 32 images and has 31"):
        train_quantized(graph, written, inputs[:31], CONFIG)


def test_the_last_step_of_the_pipeline(graph: onnx.ModelProto, bad_ranges: Ranges, inputs: np.ndarray) -> None:
    """Its result is what the INT8 variants are written from, and what calibration.json says."""
    sample = Sample(("a",) * 64, ("0" * 64,) * 64, inputs)
    stored = RangeTable(graph_sha256(graph), {name: {"minmax": ends} for name, ends in bad_ranges.items()})
    before, _ = prepare(graph, inputs[:8], "minmax", stored=stored)
    steps = {**RANGE_STEPS, "training": training(graph, sample, epochs=6, lr=0.3, seed=0)}
    after, _ = prepare(graph, inputs[:8], "minmax", stored=stored, range_steps=steps)
    facts = after.trained
    assert facts["loss_after"] < facts["loss_before"]
    assert after.learned and not before.learned
    assert facts["images"] == sample.to_json()
    for variant in (U8, S8):
        assert {name: list(ends) for name, ends in after.choose_ranges(variant).items()} == facts["ranges"][variant]
        assert after.choose_ranges(variant) != before.choose_ranges(variant)
    one, two = (
        {tensor.name: tensor.raw_data for tensor in prepared.graph.graph.initializer} for prepared in (before, after)
    )
    assert {name for name in one if one[name] != two[name]} == set(weights_and_biases(graph))
    assert json.dumps(facts)


def test_layers_in_float_are_trained_and_written_in_float(
    graph: onnx.ModelProto, bad_ranges: Ranges, inputs: np.ndarray, tmp_path: Path
) -> None:
    """The first three in a row, and one between INT8 layers."""
    names = [node.name for node in graph.graph.node if node.op_type in {"Conv", "Gemm"}]
    floats = (*names[:3], names[9])
    start = Prepared(graph, bad_ranges, bad_ranges, floats)
    sample = Sample(("a",) * len(inputs), ("0" * 64,) * len(inputs), inputs)
    after = training(graph, sample, CONFIG.epochs, CONFIG.lr, CONFIG.seed)(start, inputs)
    assert after.trained["loss_after"] < after.trained["loss_before"]
    assert after.float_nodes == floats
    student = Student(after.graph, {U8: Written(after.quantize(U8), after.ranges)})
    with torch.no_grad():
        simulated = student(torch.from_numpy(inputs[:8]), U8)["logits"].numpy()
    written = after.quantize(U8)
    stored = {tensor.name for tensor in written.graph.initializer}
    assert {node.name for node in written.graph.node if node.name in names and node.input[1] in stored} == {*floats}
    assert cosines(simulated, infer(written, inputs[:8], tmp_path / "model.onnx")).mean() > 0.9999


def test_export_trains_where_asked(run: Path, images: Path, tmp_path: Path) -> None:
    config = ExportConfig(
        run=run, out=tmp_path / "out", targets=("onnx",), calibration_images=32, qat_epochs=1, qat_images=40
    )
    assert export_run(config) == 0
    calibration = json.loads((tmp_path / "out" / "calibration.json").read_text())
    trained = calibration["trained"]
    assert trained["settings"]["epochs"] == 1
    assert trained["kept"] == (trained["loss_after"] < trained["loss_before"])
    assert len(trained["images"]) == 40
    assert [image["path"] for image in trained["images"]][:32] == [image["path"] for image in calibration["images"]]
    manifest = load_artifact(tmp_path / "out")
    golden = json.loads((tmp_path / "out" / "manifest.json").read_text())["origin"]["golden_images"]
    assert not {image["sha256"] for image in golden} & {image["sha256"] for image in trained["images"]}
    for dialect in DIALECTS:
        model = onnx.load(manifest.variants[dialect].model)
        scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        low, high = trained["ranges"][dialect]["image"]
        extent = (high - low) / 255 if dialect == U8 else max(-low, high) / 127
        assert float(scales["image_scale"]) == pytest.approx(extent, rel=1e-5)
