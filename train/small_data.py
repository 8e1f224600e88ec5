"""Fit a paper's recipe to fewer images or a shorter run than it was made for, by stated rules (no torch).

ImageNet has 1.28 million images, and the recipes 200 epochs in steps of 1024 images: a quarter of a million steps. With
3,000 images the same numbers mean two steps an epoch, a queue that holds each image twenty times, and more outputs than
images. The rules are ours:

- The batch is the largest power of two that leaves 50 steps in an epoch, 64 at least.
- The peak learning rate goes with the square root of the batch, not with the batch: LARS and AdamW make updates of a
  length that does not depend on the gradient's, so the linear rule, made for SGD, would leave a small batch untrained.
- What lasts a number of epochs (warm-ups, what is frozen at first, the start of a queue) keeps its share of the run.
- Outputs and prototypes go with the square root of the number of images.
- MoCo's queue holds half of the images at most, so that an image seldom meets its own key; SwAV's keeps its number of
  batches. Keys are normalized in groups of 32, two at least: where the last maps have one position, as at 32 px, the
  statistics of eight images are noise.
- The teacher, or key network, averages over a fiftieth of the run at most.
- With fewer than 10,000 steps the teacher's temperature stays where it starts; with fewer than 100,000 images MoCo's is
  at most 0.1, and SwAV's assignments are harder, with an epsilon of at most 0.03: by the recipe's 0.05 a batch of 64
  images is assigned so evenly that a run on 3,000 photos made all of them alike at first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from .config import PretrainConfig
from .recipes import find_recipe

PUBLISHED_IMAGES = 1_281_167
MIN_STEPS_PER_EPOCH = 50
MIN_BATCH = 64
MIN_OUTPUTS = 64
MAX_AVERAGED_SHARE = 1 / 50
MIN_MOMENTUM = 0.9
MIN_KEY_GROUP = 32
FEW_STEPS = 10_000
FEW_IMAGES = 100_000
SMALL_DATA_TEMPERATURE = 0.1
SMALL_DATA_EPSILON = 0.03

DURATIONS = {
    "dino": ("warmup_epochs", "teacher_temperature_warmup_epochs", "freeze_last_layer_epochs"),
    "mocov2": ("warmup_epochs",),
    "swav": ("warmup_epochs", "freeze_last_layer_epochs", "queue_start_epochs"),
}
"""Method -> what lasts a number of epochs."""


def fit_to_data(config: PretrainConfig, num_images: int) -> tuple[PretrainConfig, dict[str, Any]]:
    """Apply the rules above to every value that is the recipe's; others stay.

    Args:
        config: of the run.
        num_images: in the data.

    Returns:
        The fitted configuration, and what was changed: field -> new value. Nothing on data of ImageNet's size.
    """
    recipe = find_recipe(config.recipe)(config.data, config.out)
    changed: dict[str, Any] = {}

    def current(name: str) -> Any:
        return changed.get(name, getattr(config, name))

    def change(name: str, value: float) -> None:
        if getattr(config, name) == getattr(recipe, name) != value:
            changed[name] = value

    most = max(num_images // MIN_STEPS_PER_EPOCH, 1)
    change("batch_size", min(recipe.batch_size, max(MIN_BATCH, 2 ** int(math.log2(most)))))
    batch_size = current("batch_size")
    steps = max(1, round(config.epochs * (num_images // batch_size)))
    if batch_size < recipe.batch_size:
        change("base_lr", round(recipe.base_lr * math.sqrt(recipe.batch_size / batch_size), 6))
    for name in DURATIONS.get(config.method, ()):
        change(name, round(getattr(recipe, name) * min(1.0, config.epochs / recipe.epochs), 4))
    if config.method in ("dino", "swav"):
        share = math.sqrt(min(1.0, num_images / PUBLISHED_IMAGES))
        fitted = max(MIN_OUTPUTS, 8 * round(recipe.head_outputs * share / 8)) if share < 1 else recipe.head_outputs
        change("head_outputs", fitted)
    if config.method in ("dino", "mocov2"):
        momentum = max(MIN_MOMENTUM, 1 - 1 / (MAX_AVERAGED_SHARE * steps))
        change("teacher_momentum", round(min(recipe.teacher_momentum, momentum), 6))
        if recipe.teacher_momentum_end == recipe.teacher_momentum:  # it is constant
            change("teacher_momentum_end", current("teacher_momentum"))
    if config.method == "dino" and steps < FEW_STEPS:
        change("teacher_temperature", current("teacher_temperature_start"))
    if config.method == "mocov2":
        change("queue_size", max(batch_size, min(recipe.queue_size, num_images // 2)))
        change("key_groups", max(2, min(recipe.key_groups, batch_size // MIN_KEY_GROUP)))
        if num_images < FEW_IMAGES:
            change("temperature", min(recipe.temperature, SMALL_DATA_TEMPERATURE))
    if config.method == "swav":
        change("queue_size", recipe.queue_size * batch_size // recipe.batch_size)
        if num_images < FEW_IMAGES:
            change("sinkhorn_epsilon", min(recipe.sinkhorn_epsilon, SMALL_DATA_EPSILON))
    return dataclasses.replace(config, **changed), changed
