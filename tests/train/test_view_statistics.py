import json
import subprocess
import sys

import numpy as np
import pytest

from midge.train.sampling import ViewSampler
from midge.train.view_statistics import measure, overlaps
from midge.train.views import AUGMENTATIONS, ViewPolicy, view_policy


def measured(policy, sizes, seed=0):
    sizes = np.array(sizes)
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], (0.1, 2), seed)
    return measure(policy, sampler, np.arange(len(sizes)), sizes)


@pytest.mark.parametrize(
    ("name", "family", "magnification", "overlap", "nothing"),
    [
        ("lowcompute", "cnn", 1.00, 0.75, 0.028),
        ("baseline", "cnn", 1.07, 0.63, 0.125),
        ("baseline", "vit", 1.27, None, None),
    ],
)
def test_reference_figures_of_the_published_policies_on_photos(name, family, magnification, overlap, nothing):
    """Known figures for 500 x 375 px images: the ratio of the median magnifications, the mean share of a local view
    that lies inside a global one, and the share of pairs that have nothing in common."""
    statistics = measured(view_policy(name, family, 224), [(375, 500)] * 2048)
    assert statistics.magnification == pytest.approx(magnification, abs=0.015)
    if overlap is not None:
        assert statistics.overlap == pytest.approx(overlap, abs=0.01)
        assert statistics.nothing == pytest.approx(nothing, abs=0.005)


def test_the_rule_gives_equal_magnification_where_the_published_size_does_not():
    square = [(200, 200)] * 512
    published, auto = (measured(view_policy("auto", "cnn", 224, local_px=px), square) for px in (None, 122))
    assert published.magnification == pytest.approx(0.96, abs=0.01)
    assert auto.magnification == pytest.approx(1, abs=0.01)


def test_every_figure_against_its_definition_view_by_view():
    policy = view_policy("lowcompute", "cnn", 64, num_local=2)
    sizes = np.array([(30, 50), (200, 90), (64, 64)])
    sampler = ViewSampler(policy, AUGMENTATIONS["dino"], (0.1, 2), 3)
    statistics = measure(policy, sampler, np.array([5, 9, 2]), sizes)
    zooms, ratios, shares = ([], []), [], []
    for epoch in range(-(-8192 // 3)):
        drawn = sampler(epoch, np.array([5, 9, 2]), *sizes.T)
        for n, (image_height, image_width) in enumerate(sizes):
            boxes = [[int(getattr(drawn, key)[v, n]) for key in ("top", "left", "height", "width")] for v in range(4)]
            zoom = [
                (px / 64) / np.sqrt(h * w / (image_height * image_width))
                for px, (_, _, h, w) in zip((64, 64, 37, 37), boxes, strict=True)
            ]
            zooms[0].extend(zoom[:2])
            zooms[1].extend(zoom[2:])
            for v in (2, 3):
                local = np.zeros((image_height, image_width), bool)
                top, left, h, w = boxes[v]
                local[top : top + h, left : left + w] = True
                for g in (0, 1):
                    top, left, h, w = boxes[g]
                    shares.append(local[top : top + h, left : left + w].sum() / local.sum())
                    ratios.append(zoom[g] / zoom[v])
        if epoch == 300:  # the slow form is enough for the shares of these
            break
    some = measure_epochs(policy, sampler, sizes, 301)
    assert some["shares"] == pytest.approx(np.sort(shares))
    assert statistics.overlap == pytest.approx(np.mean(shares), abs=0.02)
    assert statistics.nothing == pytest.approx(np.mean(np.array(shares) == 0), abs=0.02)
    assert statistics.inside == pytest.approx(np.mean(np.array(shares) == 1), abs=0.02)
    assert statistics.magnification == pytest.approx(np.median(zooms[0]) / np.median(zooms[1]), abs=0.02)
    assert statistics.zoom[0] == pytest.approx(np.quantile(zooms[0], (0.05, 0.25, 0.5, 0.75, 0.95)), rel=0.05)
    assert statistics.pair_magnification == pytest.approx(np.quantile(ratios, (0.05, 0.25, 0.5, 0.75, 0.95)), rel=0.05)
    assert statistics.half == pytest.approx(np.mean(np.array(shares) >= 0.5), abs=0.02)


def measure_epochs(policy, sampler, sizes, epochs):
    drawn = [sampler(epoch, np.array([5, 9, 2]), *sizes.T) for epoch in range(epochs)]
    return {"shares": np.sort(np.concatenate([overlaps(d).ravel() for d in drawn]))}


def test_views_of_one_pixel_are_that_pixel():
    statistics = measured(view_policy("lowcompute", "cnn", 32), [(1, 1)])
    assert (statistics.overlap, statistics.inside, statistics.nothing) == (1, 1, 0)
    assert statistics.mean_area == (1, 1)
    assert statistics.magnification == pytest.approx(32 / 18)
    assert statistics.px_per_px == (32, 18)


def test_the_size_of_the_images_does_not_matter_but_their_shape():
    policy = ViewPolicy((0.3, 1), (0.05, 0.3), 128, 6, 0.4, 0.6)
    small, large, mixed = (
        measured(policy, sizes)
        for sizes in ([(150, 200)] * 1024, [(1500, 2000)] * 1024, [(150, 200), (1500, 2000)] * 512)
    )
    assert small.magnification == pytest.approx(large.magnification, abs=0.02)
    assert mixed.magnification == pytest.approx(large.magnification, abs=0.02)
    assert mixed.zoom[1] == pytest.approx(large.zoom[1], rel=0.03)


def test_statistics_are_json_and_need_no_torch():
    statistics = measured(view_policy("baseline", "cnn", 32), [(28, 28)] * 8)
    read_back = json.loads(json.dumps(statistics.to_json(), allow_nan=False))
    assert (read_back["global_px"], read_back["local_px"], read_back["pairs"]) == (32, 14, 12 * 8192)
    code = "import sys, midge.train.view_statistics, midge.train.magnification; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
