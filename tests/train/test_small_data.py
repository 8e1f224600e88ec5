import dataclasses
import math
from pathlib import Path

import pytest

from midge.train.recipes import RECIPES, dino_cnn, moco_cnn, quickstart, swav_cnn
from midge.train.small_data import PUBLISHED_IMAGES, fit_to_data

DATA, OUT = Path("data"), Path("out")


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"quickstart"}))
def test_data_of_imagenets_size_changes_nothing(name):
    config = RECIPES[name](DATA, OUT)
    assert fit_to_data(config, PUBLISHED_IMAGES) == (config, {})


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"quickstart"}))
@pytest.mark.parametrize("num_images", [64, 500, 3000, 10_000, 60_000, 500_000])
def test_fitted_values_are_ones_that_a_run_can_have(name, num_images):
    recipe = RECIPES[name](DATA, OUT)
    config, changed = fit_to_data(recipe, num_images)
    config.check()
    assert {field for field in changed if getattr(config, field) != getattr(recipe, field)} == set(changed)
    assert config.batch_size <= recipe.batch_size and config.head_outputs <= recipe.head_outputs
    assert config.queue_size == 0 or config.queue_size >= config.batch_size
    assert config.batch_size == 64 or num_images / config.batch_size >= 50


def test_three_thousand_images():
    config, _ = fit_to_data(dino_cnn(DATA, OUT), 3000)
    assert config.batch_size == 64
    assert config.base_lr * 64 / 256 == pytest.approx(
        0.48 * 1024 / 256 / math.sqrt(16)
    )  # the root of the batch's ratio
    assert config.head_outputs == 8 * round(4096 * math.sqrt(3000 / PUBLISHED_IMAGES) / 8)
    assert config.warmup_epochs == 10  # 200 epochs: its share of the run is kept
    steps = 200 * (3000 // 64)
    assert config.teacher_momentum == pytest.approx(1 - 50 / steps, abs=1e-6)
    assert config.teacher_temperature == 0.04
    config, _ = fit_to_data(moco_cnn(DATA, OUT), 3000)
    assert (config.queue_size, config.temperature, config.key_groups) == (1500, 0.1, 2)
    assert config.teacher_momentum == config.teacher_momentum_end == pytest.approx(1 - 50 / steps, abs=1e-6)
    config, _ = fit_to_data(swav_cnn(DATA, OUT), 3000)
    assert (config.queue_size, config.sinkhorn_epsilon) == (3840 * 64 // 1024, 0.03)


def test_groups_of_keys_keep_32_images():
    groups = {images: fit_to_data(moco_cnn(DATA, OUT), images)[0].key_groups for images in (7_000, 13_000, 60_000)}
    assert groups == {7_000: 4, 13_000: 8, 60_000: 8}


def test_durations_keep_their_share_of_a_short_run():
    config, _ = fit_to_data(swav_cnn(DATA, OUT, epochs=20.0), PUBLISHED_IMAGES)
    assert (config.warmup_epochs, config.queue_start_epochs, config.freeze_last_layer_epochs) == (1, 1.5, 0.1)
    longer, _ = fit_to_data(swav_cnn(DATA, OUT, epochs=800.0), PUBLISHED_IMAGES)
    assert longer.warmup_epochs == 10


def test_given_values_stay():
    given = {"batch_size": 128, "head_outputs": 4000, "queue_size": 512, "base_lr": 1.0, "warmup_epochs": 3.0}
    config, changed = fit_to_data(moco_cnn(DATA, OUT, **given, epochs=10.0), 3000)
    assert {field: getattr(config, field) for field in given} == given
    assert not set(changed) & set(given)


def test_the_quickstart_is_made_for_its_size():
    assert not quickstart(DATA, OUT).fit_to_data
    assert dataclasses.replace(dino_cnn(DATA, OUT), fit_to_data=False).fit_to_data is False


def test_a_short_run_keeps_the_teachers_temperature_where_it_was_told_to_start():
    config, _ = fit_to_data(dino_cnn(DATA, OUT, teacher_temperature_start=0.06), 3000)
    assert config.teacher_temperature == config.teacher_temperature_start == 0.06
