from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper

from midge.export.delivery import Delivery
from midge.export.graph_edit import observe, weights, with_weights
from midge.export.onnx_export import export_onnx
from midge.export.prepare import prepare
from midge.export.quantize import DIALECTS, DYNAMIC, quantize_onnx
from midge.export.ranges import open_session
from midge.export.smooth import choose_scales, find_smoothable, smooth, smoothing_scales
from midge.export.writers import WRITERS, Source
from midge.runtime.parity import Parity, compare_outputs
from midge.runtime.preprocess import Preprocess

PX = 32


def run(graph: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    session = open_session(graph, [output.name for output in graph.graph.output])
    return np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])


def draw(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, PX, PX)).astype(np.float32)


def minmax_u8(graph: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    names = ["image", *(name for node in graph.graph.node for name in node.output)]
    ranges: dict[str, tuple[float, float]] = {}
    for seen in observe(graph, names, images):
        for name, value in seen.items():
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = min(low, float(value.min())), max(high, float(value.max()))
    return quantize_onnx(graph, ranges, DIALECTS["onnx-int8-u8"])


@pytest.fixture(scope="module")
def vit() -> onnx.ModelProto:
    """A ViT of two blocks with outliers planted behind its layer normalizations: 3 channels of 48 are 60 times larger.

    The rows of the weights that take them are as much smaller, so that the network's answers do not hang on them alone.
    """
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=PX, patch_size=8, depth=2, embed_dim=48, num_classes=10
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        blocks: list[torch.nn.Module] = list(model.get_submodule("blocks").children())
        for block in blocks:
            for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
                planted = [3, 17, 40]
                block.get_submodule(norm).get_parameter("weight")[planted] *= 60
                block.get_submodule(norm).get_parameter("bias")[planted] *= 60
                block.get_submodule(linear).get_parameter("weight")[:, planted] /= 60
    return export_onnx(model, PX, "logits")


def test_scales_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    peaks, rows = rng.uniform(0.1, 10, 5), rng.normal(size=(7, 5))
    for alpha in (0.0, 0.5, 0.8, 1.0):
        expected = [
            peaks[j] ** alpha / max(abs(float(weight)) for weight in rows[:, j]) ** (1 - alpha) for j in range(5)
        ]
        np.testing.assert_allclose(smoothing_scales(peaks, rows, alpha), expected, rtol=1e-12)
    peaks[1], rows[:, 3] = 0, 0
    np.testing.assert_array_equal(smoothing_scales(peaks, rows, 0.5)[[1, 3]], 1)


def test_halves_are_even_at_one_half() -> None:
    rng = np.random.default_rng(0)
    peaks, rows = rng.uniform(0.1, 10, 5), rng.normal(size=(7, 5))
    scales = smoothing_scales(peaks, rows, 0.5)
    np.testing.assert_allclose(peaks / scales, np.abs(rows * scales).max(axis=0))


def test_the_network_computes_the_same_under_the_same_names(vit: onnx.ModelProto) -> None:
    assert len(find_smoothable(vit)) == 4  # two blocks; the last normalization goes to one token alone
    before = vit.SerializeToString()
    others = draw(4, seed=1)
    for alpha in (None, 0.5):
        smoothed = smooth(vit, draw(4, seed=0), alpha)
        onnx.checker.check_model(smoothed, full_check=True)
        expected, given = run(vit, others), run(smoothed, others)
        assert np.abs(expected - given).max() <= 1e-4 * np.abs(expected).max()
        assert list(smoothed.graph.node) == list(vit.graph.node)
        changed = {name for name, value in weights(smoothed).items() if not np.array_equal(value, weights(vit)[name])}
        norms = find_smoothable(vit)
        assert changed == {n for norm in norms for n in (norm.scale, norm.bias, *(name for name, _ in norm.products))}
    assert vit.SerializeToString() == before


def test_planted_outliers_ruin_no_form_that_is_exported(vit: onnx.ModelProto, tmp_path: Path) -> None:
    images, others = draw(16, seed=0), draw(24, seed=1)
    expected, absent = run(vit, others), cast(Any, None)
    int8, _ = prepare(vit, images, "minmax")
    source = Source(absent, absent, absent, vit, tmp_path / "none", images, int8, Delivery(Preprocess(PX, PX), {}))
    WRITERS[DYNAMIC].write(source, tmp_path / "model.onnx")
    forms = {name: int8.quantize(name) for name in DIALECTS} | {DYNAMIC: onnx.load(tmp_path / "model.onnx")}
    for name, graph in forms.items():
        assert compare_outputs(run(graph, others), expected).cosine_mean > 0.998, name


def test_planted_outliers_no_longer_ruin_min_max(vit: onnx.ModelProto) -> None:
    images, others = draw(16, seed=0), draw(24, seed=1)
    expected = run(vit, others)

    def parity(graph: onnx.ModelProto) -> Parity:
        return compare_outputs(run(minmax_u8(graph, images), others), expected)

    plain, smoothed, half = parity(vit), parity(smooth(vit, images)), parity(smooth(vit, images, alpha=0.5))
    assert plain.cosine_mean < 0.99
    assert smoothed.cosine_mean > 0.999
    assert half.cosine_mean > 0.998
    assert 1 - smoothed.cosine_mean < (1 - plain.cosine_mean) / 10


def test_even_channels_are_left_alone_where_that_is_best() -> None:
    rng = np.random.default_rng(0)
    tokens, rows = rng.uniform(-1, 1, size=(64, 8)), rng.normal(size=(4, 8))
    rows[:, 0] *= 100  # smoothing would move this into the activations
    tokens[:, 0] /= 1e4
    scales = choose_scales(tokens, np.abs(tokens).max(axis=0), rows)
    exact = tokens @ rows.T

    def error(scales: np.ndarray) -> float:
        x, w = tokens / scales, rows * scales
        step = (max(x.max(), 0) - min(x.min(), 0)) / 255
        sizes = np.abs(w).max(axis=1, keepdims=True) / 127
        return float(np.square((np.rint(x / step) * step) @ (np.rint(w / sizes) * sizes).T - exact).sum())

    candidates = [smoothing_scales(np.abs(tokens).max(axis=0), rows, alpha) for alpha in (0.3, 0.5, 0.8)]
    assert error(scales) <= min(error(candidate) for candidate in [*candidates, np.ones(8)]) * 1.000001


def test_what_goes_elsewhere_too_is_left_alone(vit: onnx.ModelProto) -> None:
    graph = with_weights(vit, {})
    norm = find_smoothable(graph)[0]
    graph.graph.node.append(helper.make_node("Neg", [norm.tensor], ["elsewhere"]))
    graph.graph.output.append(helper.make_empty_tensor_value_info("elsewhere"))
    assert norm not in find_smoothable(graph)
    assert len(find_smoothable(graph)) == 3
