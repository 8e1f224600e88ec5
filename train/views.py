"""What a view is: how much of the image it shows, at what size, and how it is recoloured.

The paper's contribution is four values of :class:`ViewPolicy` (Tan et al., ICLR 2023, table 1): the area of the global
crops, the area and the size of the local crops, and the weight of the two kinds of pairs in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..runtime.errors import UserError, unknown_name

PUBLISHED_PX = 224
"""Global view size (px) at which the published sizes and blur radii hold."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey value: ITU-R 601, as Pillow and torchvision."""

KERNEL_SIGMAS = 3.0
"""Where the blur's kernel may end, in standard deviations: beyond lies 0.3 % of its weight, at most 0.7 grey levels."""

MIN_DECODE_PX = 384
"""Short side, px, that an image keeps at least when it is decoded at a part of its size, up to views of 224 px."""


@dataclass(frozen=True)
class ViewPolicy:
    """The geometry of multi-crop and the weights of its pairs.

    Attributes:
        global_area: range of the share of the image's area that a global view shows.
        local_area: the same for a local view.
        local_px: side of a local view, px.
        num_local: number of local views. There are always two global ones.
        weight_global: weight of the mean loss over the two global-global pairs.
        weight_local: weight of the mean loss over the 2 x num_local global-local pairs.
        global_px: side of a global view, px.
    """

    global_area: tuple[float, float]
    local_area: tuple[float, float]
    local_px: int
    num_local: int
    weight_global: float
    weight_local: float
    global_px: int = PUBLISHED_PX

    @property
    def num_views(self) -> int:
        """Number of views of one image, the two global ones included."""
        return 2 + self.num_local

    def scaled(self, global_px: int, multiple: int = 1) -> ViewPolicy:
        """The same policy for another global view size: the local size keeps its ratio, rounded.

        Args:
            global_px: side of the global views, px.
            multiple: what both sizes must be multiples of, px: a ViT's patch, 1 for a CNN.

        Raises:
            UserError: ``global_px`` is not a positive multiple of ``multiple``.
        """
        if global_px < multiple or global_px % multiple:
            raise UserError(
                f"A global view of {global_px} px does not divide into patches of {multiple} px: "
                f"give --image-px a multiple of {multiple}."
            )
        local_px = rounded_px(self.local_px * global_px / self.global_px, multiple)
        return replace(self, global_px=global_px, local_px=local_px)


def rounded_px(px: float, multiple: int) -> int:
    """The nearest size that the network takes: a multiple of ``multiple`` px, and at least that."""
    return max(int(px / multiple + 0.5) * multiple, multiple)


LOWCOMPUTE = {
    "cnn": ViewPolicy((0.3, 1.0), (0.05, 0.3), local_px=128, num_local=6, weight_global=0.4, weight_local=0.6),
    "vit": ViewPolicy((0.3, 1.0), (0.05, 0.3), local_px=128, num_local=10, weight_global=0.4, weight_local=0.6),
}

VIEW_POLICIES = {
    # The baselines weigh all pairs alike: 2 of 2 + 2 x 6 pairs are global-global (CNN), 2 of 2 + 2 x 10 (ViT).
    "baseline": {
        "cnn": ViewPolicy((0.14, 1.0), (0.05, 0.14), local_px=96, num_local=6, weight_global=1 / 7, weight_local=6 / 7),
        "vit": ViewPolicy(
            (0.25, 1.0), (0.05, 0.25), local_px=96, num_local=10, weight_global=1 / 11, weight_local=10 / 11
        ),
    },
    "lowcompute": LOWCOMPUTE,
    "auto": LOWCOMPUTE,  # the local size then follows from the images: see magnification.py
}
"""Policy name -> family of network -> policy at a global view of 224 px."""


