"""The geometry of the report's scatter chart: accuracy (y) against latency (x), one point per row, in SVG pixels.

Everything is computed here, so that the page needs no script: scales, ticks, whiskers, and labels that keep off each
other. A row without an accuracy stands in a lane of its own below the plane; a row without a latency is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
XY = tuple[float, float]  # px
Box = tuple[float, float, float, float]  # left, top, right, bottom, px

LOG_ABOVE_RATIO = 4.0  # slowest / fastest from which on the latency axis is logarithmic
MIN_SPAN_POINTS = 1.0  # the accuracy axis never zooms in further than this
LANE_PX = 30.0
LINE_PX = 15.0
CHAR_PX = 6.9  # a generous mean width of a 12.5 px label's characters


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from values to pixels, with its labelled ticks ((px, text), ...)."""

    low: float
    high: float
    start_px: float
    end_px: float
    log: bool
    ticks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: float) -> float:
        """The position of a value, px."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start_px + (value - low) / (high - low) * (self.end_px - self.start_px)


@dataclass(frozen=True)
class Point:
    """A drawn row: its position, its whiskers' ends (None where there is no interval) and its label, in px."""

    row: Row
    label: str
    x: float
    y: float
    x_whisker: tuple[float, float] | None
    y_whisker: tuple[float, float] | None
    label_x: float = 0.0
    label_y: float = 0.0
    anchor: str = "start"
    leader: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """What the template draws."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    plane_bottom: float
    x: Scale
    y: Scale | None
    points: tuple[Point, ...]
    front: str
    left_out: int


def scatter(rows: Sequence[Row], label: Callable[[Row], str], width: float, height: float) -> Chart | None:
    """Lay out the chart.

    Args:
        rows: the summary's rows: ``p50_ms``, ``p50_ci95`` in ms; ``top1``, ``top1_ci95`` in 0..1; ``pareto``.
        label: the text that stands at a row's point.
        width: of the drawing, px.
        height: of the plane's drawing, px; lanes come on top of it.

    Returns:
        The chart, or None where no row has a latency.
    """
    drawn = [row for row in rows if row["p50_ms"] is not None]
    if not drawn:
        return None
    plane = [row for row in drawn if row["top1"] is not None]
    lanes = [row for row in drawn if row["top1"] is None]
    left, right, top = 54.0, width - 18.0, 14.0
    plane_bottom = height - 46.0 if plane else top
    bottom = plane_bottom + LANE_PX * len(lanes) + (6.0 if lanes else 0.0)
    x = latency_scale(drawn, left, right)
    y = accuracy_scale(plane, plane_bottom, top) if plane else None
    points = [_point(row, label(row), x, y(100 * row["top1"]), y) for row in plane if y]
    points += [_point(row, label(row), x, plane_bottom + 6 + LANE_PX * (i + 0.5), None) for i, row in enumerate(lanes)]
    bounds = (left, top, right, bottom)
    return Chart(
        width=width,
        height=bottom + 46.0,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        plane_bottom=plane_bottom,
        x=x,
        y=y,
        points=tuple(place_labels(points, bounds)),
        front=_front(points, right) if y else "",
        left_out=len(rows) - len(drawn),
    )


def latency_scale(rows: Sequence[Row], left: float, right: float) -> Scale:
    """The latency axis, ms: logarithmic where the rows span more than a factor of 4, else linear from zero."""
    lows = [min(row["p50_ms"], *(row["p50_ci95"] or ())) if row["p50_ci95"] else row["p50_ms"] for row in rows]
    highs = [max(row["p50_ms"], *row["p50_ci95"]) if row["p50_ci95"] else row["p50_ms"] for row in rows]
    low, high = min(lows), max(highs)
    if low > 0 and high / low > LOG_ABOVE_RATIO:
        low, high = low / 1.25, high * 1.25
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        span = math.log10(high / low)
        steps = (1, 2, 3, 5) if span < 1.5 else (1, 2, 5) if span < 3 else (1,)
        values = [step * 10.0**decade for decade in decades for step in steps]
        log = True
    else:
        low, high = 0.0, (high * 1.12 or 1.0)
        values, log = round_values(low, high, (right - left) / 85), False
    return _with_ticks(Scale(low, high, left, right, log), values, "{:g}")


def accuracy_scale(rows: Sequence[Row], bottom: float, top: float) -> Scale:
    """The accuracy axis, %: the rows and their intervals with a margin, at least one point high."""
    lows = [100 * (row["top1_ci95"][0] if row["top1_ci95"] else row["top1"]) for row in rows]
    highs = [100 * (row["top1_ci95"][1] if row["top1_ci95"] else row["top1"]) for row in rows]
    low, high = min(lows), max(highs)
    margin = max((high - low) * 0.12, (MIN_SPAN_POINTS - (high - low)) / 2)
    low, high = low - margin, high + margin
    values = [value for value in round_values(low, high, (bottom - top) / 50) if 0 <= value <= 100]
    return _with_ticks(Scale(low, high, bottom, top, False), values, "{:g}")


def round_values(low: float, high: float, count: float) -> list[float]:
    """About ``count`` round values (steps of 1, 2 or 5 times a power of ten) in ``low..high``."""
    raw = (high - low) / max(count, 1.0)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _with_ticks(scale: Scale, values: Sequence[float], form: str) -> Scale:
    inside = [value for value in values if scale.low * (1 - 1e-9) <= value <= scale.high * (1 + 1e-9)]
    ticks = tuple((scale(value), form.format(value)) for value in inside)
    return Scale(scale.low, scale.high, scale.start_px, scale.end_px, scale.log, ticks)


def _point(row: Row, label: str, x: Scale, y_px: float, y: Scale | None) -> Point:
    x_ci, y_ci = row["p50_ci95"], row["top1_ci95"]
    return Point(
        row=row,
        label=label,
        x=x(row["p50_ms"]),
        y=y_px,
        x_whisker=(x(x_ci[0]), x(x_ci[1])) if x_ci else None,
        y_whisker=(y(100 * y_ci[0]), y(100 * y_ci[1])) if y and y_ci else None,
    )


def _front(points: Sequence[Point], right: float) -> str:
    """SVG path of the steps along the points that no other beats, or nothing where there are several devices."""
    best = sorted((p for p in points if p.row["pareto"]), key=lambda p: p.x)
    if not best or len({p.row["device"] for p in best}) > 1:
        return ""
    path = [f"M{best[0].x:.1f},{best[0].y:.1f}"]
    for point in best[1:]:
        path.append(f"H{point.x:.1f}V{point.y:.1f}")
    path.append(f"H{right:.1f}")
    return "".join(path)


def place_labels(points: Sequence[Point], bounds: Box) -> list[Point]:
    """Put each label beside its point where it covers least: other labels, points and whiskers, the bounds.

    Greedy, from the most crowded point on: each label tries the sides and then rings further out, the latter with a
    leader line.
    """
    obstacles = [box for point in points for box in _ink(point)]
    taken: list[Box] = []
    placed: dict[int, Point] = {}
    crowd = sorted(range(len(points)), key=lambda i: sum(math.dist(_xy(points[i]), _xy(p)) for p in points))
    for index in crowd:
        point = points[index]
        options = [_option(point, dx, dy) for dx, dy in _offsets()]
        costs = [
            _cost(box, taken, obstacles, bounds) + _leader_cost(option, points, taken, placed.values())
            for option, box in options
        ]
        best, box = options[costs.index(min(costs))]
        placed[index] = best
        taken.append(box)
    return [placed[index] for index in range(len(points))]


def _xy(point: Point) -> XY:
    return point.x, point.y


def _offsets() -> list[tuple[int, int]]:
    near = [(12, -12), (12, 14), (-12, -12), (-12, 14), (12, 0), (-12, 0)]
    far = (-34, 36, -56, 58, -78, 80, -100, 102)
    return near + [(sign * dx, dy) for dy in far for dx in (6, 18, 40) for sign in (1, -1)]


def _option(point: Point, dx: float, dy: float) -> tuple[Point, Box]:
    """The point with its label at an offset, and the label's box."""
    x, y = point.x + dx, point.y + dy
    width = CHAR_PX * len(point.label)
    left = x if dx > 0 else x - width
    box = (left - 5, y - LINE_PX / 2 - 1, left + width + 5, y + LINE_PX / 2 + 1)
    leader = None if abs(dy) < 20 else (x + (-3 if dx > 0 else 3), y)
    moved = Point(
        point.row,
        point.label,
        point.x,
        point.y,
        point.x_whisker,
        point.y_whisker,
        label_x=x,
        label_y=y,
        anchor="start" if dx > 0 else "end",
        leader=leader,
    )
    return moved, box


