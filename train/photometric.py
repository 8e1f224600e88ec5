"""Recolour whole groups of views on the device: jitter, grayscale, blur, solarize, normalize.

Each step is torchvision's, with the parameters of each sample: a step works on the samples that drew it and leaves the
others alone. Values stay in 0..1 in float32 until the normalization, which comes last. The parameters stay on the
host, and so does the choice of samples: a mask on a GPU would stop the stream to learn how many samples it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from .datasets import ViewBatch
from .method import Views
from .sampling import ViewParameters

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow and torchvision

KERNEL_SIGMAS = 3.0


class Photometric:
    """Turns uint8 views into the network's input.

    Args:
        mean: of the three channels, in 0..1.
        std: of the three channels.
        max_blur_px: largest standard deviation of the blur, px; sets the kernel's size.
        device: where the views are.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], max_blur_px: float, device: torch.device) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1)
        self.blur_radius = math.ceil(KERNEL_SIGMAS * max_blur_px)

    @torch.no_grad()
    def views(self, batch: ViewBatch) -> Views:
        """Move a batch of uint8 views to the device and recolour it."""
        groups = (batch.global_views, batch.global_parameters), (batch.local_views, batch.local_parameters)
        device = self.mean.device
        return Views(*(self(views.to(device, non_blocking=True), parameters) for views, parameters in groups))

    def __call__(self, views: Tensor, parameters: ViewParameters) -> Tensor:
        """Recolour and normalize.

        Args:
            views: (M, h, w, 3) uint8, on the device.
            parameters: M of them.

        Returns:
            (M, 3, h, w) float32, channels last in memory.
        """
        x = torch.empty(len(views), 3, *views.shape[1:3], device=views.device)
        x.copy_(views.permute(0, 3, 1, 2)).div_(255)
        for place in range(4):
            for kind, adjust in enumerate(JITTER):
                chosen = parameters.jitter_order[:, place] == kind
                _apply(adjust, x, chosen, parameters.jitter_factor[:, kind])
        _apply(lambda y, _: luma(y).expand_as(y), x, parameters.grayscale)
        _apply(
            lambda y, sigma: gaussian_blur(y, sigma, self.blur_radius),
            x,
            parameters.blur_sigma > 0,
            parameters.blur_sigma,
        )
        _apply(lambda y, _: solarize(y), x, parameters.solarize)
        return x.sub_(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)


def _apply(
    step: Callable[[Tensor, Tensor], Tensor], x: Tensor, chosen: np.ndarray, values: np.ndarray | None = None
) -> None:
    """Replace the chosen samples of ``x`` by ``step(samples, their values)``."""
    index = torch.from_numpy(np.flatnonzero(chosen))
    if not len(index):
        return
    factor = torch.from_numpy(values[chosen]) if values is not None else index
    index, factor = (t.to(x.device, non_blocking=True) for t in (index, factor))
    x.index_copy_(0, index, step(x.index_select(0, index), factor.view(-1, 1, 1, 1)))


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
    """Invert the values from one half up."""
    return torch.where(x >= 0.5, 1 - x, x)


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Base + factor (x - base), clamped to 0..1."""
    return torch.lerp(base, x, factor).clamp_(0, 1)
