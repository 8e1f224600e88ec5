"""The CPU executor: a worker cuts and recolours every view in 8 bits; the device only normalizes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.decode import UnreadableImageError
from .crops import crop_view
from .method import Views
from .recolour import recolour
from .sampling import ViewParameters
from .views import ViewPolicy

Chunk = tuple[list[np.ndarray], ViewParameters]
"""Some images of a batch, (H, W, 3) uint8 each, and the parameters of their views."""


class CutBatch(NamedTuple):
    """The finished views of N images as they leave a worker, view by view.

    Attributes:
        global_views: (2 N, h, h, 3) uint8.
        local_views: (L N, l, l, 3) uint8.
        unreadable: images that were replaced by others, in the order met.
    """

    global_views: Tensor
    local_views: Tensor
    unreadable: Sequence[UnreadableImageError] = ()


def cut_batch(chunks: Iterable[Chunk], num_images: int, policy: ViewPolicy) -> CutBatch:
    """Render a batch, chunk by chunk, so that few images are held decoded at once."""
    views = [
        np.empty((number, num_images, px, px, 3), dtype=np.uint8)
        for number, px in ((2, policy.global_px), (policy.num_local, policy.local_px))
    ]
    start = 0
    for images, parameters in chunks:
        end = start + len(images)
        cut_views(images, parameters, [view[start:end] for kind in views for view in kind])
        start = end
    global_views, local_views = (torch.from_numpy(kind).flatten(0, 1) for kind in views)
    return CutBatch(global_views, local_views)


def cut_views(images: list[np.ndarray], parameters: ViewParameters, out: Sequence[np.ndarray]) -> None:
    """Render V views of each of N images.

    Args:
        images: N of (H, W, 3) uint8.
        parameters: (V, N) of them.
        out: V of (N, px, px, 3) uint8, written to.
    """
    p = parameters
    boxes = np.stack([p.top, p.left, p.height, p.width, p.flip], axis=-1).tolist()  # plain numbers: read a value a time
    colours = [p.jitter_order, p.jitter_factor, p.grayscale, p.blur_sigma, p.solarize]
    order, factor, gray, sigma, invert = (array.tolist() for array in colours)
    for n, image in enumerate(images):
        for v, views in enumerate(out):
            crop_view(image, *boxes[v][n], out=views[n])
            recolour(views[n], order[v][n], factor[v][n], gray[v][n], sigma[v][n], invert[v][n])


class Normalizer:
    """Turns uint8 views into the network's input, on any device.

    Args:
        mean: of the three channels, in 0..1.
        std: of the three channels.
        device: where to.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.scale = 1 / (255 * torch.tensor(std))
        self.offset = -torch.tensor(mean) / torch.tensor(std)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, batch: CutBatch) -> Views:
        """The float views of a batch; its pixels are on the device already where it was prefetched."""
        return Views(self.normalize(batch.global_views), self.normalize(batch.local_views))

    def normalize(self, views: Tensor) -> Tensor:
        """(M, h, w, 3) uint8 -> (M, 3, h, w) float32, channels last in memory.

        In rows of w x 3 values: a kernel that meets three channels as its inner dimension runs at a fifth of the speed.
        """
        num, height, width, channels = views.shape
        if width not in self._rows:
            self._rows[width] = (self.scale.repeat(width).to(self.device), self.offset.repeat(width).to(self.device))
        scale, offset = self._rows[width]
        rows = views.to(self.device, non_blocking=True).view(num * height, width * channels).float()
        return rows.mul_(scale).add_(offset).view(num, height, width, channels).permute(0, 3, 1, 2)