def _ink(point: Point) -> list[Box]:
    """The boxes that a point and its whiskers cover."""
    boxes = [(point.x - 8, point.y - 8, point.x + 8, point.y + 8)]
    if point.x_whisker:
        boxes.append((point.x_whisker[0], point.y - 3, point.x_whisker[1], point.y + 3))
    if point.y_whisker:
        boxes.append((point.x - 3, point.y_whisker[1], point.x + 3, point.y_whisker[0]))
    return boxes


def _cost(box: Box, taken: Sequence[Box], obstacles: Sequence[Box], bounds: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    outside = area - _overlap(box, bounds)
    on_labels = sum(_overlap(box, other) for other in taken)
    on_ink = sum(_overlap(box, other) for other in obstacles)
    return outside + 3 * on_labels + on_ink / 4


def _leader_cost(option: Point, points: Sequence[Point], taken: Sequence[Box], others: Collection[Point]) -> float:
    """Long leaders cost, and much more those that run over a label, another point, or another leader."""
    if option.leader is None:
        return 2.0 if option.label_y == option.y else 0.0
    start, end = _xy(option), option.leader
    along = [(start[0] + (end[0] - start[0]) * t / 12, start[1] + (end[1] - start[1]) * t / 12) for t in range(1, 13)]
    over_labels = sum(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in along for box in taken)
    near_points = sum(math.dist(xy, _xy(point)) < 9 for xy in along for point in points if _xy(point) != start)
    crossed = sum(_cross(start, end, _xy(other), other.leader) for other in others if other.leader)
    return 10 + 0.6 * math.dist(start, end) + 25 * over_labels + 25 * near_points + 120 * crossed


def _cross(a: XY, b: XY, c: XY, d: XY) -> bool:
    """Whether the segments a-b and c-d intersect."""

    def side(p: XY, q: XY, r: XY) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
