from dataclasses import replace

import pytest

from midge.runtime.errors import UserError
from midge.train.views import AUGMENTATIONS, VIEW_POLICIES, augmentations, blur_range_px, view_policy


@pytest.mark.parametrize(
    ("name", "family", "global_area", "local_area", "local_px", "num_local", "weight_global"),
    [
        ("baseline", "cnn", (0.14, 1), (0.05, 0.14), 96, 6, 1 / 7),
        ("lowcompute", "cnn", (0.3, 1), (0.05, 0.3), 128, 6, 0.4),
        ("baseline", "vit", (0.25, 1), (0.05, 0.25), 96, 10, 1 / 11),
        ("lowcompute", "vit", (0.3, 1), (0.05, 0.3), 128, 10, 0.4),
    ],
)
def test_published_policies(name, family, global_area, local_area, local_px, num_local, weight_global):
    policy = view_policy(name, family, 224)
    assert (policy.global_area, policy.local_area) == (global_area, local_area)
    assert (policy.global_px, policy.local_px, policy.num_local) == (224, local_px, num_local)
    assert policy.weight_global == pytest.approx(weight_global)
    assert policy.weight_global + policy.weight_local == pytest.approx(1)


def test_baseline_weights_are_the_plain_mean_over_pairs():
    for policy in VIEW_POLICIES["baseline"].values():
        pairs_global, pairs_local = 2, 2 * policy.num_local
        assert policy.weight_global == pytest.approx(pairs_global / (pairs_global + pairs_local))


@pytest.mark.parametrize(
    ("name", "family", "global_px", "patch_px", "local_px"),
    [
        ("baseline", "cnn", 32, 1, 14),  # 13.71
        ("lowcompute", "cnn", 32, 1, 18),  # 18.29
        ("lowcompute", "cnn", 64, 1, 37),  # 36.57
        ("lowcompute", "vit", 224, 16, 128),
        ("baseline", "vit", 32, 4, 12),  # 13.71
        ("lowcompute", "vit", 32, 4, 20),  # 18.29
        ("baseline", "vit", 16, 16, 16),  # never less than a patch
    ],
)
def test_local_views_scale_with_the_global_ones(name, family, global_px, patch_px, local_px):
    policy = view_policy(name, family, global_px, patch_px)
    assert (policy.global_px, policy.local_px) == (global_px, local_px)
    assert policy.local_area == VIEW_POLICIES[name][family].local_area


def test_blur_keeps_its_ratio_to_the_global_view():
    assert blur_range_px(224) == pytest.approx((0.1, 2))
    assert blur_range_px(56) == pytest.approx((0.025, 0.5))


def test_dino_has_three_pipelines():
    first, second, local = AUGMENTATIONS["dino"]
    assert [a.blur_chance for a in (first, second, local)] == [1, 0.1, 0.5]
    assert [a.solarize_chance for a in (first, second, local)] == [0, 0.2, 0]
    assert {(a.brightness, a.contrast, a.saturation, a.hue) for a in (first, second, local)} == {(0.4, 0.4, 0.2, 0.1)}


def test_swavs_own_jitter_has_strength_1():
    assert augmentations("swav") == augmentations("swav", 1.0) == AUGMENTATIONS["swav"]


@pytest.mark.parametrize("method", sorted(AUGMENTATIONS))
def test_the_strength_changes_the_jitter_alone(method):
    for view, own in zip(augmentations(method, 0.5), AUGMENTATIONS[method], strict=True):
        assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.4, 0.1)
        restored = {name: getattr(own, name) for name in ("brightness", "contrast", "saturation", "hue")}
        assert replace(view, **restored) == own


def test_unknown_policy_lists_the_known_ones():
    with pytest.raises(UserError, match=r"Unknown view policy 'huge': choose one of auto, baseline, lowcompute\."):
        view_policy("huge", "cnn", 224)


def test_global_view_must_divide_into_patches():
    with pytest.raises(UserError, match="30 px does not divide into patches of 4 px"):
        view_policy("lowcompute", "vit", 30, 4)


def test_given_values_take_the_place_of_the_policys():
    policy = view_policy("auto", "cnn", 64, local_px=40, num_local=3, global_area=(0.5, 1), local_area=(0.1, 0.2))
    assert (policy.global_px, policy.local_px, policy.num_local) == (64, 40, 3)
    assert (policy.global_area, policy.local_area) == ((0.5, 1), (0.1, 0.2))
    assert (policy.weight_global, policy.weight_local) == (0.4, 0.6)


def test_the_baseline_weighs_all_pairs_alike_whatever_their_number():
    policy = view_policy("baseline", "cnn", 224, num_local=2)  # 2 global-global pairs, 2 x 2 global-local ones
    assert (policy.weight_global, policy.weight_local) == pytest.approx((2 / 6, 4 / 6))
    own = view_policy("baseline", "cnn", 224)
    assert view_policy("baseline", "cnn", 224, num_local=6) == own


def test_a_local_view_must_divide_into_patches_too():
    with pytest.raises(UserError, match="--local-px is 30: give a multiple of the patch, 4 px"):
        view_policy("lowcompute", "vit", 32, 4, local_px=30)
