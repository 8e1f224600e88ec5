"""The device executor: workers only decode; crops, resizing and colours are batched on the device.

Nothing here waits for the device: all shapes follow from what the host knows (the sizes of the images, the number of
samples of each step), and what the device must know travels with the pixels, from page-locked memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime.decode import UnreadableImageError
from .cpu_views import Chunk
from .method import Views
from .photometric import Photometric, Steps, plan_steps
from .sampling import ViewParameters
from .views import ViewPolicy

GROUP_PIXELS = 1 << 24
"""Padded source pixels that are resized together: 64 images of 512 px; more would only take more memory."""

MULTIPLE = 8  # the inner dimension of a product, as tensor cores like it


class PackedBatch(NamedTuple):
    """The decoded images of a batch, and what to do to them.

    Attributes:
        pixels: (P,) uint8, image after image, each (H, W, 3): what its views show, trimmed of the rest.
        sizes: (N, 2) int64, on the host: H and W.
        boxes: (V, N, 5) float32: top, left, height and width in px of the trimmed image, and 1 for a mirrored view.
        global_steps: how to recolour the 2 N global views.
        local_steps: the same for the L N local views.
        unreadable: images that were replaced by others, in the order met.
    """

    pixels: Tensor
    sizes: np.ndarray
    boxes: Tensor
    global_steps: Steps
    local_steps: Steps
    unreadable: Sequence[UnreadableImageError] = ()


def pack_batch(chunks: Iterable[Chunk], num_images: int, policy: ViewPolicy) -> PackedBatch:
    """Collect a batch in a worker."""
    pixels, sizes, joined = [], [], []
    for images, parameters in chunks:
        trimmed, parameters = trim(images, parameters)
        pixels += [image.reshape(-1) for image in trimmed]
        sizes += [image.shape[:2] for image in trimmed]
        joined.append(parameters)
    p = ViewParameters.join(joined)
    boxes = np.stack([p.top, p.left, p.height, p.width, p.flip], axis=-1).astype(np.float32)
    return PackedBatch(
        torch.from_numpy(np.concatenate(pixels)),
        np.array(sizes),
        torch.from_numpy(boxes),
        plan_steps(p.take(slice(0, 2))),
        plan_steps(p.take(slice(2, None))),
    )


def trim(images: list[np.ndarray], parameters: ViewParameters) -> tuple[list[np.ndarray], ViewParameters]:
    """Cut off what no view shows; it also bounds the sides, for a crop is never longer than 4:3."""
    top, left = parameters.top.min(axis=0), parameters.left.min(axis=0)
    bottom = (parameters.top + parameters.height).max(axis=0)
    right = (parameters.left + parameters.width).max(axis=0)
    trimmed = [image[top[n] : bottom[n], left[n] : right[n]] for n, image in enumerate(images)]
    return trimmed, parameters.moved(-top, -left)


class DeviceViews:
    """Turns packed images into the network's input.

    Args:
        policy: sizes and number of the views.
        mean: of the three channels, in 0..1.
        std: of the three channels.
        max_blur_px: largest standard deviation of the blur, px.
        device: where to work.
    """

    def __init__(
        self,
        policy: ViewPolicy,
        mean: Sequence[float],
        std: Sequence[float],
        max_blur_px: float,
        device: torch.device,
    ) -> None:
        self.policy = policy
        self.device = device
        self.photometric = Photometric(mean, std, max_blur_px, device)
        # 16 bits halve the traffic and raise the rate of the products. Pixels are exact in float16 and its weights move
        # a view by .03 grey levels on average and .4 at most; bfloat16's would by eight times as much.
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> Views:
        """The float views of a batch that is on the device already."""
        num_images, policy = len(batch.sizes), self.policy
        kinds = ((2, policy.global_px), (policy.num_local, policy.local_px))
        views = [torch.empty(number, num_images, 3, px, px, device=self.device) for number, px in kinds]
        boxes = batch.boxes.split([number for number, _ in kinds])
        for group, images in self._groups(batch):
            for out, box in zip(views, boxes, strict=True):
                out[:, group] = crop_and_resize(images, box[:, group], out.shape[-1])
        steps = (batch.global_steps, batch.local_steps)
        return Views(
            *(self.photometric(x.flatten(0, 1).clamp_(0, 1), step) for x, step in zip(views, steps, strict=True))
        )

    def _groups(self, batch: PackedBatch) -> Iterator[tuple[slice, Tensor]]:
        """Neighbouring images, each group (n, H, 3, W) in grey levels, padded with zeros to its largest image."""
        parts = batch.pixels.split((3 * batch.sizes.prod(axis=1)).tolist())
        sizes = batch.sizes.tolist()
        for group in group_images(batch.sizes):
            height, width = (-(-side // MULTIPLE) * MULTIPLE for side in batch.sizes[group].max(axis=0).tolist())
            images = torch.zeros(group.stop - group.start, height, 3, width, dtype=self.dtype, device=self.device)
            for image, part, (h, w) in zip(images, parts[group], sizes[group], strict=True):
                image[:h, :, :w] = part.view(h, w, 3).permute(0, 2, 1)
            yield group, images


def group_images(sizes: np.ndarray) -> list[slice]:
    """Cut a batch into runs of images that hold, padded to the largest, up to ``GROUP_PIXELS`` pixels, or one image.

    Args:
        sizes: (N, 2) px.
    """
    groups, start, largest = [], 0, np.zeros(2, dtype=np.int64)
    for index, size in enumerate(sizes):
        with_it = np.maximum(largest, size)
        if index > start and with_it.prod() * (index + 1 - start) > GROUP_PIXELS:
            groups.append(slice(start, index))
            start, with_it = index, size
        largest = with_it
    return [*groups, slice(start, len(sizes))]


def crop_and_resize(images: Tensor, boxes: Tensor, px: int) -> Tensor:
    """Cut V views out of each image: Pillow's antialiased bicubic as two batched products, the mirror folded in.

    The rows come first, for all views of an image at once; then the columns, view by view.

    Args:
        images: (n, H, 3, W) in grey levels, zero where an image ends before.
        boxes: (V, n, 5): top, left, height, width, mirrored.
        px: side of the views.

    Returns:
        (V, n, 3, px, px), 1 for 255 grey levels, not yet clamped.
    """
    num_images, image_height, _, image_width = images.shape
    num_views = len(boxes)
    top, left, height, width, flip = boxes.transpose(0, 1).reshape(-1, 5).unbind(dim=1)
    rows = resize_weights(top, height, torch.zeros_like(flip), px, image_height, images.dtype, scale=1 / 255)
    columns = resize_weights(left, width, flip, px, image_width, images.dtype)
    x = torch.bmm(rows.view(num_images, num_views * px, image_height), images.flatten(2))  # (n, V px, 3 W)
    x = torch.bmm(x.view(num_images * num_views, px * 3, image_width), columns.transpose(1, 2))
    return x.view(num_images, num_views, px, 3, px).permute(1, 0, 3, 2, 4)


def resize_weights(
    start: Tensor, length: Tensor, flip: Tensor, px: int, size: int, dtype: torch.dtype, scale: float = 1.0
) -> Tensor:
    """Weights of antialiased bicubic interpolation along one axis (Keys 1981, a = -1/2), as in Pillow's Resample.c.

    Args:
        start: (B,) first pixel of each crop.
        length: (B,) its pixels.
        flip: (B,) 1 where the result is mirrored.
        px: pixels of the result.
        size: pixels of the axis; bounds the lengths.
        dtype: of the result.
        scale: sum of the weights of one pixel.

    Returns:
        (B, px, size), zero but for the few taps of each pixel.
    """
    place = torch.arange(px, device=start.device, dtype=torch.float32)
    place = torch.lerp(place, px - 1 - place, flip[:, None])  # (B, px)
    ratio = (length / px)[:, None]
    stretch = ratio.clamp(min=1)
    centre = ratio * (place + 0.5)  # from the crop's first pixel: small, so that float32 is exact enough
    first = (centre - 2 * stretch + 0.5).floor_().clamp_(min=0)
    num_taps = 4 * math.ceil(max(1.0, size / px)) + 2
    tap = first[:, :, None] + torch.arange(num_taps, device=start.device)  # (B, px, taps)
    weight = bicubic((tap - centre[:, :, None] + 0.5) / stretch[:, :, None]) * (tap < length[:, None, None])
    weight *= scale / weight.sum(dim=2, keepdim=True)
    index = (tap + start[:, None, None]).clamp_(max=size - 1).long()  # beyond the end the weights are zero
    return torch.zeros(*index.shape[:2], size, dtype=dtype, device=start.device).scatter_add_(
        2, index, weight.to(dtype)
    )


def bicubic(x: Tensor) -> Tensor:
    """Keys's kernel at a = -1/2: both pieces are a cubic in |x|."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))
