import dataclasses
import json
import math

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableBudget, list_images
from midge.train.magnification import equal_magnification_px, realized_area, resolve_local_px, sample_sizes
from midge.train.recipes import dino_cnn
from midge.train.sampling import ViewSampler
from midge.train.views import AUGMENTATIONS, view_policy


@pytest.mark.parametrize(
    ("size", "multiple", "local_px"),
    [
        ((375, 500), 1, 126),  # exactly 126.53: the nearest even size
        ((500, 375), 1, 126),
        ((400, 400), 1, 122),  # 121.98
        ((375, 500), 14, 126),
        ((375, 500), 16, 128),
        ((400, 400), 16, 128),
        ((1, 1), 1, 224),  # every crop of one pixel is that pixel
    ],
)
def test_local_size_at_the_published_areas(size, multiple, local_px):
    policy = dataclasses.replace(view_policy("auto", "cnn", 224), global_px=224)
    assert equal_magnification_px(policy, np.array([size]), multiple) == local_px


def test_local_size_grows_with_the_areas_and_the_global_size():
    sizes = np.array([[28, 28], [375, 500]])
    by_area = [
        equal_magnification_px(view_policy("auto", "cnn", 224, local_area=(0.05, high)), sizes, 1)
        for high in (0.14, 0.3, 0.8)
    ]
    assert by_area == sorted(set(by_area))
    assert equal_magnification_px(view_policy("auto", "cnn", 448), sizes, 1) == pytest.approx(2 * by_area[1], abs=2)
    assert equal_magnification_px(view_policy("auto", "cnn", 64, local_area=(1.0, 1.0)), sizes, 1) == 64


@pytest.mark.parametrize("area", [(0.3, 1.0), (0.05, 0.3), (0.14, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("size", [(375, 500), (400, 400), (100, 900), (28, 28)])
def test_realized_area_is_the_mean_of_what_the_sampler_draws(area, size):
    number = 4000
    policy = view_policy("lowcompute", "cnn", 224, num_local=1, global_area=area)
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], (0.1, 2), seed=5)
    drawn = sampler(0, np.arange(number), np.full(number, size[0]), np.full(number, size[1]))
    shares = (drawn.height[:2] * drawn.width[:2] / math.prod(size)).ravel()
    error = shares.std() / math.sqrt(len(shares))
    assert realized_area(area, np.array([size])) == pytest.approx(shares.mean(), abs=4 * error + 0.002)


def test_realized_area_is_the_mean_over_the_images():
    sizes = np.array([[400, 400], [100, 900], [400, 400]])
    alone = [realized_area((0.3, 1), sizes[i : i + 1]) for i in range(3)]
    assert realized_area((0.3, 1), sizes) == pytest.approx(np.mean(alone))
    assert alone[1] < alone[0]


def mixed_folder(tmp_path):
    """Images of six modes and two sizes, one that is no image, and one that breaks off behind its header."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "I;16")):
        Image.new(mode, (50, 30)).save(folder / f"{i}.png")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    (folder / "text.png").write_text("no image")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    (folder / "whole.png").unlink()
    return folder


def test_sizes_come_from_the_headers_of_whatever_can_be_read(tmp_path):
    images = list_images(mixed_folder(tmp_path))
    chosen, sizes = sample_sizes(images, seed=0)
    by_name = dict(zip([images.paths[i] for i in chosen], sizes.tolist(), strict=True))
    assert by_name == {**{f"{i}.png": [30, 50] for i in range(6)}, "pixel.png": [1, 1], "cut.png": [64, 64]}


def test_unreadable_images_count_where_a_budget_is_given(tmp_path):
    images = list_images(mixed_folder(tmp_path))
    with pytest.raises(UserError, match=r"1 of 9 images are unreadable \(11.1%, allowed 1.0%\), the last one .*text"):
        sample_sizes(images, 0, UnreadableBudget(0.01, len(images)))


def test_none_can_be_read(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"None of 1 images of .* can be read: .*midge data check"):
        sample_sizes(list_images(tmp_path), 0)


@pytest.fixture
def config(image_folder, tmp_path):
    return dino_cnn(image_folder(px=40), tmp_path / "run", views="auto", image_px=32)


def test_resolving_fills_in_the_local_size(config):
    images = list_images(config.data)
    resolved = resolve_local_px(config, images, "cnn", 1)
    assert resolved == dataclasses.replace(config, local_px=18)  # 32 x 122 / 224 = 17.4
    assert resolve_local_px(dataclasses.replace(config, local_area=(0.3, 1.0)), images, "cnn", 1).local_px == 32
    assert resolve_local_px(config, images, "vit", 16).local_px == 16


@pytest.mark.parametrize("changes", [{"views": "lowcompute"}, {"local_px": 20}])
def test_what_is_not_left_to_the_rule_stays(config, changes):
    given = dataclasses.replace(config, **changes)
    assert resolve_local_px(given, list_images(config.data), "cnn", 1) is given


def test_a_resumed_run_keeps_the_size_that_it_began_with(config):
    config.out.mkdir()
    images = list_images(config.data)
    (config.out / "config.json").write_text(json.dumps({"schema": 1, "config": {"views": "auto", "local_px": 24}}))
    resumed = dataclasses.replace(config, resume=True)
    assert resolve_local_px(resumed, images, "cnn", 1).local_px == 24
    assert resolve_local_px(config, images, "cnn", 1).local_px == 18
    for other in ({"views": "lowcompute", "local_px": 24}, {"views": "auto", "local_px": "24"}, {"views": "auto"}):
        (config.out / "config.json").write_text(json.dumps({"schema": 1, "config": other}))
        assert resolve_local_px(resumed, images, "cnn", 1).local_px == 18
