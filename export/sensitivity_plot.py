"""The costs of layers in the terminal: a table, the costliest first, and a plot in the network's order (no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.errors import require
from .sensitivity import LayerCost, by_cost

PLOT_WIDTH, PLOT_HEIGHT = 72, 12  # characters
TABLE_ROWS = 20


def print_costs(costs: Sequence[LayerCost]) -> None:
    """Print the costs of quantizing each layer alone."""
    shown = by_cost(costs)[:TABLE_ROWS]
    width = max(len(cost.node) for cost in shown)
    print(f"{'layer':<{width}}  {'operator':<8}  {'SQNR dB':>7}  {'cosine':>8}  {'agree %':>7}")
    for cost in shown:
        sqnr = "–" if cost.sqnr_db is None else f"{cost.sqnr_db:.1f}"
        agree = 100 * cost.top1_agreement
        print(f"{cost.node:<{width}}  {cost.op:<8}  {sqnr:>7}  {cost.cosine_mean:8.6f}  {agree:7.2f}")
    if len(costs) > len(shown):
        print(f"… and {len(costs) - len(shown)} layers that cost less.")
    places = [place for place, cost in enumerate(costs, 1) if cost.sqnr_db is not None]
    if len(places) > 1:
        print(plot(places, [cost.sqnr_db for cost in costs if cost.sqnr_db is not None]))


def plot(places: Sequence[int], sqnrs: Sequence[float]) -> str:
    """SQNR by place in the network, drawn in braille."""
    plotille = require("plotille", "report")
    figure = plotille.Figure()
    figure.width, figure.height = PLOT_WIDTH, PLOT_HEIGHT
    figure.with_colors = False
    figure.x_label, figure.y_label = "layer", "SQNR dB"
    figure.set_x_limits(min_=0, max_=places[-1] + 1)
    figure.set_y_limits(min_=0, max_=max(*sqnrs, 1) * 1.05)
    figure.x_ticks_fkt = lambda value, _: f"{value:.0f}"
    figure.y_ticks_fkt = lambda value, _: f"{value:.0f}"
    for place, sqnr in zip(places, sqnrs, strict=True):
        figure.plot([place, place], [0, sqnr])
    return str(figure.show())
