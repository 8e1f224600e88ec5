"""The same multi-crop as other code makes it, for the benchmarks: DINO's recipe on Pillow, torchvision v2, kornia."""

from __future__ import annotations

import importlib
import io
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from midge.train.views import Augmentation, ViewPolicy

BICUBIC = InterpolationMode.BICUBIC


def plans(policy: ViewPolicy, augmentations: Sequence[Augmentation]) -> list[tuple[int, Any, Augmentation]]:
    """Of each view: its side, its range of areas, its augmentation."""
    first, second, local = augmentations
    globals_ = [(policy.global_px, policy.global_area, augmentation) for augmentation in (first, second)]
    return [*globals_, *[(policy.local_px, policy.local_area, local)] * policy.num_local]


def jitter(module: Any, a: Augmentation) -> Any:
    """RandomApply of the ColorJitter of ``torchvision.transforms`` or its v2."""
    return module.RandomApply([module.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue)], p=a.jitter_chance)


class PillowRecipe:
    """What the papers' code runs in its workers: each view by itself, on a Pillow image.

    Attributes:
        seconds: CPU time by stage so far.
    """

    def __init__(self, policy: ViewPolicy, augmentations: Any, blur_px: Any, mean: Any, std: Any) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.chains = [self.chain(*plan, blur_px, mean, std) for plan in plans(policy, augmentations)]

    @staticmethod
    def chain(
        px: int, area: Any, a: Augmentation, blur_px: Any, mean: Any, std: Any
    ) -> dict[str, Callable[[Any], Any]]:
        """Stages by name, in order."""

        def blur(image: Any) -> Any:
            if random.random() >= a.blur_chance:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(*blur_px)))

        return {
            "crop, resize, flip": v1.Compose(
                [v1.RandomResizedCrop(px, area, interpolation=BICUBIC), v1.RandomHorizontalFlip(a.flip_chance)]
            ),
            "jitter": jitter(v1, a),
            "grayscale": v1.RandomGrayscale(a.grayscale_chance),
            "blur": blur,
            "solarize": lambda image: ImageOps.solarize(image) if random.random() < a.solarize_chance else image,
            "to tensor, normalize": v1.Compose([v1.ToTensor(), v1.Normalize(mean, std)]),
        }

    def __call__(self, data: Sequence[bytes]) -> list[list[Tensor]]:
        """All views of some encoded images, float32."""
        return [[self.run(chain, image) for chain in self.chains] for image in map(self.decode, data)]

    def decode(self, data: bytes) -> Image.Image:
        """As ``torchvision.datasets`` does."""
        start = time.process_time()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        self.seconds["decode"] += time.process_time() - start
        return image

    def run(self, chain: dict[str, Callable[[Any], Any]], image: Any) -> Any:
        """One view."""
        for name, stage in chain.items():
            start = time.process_time()
            image = stage(image)
            self.seconds[name] += time.process_time() - start
        return image


def torchvision_v2(policy: ViewPolicy, augmentations: Any, blur_px: Any, mean: Any, std: Any) -> Callable[[Any], Any]:
    """Decoded images -> views, by torchvision's v2 on uint8 tensors: (H, W, 3) arrays to lists of float tensors."""

    def chain(px: int, area: Any, a: Augmentation) -> Any:
        kernel = 2 * int(np.ceil(3 * blur_px[1])) + 1
        return v2.Compose(
            [
                v2.RandomResizedCrop(px, area, interpolation=BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(a.flip_chance),
                jitter(v2, a),
                v2.RandomGrayscale(a.grayscale_chance),
                v2.RandomApply([v2.GaussianBlur(kernel, blur_px)], p=a.blur_chance),
                v2.RandomSolarize(128, p=a.solarize_chance),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    chains = [chain(*plan) for plan in plans(policy, augmentations)]

    def run(images: Sequence[np.ndarray]) -> list[list[Tensor]]:
        # In torchvision's own layout: planes.
        planes = [torch.from_numpy(image).permute(2, 0, 1).contiguous() for image in images]
        return [[chain(image) for chain in chains] for image in planes]

    return run


def kornia(policy: ViewPolicy, augmentations: Any, blur_px: Any, mean: Any, std: Any) -> Callable[[Any], Any] | None:
    """The same by kornia, on a batch where all images are of one size; its resize has no antialiasing.

    Returns:
        (N, 3, H, W) float32 in 0..1 -> views; None where kornia is not installed.
    """
    try:
        augment = importlib.import_module("kornia.augmentation")
    except ModuleNotFoundError:
        return None

    def chain(px: int, area: Any, a: Augmentation) -> Any:
        kernel = 2 * int(np.ceil(3 * blur_px[1])) + 1
        steps = [
            augment.RandomResizedCrop((px, px), area, resample="bicubic", cropping_mode="slice"),
            augment.RandomHorizontalFlip(a.flip_chance),
            augment.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue, p=a.jitter_chance),
            augment.RandomGrayscale(p=a.grayscale_chance),
            augment.RandomGaussianBlur((kernel, kernel), blur_px, p=a.blur_chance),
        ]
        if a.solarize_chance:
            steps.append(augment.RandomSolarize(0.5, 0.0, p=a.solarize_chance))
        return torch.nn.Sequential(*steps, augment.Normalize(torch.tensor(mean), torch.tensor(std)))

    chains = [chain(*plan) for plan in plans(policy, augmentations)]
    return lambda x: [chain(x) for chain in chains]
