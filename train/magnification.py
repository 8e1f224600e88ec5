"""The local size at which local and global views show things equally large: ``--views auto`` (no torch).

A view magnifies by its side over the side of its crop. The published low-compute sizes, 224 and 128 px, happen to give
both kinds of views the same magnification on photos of the usual 4:3; :func:`equal_magnification_px` asks the same of
any areas, view size and images. That this is what makes the low-compute views work is our hypothesis, not the paper's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..runtime.decode import UnreadableImageError, read_size
from ..runtime.errors import UserError
from ..runtime.files import read_json
from ..runtime.images import ImageList, UnreadableBudget
from ..runtime.progress import say
from .config import PretrainConfig
from .sampling import ATTEMPTS, MAX_ASPECT, MIN_ASPECT, crop_sizes
from .views import ViewPolicy, rounded_px, view_policy

AUTO = "auto"
SAMPLED_IMAGES = 1000
GRID = 64  # areas x aspects at which the crop law is evaluated
STEM_STRIDE = 2
"""CNNs halve an image in their first layer, so that of an odd side the last pixels would count less: sides are even."""


def resolve_local_px(config: PretrainConfig, images: ImageList, family: str, multiple: int) -> PretrainConfig:
    """The configuration with the local size that ``--views auto`` stands for; any other comes back as it is.

    A run that is resumed takes the size from its config.json, so that it depends on no second look at the images.

    Args:
        config: of the run.
        images: the data.
        family: of the backbone, ``"cnn"`` or ``"vit"``.
        multiple: what the view sizes must be multiples of, px.

    Raises:
        UserError: no image of the sample can be read, or the global size does not fit the patch.
    """
    if config.views != AUTO or config.local_px is not None:
        return config
    if (local_px := _stored_local_px(config)) is None:
        policy = view_policy(
            AUTO, family, config.image_px, multiple, global_area=config.global_area, local_area=config.local_area
        )
        sampled, sizes = sample_sizes(images, config.seed)
        local_px = equal_magnification_px(policy, sizes, multiple)
        say(
            f"Local views of {local_px} px beside global ones of {config.image_px} px, by {len(sampled)} images' sizes."
        )
    return replace(config, local_px=local_px)


def _stored_local_px(config: PretrainConfig) -> int | None:
    """The local size in the config.json of a run that is resumed, if it was found by the rule."""
    path = config.out / "config.json"
    if not (config.resume and path.exists()):
        return None
    description = read_json(path, "run configuration")
    stored = description.get("config") if isinstance(description, dict) else None
    local_px = stored.get("local_px") if isinstance(stored, dict) and stored.get("views") == AUTO else None
    return local_px if isinstance(local_px, int) else None


def sample_sizes(images: ImageList, seed: int, budget: UnreadableBudget | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read the sizes of a random sample of the images from their headers.

    Args:
        images: the data.
        seed: of the sample.
        budget: counts the unreadable ones; None passes over them, where they are counted later.

    Returns:
        Indices of up to 1,000 readable images, (N,) int64, and their heights and widths, (N, 2) int64, px.

    Raises:
        UserError: none of them can be read.
    """
    chosen, sizes = [], []
    for index in np.random.default_rng(seed).permutation(len(images))[:SAMPLED_IMAGES].tolist():
        try:
            sizes.append(read_size(images.source(index), images.path(index)))
            chosen.append(index)
        except UnreadableImageError as error:
            if budget is not None:
                budget.skip(error)
    if not chosen:
        tried = min(len(images), SAMPLED_IMAGES)
        raise UserError(f"None of {tried} images of '{images.root}' can be read: find out why with 'midge data check'.")
    return np.array(chosen), np.array(sizes)


def equal_magnification_px(policy: ViewPolicy, sizes: np.ndarray, multiple: int) -> int:
    """The local size, px, at which views of both kinds magnify alike on average.

    Args:
        policy: its areas and its global size.
        sizes: (N, 2) heights and widths of images, px.
        multiple: what the result must be a multiple of, px.
    """
    mean_global, mean_local = (realized_area(area, sizes) for area in (policy.global_area, policy.local_area))
    local_px = policy.global_px * math.sqrt(mean_local / mean_global)
    return min(rounded_px(local_px, math.lcm(multiple, STEM_STRIDE)), policy.global_px)


def realized_area(area: tuple[float, float], sizes: np.ndarray) -> float:
    """Mean share of an image that the random resized crop really shows, 0..1: an exact mean, nothing is drawn.

    Crops that do not fit are drawn again, and those are the large ones: of 0.3 to 1 of a 4:3 photo, on average 0.55
    remain instead of 0.65.

    Args:
        area: range of the share that is asked for.
        sizes: (N, 2) heights and widths of images, px.
    """
    steps = (np.arange(GRID) + 0.5) / GRID
    asked, log_aspect = np.meshgrid(
        area[0] + (area[1] - area[0]) * steps,
        math.log(MIN_ASPECT) + math.log(MAX_ASPECT / MIN_ASPECT) * steps,
    )
    asked, aspect = asked.reshape(-1, 1, 1), np.exp(log_aspect).reshape(-1, 1, 1)  # one attempt at a time
    unique, counts = np.unique(sizes, axis=0, return_counts=True)
    means = [_realized(asked, aspect, unique[i : i + 1]) for i in range(len(unique))]
    return float(np.average(means, weights=counts))


def _realized(asked: np.ndarray, aspect: np.ndarray, size: np.ndarray) -> float:
    """Mean share that the crops of one image show, over all attempts, (G, 1, 1) each."""
    height, width, fits = crop_sizes(asked, aspect, *size.T)  # (G, 1); where it does not fit, the central crop
    share = height * width / size.prod()
    fitting = fits.mean()
    none_fits = (1 - fitting) ** ATTEMPTS
    central = share[~fits].mean() if none_fits else 0.0
    return (1 - none_fits) * (share[fits].mean() if fitting else 0.0) + none_fits * central
