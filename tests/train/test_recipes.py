import dataclasses
import json
from pathlib import Path

import pytest
import tyro

from midge.__main__ import main
from midge.runtime.errors import UserError
from midge.train.config import PretrainConfig
from midge.train.recipes import RECIPES, defaults, find_recipe, flag_value, moco_cnn, swav_cnn
from midge.train.recipes_table import flag

DATA, OUT = Path("data"), Path("out")


def test_swav_recipe_is_the_papers():
    config = swav_cnn(DATA, OUT)
    assert (config.method, config.batch_size, config.epochs) == ("swav", 1024, 200)
    assert (config.base_lr, config.min_lr, config.warmup_lr, config.warmup_epochs) == (0.3, 0.0048, 0.075, 10)
    assert (config.head_hidden, config.head_bottleneck, config.head_outputs) == (4096, 128, 3000)
    assert (config.temperature, config.sinkhorn_epsilon, config.sinkhorn_iterations) == (0.1, 0.05, 3)
    assert (config.queue_size, config.queue_start_epochs, config.freeze_last_layer_epochs) == (3840, 15, 1)
    assert config.head_batch_norm


def test_moco_recipe_is_the_papers():
    config = moco_cnn(DATA, OUT)
    assert (config.method, config.base_lr, config.min_lr, config.warmup_lr) == ("mocov2", 0.48, 0.0048, 0)
    assert (config.head_hidden, config.head_bottleneck, config.head_batch_norm) == (2048, 128, False)
    assert (config.queue_size, config.temperature) == (65536, 0.2)
    assert (config.teacher_momentum, config.teacher_momentum_end) == (0.999, 0.999)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"quickstart"}))
def test_each_recipe_stands_for_two_that_differ_in_their_views_alone(name):
    low, base = (dataclasses.asdict(find_recipe(f"{name}-{views}")(DATA, OUT)) for views in ("lowcompute", "baseline"))
    assert {field for field in low if low[field] != base[field]} == {"recipe", "views"}
    assert find_recipe(name)(DATA, OUT).views == low["views"] == "lowcompute"
    assert base["recipe"] == f"{name}-baseline"


@pytest.mark.parametrize("name", ["dino", "dino-cnn-tiny", "resnet-baseline", "-baseline", ""])
def test_unknown_recipes_are_named_with_what_there_is(name):
    with pytest.raises(UserError, match=r"Unknown recipe .*dino-cnn, dino-vit, moco-cnn"):
        find_recipe(name)


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], "dino-cnn"),
        (["--method", "swav"], "swav-cnn"),
        (["--method=mocov2", "--backbone", "mobilenetv2_100"], "moco-cnn"),
        (["--backbone=vit_tiny_patch16_224"], "dino-vit"),
        (["--method", "swav", "--backbone", "deit_tiny_patch16_224"], "swav-vit"),
        (["--recipe", "moco-vit", "--backbone", "resnet34"], "moco-vit"),
        (["--recipe", "dino-vit-baseline", "--method", "dino"], "dino-vit-baseline"),
    ],
)
def test_flags_start_from_the_recipe_of_the_method_and_the_backbone(arguments, recipe):
    assert defaults(arguments).recipe == recipe


def test_flags_change_single_values_of_a_recipe():
    arguments = ["--recipe", "swav-cnn-baseline", "--data", "d", "--out", "o", "--head-outputs", "77"]
    config = tyro.cli(PretrainConfig, args=arguments, default=defaults(arguments))
    expected = dataclasses.replace(swav_cnn(Path("d"), Path("o")), recipe="swav-cnn-baseline", views="baseline")
    assert config == dataclasses.replace(expected, head_outputs=77)


def test_a_recipe_of_another_method_is_refused(capsys):
    assert main(["pretrain", "--recipe", "dino-cnn", "--method", "swav", "--data", "d", "--out", "o"]) == 2
    assert "--recipe dino-cnn is of the method dino, not swav" in capsys.readouterr().err


def test_an_unknown_method_is_found_by_the_command(tmp_path, capsys):
    assert main(["pretrain", "--method", "byol", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "Unknown method 'byol': choose one of dino, mocov2, swav." in capsys.readouterr().err


def test_flag_value():
    assert flag_value(["--a", "1", "--b=2", "--a=3"], "a") == "3"
    assert flag_value(["--a"], "a") is None
    assert flag_value(["--ab", "1"], "a") is None


def test_recipes_are_listed_and_explained(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["recipes", "moco-cnn-baseline"]) == 0
    shown = capsys.readouterr().out
    assert "--queue-size" in shown and "65536" in shown and "baseline" in shown
    assert "midge pretrain --recipe moco-cnn-baseline --data IMAGES --out RUN" in shown
    assert main(["recipes", "moco-cnn", "--images", "3000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipes"]["moco-cnn"]["queue_size"] == 1500
    assert main(["recipes", "moco"]) == 2


def test_settings_are_shown_as_flags_that_the_command_takes():
    assert flag("head_batch_norm", False) == ("--no-head-batch-norm", "")
    assert flag("fit_to_data", True) == ("--fit-to-data", "")
    assert flag("global_area", (0.3, 1.0)) == ("--global-area", "0.3 1.0")


def test_a_number_of_images_that_cannot_be(capsys):
    assert main(["recipes", "dino-cnn", "--images", "-5"]) == 2
    assert "--images is -5: give 1 or more." in capsys.readouterr().err
