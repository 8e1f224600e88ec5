"""Curves in the terminal: one panel per series, as many as fit, drawn in braille by plotille (no torch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..runtime.errors import require
from ..runtime.printable import printable

Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]

MIN_PANEL_WIDTH = 38
MIN_PLOT_HEIGHT, MAX_PLOT_HEIGHT = 3, 8
FRAME = 2  # lines of a panel's border
OTHERS_HEIGHT = 2  # lines for the series that have no panel
LABEL_WIDTH = 8
DOTS_PER_COLUMN, DOTS_PER_ROW = 2, 4  # of a braille character


def _significant(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


# name in metrics.jsonl -> title, how a value is written, colour
KNOWN: dict[str, tuple[str, Callable[[float], str], str]] = {
    "loss": ("loss", _significant, "cyan"),
    "loss_global": ("loss, global pairs", _significant, "cyan"),
    "loss_local": ("loss, local pairs", _significant, "cyan"),
    "lr": ("learning rate", lambda value: f"{value:.3g}", "magenta"),
    "knn_top1": ("k-NN top-1, %", lambda value: f"{100 * value:.2f}", "green"),
    "rankme": ("RankMe", _significant, "green"),
    "feature_std": ("feature std", _significant, "green"),
    "images_per_s": ("images/s", _significant, "yellow"),
    "data_wait_percent": ("waiting for data, %", lambda value: f"{value:.1f}", "yellow"),
    "gpu_memory_mib": ("GPU memory, MiB", lambda value: f"{value:,.0f}", "yellow"),
}
"""Series in the order in which they are shown; others follow under their own names."""


def ordered(series: Series) -> list[str]:
    """The names to show, the known ones first."""
    return [name for name in KNOWN if name in series] + [name for name in series if name not in KNOWN]


def title_of(name: str) -> str:
    """What a series is called; control characters of a file cannot reach the terminal."""
    return KNOWN[name][0] if name in KNOWN else printable(name)


def shown(name: str, value: float) -> str:
    """A value as its series writes it."""
    return (KNOWN[name][1] if name in KNOWN else _significant)(value)


def panels(series: Series, width: int, height: int | None = None) -> RenderableType:
    """All curves side by side, or the first ones and the last values of the others.

    Args:
        series: name -> (steps, values), each of one value or more.
        width: columns of the terminal.
        height: its lines that are free, or None where there is no limit.
    """
    names = ordered(series)
    columns = max(1, min(width // MIN_PANEL_WIDTH, 4, len(names)))
    rows, plot_height = -(-len(names) // columns), MAX_PLOT_HEIGHT - 3
    others: list[str] = []
    if height is not None:
        if rows * (MIN_PLOT_HEIGHT + FRAME) > height:
            rows = max(1, (height - OTHERS_HEIGHT) // (MIN_PLOT_HEIGHT + FRAME))
            names, others = names[: rows * columns], names[rows * columns :]
        free = height - OTHERS_HEIGHT if others else height
        plot_height = min(max(free // rows - FRAME, MIN_PLOT_HEIGHT), MAX_PLOT_HEIGHT)
    first = min(steps[0] for steps, _ in series.values())
    last = max(steps[-1] for steps, _ in series.values())
    panel_width = width // columns
    grid = Table.grid(padding=0)
    for start in range(0, len(names), columns):
        grid.add_row(
            *(
                _panel(name, *series[name], (first, last), panel_width, plot_height)
                for name in names[start : start + columns]
            )
        )
    if not others:
        return grid
    rest = Text("   ".join(f"{title_of(name)} {shown(name, series[name][1][-1])}" for name in others), style="dim")
    return Group(grid, rest)


def _panel(
    name: str, steps: Sequence[int], values: Sequence[float], span: tuple[int, int], width: int, height: int
) -> Panel:
    colour = KNOWN[name][2] if name in KNOWN else "blue"
    plot, low, high = draw(steps, values, span, max(width - FRAME - 2 - LABEL_WIDTH - 1, 1), height)
    labels = [shown(name, high), *[""] * (height - 2), shown(name, low) if low < high else ""]
    content = Table.grid(padding=(0, 1, 0, 0))
    content.add_column(width=LABEL_WIDTH, justify="right", no_wrap=True, style="dim")
    content.add_column(no_wrap=True, style=colour)
    content.add_row("\n".join(labels), "\n".join(plot))
    title = Text.assemble((title_of(name), ""), " ", (shown(name, values[-1]), f"bold {colour}"))
    return Panel(content, title=title, title_align="left", width=width, border_style="dim", padding=(0, 1, 0, 0))


def draw(
    steps: Sequence[int], values: Sequence[float], span: tuple[int, int], width: int, height: int
) -> tuple[list[str], float, float]:
    """A curve in braille.

    Args:
        steps: of the values, ascending.
        values: as many.
        span: first and last step of the axis.
        width: columns.
        height: lines.

    Returns:
        ``height`` strings of at most ``width`` characters, and the values that the lowest and the highest dot stand
        for: means, where several values fall into one column of dots.
    """
    plotille = require("plotille", "report")
    places, means = thinned(np.asarray(steps), np.asarray(values), span, DOTS_PER_COLUMN * width)
    low, high = float(means.min()), float(means.max())
    flat = high - low <= 1e-12 * max(abs(low), abs(high))
    canvas = plotille.Canvas(width, height, xmin=0, ymin=0, xmax=1, ymax=1)
    x = (places + 0.5) / (DOTS_PER_COLUMN * width)
    share = np.full(len(means), 0.5) if flat else means / (high - low) - low / (high - low)
    y = (0.5 + share * (DOTS_PER_ROW * height - 1)) / (DOTS_PER_ROW * height)
    points = list(zip(x.tolist(), y.tolist(), strict=True))
    for start, end in zip(points, points[1:] or points, strict=False):
        canvas.line(*start, *end)
    return canvas.plot().split("\n"), low, high


def thinned(
    steps: np.ndarray, values: np.ndarray, span: tuple[int, int], columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of the values that fall into each column of dots: columns (K,) ascending, and means (K,)."""
    position = (steps - span[0]) / max(span[1] - span[0], 1) * (columns - 1)
    column, index = np.unique(np.rint(position).astype(np.int64), return_inverse=True)
    # Scaled first, for a sum of huge values must not overflow.
    scale = float(np.abs(values).max()) or 1.0
    return column, np.bincount(index, values / scale) / np.bincount(index) * scale


def table(series: Series) -> Table:
    """The same in figures, for a terminal that has no braille."""
    result = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    result.add_column("series")
    for name in ("last", "lowest", "highest", "values"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ordered(series):
        values = series[name][1]
        figures = (values[-1], min(values), max(values))
        result.add_row(Text(title_of(name)), *(shown(name, value) for value in figures), str(len(values)))
    return result
