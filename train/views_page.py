"""The page of ``midge views``: figures of the policies side by side, and the views of some images (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.page import render_page
from .view_statistics import DRAWN_IMAGES, ViewStatistics

if TYPE_CHECKING:
    from .contact_sheet import ShownImage

TICKS = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 16)
GLOBAL_REM = 10.5  # largest side of a global view on the page; the local ones keep their ratio to it
ROOM_REM = 43.0  # for two global views and three local ones, side by side
PIXELATED_PX = 112  # views up to this size are enlarged without smoothing
ALIKE = 0.05  # magnifications that differ by less are called equal


def render_views(
    name: str,
    backbone: str,
    chosen: str,
    statistics: Mapping[str, ViewStatistics],
    sizes: np.ndarray,
    shown: Sequence[ShownImage],
) -> str:
    """The page as text.

    Args:
        name: of the data.
        backbone: the network that the sizes suit.
        chosen: the policy whose views are shown.
        statistics: of it and the others, by name.
        sizes: (N, 2) heights and widths that were read, px.
        shown: images and their views.
    """
    policy = statistics[chosen].policy
    ratio = policy.local_px / policy.global_px
    global_rem = min(GLOBAL_REM, ROOM_REM / (2 + 3 * ratio))
    return render_page(
        Path(__file__).with_name("views.html.jinja"),
        title=f"Views of {name}",
        subtitle=f"Policy {chosen}: 2 global views of {policy.global_px} px and {policy.num_local} local ones of "
        f"{policy.local_px} px per image, for {backbone} · {describe_sizes(sizes)}",
        inline_images=True,
        filters={"percent": lambda share: f"{100 * share:.0f}", "fine": lambda share: f"{100 * share:.1f}"},
        headline=headline(chosen, statistics),
        chosen=chosen,
        rows=[_row(name, one) for name, one in statistics.items()],
        zooms=_zoom_strips(statistics),
        overlaps=[(name, _segments(one), one) for name, one in statistics.items()],
        shown=shown,
        view_rem={"global": global_rem, "local": global_rem * ratio},
        pixelated={"global": policy.global_px <= PIXELATED_PX, "local": policy.local_px <= PIXELATED_PX},
        drawn_images=DRAWN_IMAGES,
        sizes_read=len(sizes),
    )


def headline(chosen: str, statistics: Mapping[str, ViewStatistics]) -> list[str]:
    """What the chosen policy does, then what the baseline would do."""
    one = statistics[chosen]
    sentences = [
        f"{_magnification_sentence(one.magnification)} On average {100 * one.overlap:.0f} % of a local view lies "
        f"inside a global one, and {100 * one.nothing:.1f} % of the pairs have nothing in common."
    ]
    if chosen != "baseline":
        other = statistics["baseline"]
        sentences.append(
            f"With the baseline's views things would be {other.magnification:.2f}× as large in global views as in "
            f"local ones, {100 * other.overlap:.0f} % of a local view would lie inside a global one, and "
            f"{100 * other.nothing:.1f} % of the pairs would have nothing in common. Small networks learn more from "
            "views that ask less of them (Tan et al., ICLR 2023)."
        )
    return sentences


def _magnification_sentence(magnification: float) -> str:
    if abs(math.log(magnification)) < ALIKE:
        return "Global and local views show things equally large."
    larger, by = ("Global", magnification) if magnification > 1 else ("Local", 1 / magnification)
    return f"{larger} views show things {by:.2f}× as large as {'local' if larger == 'Global' else 'global'} ones."


def describe_sizes(sizes: np.ndarray) -> str:
    """The sizes of the images in words."""
    height, width = np.median(sizes, axis=0)
    if len(np.unique(sizes, axis=0)) == 1:
        return f"images of {width:.0f} × {height:.0f} px"
    longer = sizes.max(axis=1) / sizes.min(axis=1)
    return f"images of {width:.0f} × {height:.0f} px (medians), sides 1 : {np.median(longer):.2f}"


def shown_range(area: tuple[float, float]) -> str:
    """A range of areas in %."""
    return f"{100 * area[0]:g}–{100 * area[1]:g}"


def _row(name: str, one: ViewStatistics) -> dict[str, Any]:
    policy = one.policy
    return {
        "name": name,
        "policy": policy,
        "one": one,
        "global_area": shown_range(policy.global_area),
        "local_area": shown_range(policy.local_area),
    }


def _zoom_strips(statistics: Mapping[str, ViewStatistics]) -> dict[str, Any]:
    """Where the quantiles of the zooms stand, in % of the width, on one logarithmic scale."""
    every = [value for one in statistics.values() for kind in one.zoom for value in kind]
    low, high = math.log(min(1.0, *every)) - 0.04, math.log(max(every)) + 0.04

    def at(value: float) -> float:
        return 100 * (math.log(value) - low) / (high - low)

    return {
        "ticks": [(at(tick), f"{tick:g}×") for tick in TICKS if low <= math.log(tick) <= high],
        "strips": [
            (name, [[at(value) for value in kind] for kind in one.zoom], one) for name, one in statistics.items()
        ],
    }


def _segments(one: ViewStatistics) -> list[dict[str, Any]]:
    """The pairs by how much of the local view lies in the global one: parts of a bar, in % of its width."""
    parts = {
        "nothing": one.nothing,
        "less": 1 - one.half - one.nothing,
        "half": one.half - one.inside,
        "whole": one.inside,
    }
    segments, start = [], 0.0
    for kind, share in parts.items():
        segments.append({"kind": kind, "start": 100 * start, "width": 100 * share})
        start += share
    return segments
