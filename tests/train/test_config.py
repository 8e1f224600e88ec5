import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from midge.runtime.errors import UserError
from midge.train.config import NAMES, OPERATIONAL_FIELDS, RANGES, PretrainConfig
from midge.train.recipes import RECIPES, dino_cnn, dino_vit, quickstart

DATA, OUT = Path("data"), Path("out")


def test_cnn_recipe_is_the_papers():
    config = dino_cnn(DATA, OUT)
    assert (config.batch_size, config.epochs, config.image_px, config.views) == (1024, 200, 224, "lowcompute")
    assert (config.optimizer, config.base_lr, config.min_lr, config.warmup_epochs) == ("lars", 0.48, 0.0048, 10)
    assert (config.weight_decay, config.weight_decay_end, config.trust_coefficient) == (1e-6, 1e-6, 1e-3)
    assert (config.head_hidden, config.head_bottleneck, config.head_outputs) == (2048, 256, 4096)
    assert config.head_batch_norm
    assert config.fixed_magnitude
    temperatures = (config.temperature, config.teacher_temperature_start, config.teacher_temperature)
    assert temperatures == (0.1, 0.04, 0.07)
    assert (config.teacher_temperature_warmup_epochs, config.freeze_last_layer_epochs) == (50, 1)
    assert (config.teacher_momentum, config.teacher_momentum_end, config.center_momentum) == (0.996, 1, 0.9)


def test_vit_recipe_is_the_papers():
    config = dino_vit(DATA, OUT)
    assert (config.optimizer, config.base_lr, config.min_lr, config.drop_path) == ("adamw", 5e-4, 1e-5, 0.1)
    assert (config.weight_decay, config.weight_decay_end) == (0.04, 0.4)
    assert (config.head_outputs, config.head_batch_norm, config.fixed_magnitude) == (65536, False, False)
    assert config.teacher_temperature_warmup_epochs == 30


def test_changes_override_a_recipe():
    assert quickstart(DATA, OUT, epochs=7.5, head_outputs=99).epochs == 7.5
    assert dino_vit(DATA, OUT, drop_path=0.0).drop_path == 0


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_pass_the_check_and_go_through_json(name):
    config = RECIPES[name](DATA, OUT)
    config.check()
    read_back = json.loads(json.dumps(config.to_json()))
    assert set(read_back) == {field.name for field in dataclasses.fields(config)}
    assert read_back["data"] == str(DATA.absolute())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0.0}, "--epochs is 0: give a value above 0"),
        ({"epochs": float("nan")}, "--epochs is nan"),
        ({"batch_size": 1}, "--batch-size is 1: give a value from 2 to"),
        ({"seed": -1}, "--seed is -1"),
        ({"image_px": 4}, "--image-px is 4"),
        ({"max_unreadable": 0.9}, "--max-unreadable is 0.9"),
        ({"export_weights": "both"}, "--export-weights is 'both': choose student or teacher"),
        ({"resize_px": 100}, "--resize-px is 100: give at least --image-px, 224"),
        ({"blur_px": (2.0, 1.0)}, "--blur-px is"),
        ({"teacher_momentum": 1.2}, "--teacher-momentum is 1.2"),
        ({"channels": (8, 0)}, "--channels is"),
        ({"std": (0.2, 0.0, 0.2)}, "--std is"),
        ({"local_area": (0.5, 0.2)}, "--local-area is"),
        ({"global_area": (0.0, 1.0)}, "--global-area is"),
        ({"koleo_weight": -1.0}, "--koleo-weight is -1"),
    ],
)
def test_values_out_of_range_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        dino_cnn(DATA, OUT, **changes).check()


def test_tables_name_fields():
    names = {field.name for field in dataclasses.fields(PretrainConfig)}
    assert set(RANGES) <= names
    assert names >= OPERATIONAL_FIELDS


def test_command_line():
    config = tyro.cli(
        PretrainConfig,
        args=["--data", "d", "--out", "o", "--channels", "32", "64", "--resume", "--blur-px", "0.1", "1"],
    )
    assert (config.channels, config.resume, config.epochs) == ((32, 64), True, 200)
    assert config.blur_px == (0.1, 1)


def test_every_field_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(PretrainConfig, args=["--help"])
    shown = capsys.readouterr().out
    assert "Peak learning rate at a batch of 256" in shown
    source = Path(inspect.getfile(PretrainConfig)).read_text().splitlines()
    body = source[source.index("class PretrainConfig:") : source.index("    def check(self) -> None:")]
    fields = [i for i, line in enumerate(body) if ": " in line and line.startswith("    ") and line[4].isalpha()]
    fields = [i for i in fields if body[i].split(":")[0].strip().isidentifier()]
    assert len(fields) == len(dataclasses.fields(PretrainConfig))
    assert all(body[i + 1].startswith('    """') for i in fields)


def test_configuration_imports_no_torch():
    code = (
        "import sys, midge.train.config, midge.train.recipes, midge.train.run_folder; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_those_of_the_tables():
    from midge.train.methods import METHODS
    from midge.train.optim import OPTIMIZERS

    assert set(NAMES["method"]) == set(METHODS)
    assert set(NAMES["optimizer"]) == set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [("--method", "byol", "Unknown method 'byol': choose one of dino"), ("--epochs", "0", "--epochs is 0")],
)
def test_slips_are_told_before_torch_is_imported(tmp_path, flag, value, says):
    script = (
        "import sys\n"
        "from midge.__main__ import main\n"
        f"code = main(['pretrain', '--data', 'x', '--out', {str(tmp_path / 'run')!r}, {flag!r}, {value!r}])\n"
        "sys.exit('torch is imported' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr
