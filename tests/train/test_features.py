"""Features, raw pixels and batch statistics against slow derivations, one image after the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableBudget, list_images, load_image
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import load_model
from midge.train.features import encode, estimate_batch_statistics, extract_features, find_device, pixels

pytestmark = pytest.mark.usefixtures("one_thread")

PREPROCESS = Preprocess(36, 32)


@pytest.mark.parametrize(("batch_size", "workers"), [(5, 1), (64, 3), (1, 2)])
def test_features_are_those_of_one_image_after_the_other(labelled_folder, run_folder, batch_size: int, workers: int):
    images = list_images(labelled_folder(each=4))
    model, _ = load_model(run_folder(), "backbone")
    features, kept = extract_features(model, images, PREPROCESS, batch_size, workers=workers)
    assert kept.tolist() == list(range(12))
    assert features.dtype == np.float32
    for index in range(12):
        alone = torch.from_numpy(PREPROCESS(load_image(images.path(index))))[None]
        with torch.inference_mode():
            np.testing.assert_allclose(features[index], model(alone)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_unreadable_images_are_left_out_within_the_budget(labelled_folder):
    root = labelled_folder(each=4)
    images = list_images(root)
    whole = images.path(5).read_bytes()
    images.path(5).write_bytes(whole[:200])
    budget = UnreadableBudget(0.1, len(images))
    encoders = {"mean": lambda batch: batch.mean((2, 3)), "maximum": lambda batch: batch.amax((2, 3))}
    features, kept = encode(encoders, images, PREPROCESS, batch_size=3, budget=budget)
    assert kept.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert len(budget.paths) == 1
    expected = np.stack([PREPROCESS(load_image(images.path(index))) for index in kept])
    np.testing.assert_allclose(features["mean"], expected.mean((2, 3)), atol=1e-5)
    np.testing.assert_array_equal(features["maximum"], expected.max((2, 3)))
    with pytest.raises(UserError, match="1 of 12 images are unreadable"):
        encode(encoders, images, PREPROCESS)


def test_a_batch_of_unreadable_images(labelled_folder):
    images = list_images(labelled_folder(each=4))
    for index in (3, 4, 5):
        images.path(index).write_bytes(b"")
    _, kept = encode({"x": nn.Flatten()}, images, PREPROCESS, 3, budget=UnreadableBudget(0.5, 12))
    assert kept.tolist() == [0, 1, 2, 6, 7, 8, 9, 10, 11]


def test_raw_pixels_are_the_resized_image_in_0_to_1(labelled_folder):
    images = list_images(labelled_folder(each=2))
    features, _ = pixels(images, PREPROCESS)
    plain = Preprocess(36, 32, mean=(0, 0, 0), std=(1, 1, 1))
    for index in range(len(images)):
        np.testing.assert_allclose(features[index], plain(load_image(images.path(index))).ravel(), atol=1e-6)
    assert 0 <= features.min() < features.max() <= 1 + 1e-6


def test_large_raw_pixels_are_averaged_down(labelled_folder):
    images = list_images(labelled_folder(each=1, px=128))
    features, _ = pixels(images, Preprocess(128, 128))
    expected = load_image(images.path(0)).reshape(64, 2, 64, 2, 3).mean((1, 3)).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(features[0], expected.ravel(), atol=1e-5)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 4, 3, stride=4)
        self.second = nn.BatchNorm2d(4, momentum=0.3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.second(self.conv(self.first(x)))).flatten(1)


def test_batch_statistics_are_the_plain_average_over_batches(labelled_folder):
    images = list_images(labelled_folder(each=10))
    torch.manual_seed(0)
    model = TwoLayers().train()
    model(torch.randn(8, 3, 32, 32))  # earlier statistics, which must leave no trace
    estimate_batch_statistics(model, images, PREPROCESS, batch_size=8, seed=3)

    order = np.random.default_rng(3).permutation(30)
    batches = [
        np.stack([PREPROCESS(load_image(images.path(index))) for index in order[start : start + 8]])
        for start in (0, 8, 16)  # the last six images are no batch of eight, but more than half of one
    ]
    batches.append(np.stack([PREPROCESS(load_image(images.path(index))) for index in order[24:]]))
    means = [batch.mean((0, 2, 3)) for batch in batches]
    variances = [batch.var((0, 2, 3), ddof=1) for batch in batches]
    np.testing.assert_allclose(model.first.running_mean, np.mean(means, axis=0), atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(model.first.running_var, np.mean(variances, axis=0), rtol=1e-4)  # type: ignore[arg-type]
    hidden = []
    for batch in batches:
        normal = (batch - batch.mean((0, 2, 3), keepdims=True)) / np.sqrt(
            batch.var((0, 2, 3), keepdims=True) + model.first.eps
        )
        with torch.inference_mode():
            hidden.append(model.conv(torch.from_numpy(normal)).numpy())
    expected = np.mean([values.var((0, 2, 3), ddof=1) for values in hidden], axis=0)
    np.testing.assert_allclose(model.second.running_var, expected, rtol=1e-3)  # type: ignore[arg-type]

    assert not any(module.training for module in model.modules())
    assert (model.first.momentum, model.second.momentum) == (0.1, 0.3)


def test_a_network_without_batch_normalization_is_left_alone(labelled_folder, run_folder):
    images = list_images(labelled_folder(each=1))
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model, _ = load_model(run_folder(timm_name="vit_tiny_patch16_224", timm_args=args, feature_dim=32), "backbone")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert estimate_batch_statistics(model, images.take([0]), PREPROCESS) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_statistics_of_one_image_are_refused(labelled_folder):
    images = list_images(labelled_folder(each=1)).take([0])
    with pytest.raises(UserError, match="two images or more"):
        estimate_batch_statistics(TwoLayers(), images, PREPROCESS)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="Unknown device 'tpu': choose one of auto, cpu, cuda, mps"):
        find_device("tpu")
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(UserError, match=f"--device {absent}: torch finds no such device"):
        find_device(absent)


def test_an_image_smaller_than_the_crop_and_a_grey_one(tmp_path: Path):
    Image.new("L", (5, 9), 255).save(tmp_path / "a.png")
    features, _ = pixels(list_images(tmp_path), PREPROCESS)
    np.testing.assert_allclose(features, np.ones((1, 3 * 32 * 32)), atol=1e-6)
