"""Draw every random choice of every view from counters, so that a view depends on nothing but its place.

The numbers of a view come from Philox (Salmon et al., SC 2011) under the key (seed, stream) at the counter
(view, image, epoch). So they are the same whatever the number of workers or processes, the order in which images are
read, the batch size, or the device that renders the view; and a run that is resumed needs no generator state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations

import numpy as np

from .views import Augmentation, ViewPolicy

MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
ATTEMPTS = 10

JITTER_ORDERS = np.array(list(permutations(range(4))))
"""(24, 4): the orders in which brightness 0, contrast 1, saturation 2 and hue 3 can come."""

DRAWS_PER_VIEW = 36  # 10 x (area, aspect) + 13 others, filled up to whole Philox blocks of 4
_VIEW_STREAM, _ORDER_STREAM = 0, 1


@dataclass(frozen=True, eq=False)
class ViewParameters:
    """All that is random in V views of N images. Each attribute is an array with the leading axes (V, N).

    Attributes:
        top, left, height, width: int64, the crop in source pixels.
        flip: bool, mirror left and right.
        jitter_order: (V, N, 4) int64, what to change first, second, …: 0 brightness, 1 contrast, 2 saturation, 3 hue;
            -1 throughout where there is no jitter.
        jitter_factor: (V, N, 4) float32, by kind: three factors around 1, and the hue shift in turns.
        grayscale: bool.
        blur_sigma: float32, px of the view; 0 is no blur.
        solarize: bool.
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    jitter_order: np.ndarray
    jitter_factor: np.ndarray
    grayscale: np.ndarray
    blur_sigma: np.ndarray
    solarize: np.ndarray

    def take(self, views: slice) -> ViewParameters:
        """The parameters of some views, with V and N merged into one leading axis of V * N, view by view."""
        arrays = {field.name: getattr(self, field.name)[views] for field in fields(self)}
        return ViewParameters(**{name: array.reshape(-1, *array.shape[2:]) for name, array in arrays.items()})

    def moved(self, down: np.ndarray, right: np.ndarray) -> ViewParameters:
        """The same views where each image's first pixel is another one; (N,) px each."""
        return replace(self, top=self.top + down, left=self.left + right)

    @staticmethod
    def join(chunks: Sequence[ViewParameters]) -> ViewParameters:
        """Concatenate along the images."""
        names = [field.name for field in fields(ViewParameters)]
        return ViewParameters(**{name: np.concatenate([getattr(c, name) for c in chunks], axis=1) for name in names})


