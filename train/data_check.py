"""``midge data check``: read every image of a folder as training does, and say what is in it and what is broken."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runtime.decode import FORMATS
from ..runtime.images import ImageList, UnreadableImageError, content_hash, list_images, load_image
from ..runtime.progress import Bar
from .data_config import CheckConfig

IMAGES_PER_BLOCK = 2048  # results in flight at a time, so that a million images take no memory
MOST_LISTED = 20


@dataclass(frozen=True)
class Checked:
    """What reading one image gave.

    Attributes:
        mode: Pillow mode of the file, before conversion to RGB; "" where it is unreadable.
        height_px: height as training sees it, EXIF orientation applied.
        width_px: width likewise.
        sha256: of the file's bytes; "" where it is unreadable.
        reason: why it is unreadable, else "".
    """

    mode: str = ""
    height_px: int = 0
    width_px: int = 0
    sha256: str = ""
    reason: str = ""


def check(config: CheckConfig) -> int:
    """Check all images of a folder.

    Returns:
        1 where some are unreadable, or a shard is not what its index says, else 0.

    Raises:
        UserError: there is no folder, or no image in it.
    """
    images = list_images(config.data)
    report = summarize(images, check_images(images))
    report["changed_shards"] = [] if images.shards is None else images.shards.changed()
    if config.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 1 if report["unreadable"] or report["changed_shards"] else 0


def check_images(images: ImageList) -> Iterator[Checked]:
    """Read all images, in order, in as many threads as there are cores: Pillow decodes without Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, Bar("Reading images", len(images)) as bar:
        for first in range(0, len(images), IMAGES_PER_BLOCK):
            block = range(first, min(first + IMAGES_PER_BLOCK, len(images)))
            for checked in pool.map(lambda index: check_image(images, index), block):
                bar.advance()
                yield checked


def check_image(images: ImageList, index: int) -> Checked:
    """Decode one image as training would."""
    try:
        source = images.source(index)
        height, width, _ = load_image(source, images.path(index)).shape
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as header:
            mode = header.mode
        return Checked(mode, height, width, content_hash(source))
    except UnreadableImageError as error:
        return Checked(reason=error.reason)


def summarize(images: ImageList, results: Iterator[Checked]) -> dict[str, Any]:
    """Count what was found.

    Args:
        images: the images.
        results: what reading each gave, in their order.

    Returns:
        The JSON document of the command. ``duplicates`` names the files whose bytes equal those of an earlier one.
    """
    modes: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    unreadable, duplicates = [], []
    first_with: dict[str, str] = {}
    for index, checked in enumerate(results):
        path = images.paths[index]
        if checked.reason:
            unreadable.append({"path": path, "reason": checked.reason})
            continue
        modes[checked.mode] += 1
        sizes[f"{checked.width_px} × {checked.height_px}"] += 1
        if images.labels is not None:
            classes[images.classes[images.labels[index]]] += 1
        if (first := first_with.setdefault(checked.sha256, path)) != path:
            duplicates.append({"path": path, "same_as": first})
    return {
        "schema": 1,
        "data": str(images.root),
        "images": len(images),
        "readable": len(images) - len(unreadable),
        "unreadable": unreadable,
        "modes": dict(modes.most_common()),
        "sizes": dict(sizes.most_common()),
        "classes": {name: classes[name] for name in images.classes},
        "duplicates": duplicates,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table; long lists are cut."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for title, key in (("modes", "modes"), ("sizes, width × height", "sizes"), ("classes", "classes")):
        counts = list(report[key].items())
        listed = [f"{escape(str(name))}: {count}" for name, count in counts[:MOST_LISTED]]
        more = [f"and {len(counts) - MOST_LISTED} more"] if len(counts) > MOST_LISTED else []
        table.add_row(title, ", ".join(listed + more) or "no labels (not in ImageFolder layout)")
    table.add_row("duplicates", _listing([f"{d['path']} = {d['same_as']}" for d in report["duplicates"]]) or "none")
    table.add_row("unreadable", _listing([f"{u['path']}: {u['reason']}" for u in report["unreadable"]]) or "none")
    if report["changed_shards"]:
        table.add_row("changed shards", _listing(report["changed_shards"]))
    console = Console(highlight=False)
    console.print(
        f"{report['readable']} of {report['images']} images in '{report['data']}' are readable.", markup=False
    )
    console.print(table)


def _listing(lines: list[str]) -> str:
    more = [f"… and {len(lines) - MOST_LISTED} more (all with --json)"] if len(lines) > MOST_LISTED else []
    return "\n".join([f"{len(lines)}:", *map(escape, lines[:MOST_LISTED]), *more]) if lines else ""
