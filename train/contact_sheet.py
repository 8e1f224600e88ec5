"""Real views of some images, cut and recoloured as in training, ready for a page (needs torch)."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..runtime.images import ImageList, UnreadableBudget, UnreadableImageError
from .cpu_views import cut_views
from .jpeg import load
from .sampling import ViewParameters, ViewSampler
from .view_statistics import overlaps
from .views import ViewPolicy, min_decode_px

SOURCE_PX = 480  # longer side of the source image on the page
SHOWN_PX = 224  # views are shown no larger
LOSSLESS_PX = 64  # views of this size or less, of which every pixel is seen


@dataclass(frozen=True)
class ShownView:
    """One view.

    Attributes:
        name: ``G1`` and ``G2``, then ``1``, ``2``, … of the local views.
        top, left, height, width: its crop, source px.
        area: share of the image that it shows, 0..1.
        inside: of a local view: share of it that lies in the first global view, and in the second; else ().
        changes: what was done to it, e.g. ``("mirrored", "colours changed")``.
        image: data URI.
    """

    name: str
    top: int
    left: int
    height: int
    width: int
    area: float
    inside: tuple[float, ...]
    changes: tuple[str, ...]
    image: str


@dataclass(frozen=True)
class ShownImage:
    """One image: its name, its size in px, the image itself as a data URI, and its views, the global ones first."""

    name: str
    height: int
    width: int
    image: str
    views: tuple[ShownView, ...]


def show_images(
    images: ImageList,
    candidates: np.ndarray,
    number: int,
    policy: ViewPolicy,
    sampler: ViewSampler,
    budget: UnreadableBudget,
) -> list[ShownImage]:
    """The views of the first images that can be read, as training gets them in its first epoch.

    Args:
        images: the data.
        candidates: indices of images, in the order in which they are tried.
        number: how many to show.
        policy: of the views.
        sampler: draws them.
        budget: counts the unreadable ones.

    Raises:
        UserError: too many are unreadable.
    """
    min_px = min_decode_px(policy.global_px)
    shown = []
    for index in candidates.tolist():
        if len(shown) == number:
            break
        try:
            pixels = load(images, index, min_px)
        except UnreadableImageError as error:
            budget.skip(error)
            continue
        drawn = sampler(0, np.array([index]), *np.array(pixels.shape[:2])[:, None])
        views = _render(pixels, drawn, policy)
        shown.append(_describe(images.paths[index], pixels, drawn, views))
    return shown


def _render(pixels: np.ndarray, drawn: ViewParameters, policy: ViewPolicy) -> list[np.ndarray]:
    """The views of one image as the network gets them, before the normalization: (px, px, 3) uint8 each."""
    sizes = [policy.global_px] * 2 + [policy.local_px] * policy.num_local
    views = [np.empty((1, px, px, 3), dtype=np.uint8) for px in sizes]
    cut_views([pixels], drawn, views)
    return [view[0] for view in views]


def _describe(name: str, pixels: np.ndarray, drawn: ViewParameters, views: list[np.ndarray]) -> ShownImage:
    height, width = pixels.shape[:2]
    inside = overlaps(drawn)[..., 0]  # (local views, 2)
    described = []
    for v, view in enumerate(views):
        box = {key: int(getattr(drawn, key)[v, 0]) for key in ("top", "left", "height", "width")}
        described.append(
            ShownView(
                name=f"G{v + 1}" if v < 2 else str(v - 1),
                **box,
                area=box["height"] * box["width"] / (height * width),
                inside=() if v < 2 else tuple(inside[v - 2].tolist()),
                changes=_changes(drawn, v),
                image=data_uri(view, SHOWN_PX),
            )
        )
    return ShownImage(name, height, width, data_uri(pixels, SOURCE_PX), tuple(described))


def _changes(drawn: ViewParameters, view: int) -> tuple[str, ...]:
    """What the drawn parameters do to a view, in words."""
    done = {
        "mirrored": drawn.flip[view, 0],
        "colours changed": drawn.jitter_order[view, 0, 0] >= 0,
        "grey": drawn.grayscale[view, 0],
        "blurred": drawn.blur_sigma[view, 0] > 0,
        "solarized": drawn.solarize[view, 0],
    }
    return tuple(name for name, applies in done.items() if applies)


def data_uri(pixels: np.ndarray, max_px: int) -> str:
    """An image, (H, W, 3) uint8, as a WebP within a URI; shrunk to ``max_px`` on its longer side where it is larger."""
    image = Image.fromarray(pixels)
    image.thumbnail((max_px, max_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=max(pixels.shape[:2]) <= LOSSLESS_PX, quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
