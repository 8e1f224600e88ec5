"""``midge recipes``: the known good settings, by name, and what each changes (no torch)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from ..runtime.errors import UserError
from .config import PretrainConfig
from .recipes import RECIPES, find_recipe
from .small_data import fit_to_data
from .views import VIEW_POLICIES

NOT_SETTINGS = frozenset({"data", "out", "recipe"})


@dataclass(frozen=True)
class RecipesConfig:
    """List the recipes of `midge pretrain --recipe NAME`, or show one: what it sets, and what fewer images change.

    The recipes are those of Tan et al. (ICLR 2023) for ImageNet. Each stands for two: NAME-lowcompute, which is NAME,
    and NAME-baseline, with the views that the paper starts from. On fewer images the batch is the largest power of two
    with 50 steps an epoch; the learning rate goes with the batch's square root, outputs with that of the number of
    images; durations keep their share of the run; queues and averages shrink.
    """

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """The recipe to show; default all, a line each."""

    images: int | None = None
    """Show what the recipe becomes with so many images."""

    json: bool = False
    """Print one JSON document instead of a table."""


def recipes(config: RecipesConfig) -> int:
    """Print the recipes.

    Raises:
        UserError: there is no such recipe, or a number of images that cannot be.
    """
    if config.images is not None and config.images < 1:
        raise UserError(f"--images is {config.images}: give 1 or more.")
    names = [config.name] if config.name else list(RECIPES)
    shown = {name: settings(name, config.images) for name in names}
    if config.json:
        print(json.dumps({"schema": 1, "recipes": shown}))
    elif config.name:
        print_one(config.name, shown[config.name], config.images)
    else:
        print_all()
    return 0


def settings(name: str, num_images: int | None) -> dict[str, Any]:
    """What a recipe sets, field by field, fitted to a number of images where one is given."""
    made = find_recipe(name)(Path(), Path())
    if num_images is not None and made.fit_to_data:
        made, _ = fit_to_data(made, num_images)
    return {field: value for field, value in dataclasses.asdict(made).items() if field not in NOT_SETTINGS}


def print_all() -> None:
    """A line for each recipe."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("recipe", "method", "backbone", "what it is"):
        table.add_column(column)
    for name, recipe in RECIPES.items():
        made = recipe(Path(), Path())
        table.add_row(name, made.method, made.backbone, (recipe.__doc__ or "").partition("\n")[0])
    console = Console(highlight=False)
    console.print(table)
    views = " or ".join(f"-{name}" for name in VIEW_POLICIES)
    console.print(f"\nEach also with {views} behind its name. 'midge recipes NAME' shows what it sets.", markup=False)


def flag(field: str, value: Any) -> tuple[str, str]:
    """A setting as the command line takes it: the flag, and its value where it has one."""
    name = field.replace("_", "-")
    if isinstance(value, bool):
        return ("--" if value else "--no-") + name, ""
    return "--" + name, " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def print_one(name: str, shown: dict[str, Any], num_images: int | None) -> None:
    """Every value of a recipe that is not the plain default, and how to run it."""
    console = Console(highlight=False, soft_wrap=True)
    stem = name if name in RECIPES else name.rpartition("-")[0]
    console.print((RECIPES[stem].__doc__ or "").partition("\n")[0], markup=False)
    plain = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
    always = {"method", "backbone", "views", "optimizer", "base_lr", "batch_size", "epochs", "image_px"}
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for field, value in shown.items():
        if field in always or value != plain[field]:
            table.add_row(*flag(field, value))
    console.print(table)
    if num_images is not None:
        console.print(f"With {num_images} images.", markup=False)
    console.print(f"\nmidge pretrain --recipe {name} --data IMAGES --out RUN", markup=False)
