"""The one path from a decoded image to a network's input.

Evaluation, calibration and the device all call the same :class:`Preprocess`, because a resize by another library alone
moves the accuracy of a small network by some tenths of a point. It is PIL and numpy, without torch, and equal to
torchvision's ``Resize(resize_px)``, ``CenterCrop(crop_px)``, ``ToTensor``, ``Normalize`` on PIL images:

* the short side becomes ``resize_px``, the long side ``int(resize_px * long / short)`` (rounded down), antialiased;
* the crop starts at ``round((side - crop_px) / 2)``, halves rounded to even;
* values are divided by 255, then by channel the mean is subtracted and the result divided by std, all in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import UserError, unknown_name
from .fields import Fields

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PX = 4096


@dataclass(frozen=True)
class Preprocess:
    """Resize the short side, crop the centre, scale to 0..1, normalize.

    Attributes:
        resize_px: short side after the resize; at least ``crop_px``.
        crop_px: side of the square that is cropped: the network's input size.
        interpolation: one of nearest, bilinear, bicubic, lanczos.
        mean: per channel (RGB), of values in 0..1.
        std: per channel (RGB), of values in 0..1; above 0.
        embedded: the network scales and normalizes by itself, so that it takes the crop in 8 bits.
    """

    resize_px: int
    crop_px: int
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    embedded: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.crop_px <= self.resize_px <= MAX_PX:
            raise UserError(
                f"Cannot crop {self.crop_px} px from images resized to {self.resize_px} px: the crop must be at least "
                f"1 px and at most the resize, which is at most {MAX_PX} px."
            )
        if self.interpolation not in INTERPOLATIONS:
            raise unknown_name("interpolation", self.interpolation, INTERPOLATIONS)
        if not all(value > 0 for value in self.std):
            raise UserError(f"Cannot normalize by std {self.std}: every value must be above 0.")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one input of the network: (3, crop_px, crop_px), or (crop_px, crop_px, 3) where ``embedded``."""
        side = self.crop_px
        return (side, side, 3) if self.embedded else (3, side, side)

    @property
    def input_dtype(self) -> str:
        """Type of the input: ``"float32"``, or ``"uint8"`` where ``embedded``."""
        return "uint8" if self.embedded else "float32"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Preprocess one image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            ``input_shape`` of ``input_dtype``, C-contiguous.
        """
        crop = self.crop(image)
        return crop if self.embedded else self.normalize(crop[None])[0]

    def crop(self, image: np.ndarray) -> np.ndarray:
        """Resize and crop one image: (H, W, 3) uint8 -> (crop_px, crop_px, 3) uint8, C-contiguous."""
        height, width = image.shape[:2]
        size = resized_size(width, height, self.resize_px)
        if size != (width, height):
            image = np.asarray(Image.fromarray(image).resize(size, INTERPOLATIONS[self.interpolation]))
        left, top = (round((side - self.crop_px) / 2) for side in size)
        return np.ascontiguousarray(image[top : top + self.crop_px, left : left + self.crop_px])

    def normalize(self, crops: np.ndarray) -> np.ndarray:
        """Scale and normalize crops: (N, H, W, 3) uint8 -> (N, 3, H, W) float32, C-contiguous."""
        scaled = crops.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
        mean = np.array(self.mean, dtype=np.float32)[:, None, None]
        std = np.array(self.std, dtype=np.float32)[:, None, None]
        return (scaled - mean) / std

    def to_json(self) -> dict[str, Any]:
        """The JSON object that :meth:`from_json` reads."""
        value = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        if not self.embedded:
            del value["embedded"]
        return value

    @classmethod
    def from_json(cls, value: object, what: str = "preprocess") -> Preprocess:
        """Read what :meth:`to_json` wrote.

        Args:
            value: the JSON object, which may be hostile.
            what: its name for errors.

        Raises:
            UserError: a field is missing or out of range.
        """
        fields = Fields(value, what)
        mean, std = fields.numbers("mean", 3), fields.numbers("std", 3)
        return cls(
            resize_px=fields.integer("resize_px", 1, MAX_PX),
            crop_px=fields.integer("crop_px", 1, MAX_PX),
            interpolation=fields.choice("interpolation", INTERPOLATIONS),
            mean=(mean[0], mean[1], mean[2]),
            std=(std[0], std[1], std[2]),
            embedded=fields.flag("embedded", False),
        )


def resized_size(width: int, height: int, resize_px: int) -> tuple[int, int]:
    """(width, height) after the short side has become ``resize_px``, by torchvision's rule."""
    short, long = min(width, height), max(width, height)
    new_long = int(resize_px * long / short)
    return (resize_px, new_long) if width <= height else (new_long, resize_px)
