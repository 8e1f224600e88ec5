"""What a view policy does to given images, measured on the views that training would draw (no torch).

The zoom of a view is how large it shows things, where 1 is the whole image as a global view: its side over the side of
a global view, divided by the square root of the share of the image's area that it shows. So it compares views of
images of any size; output pixels per source pixel are the zoom times a constant of the image.

Two views of different zoom show an object at different sizes, two views without overlap show different things: the
network has to find them alike all the same, which is more than a small one can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .magnification import realized_area
from .sampling import ViewParameters, ViewSampler
from .views import ViewPolicy

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
DRAWN_IMAGES = 8192  # drawn for at least so often, epoch by epoch: the share of 3 % then has an error of 0.2 points


@dataclass(frozen=True)
class ViewStatistics:
    """The geometry of a policy on some images; a pair is a global and a local view of one image.

    Attributes:
        policy: what was drawn.
        mean_area: mean share of the image that a global view shows, and a local one, 0..1.
        zoom: quantiles (5, 25, 50, 75, 95 %) of the zoom of the global views, and of the local ones.
        px_per_px: median output pixels per source pixel of the global views, and of the local ones.
        magnification: median zoom of the global views over that of the local ones; 1 is equal magnification.
        pair_magnification: quantiles of the ratio of the zooms within the pairs.
        overlap: mean share of a local view's area that lies inside the global view of its pair, 0..1.
        inside: share of the pairs whose local view lies inside the global one, whole.
        half: share of the pairs of which at least half of the local view does, those included.
        nothing: share of the pairs that have no pixel in common.
        pairs: number of pairs.
    """

    policy: ViewPolicy
    mean_area: tuple[float, float]
    zoom: tuple[tuple[float, ...], tuple[float, ...]]
    px_per_px: tuple[float, float]
    magnification: float
    pair_magnification: tuple[float, ...]
    overlap: float
    inside: float
    half: float
    nothing: float
    pairs: int

    def to_json(self) -> dict[str, Any]:
        """All of it by name."""
        policy = self.policy
        return {
            "global_px": policy.global_px,
            "local_px": policy.local_px,
            "num_local": policy.num_local,
            "global_area": list(policy.global_area),
            "local_area": list(policy.local_area),
            "weight_global": policy.weight_global,
            "weight_local": policy.weight_local,
            "mean_global_area": self.mean_area[0],
            "mean_local_area": self.mean_area[1],
            "quantiles": list(QUANTILES),
            "global_zoom": list(self.zoom[0]),
            "local_zoom": list(self.zoom[1]),
            "global_px_per_px": self.px_per_px[0],
            "local_px_per_px": self.px_per_px[1],
            "magnification": self.magnification,
            "pair_magnification": list(self.pair_magnification),
            "overlap": self.overlap,
            "inside": self.inside,
            "half": self.half,
            "nothing": self.nothing,
            "pairs": self.pairs,
        }


def measure(policy: ViewPolicy, sampler: ViewSampler, indices: np.ndarray, sizes: np.ndarray) -> ViewStatistics:
    """Draw the views of some images, as many epochs as it takes, and measure them.

    Args:
        policy: of the views.
        sampler: draws them, by the same policy.
        indices: (N,) places of the images in the data.
        sizes: (N, 2) their heights and widths, px.
    """
    heights, widths = sizes.T
    epochs = -(-DRAWN_IMAGES // len(indices))
    drawn = ViewParameters.join([sampler(epoch, indices, heights, widths) for epoch in range(epochs)])
    pixels = np.tile(heights * widths, epochs)  # (M,) of the images
    area = drawn.height * drawn.width  # (V, M)
    side = np.array([policy.global_px] * 2 + [policy.local_px] * policy.num_local)[:, None]
    zoom = side / policy.global_px / np.sqrt(area / pixels)
    px_per_px = side / np.sqrt(area)
    share = overlaps(drawn)
    kinds = slice(0, 2), slice(2, None)
    quantiles = [_quantiles(zoom[kind]) for kind in kinds]
    return ViewStatistics(
        policy=policy,
        mean_area=(realized_area(policy.global_area, sizes), realized_area(policy.local_area, sizes)),
        zoom=(quantiles[0], quantiles[1]),
        px_per_px=(float(np.median(px_per_px[kinds[0]])), float(np.median(px_per_px[kinds[1]]))),
        magnification=float(np.median(zoom[kinds[0]]) / np.median(zoom[kinds[1]])),
        pair_magnification=_quantiles(zoom[None, kinds[0]] / zoom[kinds[1], None]),
        overlap=float(share.mean()),
        inside=float((share == 1).mean()),
        half=float((share >= 0.5).mean()),
        nothing=float((share == 0).mean()),
        pairs=share.size,
    )


def overlaps(drawn: ViewParameters) -> np.ndarray:
    """Share of each local view that lies inside each global view: (V, M) views -> (V - 2, 2, M) in 0..1."""
    top, left, bottom, right = drawn.top, drawn.left, drawn.top + drawn.height, drawn.left + drawn.width
    rows = np.minimum(bottom[2:, None], bottom[None, :2]) - np.maximum(top[2:, None], top[None, :2])
    columns = np.minimum(right[2:, None], right[None, :2]) - np.maximum(left[2:, None], left[None, :2])
    return rows.clip(0) * columns.clip(0) / (drawn.height * drawn.width)[2:, None]


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.quantile(values, QUANTILES).tolist())
