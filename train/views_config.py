"""The configuration of ``midge views`` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import check_ranges
from .config import RANGES as PRETRAIN_RANGES
from .config import check_areas

SHARED = ("seed", "patch_px", "image_px", "local_px", "num_local", "jitter_strength", "max_unreadable")
RANGES: dict[str, tuple[float, float]] = {"images": (1, 24), **{name: PRETRAIN_RANGES[name] for name in SHARED}}
"""Inclusive; those of fields that pretraining has too are the same there."""


@dataclass(frozen=True)
class ViewsConfig:
    """What a view policy does to a folder of images: real views of some, and its statistics beside other policies'."""

    data: Path
    """Folder of images, of any nesting."""
    html: Path | None = None
    """Page to write: the statistics, and the views of some images as training gets them."""
    views: str = "lowcompute"
    """View policy: lowcompute, baseline, or auto (lowcompute with the local size that suits the images' sizes)."""
    backbone: str = "resnet18"
    """Any timm network by name: CNNs and ViTs have policies of their own."""
    patch_px: int | None = None
    """Side of a ViT's patches, px; default the network's own."""
    image_px: int = 224
    """Side of the global views, px; the local views follow by the view policy."""
    local_px: int | None = None
    """Side of the local views, px; default by the view policy."""
    num_local: int | None = None
    """Number of local views; default by the view policy."""
    global_area: tuple[float, float] | None = None
    """Range of the share of the image's area that a global view shows, 0..1; default by the view policy."""
    local_area: tuple[float, float] | None = None
    """The same for a local view."""
    jitter_strength: float | None = None
    """Strength s of the colour jitter, as SimCLR counts it; default the method's own."""
    method: str = "dino"
    """Self-supervised method, whose recolouring is shown: dino, swav or mocov2."""
    images: int = 6
    """Images whose views are shown."""
    seed: int = 0
    """Seed of the views, as in midge pretrain, and of which images are shown."""
    max_unreadable: float = 0.01
    """Largest share of unreadable images that is put up with, 0..1."""
    json: bool = False
    """Print one JSON document instead of the table."""

    def check(self) -> None:
        """Refuse values that cannot work; names are checked where they are looked up.

        Raises:
            UserError: a value is out of range.
        """
        check_ranges(self, RANGES)
        check_areas(self.global_area, self.local_area)
