"""The images of the benchmarks: real ones, or generated JPEGs of the size and the weight of ImageNet's."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from midge.runtime.images import list_images

JPEG_BYTES = 90_000


def read(folder: Path, number: int) -> list[bytes]:
    """The first images of a seeded subset."""
    images = list_images(folder, number)
    return [images.path(index).read_bytes() for index in range(len(images))]


def make_jpegs(number: int) -> list[bytes]:
    """Pictures of 500 x 375 px with detail at all scales, each in the quality that comes nearest to 90 kB."""
    rng = np.random.default_rng(0)
    result = []
    for _ in range(number):
        image = np.full((375, 500, 3), 128.0)
        for side in (4, 10, 25, 75, 190, 375):
            grid = rng.normal(0, 30 if side < 50 else 14, (side, side * 4 // 3, 3)).astype(np.float32)
            image += cv2.resize(grid, (500, 375), interpolation=cv2.INTER_CUBIC)
        picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
        qualities = [encode(picture, quality) for quality in range(70, 100, 2)]
        result.append(min(qualities, key=lambda item: abs(len(item) - JPEG_BYTES)))
    return result


def encode(picture: Image.Image, quality: int) -> bytes:
    """As JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()