class ViewSampler:
    """Draws the parameters of all views of some images.

    Args:
        policy: areas and number of the views.
        augmentations: of the first global view, the second, and every local one.
        blur_px: range of the blur's standard deviation, px.
        seed: of the run.
    """

    def __init__(
        self, policy: ViewPolicy, augmentations: Sequence[Augmentation], blur_px: tuple[float, float], seed: int
    ) -> None:
        first, second, local = augmentations
        per_view = (first, second, *[local] * policy.num_local)
        areas = [policy.global_area] * 2 + [policy.local_area] * policy.num_local
        self.seed = seed
        self.min_area, self.max_area = np.array(areas).T[:, :, None, None]  # (V, 1, 1) each
        self.blur_px = blur_px
        chances = ("flip", "jitter", "grayscale", "blur", "solarize")
        self.chance = {name: np.array([getattr(r, f"{name}_chance") for r in per_view])[:, None] for name in chances}
        strengths = [(r.brightness, r.contrast, r.saturation, r.hue) for r in per_view]
        self.strength = np.array(strengths)[:, None, :]  # (V, 1, 4)

    def __call__(self, epoch: int, images: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> ViewParameters:
        """Draw the views of some images in one epoch.

        Args:
            epoch: counted from 0.
            images: (N,) indices in the data set.
            heights: (N,) px.
            widths: (N,) px.
        """
        num_views = len(self.strength)
        draws = np.stack([self._draws(epoch, int(image), num_views) for image in images], axis=1)  # (V, N, 36)
        area = self.min_area + (self.max_area - self.min_area) * draws[..., 0:20:2]
        log_aspect = np.log(MIN_ASPECT) + (np.log(MAX_ASPECT) - np.log(MIN_ASPECT)) * draws[..., 1:20:2]
        height, width, fits = crop_sizes(area, np.exp(log_aspect), heights, widths)
        place_y, place_x, flip, jitter, order, gray, blur, sigma, solarize = np.moveaxis(draws[..., 20:29], -1, 0)
        factor = self.strength * (2 * draws[..., 29:33] - 1)
        factor[..., :3] += 1
        orders = JITTER_ORDERS[(order * len(JITTER_ORDERS)).astype(np.int64)]
        sigma = self.blur_px[0] + (self.blur_px[1] - self.blur_px[0]) * sigma
        return ViewParameters(
            top=np.where(fits, place_y * (heights - height + 1), (heights - height) // 2).astype(np.int64),
            left=np.where(fits, place_x * (widths - width + 1), (widths - width) // 2).astype(np.int64),
            height=height,
            width=width,
            flip=flip < self.chance["flip"],
            jitter_order=np.where((jitter < self.chance["jitter"])[..., None], orders, -1),
            jitter_factor=factor.astype(np.float32),
            grayscale=gray < self.chance["grayscale"],
            blur_sigma=np.where(blur < self.chance["blur"], sigma, 0).astype(np.float32),
            solarize=solarize < self.chance["solarize"],
        )

    def _draws(self, epoch: int, image: int, num_views: int) -> np.ndarray:
        """(V, 36) float64 in [0, 1): the counter's lowest word runs on through the views."""
        return _uniform(_philox(self.seed, _VIEW_STREAM, image, epoch), num_views * DRAWS_PER_VIEW).reshape(
            num_views, -1
        )


def crop_sizes(
    area: np.ndarray, aspect: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size of the random resized crop by torchvision's law: the first attempt that fits into the image.

    Where none of the ten does (an image longer than 4:3, a large area), it is the largest crop of an allowed aspect,
    which then lies in the centre.

    Args:
        area: (V, N, 10) shares of the image's area, one per attempt.
        aspect: (V, N, 10) width over height.
        heights: (N,) px.
        widths: (N,) px.

    Returns:
        Height and width in px, (V, N) int64, and whether an attempt fitted, (V, N) bool.
    """
    pixels = area * (heights * widths)[:, None]
    width = np.rint(np.sqrt(pixels * aspect)).astype(np.int64)  # half to even, as Python's round
    height = np.rint(np.sqrt(pixels / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths[:, None]) & (height > 0) & (height <= heights[:, None])
    first = fits.argmax(axis=-1)[..., None]
    width = np.take_along_axis(width, first, axis=-1)[..., 0]
    height = np.take_along_axis(height, first, axis=-1)[..., 0]
    largest_height = np.minimum(heights, np.rint(widths / MIN_ASPECT).astype(np.int64))
    largest_width = np.minimum(widths, np.rint(heights * MAX_ASPECT).astype(np.int64))
    fitted = fits.any(axis=-1)
    return np.where(fitted, height, largest_height), np.where(fitted, width, largest_width), np.asarray(fitted)


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of the images in one epoch: (num_images,) int64, a permutation that needs no state to resume."""
    return np.argsort(_philox(seed, _ORDER_STREAM, 0, epoch).random_raw(num_images), kind="stable")


def _philox(seed: int, stream: int, image: int, epoch: int) -> np.random.Philox:
    """The generator at one place: 64 bits each of key (seed, stream) and of counter (draws, 0, image, epoch)."""
    return np.random.Philox(key=seed | stream << 64, counter=image << 128 | epoch << 192)


def _uniform(generator: np.random.Philox, count: int) -> np.ndarray:
    """(count,) float64 in [0, 1) from the upper 53 bits of the raw numbers, which no version of numpy may change."""
    return (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53
