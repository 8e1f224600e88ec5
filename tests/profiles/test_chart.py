from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.profiles.chart import CHAR_PX, LINE_PX, Chart, Point, round_values, scatter


def row(name: str, p50: float, top1: float | None, spread: float = 0.01, pareto: bool = False) -> dict[str, Any]:
    return {
        "variant": name,
        "device": "d",
        "p50_ms": p50,
        "p50_ci95": [p50 * (1 - spread), p50 * (1 + spread)],
        "top1": top1,
        "top1_ci95": None if top1 is None else [max(top1 - 0.007, 0.0), min(top1 + 0.007, 1.0)],
        "pareto": pareto,
    }


def draw(rows: list[dict[str, Any]], width: float = 1040, height: float = 470) -> Chart:
    chart = scatter(rows, lambda each: each["variant"], width, height)
    assert chart is not None
    return chart


@given(st.lists(st.tuples(st.floats(1e-3, 1e4), st.none() | st.floats(0, 1)), min_size=1, max_size=8))
def test_every_row_with_a_latency_is_drawn_inside_and_in_order(measured: list[tuple[float, float | None]]) -> None:
    rows = [row(str(i), p50, top1) for i, (p50, top1) in enumerate(measured)]
    chart = draw(rows)
    points = {point.label: point for point in chart.points}
    assert sorted(points) == sorted(each["variant"] for each in rows)
    for point in chart.points:
        assert chart.left <= point.x <= chart.right and chart.top <= point.y <= chart.bottom
        assert (point.y <= chart.plane_bottom) == (point.row["top1"] is not None)
        assert point.x_whisker is not None and chart.left <= point.x_whisker[0] <= point.x <= point.x_whisker[1]
    for a, b in itertools.pairwise(sorted(chart.points, key=lambda point: point.row["p50_ms"])):
        assert a.x <= b.x
    plane = sorted((p for p in chart.points if p.row["top1"] is not None), key=lambda point: point.row["top1"])
    assert all(a.y >= b.y for a, b in itertools.pairwise(plane))


def test_the_latency_axis_is_logarithmic_where_the_range_asks_for_it() -> None:
    assert not draw([row("a", 1.0, 0.8), row("b", 3.0, 0.9)]).x.log
    wide = draw([row("a", 0.9, 0.8), row("b", 4.0, 0.9)]).x
    assert wide.log
    ratio = (wide(4.0) - wide(2.0)) / (wide(2.0) - wide(1.0))
    assert ratio == pytest.approx(1.0)


def test_ticks_stand_where_their_values_are() -> None:
    chart = draw([row("a", 0.3, 0.81), row("b", 4.0, 0.9)])
    assert chart.y is not None
    for scale in (chart.x, chart.y):
        assert len(scale.ticks) >= 3
        assert all(px == pytest.approx(scale(float(text))) for px, text in scale.ticks)


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 12))
def test_round_values_are_inside_and_evenly_spaced(low: float, span: float, count: int) -> None:
    values = round_values(low, low + span, count)
    assert all(low - 1e-6 * span <= value <= low + span + 1e-6 * span for value in values)
    assert len(values) <= count + 1
    steps = {round((b - a) / span, 3) for a, b in itertools.pairwise(values)}
    assert len(steps) <= 1


def label_box(point: Point) -> tuple[float, float, float, float]:
    width = CHAR_PX * len(point.label)
    left = point.label_x if point.anchor == "start" else point.label_x - width
    return left, point.label_y - LINE_PX / 2, left + width, point.label_y + LINE_PX / 2


@pytest.mark.parametrize(("width", "height"), [(1040, 470), (370, 400)])
def test_labels_of_crowded_points_cover_neither_each_other_nor_the_edge(width: float, height: float) -> None:
    names = ["onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "openvino-fp32", "openvino-int8", "torch-fp32"]
    rows = [row(name, 0.5 + 0.01 * i, 0.873 - 0.0003 * i) for i, name in enumerate(names)]
    chart = draw(rows, width, height)
    boxes = [label_box(point) for point in chart.points]
    for left, top, right, bottom in boxes:
        assert left >= 0 and right <= chart.width and top >= 0 and bottom <= chart.height
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_the_front_joins_the_pareto_points_in_steps() -> None:
    chart = draw([row("slow", 4.0, 0.9, pareto=True), row("beaten", 3.0, 0.7), row("fast", 1.0, 0.8, pareto=True)])
    at = {point.label: point for point in chart.points}
    fast, slow = at["fast"], at["slow"]
    assert chart.front == f"M{fast.x:.1f},{fast.y:.1f}H{slow.x:.1f}V{slow.y:.1f}H{chart.right:.1f}"


def test_rows_without_a_latency_are_counted_not_drawn() -> None:
    missing = {**row("a", 1.0, 0.9), "p50_ms": None, "p50_ci95": None}
    assert scatter([missing], lambda each: each["variant"], 400, 300) is None
    assert draw([missing, row("b", 1.0, 0.9)]).left_out == 1
