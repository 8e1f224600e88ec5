"""Each 8-bit step against torchvision's in floats: nothing but the rounding may differ."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as reference
from PIL import Image

from midge.train.recolour import (
    JITTER,
    LEAST_BLUR,
    gaussian_blur,
    grayscale,
    recolour,
    solarize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

THEIRS: Any = [
    reference.adjust_brightness,
    reference.adjust_contrast,
    reference.adjust_saturation,
    reference.adjust_hue,
]
VALUES = [[0.6, 0.85, 1.0, 1.4]] * 2 + [[0.8, 0.9, 1.0, 1.2]] + [[-0.5, -0.1, -0.03, 0.0, 0.1, 0.5]]


@pytest.fixture
def view():
    """(60, 72, 3) uint8: every 17th level of each channel, greys, black, white, ties between channels."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    noise = np.random.default_rng(0).integers(0, 256, (60 * 72 - len(cube), 3), dtype=np.uint8)
    return np.concatenate([cube, noise]).reshape(60, 72, 3)


def planar(view):
    return torch.from_numpy(view.copy()).permute(2, 0, 1) / 255


def levels(x):
    return 255 * x.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", range(4))
def test_jitter_steps_are_torchvisions_to_the_rounding(view, kind):
    for value in VALUES[kind]:
        ours = view.copy()
        JITTER[kind](ours, value)
        expected = levels(THEIRS[kind](planar(view), value))
        # Half a level, and what OpenCV's 10-bit coefficients add in the product with the saturation's matrix (0.23).
        assert np.abs(ours - expected).max() < (0.75 if kind == 2 else 0.53), (kind, value)


def test_hue_in_eight_bits_would_not_do(view):
    """The reason for the detour through floats, and the error that torchvision itself makes on a Pillow image."""
    image: Any = Image.fromarray(view)
    pillow = np.asarray(reference.adjust_hue(image, 0.1)).astype(float)
    assert np.abs(pillow - levels(reference.adjust_hue(planar(view), 0.1))).max() > 5


def test_grayscale_and_solarize(view):
    ours = view.copy()
    grayscale(ours)
    assert np.abs(ours - levels(reference.rgb_to_grayscale(planar(view), 3))).max() < 0.55
    ours = view.copy()
    solarize(ours)
    assert np.array_equal(ours, np.where(view < 128, view, 255 - view))


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 1.4, 2.0])
def test_blur_is_torchvisions_to_the_rounding(view, sigma):
    ours = view.copy()
    gaussian_blur(ours, sigma)
    expected = levels(reference.gaussian_blur(planar(view), [25, 25], [sigma]))
    assert np.abs(ours - expected).max() < 0.5 + 0.7  # and what lies behind three standard deviations


def test_the_least_blur_changes_nothing(view):
    ours = view.copy()
    gaussian_blur(ours, LEAST_BLUR)
    checkerboard = np.indices((60, 72)).sum(axis=0) % 2 * 255
    hardest = np.repeat(checkerboard[:, :, None], 3, axis=2).astype(np.uint8)
    blurred = hardest.copy()
    gaussian_blur(blurred, LEAST_BLUR)
    assert np.abs(blurred.astype(int) - hardest).max() <= 1  # along both axes at once, where one may give a half
    assert (ours != view).mean() < 0.05


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_tiny_views(side):
    view = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    recolour(view, [3, 1, 0, 2], [1.2, 0.8, 1.1, 0.1], True, 2.0, True)
    assert view.shape == (side, side, 3)


def test_nothing_drawn_changes_nothing(view):
    ours = view.copy()
    recolour(ours, [-1] * 4, [9.0] * 4, False, 0.0, False)
    assert np.array_equal(ours, view)


def test_the_order_is_kept(view):
    one, other = view.copy(), view.copy()
    recolour(one, [0, 1, 2, 3], [1.4, 0.6, 1.2, 0.1], False, 0.0, False)
    recolour(other, [1, 0, 2, 3], [1.4, 0.6, 1.2, 0.1], False, 0.0, False)
    for ours, order in ((one, [0, 1, 2, 3]), (other, [1, 0, 2, 3])):
        expected = planar(view)
        for kind in order:
            expected = THEIRS[kind](expected, [1.4, 0.6, 1.2, 0.1][kind])
        difference = np.abs(ours - levels(expected))
        assert difference.mean() < 0.6  # four roundings of a quarter of a level on average
        assert difference.max() < 8  # the hue of a nearly grey pixel turns a rounding into levels
    assert np.abs(one.astype(int) - other).max() > 10
