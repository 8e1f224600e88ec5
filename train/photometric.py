"""Recolour whole groups of views on the device: jitter, grayscale, blur, solarize, normalize.

Each step is torchvision's, with the parameters of each sample: a step works on the samples that drew it and leaves the
others alone. Values stay in 0..1 in float32 until the normalization, which comes last. Which samples a step takes is
known on the host: a mask on a GPU would stop the stream to learn how many samples it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .sampling import ViewParameters
from .views import KERNEL_SIGMAS, LUMA


class Steps(NamedTuple):
    """What to do to M views, step by step: the four places of the jitter by kind, grayscale, blur, solarize.

    Attributes:
        samples: (S,) int64: those of the first step, then those of the second, …
        factor: (S,) float32: for each of them a factor, a shift of the hue, or the blur's standard deviation in px.
        counts: (19,) int64, on the host: samples of each step.
    """

    samples: Tensor
    factor: Tensor
    counts: np.ndarray


def plan_steps(parameters: ViewParameters) -> Steps:
    """Put the parameters of M views into the form that travels to the device in two copies."""
    p = parameters
    unused = np.zeros(len(p.flip), dtype=np.float32)
    places = [(p.jitter_order[:, place] == kind, p.jitter_factor[:, kind]) for place in range(4) for kind in range(4)]
    steps = [*places, (p.grayscale, unused), (p.blur_sigma > 0, p.blur_sigma), (p.solarize, unused)]
    samples = np.concatenate([np.flatnonzero(chosen) for chosen, _ in steps])
    factor = np.concatenate([values[chosen] for chosen, values in steps])
    counts = np.array([np.count_nonzero(chosen) for chosen, _ in steps])
    return Steps(torch.from_numpy(samples), torch.from_numpy(factor), counts)


class Photometric:
    """Recolours and normalizes views.

    Args:
        mean: of the three channels, in 0..1.
        std: of the three channels.
        max_blur_px: largest standard deviation of the blur, px; sets the kernel's size.
        device: where the views are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], max_blur_px: float, device: torch.device) -> None:
        self.scale = (1 / torch.tensor(std, dtype=torch.float32)).view(3, 1, 1).to(device)
        self.offset = (-torch.tensor(mean) / torch.tensor(std)).view(3, 1, 1).to(device)
        self.blur_radius = math.ceil(KERNEL_SIGMAS * max_blur_px)

    @torch.no_grad()
    def __call__(self, x: Tensor, steps: Steps) -> Tensor:
        """Recolour in place, then normalize.

        Args:
            x: (M, 3, h, w) float32 in 0..1, contiguous; it is used up.
            steps: what to do.

        Returns:
            (M, 3, h, w) float32, channels last in memory.
        """
        counts = steps.counts.tolist()
        jobs = [*JITTER * 4, _grayscale, self._blur, _solarize]
        for job, samples, factor in zip(jobs, steps.samples.split(counts), steps.factor.split(counts), strict=True):
            if len(samples):
                x.index_copy_(0, samples, job(x.index_select(0, samples), factor.view(-1, 1, 1, 1)))
        result = torch.empty_like(x, memory_format=torch.channels_last)
        return torch.addcmul(self.offset, x, self.scale, out=result)

    def _blur(self, x: Tensor, sigma: Tensor) -> Tensor:
        return gaussian_blur(x, sigma, self.blur_radius)


def luma(x: Tensor) -> Tensor:
    """Grey value: (M, 3, h, w) in 0..1 -> (M, 1, h, w)."""
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black: (M, 3, h, w) in 0..1 by (M, 1, 1, 1)."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to the image's mean grey value."""
    return _blend(luma(x).mean(dim=(2, 3), keepdim=True), x, factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to each pixel's grey value."""
    return _blend(luma(x), x, factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue, keeping the saturation and the value of the HSV hexcone.

    Both ways through the hexcone in one: with V = max and C = max - min, channel n in (5, 3, 1) of the result is
    V - C clamp(min(k, 4 - k), 0, 1), where k = (n + hue sextant) mod 6.

    Args:
        x: (M, 3, h, w) in 0..1.
        shift: (M, 1, 1, 1), in turns.
    """
    red, green, blue = x.unbind(dim=1)
    high = torch.maximum(torch.maximum(red, green), blue)  # six times as fast as a reduction over three channels
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1, chroma)  # where there is no colour the sextant is of no matter
    sextant = torch.where(
        high == red,
        (green - blue) / divisor,
        torch.where(high == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextant += 6 * shift.squeeze(1)
    result = torch.empty_like(x)
    for channel, n in enumerate((5, 3, 1)):
        k = (sextant + n).remainder_(6)
        result[:, channel] = high - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma)
    return result


JITTER = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def gaussian_blur(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each sample by its own Gaussian, the border mirrored: two depthwise convolutions, a group per channel.

    Args:
        x: (M, 3, h, w).
        sigma: (M, 1, 1, 1), px.
        radius: where the kernel is cut off, px; at most the view's side less one is used.

    Returns:
        (M, 3, h, w).
    """
    num, channels, height, width = x.shape
    radius = min(radius, height - 1, width - 1)
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (offset / sigma.view(-1, 1)) ** 2)  # (M, 2 radius + 1)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(channels, dim=0)
    groups = num * channels
    x = pad(x, (radius,) * 4, mode="reflect").view(1, groups, height + 2 * radius, width + 2 * radius)
    x = conv2d(x, kernel.view(groups, 1, 1, -1), groups=groups)
    return conv2d(x, kernel.view(groups, 1, -1, 1), groups=groups).view(num, channels, height, width)


def solarize(x: Tensor) -> Tensor:
    """Invert the values from one half up: what is inverted is then the smaller of the two."""
    return torch.minimum(x, 1 - x)


def _grayscale(x: Tensor, _: Tensor) -> Tensor:
    return luma(x).expand_as(x)


def _solarize(x: Tensor, _: Tensor) -> Tensor:
    return solarize(x)


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Base + factor (x - base), clamped to 0..1."""
    return torch.lerp(base, x, factor).clamp_(0, 1)
