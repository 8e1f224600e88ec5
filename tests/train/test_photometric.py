"""Each step against torchvision's on float tensors (the same law, so 1e-5), and the chain against Pillow's on uint8."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as reference

from midge.runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from midge.train.photometric import (
    Photometric,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    luma,
    plan_steps,
    solarize,
)
from midge.train.sampling import ViewParameters, ViewSampler
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORS = [0.6, 0.85, 1.0, 1.4]
SHIFTS = [-0.1, -0.03, 0.0, 0.1]
CPU = torch.device("cpu")
STEPS: Any = [
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
]


@pytest.fixture
def images():
    """(4, 3, 20, 24) float32 in 0..1: colours of all sextants, greys, black, white."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 20, 24, generator=generator)
    x[0, :, :5] = x[0, :1, :5]
    x[1, :, :2] = 0
    x[2, :, :2] = 1
    x[3, 0, :5] = x[3, 1, :5]  # ties between the two largest channels
    return x


def column(values):
    return torch.tensor(values).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "values"),
    [
        (adjust_brightness, reference.adjust_brightness, FACTORS),
        (adjust_contrast, reference.adjust_contrast, FACTORS),
        (adjust_saturation, reference.adjust_saturation, FACTORS),
        (adjust_hue, reference.adjust_hue, SHIFTS),
    ],
)
def test_jitter_steps_equal_torchvision(images, ours, theirs, values):
    expected = torch.stack([theirs(image, value) for image, value in zip(images, values, strict=True)])
    # torchvision weighs red by .2989, Pillow and we by .299: up to 1e-4 * .5 in the grey value.
    torch.testing.assert_close(ours(images, column(values)), expected, rtol=0, atol=1e-4)


def test_hue_turns_the_primaries():
    primaries = torch.eye(3).view(3, 3, 1, 1)
    third = adjust_hue(primaries, column([1 / 3] * 3))
    torch.testing.assert_close(third, primaries[[1, 2, 0]], rtol=0, atol=1e-6)


def test_grayscale_equals_torchvision(images):
    expected = reference.rgb_to_grayscale(images)
    torch.testing.assert_close(luma(images), expected, rtol=0, atol=1e-4)


def test_solarize_equals_torchvision(images):
    torch.testing.assert_close(solarize(images), reference.solarize(images, 0.5))


@pytest.mark.parametrize("sigmas", [(0.1, 0.3, 0.5, 0.6), (0.1, 0.8, 1.4, 2.0)])
def test_blur_equals_torchvision(images, sigmas):
    radius = 6
    expected = [
        reference.gaussian_blur(image, [2 * radius + 1] * 2, [sigma])
        for image, sigma in zip(images, sigmas, strict=True)
    ]
    got = gaussian_blur(images, column(sigmas), radius)
    torch.testing.assert_close(got, torch.stack(expected), rtol=0, atol=1e-6)


def test_blur_radius_is_cut_at_a_tiny_view(images):
    tiny = images[:, :, :4, :4]
    blurred = gaussian_blur(tiny, column([2.0] * 4), radius=6)
    assert blurred.shape == tiny.shape
    assert 0 < blurred.std() < tiny.std()


def draw(px, number, seed=0):
    policy = view_policy("lowcompute", "cnn", px)
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], blur_range_px(px), seed)
    parameters = sampler(0, np.arange(number), np.full(number, px), np.full(number, px))
    return parameters.take(slice(0, 2))


def finish(views, parameters, mean=IMAGENET_MEAN, std=IMAGENET_STD, px=224):
    """Photometric of (M, h, w, 3) uint8."""
    x = (views.permute(0, 3, 1, 2) / 255).contiguous()
    return Photometric(mean, std, blur_range_px(px)[1], CPU)(x, plan_steps(parameters))


def row(parameters: ViewParameters, index: int) -> dict:
    return {name: array[index] for name, array in vars(parameters).items()}


def normalize(x):
    return (x - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def torchvision_chain(image, p, radius):
    """The recipe on one (3, h, w) float tensor."""
    for kind in p["jitter_order"]:
        if kind >= 0:
            image = STEPS[kind](image, float(p["jitter_factor"][kind]))
    if p["grayscale"]:
        image = reference.rgb_to_grayscale(image, 3)
    if p["blur_sigma"] > 0:
        image = reference.gaussian_blur(image, [2 * radius + 1] * 2, [float(p["blur_sigma"])])
    return reference.solarize(image, 0.5) if p["solarize"] else image


def pillow_chain(image: Any, p):
    """The recipe as the papers' code runs it: Pillow, rounded to uint8 after each step."""
    for kind in p["jitter_order"]:
        if kind >= 0:
            image = STEPS[kind](image, float(p["jitter_factor"][kind]))
    if p["grayscale"]:
        image = reference.rgb_to_grayscale(image, 3)
    if p["blur_sigma"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(p["blur_sigma"])))
    return ImageOps.solarize(image) if p["solarize"] else image


def photos(number, px):
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 256, (number, px // 8, px // 8, 3), dtype=np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((px, px), Image.Resampling.BICUBIC)) for image in coarse]
    return np.stack(smooth)


def test_chain_equals_torchvision_sample_by_sample():
    px, number = 224, 16
    views = photos(2 * number, px)
    parameters = draw(px, number)
    got = finish(torch.from_numpy(views), parameters)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for index, view in enumerate(views):
        expected = torchvision_chain(torch.from_numpy(view).permute(2, 0, 1) / 255, row(parameters, index), 6)
        difference = (got[index] - normalize(expected)).abs()
        # A value within 1e-4 of one half may fall on the other side of the solarization.
        assert (difference > 2e-3).float().mean() < (1e-3 if parameters.solarize[index] else 1e-9)


def test_chain_is_near_pillow():
    px, number = 64, 40
    views = photos(2 * number, px)
    parameters = draw(px, number)
    got = finish(torch.from_numpy(views), parameters, (0, 0, 0), (1 / 255,) * 3, px).permute(0, 2, 3, 1).numpy()
    means, largest = [], []
    for index, view in enumerate(views):
        if parameters.solarize[index]:  # a level on the other side of the threshold is far away; tested above
            continue
        expected = np.asarray(pillow_chain(Image.fromarray(view), row(parameters, index))).astype(float)
        difference = np.abs(got[index] - expected)
        means.append(difference.mean())
        largest.append(difference.max())
    # Pillow cuts the fraction off after each of four steps (1.2 levels on average, measured without hue and blur), its
    # hue has 256 steps of which it cuts the fraction off too (up to 19 levels in a saturated pixel), and its blur is a
    # few box filters (0.1).
    assert len(means) > 60
    assert np.mean(means) < 1.6
    assert max(means) < 2.6
    assert max(largest) < 20


def test_parameters_that_do_nothing_give_the_normalized_image():
    views = torch.from_numpy(photos(4, 32))
    still = {name: np.zeros_like(array) for name, array in vars(draw(32, 2)).items()}
    still["jitter_order"] = np.full_like(still["jitter_order"], -1)
    got = finish(views, ViewParameters(**still), px=32)
    torch.testing.assert_close(got, normalize(views.permute(0, 3, 1, 2) / 255), rtol=0, atol=1e-6)


def test_a_sample_does_not_depend_on_the_batch():
    views = torch.from_numpy(photos(8, 32))
    parameters = draw(32, 4)
    together = finish(views, parameters, px=32)
    for index in range(8):
        alone = ViewParameters(**{name: array[index : index + 1] for name, array in vars(parameters).items()})
        single = finish(views[index : index + 1], alone, px=32)[0]
        torch.testing.assert_close(single, together[index], rtol=0, atol=1e-6)