@dataclass(frozen=True)
class Augmentation:
    """How a view is recoloured after the crop; the chance of each step is drawn per view.

    Attributes:
        brightness: the factor is drawn from 1 - brightness .. 1 + brightness.
        contrast: likewise.
        saturation: likewise.
        hue: the shift is drawn from -hue .. hue, in turns of the colour circle.
        blur_chance: probability of the Gaussian blur.
        solarize_chance: probability of the solarization.
        jitter_chance: probability of the four jitter steps, which then come in random order.
        grayscale_chance: probability of dropping the colour.
        flip_chance: probability of the horizontal mirror.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: float
    blur_chance: float
    solarize_chance: float
    jitter_chance: float = 0.8
    grayscale_chance: float = 0.2
    flip_chance: float = 0.5


AUGMENTATIONS = {
    "dino": (
        Augmentation(0.4, 0.4, 0.2, 0.1, blur_chance=1.0, solarize_chance=0.0),
        Augmentation(0.4, 0.4, 0.2, 0.1, blur_chance=0.1, solarize_chance=0.2),
        Augmentation(0.4, 0.4, 0.2, 0.1, blur_chance=0.5, solarize_chance=0.0),
    ),
    "swav": (Augmentation(0.8, 0.8, 0.8, 0.2, blur_chance=0.5, solarize_chance=0.0),) * 3,
}
AUGMENTATIONS["mocov2"] = AUGMENTATIONS["dino"]
"""Method -> augmentation of the first global view, of the second, and of every local view."""


def augmentations(method: str, jitter_strength: float | None = None) -> tuple[Augmentation, ...]:
    """How a method's views are recoloured.

    Args:
        method: a key of :data:`AUGMENTATIONS`.
        jitter_strength: s of SimCLR's colour jitter (Chen et al., 2020, arXiv 2002.05709, appendix A): brightness,
            contrast and saturation 0.8 s, hue 0.2 s, 0..1.25 for every view; or None for the method's own. SwAV's own
            has s = 1.

    Returns:
        Of the first global view, of the second, and of every local view.
    """
    if jitter_strength is None:
        return AUGMENTATIONS[method]
    colour, hue = 0.8 * jitter_strength, 0.2 * jitter_strength
    jitter = {"brightness": colour, "contrast": colour, "saturation": colour, "hue": hue}
    return tuple(replace(view, **jitter) for view in AUGMENTATIONS[method])


def view_policy(
    name: str,
    family: str,
    global_px: int,
    multiple: int = 1,
    *,
    local_px: int | None = None,
    num_local: int | None = None,
    global_area: tuple[float, float] | None = None,
    local_area: tuple[float, float] | None = None,
) -> ViewPolicy:
    """Look up a policy, scale it to the global view size, and put given values in the place of its own.

    Args:
        name: ``"baseline"``, ``"lowcompute"`` or ``"auto"``; for the last ``local_px`` is expected to be given, as
            :func:`~midge.train.magnification.equal_magnification_px` finds it. Without, it is that of lowcompute.
        family: ``"cnn"`` or ``"vit"``.
        global_px: side of the global views, px.
        multiple: what both view sizes must be multiples of, px.
        local_px: side of the local views, px, or None for the policy's; so for the others.
        num_local: number of local views.
        global_area: range of the share of the image's area that a global view shows.
        local_area: the same for a local view.

    Raises:
        UserError: no such policy, or ``global_px`` or ``local_px`` does not fit the patch.
    """
    if name not in VIEW_POLICIES:
        raise unknown_name("view policy", name, VIEW_POLICIES)
    if local_px is not None and local_px % multiple:
        raise UserError(f"--local-px is {local_px}: give a multiple of the patch, {multiple} px.")
    given = {"local_px": local_px, "num_local": num_local, "global_area": global_area, "local_area": local_area}
    policy = VIEW_POLICIES[name][family].scaled(global_px, multiple)
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if name == "baseline" and num_local is not None:  # all pairs alike, however many: 2 of 2 + 2 x num_local
        changes |= {"weight_global": 1 / (1 + num_local), "weight_local": num_local / (1 + num_local)}
    return replace(policy, **changes)


def blur_range_px(global_px: int) -> tuple[float, float]:
    """Range of the blur's standard deviation, px, at a global view size.

    Published is .1 to 2 px at 224 px, for global and local views alike, which the low-compute policy shows at equal
    magnification. At 32 px two pixels would wipe out what the published blur leaves, so (our choice) the range keeps
    its ratio to the global view.
    """
    return 0.1 * global_px / PUBLISHED_PX, 2.0 * global_px / PUBLISHED_PX


def min_decode_px(global_px: int) -> int:
    """Short side, px, that a decoded image keeps at least: 384, in proportion for global views above 224 px."""
    return max(MIN_DECODE_PX, -(-MIN_DECODE_PX * global_px // PUBLISHED_PX))
