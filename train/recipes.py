"""Known good configurations, each a function: a base and what differs from it (no torch)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from ..runtime.errors import UserError, unknown_name
from .config import PretrainConfig
from .views import VIEW_POLICIES

VIT: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "drop_path": 0.1,
    "optimizer": "adamw",
    "base_lr": 5e-4,
    "min_lr": 1e-5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.4,
    "head_batch_norm": False,
}
"""What a ViT-Ti/16 has instead: AdamW, no batch normalization anywhere, drop path."""


def dino_cnn(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """DINO for a CNN: LARS, a head with batch normalization and 4096 outputs of fixed length."""
    return dataclasses.replace(PretrainConfig(data=data, out=out, recipe="dino-cnn"), **changes)


def dino_vit(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """DINO for a ViT: AdamW, a head without batch normalization and 65536 outputs, ten local views."""
    own = {"recipe": "dino-vit", "head_outputs": 65536, "fixed_magnitude": False}
    return dino_cnn(data, out, **{**VIT, **own, "teacher_temperature_warmup_epochs": 30.0, **changes})


def swav_cnn(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """SwAV for a CNN: 3000 prototypes, a queue of 3840 from epoch 15, stronger colour jitter."""
    own: dict[str, Any] = {
        "recipe": "swav-cnn",
        "method": "swav",
        "base_lr": 0.3,
        "warmup_lr": 0.075,
        "head_hidden": 4096,
        "head_bottleneck": 128,
        "head_outputs": 3000,
        "queue_size": 3840,
    }
    return dino_cnn(data, out, **{**own, **changes})


def swav_vit(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """SwAV for a ViT: AdamW as DINO has it; not in the paper."""
    return swav_cnn(data, out, **{**VIT, "recipe": "swav-vit", "warmup_lr": 0.0, **changes})


def moco_cnn(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """MoCo v2 for a CNN: a queue of 65536 keys, one key and seven queries per image."""
    own: dict[str, Any] = {
        "recipe": "moco-cnn",
        "method": "mocov2",
        "head_bottleneck": 128,
        "head_batch_norm": False,
        "temperature": 0.2,
        "teacher_momentum": 0.999,
        "teacher_momentum_end": 0.999,
        "queue_size": 65536,
    }
    return dino_cnn(data, out, **{**own, **changes})


def moco_vit(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """MoCo v2 for a ViT: AdamW as DINO has it; not in the paper."""
    return moco_cnn(data, out, **{**VIT, "recipe": "moco-vit", **changes})


def quickstart(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """DINO sized for minutes on a laptop's CPU: small images, a narrow ResNet18, a small head, a fast teacher.

    In a thousand steps the published settings leave features worse than those they started from. What was found to
    help, on training images that were held out (k-NN of 20,000 images' training; 77.0 % without any): frozen batch
    normalization and KoLeo 77 to 78 %, views that show more of an image, whose object fills it, 79.9 %.
    """
    small: dict[str, Any] = {
        "recipe": "quickstart",
        "fit_to_data": False,
        "channels": (32, 64, 128, 256),
        "image_px": 32,
        "resize_px": 32,
        "global_area": (0.7, 1.0),
        "local_area": (0.3, 0.8),
        "epochs": 0.4,  # what eight minutes of the whole path leave on two cores without AVX-512
        "batch_size": 64,
        "base_lr": 3.0,
        "warmup_epochs": 0.05,
        "head_hidden": 512,
        "head_bottleneck": 128,
        "head_outputs": 1024,
        "teacher_temperature": 0.04,
        "teacher_temperature_warmup_epochs": 0.0,
        "teacher_momentum": 0.97,
        "freeze_last_layer_epochs": 0.1,
        "koleo_weight": 0.05,
        "freeze_batch_norm": True,
    }
    return dino_cnn(data, out, **{**small, **changes})


RECIPES: dict[str, Callable[..., PretrainConfig]] = {
    "dino-cnn": dino_cnn,
    "dino-vit": dino_vit,
    "moco-cnn": moco_cnn,
    "moco-vit": moco_vit,
    "quickstart": quickstart,
    "swav-cnn": swav_cnn,
    "swav-vit": swav_vit,
}

METHOD_RECIPES = {"dino": "dino", "mocov2": "moco", "swav": "swav"}
"""Method -> what its recipes' names begin with."""

VIT_PREFIXES = ("vit_", "deit", "flexivit")


def find_recipe(name: str) -> Callable[..., PretrainConfig]:
    """A recipe by name: one of the table, or one followed by its views, as ``dino-cnn-baseline``.

    Raises:
        UserError: there is no such recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    stem, _, views = name.rpartition("-")
    if stem in RECIPES and views in VIEW_POLICIES:
        return functools.partial(RECIPES[stem], recipe=name, views=views)
    raise unknown_name("recipe", name, [*RECIPES, *(f"…-{views}" for views in VIEW_POLICIES)])


def defaults(arguments: Sequence[str]) -> PretrainConfig:
    """What the flags of ``midge pretrain`` start from: the recipe named, else that of the method and the backbone.

    Args:
        arguments: of the command line.

    Returns:
        A configuration without data and out.

    Raises:
        UserError: there is no such recipe, or it is of another method than the one named.
    """
    name = flag_value(arguments, "recipe")
    method, backbone = flag_value(arguments, "method"), flag_value(arguments, "backbone")
    if name is None:
        family = "vit" if (backbone or "").startswith(VIT_PREFIXES) else "cnn"
        name = f"{METHOD_RECIPES.get(method or 'dino', 'dino')}-{family}"
    config = find_recipe(name)(tyro.MISSING, tyro.MISSING)
    if method not in (None, config.method) and flag_value(arguments, "recipe") is not None:
        raise UserError(f"--recipe {name} is of the method {config.method}, not {method}: leave one of the two out.")
    return config


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, the last one, or None."""
    value = None
    for index, argument in enumerate(arguments):
        if argument == f"--{name}" and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value
