"""The pages that midge writes: one HTML file each, that opens offline, in a common shell (``page.html.jinja``).

jinja2 escapes every value; the shell's content policy forbids scripts and requests, whatever the values hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import require
from .files import atomic_file


def render_page(
    template: Path,
    title: str,
    subtitle: str,
    inline_images: bool = False,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **context: Any,
) -> str:
    """Fill a template that extends the shell.

    Args:
        template: file with the blocks ``style`` and ``content``.
        title: of the page.
        subtitle: the line below it.
        inline_images: allow images, as ``data:`` only.
        filters: more filters for the template; ``count`` and ``px`` are there.
        context: what the template shows.

    Returns:
        The page as HTML.
    """
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"count": lambda value: f"{value:,}", "px": lambda value: f"{value:.1f}", **(filters or {})}
    return environment.get_template(template.name).render(
        title=title, subtitle=subtitle, inline_images=inline_images, version=__version__, **context
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
