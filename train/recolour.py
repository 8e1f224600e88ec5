"""Recolour one view on the CPU, in place: jitter, grayscale, blur, solarize; uint8 in, uint8 out.

The law is that of ``photometric.py``, which does the same to whole groups on a device, and of torchvision. Each step is
computed exactly and rounded to the nearest grey level, where Pillow cuts the fraction off. OpenCV's vector kernels take
a tenth of the time of Pillow's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from .views import KERNEL_SIGMAS, LUMA

# The workers are the parallelism, and OpenCV's own threads, once started, do not survive the fork of a worker.
cv2.setNumThreads(0)

LEAST_BLUR = 1 / math.sqrt(2 * math.log(4 * 255))
"""The standard deviation, px, up to which no pixel can change by half a grey level: 510 exp(-1 / 2 sigma^2) < 1/2."""

_IDENTITY = np.eye(3)
_LUMA_ROWS = np.tile(LUMA, (3, 1))


def recolour(
    view: np.ndarray, order: Sequence[int], factor: Sequence[float], gray: bool, blur_sigma: float, invert: bool
) -> None:
    """Apply to one view what was drawn for it; the attributes of :class:`~.sampling.ViewParameters` say more.

    Args:
        view: (h, w, 3) uint8, contiguous, changed in place.
        order: the jitter's kinds, -1 throughout for none.
        factor: by kind.
        gray: drop the colour.
        blur_sigma: px; 0 is no blur.
        invert: solarize.
    """
    if order[0] >= 0:
        for kind in order:
            JITTER[kind](view, factor[kind])
    if gray:
        grayscale(view)
    if blur_sigma > LEAST_BLUR:
        gaussian_blur(view, blur_sigma)
    if invert:
        solarize(view)


def adjust_brightness(view: np.ndarray, factor: float) -> None:
    """Scale towards black."""
    cv2.convertScaleAbs(view, view, factor)


def adjust_contrast(view: np.ndarray, factor: float) -> None:
    """Scale the distance to the view's mean grey value."""
    mean = float(np.dot(LUMA, cv2.mean(view)[:3]))
    matrix = np.zeros((3, 4))
    matrix[:, :3] = factor * _IDENTITY
    matrix[:, 3] = (1 - factor) * mean
    cv2.transform(view, matrix, view)


def adjust_saturation(view: np.ndarray, factor: float) -> None:
    """Scale the distance to each pixel's grey value."""
    cv2.transform(view, factor * _IDENTITY + (1 - factor) * _LUMA_ROWS, view)


def adjust_hue(view: np.ndarray, shift: float) -> None:
    """Turn the hue by ``shift`` turns, in floats: as fast as in 8 bits, whose nearest hue is up to 11 levels off."""
    hsv = cv2.cvtColor(view.astype(np.float32), cv2.COLOR_RGB2HSV)  # hue in degrees; the value keeps its range
    degrees = np.zeros((view.shape[1], 3), dtype=np.float32)
    degrees[:, 0] = 360 * (shift % 1)  # forwards: of a negative hue OpenCV's vector kernel makes another colour
    hsv += degrees
    cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), view)


JITTER: tuple[Callable[[np.ndarray, float], None], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def grayscale(view: np.ndarray) -> None:
    """Drop the colour."""
    cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB, view)


def gaussian_blur(view: np.ndarray, sigma: float) -> None:
    """Blur, the border mirrored; sigma in px."""
    radius = min(math.ceil(KERNEL_SIGMAS * sigma), min(view.shape[:2]) - 1)
    kernel = cv2.getGaussianKernel(2 * radius + 1, sigma)
    cv2.sepFilter2D(view, -1, kernel, kernel, view)  # rounds once; cv2.GaussianBlur takes longer and is 1 level off


def solarize(view: np.ndarray) -> None:
    """Invert the values from 128 up: what is inverted is then the smaller of the two."""
    cv2.min(view, cv2.bitwise_not(view), view)
