"""The batched crops against Pillow's, and the packing that brings the images there."""

import numpy as np
import pytest
import torch
from PIL import Image

from midge.train.device_views import (
    GROUP_PIXELS,
    DeviceViews,
    crop_and_resize,
    group_images,
    pack_batch,
    trim,
)
from midge.train.sampling import ViewSampler
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BOXES = [(20, 30, 300, 310), (100, 200, 60, 70), (0, 0, 375, 500), (374, 499, 1, 1), (5, 5, 38, 33), (0, 490, 375, 10)]


def photo(height=375, width=500, seed=0, low=0, high=256):
    """Smooth, with edges, from black to white or from ``low`` to ``high``."""
    coarse = np.random.default_rng(seed).integers(low, high, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).copy()


def padded(image, dtype=torch.float32):
    height, width, _ = image.shape
    x = torch.zeros(1, -(-height // 8) * 8, 3, -(-width // 8) * 8, dtype=dtype)
    x[0, :height, :, :width] = torch.from_numpy(image).permute(0, 2, 1)
    return x


def pillow(image, box, flip, px):
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    view = crop.resize((px, px), Image.Resampling.BICUBIC)
    return np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view).astype(float)


@pytest.mark.parametrize("px", [224, 128, 32, 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_crops_are_pillows_to_the_rounding(px, dtype):
    boxes = torch.tensor([[[*box, float(flip)]] for box in BOXES for flip in (False, True)])
    # Pillow rounds after each of its passes: half a level, times the sum of the second filter's absolute weights (1.3),
    # and half a level; .25 are float16's. At full contrast Pillow also clips between the passes what the first one
    # overshoots, which the second one would have brought back in part.
    for image, bound in ((photo(low=60, high=196), 1.4), (photo(), 3)):
        views = crop_and_resize(padded(image, dtype), boxes, px).float().clamp(0, 1) * 255
        for view, (*box, flip) in zip(views[:, 0], boxes[:, 0].int().tolist(), strict=True):
            difference = np.abs(view.permute(1, 2, 0).numpy() - pillow(image, box, flip, px))
            assert difference.max() < bound
            assert difference.mean() < 0.35


def test_float16_does_no_harm_and_bfloat16_would():
    image, boxes = photo(), torch.tensor([[[*box, 0.0]] for box in BOXES])
    exact = crop_and_resize(padded(image), boxes, 128)
    harm = {}
    for dtype in (torch.float16, torch.bfloat16):
        difference = 255 * (crop_and_resize(padded(image, dtype), boxes, 128).float() - exact).abs()
        harm[dtype] = (difference.mean(), difference.max())
    assert harm[torch.float16][0] < 0.05
    assert harm[torch.float16][1] < 0.5  # less than the rounding of an 8-bit view
    assert harm[torch.bfloat16][0] > 0.2
    assert harm[torch.bfloat16][1] > 2


def test_nothing_outside_the_crop_shows_through():
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[10:20, 10:20] = 200
    views = crop_and_resize(padded(image), torch.tensor([[[10.0, 10.0, 10.0, 10.0, 0.0]]]), 32)
    torch.testing.assert_close(views, torch.full_like(views, 200 / 255))


def draw(images, policy, seed=0):
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], blur_range_px(policy.global_px), seed)
    return sampler(0, np.arange(len(images)), *np.array([image.shape[:2] for image in images]).T)


def render(images, policy):
    views = DeviceViews(policy, (0.0,) * 3, (1.0,) * 3, blur_range_px(policy.global_px)[1], CPU)
    return views(pack_batch([(images, draw(images, policy))], len(images), policy))


def test_an_image_does_not_depend_on_its_neighbours(monkeypatch):
    policy = view_policy("lowcompute", "cnn", 32)
    images = [photo(*size, seed=n) for n, size in enumerate([(60, 80), (200, 40), (33, 34), (1, 1), (64, 64)])]
    together = render(images, policy)
    monkeypatch.setattr("midge.train.device_views.GROUP_PIXELS", 1)  # each image alone
    alone = render(images, policy)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert together.global_views.shape == (10, 3, 32, 32)
    assert together.local_views.shape == (30, 3, 18, 18)
    assert together.local_views.is_contiguous(memory_format=torch.channels_last)


def test_groups_hold_what_they_may_and_every_image_once():
    side = int(GROUP_PIXELS**0.5) // 2
    sizes = np.array([(side, side)] * 9 + [(5 * side, side), (10, 10), (10, 2000)])
    groups = group_images(sizes)
    assert [n for group in groups for n in range(group.start, group.stop)] == list(range(len(sizes)))
    for group in groups:
        assert group.stop - group.start == 1 or np.prod(sizes[group].max(axis=0)) * len(sizes[group]) <= GROUP_PIXELS
    assert groups[0] == slice(0, 4)


def test_trimming_leaves_the_views_and_bounds_a_strip():
    policy = view_policy("lowcompute", "cnn", 32)
    images = [photo(20, 4000), photo(300, 400)]
    parameters = draw(images, policy)
    trimmed, moved = trim(images, parameters)
    assert trimmed[0].shape[1] < 20 * 27 + 1  # crops of 5 % that still fit are 4 / 3 / 0.05 times as long
    for n in range(2):
        for v in range(policy.num_views):
            height, width = parameters.height[v, n], parameters.width[v, n]
            old = images[n][parameters.top[v, n] :, parameters.left[v, n] :][:height, :width]
            new = trimmed[n][moved.top[v, n] :, moved.left[v, n] :][:height, :width]
            assert np.array_equal(old, new)
            assert new.shape[:2] == (height, width)
