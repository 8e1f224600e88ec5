"""``midge views``: what a view policy does to a folder of images, as a table, as JSON, and as a page of real views."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..runtime.errors import require, unknown_name
from ..runtime.images import ImageList, UnreadableBudget, list_images
from ..runtime.page import write_page
from ..runtime.progress import say
from .magnification import AUTO, equal_magnification_px, sample_sizes
from .sampling import ViewSampler
from .view_statistics import ViewStatistics, measure
from .views import AUGMENTATIONS, VIEW_POLICIES, ViewPolicy, augmentations, blur_range_px, view_policy
from .views_config import ViewsConfig
from .views_page import render_views, shown_range

SCHEMA = 1
YOURS = "yours"
WIDTH = 120  # of the table where there is no terminal


def show_views(config: ViewsConfig) -> int:
    """Measure the chosen policy and the others on the images, and show it.

    Returns:
        The exit code, 0.

    Raises:
        UserError: something given cannot work; no page is written then.
    """
    config.check()
    require("torch", "train")
    from .backbones import find_backbone

    if config.method not in AUGMENTATIONS:
        raise unknown_name("method", config.method, AUGMENTATIONS)
    images = list_images(config.data)
    backbone = find_backbone(config.backbone, config.image_px, None, config.patch_px)
    budget = UnreadableBudget(config.max_unreadable, len(images))
    indices, sizes = sample_sizes(images, config.seed, budget)
    chosen, policies = compared_policies(config, backbone.family, backbone.patch_px, sizes)
    backbone.check_views((policies[chosen].global_px, policies[chosen].local_px))
    samplers = {name: build_sampler(config, policy) for name, policy in policies.items()}
    measured: dict[ViewPolicy, ViewStatistics] = {}  # equal policies are measured once
    for name, policy in policies.items():
        if policy not in measured:
            measured[policy] = measure(policy, samplers[name], indices, sizes)
    statistics = {name: measured[policy] for name, policy in policies.items()}
    if config.html is not None:
        from .contact_sheet import show_images

        shown = show_images(images, indices, config.images, policies[chosen], samplers[chosen], budget)
        name = "/".join(images.root.absolute().parts[-2:])
        write_page(config.html, render_views(name, config.backbone, chosen, statistics, sizes, shown))
    report(config, images, chosen, statistics, sizes)
    return 0


def build_sampler(config: ViewsConfig, policy: ViewPolicy) -> ViewSampler:
    """The sampler of a training run with this policy."""
    return ViewSampler(
        policy, augmentations(config.method, config.jitter_strength), blur_range_px(config.image_px), config.seed
    )


def compared_policies(
    config: ViewsConfig, family: str, multiple: int, sizes: np.ndarray
) -> tuple[str, dict[str, ViewPolicy]]:
    """The name of the chosen policy, and by name that and the others to set beside it.

    Args:
        config: what was chosen.
        family: of the backbone.
        multiple: what the view sizes must be multiples of, px.
        sizes: (N, 2) heights and widths of images, px.
    """
    given = {name: getattr(config, name) for name in ("local_px", "num_local", "global_area", "local_area")}

    def policy(name: str, **given: Any) -> ViewPolicy:
        found = view_policy(name, family, config.image_px, multiple, **given)
        by_rule = name == AUTO and given.get("local_px") is None
        return replace(found, local_px=equal_magnification_px(found, sizes, multiple)) if by_rule else found

    chosen = policy(config.views, **given)
    policies = {name: policy(name) for name in VIEW_POLICIES}
    if policies[config.views] == chosen:
        return config.views, policies
    return YOURS, {YOURS: chosen, **policies}


def report(
    config: ViewsConfig, images: ImageList, chosen: str, statistics: dict[str, ViewStatistics], sizes: np.ndarray
) -> None:
    """Print the statistics."""
    if config.json:
        document = {
            "schema": SCHEMA,
            "data": str(images.root),
            "images": len(images),
            "sizes_read": len(sizes),
            "backbone": config.backbone,
            "chosen": chosen,
            "policies": {name: one.to_json() for name, one in statistics.items()},
            "html": None if config.html is None else str(config.html),
        }
        print(json.dumps(document, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("policy")
    for name in ("global\npx", "area %\nasked", "\nmean", "local\npx", "area %\nasked", "\nmean"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("magnification\nglobal ÷ local", "of a local view\nin a global, %", "pairs that\nshare nothing, %"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in statistics.items():
        policy = one.policy
        table.add_row(
            name + (" *" if name == chosen else ""),
            f"2 × {policy.global_px}",
            shown_range(policy.global_area),
            f"{100 * one.mean_area[0]:.0f}",
            f"{policy.num_local} × {policy.local_px}",
            shown_range(policy.local_area),
            f"{100 * one.mean_area[1]:.0f}",
            f"{one.magnification:.2f}",
            f"{100 * one.overlap:.0f}",
            f"{100 * one.nothing:.1f}",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(table)
    if config.html is not None:
        say(f"Page: {config.html}")
