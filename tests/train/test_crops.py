import numpy as np
import pytest
from PIL import Image

from midge.train.crops import crop_view

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(height, width, low, high):
    return np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)


def pillow(image, top, left, height, width, flip, px):
    view = (
        Image.fromarray(image).crop((left, top, left + width, top + height)).resize((px, px), Image.Resampling.BICUBIC)
    )
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("size", "box", "px"),
    [
        ((375, 500), (20, 30, 300, 310), 224),
        ((375, 500), (100, 200, 60, 70), 128),
        ((375, 500), (0, 0, 375, 500), 32),
        ((28, 28), (3, 4, 20, 17), 32),
        ((28, 28), (5, 5, 8, 7), 18),
        ((5, 9), (0, 0, 5, 6), 32),
        ((60, 60), (5, 5, 38, 33), 37),
        ((1, 1), (0, 0, 1, 1), 32),
    ],
)
def test_equals_pillow(size, box, px, flip):
    out = np.empty((px, px, 3), dtype=np.uint8)
    soft, hard = noise(*size, low=80, high=176), noise(*size, low=0, high=256)
    crop_view(soft, *box, flip=flip, out=out)
    difference = np.abs(out.astype(int) - pillow(soft, *box, flip=flip, px=px))
    assert difference.max() <= 2
    assert difference.mean() < 0.4
    crop_view(hard, *box, flip=flip, out=out)  # white noise at full contrast: the filter overshoots everywhere
    assert np.abs(out.astype(int) - pillow(hard, *box, flip=flip, px=px)).mean() < 1


def test_nothing_outside_the_crop_shows_through():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[10:20, 10:20] = 200
    out = np.empty((32, 32, 3), dtype=np.uint8)
    crop_view(image, 10, 10, 10, 10, False, out)
    assert np.array_equal(out, np.full_like(out, 200))
