from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from midge.train.curves import draw, ordered, panels, shown, table, thinned


def rendered(renderable: object, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def dots(lines: list[str]) -> np.ndarray:
    """Braille as a picture: (4 x lines, 2 x columns) bool, from the bits of the characters."""
    bits = [[0, 3], [1, 4], [2, 5], [6, 7]]
    codes = np.array([[ord(char) - 0x2800 for char in line] for line in lines])
    picture = np.zeros((4 * codes.shape[0], 2 * codes.shape[1]), bool)
    for row in range(4):
        for column in range(2):
            picture[row::4, column::2] = np.bitwise_and(codes >> bits[row][column], 1)
    return picture


def test_a_straight_line_goes_from_corner_to_corner() -> None:
    lines, low, high = draw(range(100), [3.0 + step for step in range(100)], (0, 99), width=10, height=5)
    assert (low, high) == pytest.approx((5, 100), abs=2.5)
    picture = dots(lines)
    assert picture.shape == (20, 20)
    rows, columns = np.nonzero(picture)
    assert set(columns) == set(range(20))
    assert np.abs(rows - (19 - columns)).max() <= 1


@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [1e300, 1e300], [-5.0] * 9])
def test_a_flat_line_stands_in_the_middle(values: list[float]) -> None:
    lines, low, high = draw(range(len(values)), values, (0, 8), width=6, height=3)
    assert low == high == values[0]
    rows = set(np.nonzero(dots(lines))[0])
    assert len(rows) == 1 and rows <= {5, 6}


def test_huge_and_tiny_values_do_not_overflow() -> None:
    lines, low, high = draw([0, 1, 2], [-1e308, 0.0, 1e308], (0, 2), width=4, height=3)
    assert (low, high) == (-1e308, 1e308)
    assert dots(lines).any()


def test_thinning_takes_the_mean_of_each_column() -> None:
    columns, means = thinned(np.arange(10), np.arange(10.0), (0, 9), 2)
    assert columns.tolist() == [0, 1]
    assert means.tolist() == [2, 7]
    columns, means = thinned(np.array([50]), np.array([4.0]), (0, 100), 11)
    assert (columns.tolist(), means.tolist()) == ([5], [4.0])


SERIES = {
    "mine\x1b[31m": ([0, 1], [1.0, 2.0]),
    "loss": ([0, 1], [6.0, 5.25]),
    "knn_top1": ([1], [0.5]),
    "lr": ([0, 1], [0.1, 0.25]),
}


def test_known_series_come_first_and_unknown_ones_are_shown_as_text() -> None:
    assert ordered(SERIES) == ["loss", "lr", "knn_top1", "mine\x1b[31m"]
    text = "\n".join(rendered(panels(SERIES, 80), 80))
    for title in ("loss 5.25", "learning rate 0.25", "k-NN top-1, % 50.00", "mine?[31m 2"):
        assert title in text
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [10, 38, 80, 200])
@pytest.mark.parametrize("height", [3, 8, 20, 60])
def test_panels_keep_to_the_terminal(width: int, height: int) -> None:
    lines = rendered(panels(SERIES, width, height), width)
    assert max(map(len, lines)) <= width
    if height >= 8 and width >= 38:
        assert len(lines) <= height
        joined = " ".join(lines)
        assert all(f"{name} " in joined for name in ("loss", "learning rate"))


def test_what_has_no_room_is_given_in_figures() -> None:
    text = "\n".join(rendered(panels(SERIES, 80, 8), 80))
    assert text.count("╭") == 2
    assert "k-NN top-1, % 50.00" in text and "mine?[31m 2" in text


def test_the_table_has_last_lowest_and_highest() -> None:
    lines = rendered(table(SERIES), 80)
    assert lines[1].split() == ["loss", "5.25", "5.25", "6", "2"]
    assert shown("images_per_s", 12345.6) == "12,346"
